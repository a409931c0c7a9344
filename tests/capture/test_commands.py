"""The commands `capture` and `info`, as they are typed."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from saapindex.errors import InvalidInputError
from saapindex.learn.traces import find_traces

typer = pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner  # noqa: E402

from saapindex.commands.capture import capture, parse_layers, parse_rope_scaling  # noqa: E402
from saapindex.commands.info import describe, info  # noqa: E402

app = typer.Typer()
app.command()(capture)
app.command()(info)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.fixture
def texts(text):
    other = text.with_name("other.txt")
    other.write_text("something else " * 10)
    return [text, other]


@pytest.mark.torch
def test_capture_prints_json_and_then_finds_its_files(folder, texts, tmp_path):
    pytest.importorskip("transformers")
    command = [
        "capture",
        folder,
        "--text",
        *texts,
        "--context",
        50,
        "--out",
        tmp_path / "out",
        "--layers",
        "0,2",
    ]
    command += ["--queries", 20, "--sequences", 4, "--dtype", "bfloat16", "--device", "cpu", "--json"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [part["name"] for part in report["sequences"]] == [
        *(f"manual-{number}" for number in range(4)),
        *(f"other-{number}" for number in range(3)),
    ]
    assert report["short"] == {"other": 3}
    assert report["layers"] == [0, 2]
    assert (report["info"]["model"], report["info"]["queries"]) == ("tiny-llama", 20)
    found = find_traces(tmp_path / "out")
    assert {name: list(layers) for name, layers in found.items()} == {
        part["name"]: part["written"] for part in report["sequences"]
    }
    again = json.loads(run(*command).stdout)
    assert all(part["written"] == [] and part["present"] == [0, 2] for part in again["sequences"])
    copies = json.loads(run(*command, "--copies").stdout)
    assert copies["sequences"][0]["name"] == "manual-0-copies"


@pytest.mark.torch
def test_capture_prints_tables_and_info_reads_them(folder, texts, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    result = run("capture", folder, *texts, "--context", 100, "--out", out, "--rope-scaling", "linear")
    assert result.exit_code == 0, result.output
    for expected in (
        "layers written",
        "manual-0",
        "other-0",
        "3 of 3 layers, 100 tokens, queries: all, float16",
    ):
        assert expected in result.stdout
    listed = run("info", out).stdout
    for expected in ("manual-0", "tiny-llama", "0-2"):
        assert expected in listed
    shown = run("info", out / "manual-0" / "layer-01.safetensors").stdout
    for expected in (
        "saapindex.trace, version 2",
        "info.weights",
        "rope.scaling.factor",
        "2 x 100 x 16",
        "F16",
    ):
        assert expected in shown
    described = json.loads(run("info", out, "--json").stdout)
    assert described["sequences"]["other-0"]["layers"] == [0, 1, 2]


@pytest.mark.torch
def test_capture_says_what_it_left_out(tiny, letters, text, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from saapindex.learn import capture as learn
    from saapindex.learn.models import LoadedModel

    gemma = LoadedModel(tiny("Gemma3 Text"), letters, "gemma")
    monkeypatch.setattr(learn, "load_model", lambda *arguments, **options: gemma)
    result = run("capture", "gemma", text, "--context", 100, "--out", tmp_path / "out", "--sequences", 20)
    assert "Left out (sliding_attention, window 24): layers 0, 2." in result.stdout
    assert "The text manual holds 10 sequences only." in result.stdout


@pytest.mark.parametrize(
    ("typed", "layers"),
    [("all", "all"), ("4", [4]), ("4,11", [4, 11]), ("0-3", [0, 1, 2, 3]), ("7, 0-1", [7, 0, 1])],
)
def test_layers_as_they_are_typed(typed, layers):
    assert parse_layers(typed) == layers


@pytest.mark.parametrize("typed", ["", "some", "3-1", "-1", "1-", "1.5", "1;2"])
def test_layers_that_are_none(typed):
    with pytest.raises(InvalidInputError, match="expected numbers and ranges"):
        parse_layers(typed)


def test_rope_scalings_as_they_are_typed():
    assert parse_rope_scaling(None) is None
    assert parse_rope_scaling("yarn") == "yarn"
    assert parse_rope_scaling(' {"rope_type": "linear"}') == {"rope_type": "linear"}
    with pytest.raises(InvalidInputError, match="which is no JSON"):
        parse_rope_scaling("{rope_type: linear}")


@pytest.mark.parametrize("name", ["train", "test", "paper"])
def test_info_of_what_ships(name):
    path = files("saapindex") / "data" / f"{name}.safetensors"
    described = json.loads(run("info", path, "--json").stdout)
    assert described == json.loads(json.dumps(describe(path)))
    assert described["rope"]["dim"] == 64
    shown = run("info", path).stdout
    assert described["format"] in shown
    assert "rope.theta" in shown
    for tensor in described["tensors"]:
        assert tensor in shown
