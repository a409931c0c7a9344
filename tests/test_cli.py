"""The command line: the demo on what the package ships, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import pytest

from saapindex.cli import main

DATA = files("saapindex") / "data"


def test_demo_measures_every_method_and_draws(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    with pytest.raises(SystemExit) as end:
        main(["demo", "--json", "--out", str(picture)])
    assert end.value.code == 0
    result = json.loads(capsys.readouterr().out)
    recall = {row["method"]: row["recall@10"] for row in result["rows"]}
    mass = {row["method"]: row["mass"] for row in result["rows"]}
    ours, exact = "saapindex, mean router (default)", "exact search"
    assert len(recall) == 7
    assert all(set(shares) == {"0.01", "0.025", "0.05", "0.1"} for shares in recall.values())
    for name in set(recall) - {ours, exact}:
        for share in recall[name]:
            assert recall[name][share] < recall[ours][share] < recall[exact][share] == 1, (name, share)
            assert mass[name][share] < mass[ours][share] < mass[exact][share], (name, share)
    assert result["seconds"] < 60
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_prints_a_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "demo.png")])
    printed = capsys.readouterr().out
    assert "recall@10" in printed
    assert "Faiss IVFFlat, rotated keys" in printed


@pytest.mark.torch
def test_retrained_classifier_is_as_good_as_the_one_that_ships(tmp_path, capsys):
    pytest.importorskip("torch")
    mass = {}
    for option in ([], ["--retrain"]):
        with pytest.raises(SystemExit):
            main(["demo", "--json", *option, "--out", str(tmp_path / "demo.png")])
        rows = json.loads(capsys.readouterr().out)["rows"]
        mass[bool(option)] = next(row["mass"]["0.05"] for row in rows if "published" in row["method"])
    assert abs(mass[True] - mass[False]) < 0.02


@pytest.mark.parametrize("name", ["train", "test", "paper"])
def test_info_tells_what_ships(name, capsys):
    with pytest.raises(SystemExit):
        main(["info", "--json", str(DATA / f"{name}.safetensors")])
    header = json.loads(capsys.readouterr().out)
    assert header["format"] in ("saapindex.trace", "saapindex.index")
    assert header["rope"]["dim"] == 64


def test_shipped_data_is_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 6_000_000


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_foreign_file_ends_with_one_line(tmp_path, content, capsys):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["info", str(path)])
    assert end.value.code == 1
    assert "error:" in capsys.readouterr().err


def test_a_missing_file_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["info", str(tmp_path / "nothing")])
    assert end.value.code == 1
    assert "nothing" in capsys.readouterr().err


def test_without_typer_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from saapindex.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'saapindex[demo]'" in result.stderr
