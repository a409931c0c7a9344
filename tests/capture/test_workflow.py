"""From a model to a report: the three commands of the README, on a tiny model."""

from __future__ import annotations

import json

import pytest

from saapindex.attention import AttentionIndex, LayerCodebook
from saapindex.cli import main
from saapindex.codebook import Codebook
from saapindex.learn import read_trace

pytestmark = pytest.mark.torch


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def test_capture_train_evaluate(folder, tmp_path, capsys):
    for name, step in (("one", 3), ("two", 7), ("three", 11), ("test", 13)):
        letters = "".join(chr(97 + (number * number * step) % 26) for number in range(3000))
        (tmp_path / f"{name}.txt").write_text(letters)
    common = ("--context", 600, "--queries", 300, "--rope-scaling", "ntk", "--layers", "1-2")
    for out, names in (("traces", ("one", "two", "three")), ("tests", ("test",))):
        texts = [part for name in names for part in ("--text", tmp_path / f"{name}.txt")]
        run("capture", folder, *texts, *common, "--out", tmp_path / out)

    book = tmp_path / "book.safetensors"
    small = ("--set", "window=100", "--set", "snapshots=2", "--set", "epochs=2", "--set", "words=1")
    run("train", tmp_path / "traces", "--out", book, "--nlist", "4,8", "--device", "cpu", *small)
    codebook = Codebook.load(book)
    assert list(codebook.layers) == [1, 2]
    assert codebook.layer(1).nlists == (4, 8)

    report = tmp_path / "report"
    protocol = ("--window", 100, "--span", 100, "--max-queries", 16, "--budgets", "0.3,0.6")
    methods = ("--methods", "saapindex,exact,window", "--device", "cpu")
    run("evaluate", book, tmp_path / "tests", *protocol, *methods, "--out", report)
    assert "saapindex" in capsys.readouterr().out
    found = json.loads((report / "report.json").read_text())["records"]
    rows = [dict(zip(found["fields"], row, strict=True)) for row in found["rows"]]
    assert {row["method"] for row in rows} == {"saapindex", "exact", "window"}
    assert {row["layer"] for row in rows} == {1, 2}
    assert all(row["bytes"] <= row["budget"] + 1e-6 for row in rows)
    assert (report / "report.html").exists()
    assert (report / "pareto.png").read_bytes().startswith(b"\x89PNG")

    # The codebook serves: attention through it, all of it read, is dense attention.
    trace = read_trace(next((tmp_path / "tests").glob("*/layer-01.safetensors")))
    index = AttentionIndex(LayerCodebook.of(codebook.layer(1), 600), window=100, dense_below=0)
    index.add(trace.keys[None].astype("float32"), trace.values[None].astype("float32"))
    query = trace.queries[None, :, -1].astype("float32")
    dense, _ = index.attend(query, budget=1.0)
    near, _ = index.attend(query, budget=0.5)
    assert abs(near - dense).max() < 0.5 * abs(dense).max()
