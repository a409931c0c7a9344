"""The evaluation: its protocol, its measures against float64 attention, its choices, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types

import numpy as np
import pytest

import saapindex as sx
from saapindex.learn.peers import Peer, Read
from saapindex.learn.traces import Trace, write_trace

torch = pytest.importorskip("torch")
typer = pytest.importorskip("typer")
pytestmark = pytest.mark.torch

from saapindex.learn.evaluation import (  # noqa: E402
    Protocol,
    Record,
    choose,
    evaluate,
    imbalance,
    keep,
    measure,
    summarise,
    take_snapshot,
    trace_files,
    training_sequence,
)

SMALL = Protocol(sinks=1, window=15, span=32, max_queries=8)


def make_trace(n=150, d=8, kv_heads=2, group=3, seed=0, layer=0, every=1, **info):
    draw = np.random.default_rng(seed)
    rope = sx.Rope(theta=100.0, dim=d)
    at = np.arange(0, n, every)
    return Trace(
        2 * draw.standard_normal((kv_heads, n, d)).astype(np.float32),
        draw.standard_normal((kv_heads, n, d)).astype(np.float32),
        draw.standard_normal((kv_heads * group, len(at), d)).astype(np.float32),
        np.arange(n),
        at,
        rope,
        {"layer": layer, **info},
    )


class Fixed(Peer):
    """Reads the keys it is told to, and estimates what it is told to."""

    name, source = "fixed", "this test"

    def __init__(self, keys, estimates=None, values=None, read=100.0):
        self.keys, self.estimates, self.values, self.bytes = keys, estimates, values, read

    def read(self, queries, budget):
        m = len(queries.positions)
        rows = (queries.positions[:, None] == self.positions).int().argmax(1)
        keys = self.keys[rows]
        if self.estimates is None:
            return Read(keys, torch.full((m,), self.bytes))
        heads = self.estimates[: len(queries.x)] if len(queries.x) > 1 else self.estimates[:1]
        return Read(keys, torch.full((m,), self.bytes), heads[:, rows], self.values)

    def at(self, snapshot):
        self.positions = snapshot.queries.positions
        self.build(snapshot.context)
        return self


# The protocol


def test_a_snapshot_is_what_the_protocol_says():
    trace = make_trace(every=2)
    snapshot = take_snapshot(trace, 1, SMALL, sequence="one")
    # The last 32 positions are 118 to 149; of 16 queries at even ones 8 are taken, first and last too.
    positions = snapshot.queries.positions.tolist()
    assert (positions[0], positions[-1], len(positions)) == (118, 148, 8)
    assert all(np.diff(positions) >= 4)
    # In lists: from the sink on, up to the window before the first query.
    assert snapshot.context.positions.tolist() == list(range(1, 118 - 15))
    assert snapshot.near_positions.tolist() == [0, *range(103, 150)]
    assert (snapshot.context.keys.numpy() == trace.keys[1, 1:103]).all()
    assert (snapshot.near_values.numpy() == trace.values[1, [0, *range(103, 150)]]).all()
    assert (snapshot.queries.x.numpy() == trace.queries[3:6][:, np.array(positions) // 2]).all()
    assert (snapshot.context.row, snapshot.context.scale) == (2 * 8 * 2, 8**-0.5)
    assert (snapshot.sequence, snapshot.layer, snapshot.head) == ("one", 0, 1)


def test_a_training_sequence_has_every_query_that_sees_something():
    context, queries = training_sequence(make_trace(), 0, SMALL)
    assert context.positions.tolist() == list(range(1, 150))
    # The query at 17 is the first whose window of 15 leaves position 1 behind.
    assert queries.positions.tolist() == list(range(17, 150))
    assert queries.x.shape == (3, 133, 8)
    assert context.window == 15


def test_some_heads_of_a_model_keep_their_numbers():
    trace = make_trace(kv_heads=1, heads=[4])
    assert take_snapshot(trace, 4, SMALL).head == 4
    with pytest.raises(sx.InvalidInputError, match=r"head is 0, expected one of the KV heads \[4\]"):
        take_snapshot(trace, 0, SMALL)


@pytest.mark.parametrize(
    ("trace", "protocol", "message"),
    [
        (make_trace(), Protocol(), "no key lies between"),
        (make_trace(softcap=30.0), SMALL, "capped at 30.0"),
        (
            dataclasses.replace(make_trace(), query_positions=np.arange(150) - 120),
            SMALL,
            "no query stands in",
        ),
    ],
)
def test_traces_that_cannot_be_evaluated(trace, protocol, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        take_snapshot(trace, 0, protocol)


def test_protocols_are_checked():
    with pytest.raises(sx.InvalidInputError, match="max_queries is 0"):
        Protocol(max_queries=0)
    with pytest.raises(sx.InvalidInputError, match="no query sees a key"):
        training_sequence(make_trace(), 0, Protocol(window=149))


# The measures


def dense_and_sparse(trace, snapshot, keys, estimates=None, values=None):
    """Both outputs in float64, by the book: (g, m, d) each, and the long-range weights (g, m, n)."""
    outputs, shares = [], []
    for g, x in enumerate(snapshot.queries.x.double().numpy()):
        for i, position in enumerate(snapshot.queries.positions.tolist()):
            k, v = (
                part[snapshot.head, : position + 1].astype(np.float64) for part in (trace.keys, trace.values)
            )
            weights = np.exp(k @ x[i] / np.sqrt(8))
            dense = weights @ v / weights.sum()
            far = snapshot.context.positions.numpy()
            kept = weights.copy()
            kept[far[~keys[i].numpy()]] = 0
            top, bottom = kept @ v, kept.sum()
            if estimates is not None:
                more = np.exp(estimates[g, i].double().numpy())
                top, bottom = top + more @ values.double().numpy(), bottom + more.sum()
            outputs.append((dense, top / bottom))
            shares.append(weights[far] / weights[far].sum())
    m = len(snapshot.queries.positions)
    dense, sparse = np.array(outputs).transpose(1, 0, 2).reshape(2, -1, m, 8)
    return dense, sparse, np.array(shares).reshape(-1, m, len(far))


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("held", [2**26, 700])
def test_measures_are_those_of_float64(monkeypatch, estimated, held):
    monkeypatch.setattr("saapindex.learn.evaluation.measures._HELD", held)
    trace = make_trace(seed=3)
    snapshot = take_snapshot(trace, 1, SMALL)
    draw = torch.Generator().manual_seed(0)
    n = len(snapshot.context.keys)
    keys = torch.rand(8, n, generator=draw) < 0.3
    keys[2] = False
    estimates = values = None
    if estimated:
        estimates, values = torch.randn(3, 8, 5, generator=draw), torch.randn(5, 8, generator=draw)
        estimates[1, 4] = -torch.inf
    dense, sparse, shares = dense_and_sparse(trace, snapshot, keys, estimates, values)
    errors = np.linalg.norm(sparse - dense, axis=2) / np.linalg.norm(dense, axis=2)
    found = measure(Fixed(keys, estimates, values).at(snapshot), snapshot, [0.1], modes=["group"])
    assert [record.q_head for record in found] == [3, 4, 5]
    for g, record in enumerate(found):
        assert record.error == pytest.approx(errors[g].mean(), rel=1e-4)
        assert record.error_median == pytest.approx(np.median(errors[g]), rel=1e-4)
        assert record.error_p90 == pytest.approx(np.quantile(errors[g], 0.9), rel=1e-4)
        assert record.mass == pytest.approx((shares[g] * keys.numpy()).sum(1).mean(), rel=1e-4)
        for k, recall in ((10, record.recall_10), (100, record.recall_100)):
            best = np.argsort(-shares[g], axis=1)[:, :k]
            assert recall == pytest.approx(np.take_along_axis(keys.numpy(), best, 1).mean(), rel=1e-5)
        assert record.bytes == pytest.approx(100 / (n * 32))
        assert record.keys == pytest.approx(float(keys.float().mean()))
        assert (record.keys_total, record.queries, record.budget) == (n, 8, 0.1)


def test_heads_alone_select_for_themselves():
    from saapindex.learn.peers import PEERS

    snapshot = take_snapshot(make_trace(), 0, SMALL)
    peer = PEERS["exact"]()
    peer.build(snapshot.context)
    records = measure(peer, snapshot, [0.1, 1.0])
    by = {(record.mode, record.budget, record.q_head): record for record in records}
    assert len(by) == len(records) == 2 * 2 * 3
    for head in range(3):
        alone, together = by["per_head", 0.1, head], by["group", 0.1, head]
        assert alone.mass > together.mass
        assert alone.recall_10 == 1
        assert alone.bytes == together.bytes <= 0.1
        assert by["group", 1.0, head].error < 1e-6
        assert by["group", 1.0, head].mass == pytest.approx(1)


def test_masses_too_small_for_float32_are_merged_exactly():
    # What is fetched has a weight e**-200 of the best, and the recent keys less still.
    trace = make_trace(kv_heads=1, group=1)
    keys = np.zeros_like(trace.keys)
    keys[0, 50, 0], keys[0, 60, 0], keys[0, [0, *range(103, 150)], 0] = 700, 0, -700
    queries = np.zeros_like(trace.queries)
    queries[..., 0] = 1.0
    snapshot = take_snapshot(dataclasses.replace(trace, keys=keys, queries=queries), 0, SMALL)
    read = torch.zeros(8, len(snapshot.context.keys), dtype=torch.bool)
    read[:, 59] = True  # position 60
    (record,) = measure(Fixed(read).at(snapshot), snapshot, [0.1], modes=["group"])
    dense, sparse = trace.values[0, 50], trace.values[0, 60]
    assert record.error == pytest.approx(np.linalg.norm(sparse - dense) / np.linalg.norm(dense), rel=1e-5)


@pytest.mark.parametrize(
    ("peer", "budget", "message"),
    [
        (Fixed(torch.ones(8, 4, dtype=torch.bool)), 0.1, "a read has keys torch.bool of"),
        (Fixed(torch.ones(8, 102)), 0.1, "a read has keys torch.float32"),
        (
            Fixed(torch.ones(8, 102) > 0, torch.ones(3, 8, 2), torch.ones(3, 8)),
            0.1,
            "a read has log_weights of",
        ),
        (Fixed(torch.ones(8, 102) > 0, torch.ones(3, 8, 2)), 0.1, "alone, expected both or neither"),
        (Fixed(torch.ones(8, 102) > 0), 0.0, "budget is 0.0"),
    ],
)
def test_reads_that_do_not_fit_are_named(peer, budget, message):
    snapshot = take_snapshot(make_trace(), 0, SMALL)
    with pytest.raises(sx.InvalidInputError, match=message):
        measure(peer.at(snapshot), snapshot, [budget], modes=["group"])


# Summaries and choices


def record(**changes):
    plain = Record(
        "quest", "page=16", "group", 0.05, "a", 0, 0, 0, 100, 8, 0.3, 0.2, 0.5, 0.7, 0.9, 0.8, 0.05, 0.04
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def test_summaries_are_over_heads_and_sequences():
    errors = [0.1, 0.2, 0.3, 0.8]
    records = [record(error=error, q_head=i, layer=7) for i, error in enumerate(errors)]
    (one,) = summarise(records, "method", "budget")
    assert one.key == ("quest", 0.05)
    assert (one.count, one.error, one.error_median) == (4, pytest.approx(0.35), pytest.approx(0.25))
    assert (one.error_p90, one.error_worst) == (pytest.approx(0.65), 0.8)
    assert (one.worst, one.setting, one.within) == ("a layer 7 head 3", "page=16", True)
    assert len(summarise(records, "q_head")) == 4
    assert summarise([record(), record(setting="page=32")], "method")[0].setting == "several"
    assert not summarise([record(bytes=0.06)], "method")[0].within


def test_settings_are_chosen_by_error_within_the_budget():
    held = [
        record(setting="a", error=0.1, bytes=0.09),  # best, but over the budget
        record(setting="b", error=0.3, bytes=0.02),
        record(setting="c", error=0.2, bytes=0.05),
        record(setting="c", error=0.3, bytes=0.05, q_head=1),
        record(method="sale", setting="x", bytes=0.2, error=0.1),
        record(method="sale", setting="y", bytes=0.1, error=0.9),
    ]
    chosen = choose(held)
    assert chosen == {("quest", "group", 0.05): "c", ("sale", "group", 0.05): "y"}
    other = record(method="exact", setting="")
    assert keep([*held, other], chosen) == [held[2], held[3], held[5], other]


def test_bad_sizes_have_no_imbalance():
    assert imbalance(np.array([4, 0, 0, 4])) == 2
    for sizes in ([], [0, 0], [3, -1], [[1, 2]]):
        with pytest.raises(sx.InvalidInputError, match="sizes"):
            imbalance(sizes)


# A whole evaluation


@pytest.fixture
def folders(tmp_path):
    """A test and two training sequences of two layers: `tests`, `trains`."""
    tests, trains = tmp_path / "tests", tmp_path / "trains"
    tests.mkdir()
    for layer in (3, 5):
        write_trace(tests / f"book-layer{layer}.safetensors", make_trace(seed=9 + layer, layer=layer))
        for i in range(2):
            folder = trains / f"manual-{i}"
            folder.mkdir(parents=True, exist_ok=True)
            write_trace(folder / f"layer-0{layer}.safetensors", make_trace(seed=i + layer, layer=layer))
    return tests, trains


def test_traces_are_found_by_layer(folders):
    tests, trains = folders
    assert [(layer, [name for name, _ in files]) for layer, files in trace_files([trains]).items()] == [
        (3, ["manual-0", "manual-1"]),
        (5, ["manual-0", "manual-1"]),
    ]
    single = trace_files([tests / "book-layer5.safetensors", trains / "manual-1" / "layer-05.safetensors"])
    assert [name for name, _ in single[5]] == ["book", "manual-1"]


def test_an_evaluation_end_to_end(folders):
    tests, trains = folders
    methods = ["exact", "a2ats", "quest", "sale", "window"]
    settings = {"protocol": SMALL, "budgets": [0.3, 0.6], "heads": [1], "show": False}
    report = evaluate([tests], [trains], methods=methods, **settings)
    assert report.methods == methods
    assert (report.tests, report.trains) == (["book"], ["manual-0", "manual-1"])
    # Methods, modes, budgets, layers and query heads, one setting each.
    assert len(report.records) == 5 * 2 * 2 * 2 * 3
    assert {record.sequence for record in report.records} == {"book"}
    assert {record.sequence for record in report.held_out} == {"manual-1"}
    for (method, *_), setting in choose(report.held_out).items():
        assert setting in {record.setting for record in report.records if record.method == method}
    error = {s.key: s.error for s in summarise(report.records, "method", "mode", "budget")}
    for mode in ("group", "per_head"):
        assert error["exact", mode, 0.6] < error["exact", mode, 0.3] < error["quest", mode, 0.3]
        assert error["quest", mode, 0.6] < error["window", mode, 0.6]
    assert all(seconds > 0 for parts in report.seconds.values() for seconds in (parts["measure"],))
    again = evaluate([tests], [trains], methods=methods, **settings)
    assert again.records == report.records


def test_without_training_what_learns_is_left_out(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    report = evaluate([folders[0]], protocol=SMALL, budgets=[0.3], modes=["group"], heads=[1], show=False)
    assert {"a2ats", "faiss", "faiss-context", "saap", "saapindex"} <= set(report.skipped)
    assert "needs training traces" in report.skipped["saap"]
    assert "faiss-cpu" in report.skipped["faiss-context"]
    assert {"exact", "quest", "retroinfer", "magicpig", "sale"} <= set(report.methods)
    assert not report.held_out
    assert {record.kv_head for record in report.records} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["oracle"]}, "method is 'oracle', expected one of 'saapindex', 'a2ats'"),
        ({"methods": ["saap"]}, "'saap' learns offline and needs training traces"),
        ({"methods": ["saapindex"]}, "needs a codebook"),
        ({"heads": [7]}, "head is 7"),
    ],
)
def test_what_cannot_run_says_so_before_any_work(folders, arguments, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        evaluate([folders[0]], protocol=SMALL, show=False, **arguments)


def test_training_on_the_test_is_refused(folders):
    tests, trains = folders
    with pytest.raises(sx.InvalidInputError, match=r"tune_layers has 4, expected some of \[3, 5\]"):
        evaluate([tests], [trains], methods=["quest"], protocol=SMALL, tune_layers=[4], show=False)
    with pytest.raises(sx.InvalidInputError, match="both trained on and tested"):
        evaluate([tests], [trains, tests], protocol=SMALL, show=False)
    for file in trains.rglob("layer-05*"):
        file.unlink()
    with pytest.raises(sx.InvalidInputError, match="layer 5 has test traces and no training traces"):
        evaluate([tests], [trains], protocol=SMALL, show=False)


def test_the_own_method_comes_from_its_codebook(folders, monkeypatch):
    from saapindex.learn.peers import PEERS

    asked = []

    def peers_from_codebook(path, *, device):
        def make(layer, head):
            asked.append((path.name, layer, head))
            return PEERS["exact"]()

        return make

    ladder = types.SimpleNamespace(peers_from_codebook=peers_from_codebook)
    monkeypatch.setitem(sys.modules, "saapindex.learn.peers.ladder", ladder)
    report = evaluate(
        [folders[0]], methods=["saapindex"], codebook=folders[0] / "model.codebook", protocol=SMALL,
        budgets=[0.3], show=False,
    )  # fmt: skip
    assert asked == [("model.codebook", layer, head) for layer in (3, 5) for head in (0, 1)]
    assert report.methods == ["saapindex"]


def run_command(arguments):
    from typer.testing import CliRunner

    from saapindex.commands.evaluate import evaluate as command

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_report(folders, tmp_path):
    tests, trains = folders
    out = tmp_path / "deep" / "out"
    result = run_command(
        [
            tests, "--train", trains, "--methods", "exact,quest, window,sale", "--budgets", "0.05,0.3",
            "--out", out, "--tune-layers", "3",
            "--window", 15, "--span", 32, "--max-queries", 8, "--per-head",
        ]
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    assert "Written to" in result.output
    data = json.loads((out / "report.json").read_text())
    assert data["protocol"] == {"sinks": 1, "window": 15, "span": 32, "max_queries": 8}
    assert data["versions"]["saapindex"] == sx.__version__
    assert {row["method"] for row in data["summary"]} == {"exact", "quest", "window", "sale"}
    pages = {f"page={page}" for page in (16, 32, 64, 128)}
    assert {row["setting"] for row in data["held_out"]} == {*pages, "block=32", "block=1"}
    first = dict(zip(data["records"]["fields"], data["records"]["rows"][0], strict=True))
    assert Record(**first).method == "exact"
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href) *= *"?(.{5})', page) == ["data:"]
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count("<table>") == 2 * 5
    assert {part.name for part in out.iterdir()} == {"report.json", "pareto.png", "report.html"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "much"], "budgets is 'much'"),
        (["--mode", "both heads"], "mode is 'both heads'"),
        (["--heads", "1.5"], "heads is '1.5'"),
    ],
)
def test_the_command_refuses_nonsense(folders, arguments, message):
    error = run_command([folders[0], *arguments]).exception
    assert isinstance(error, sx.InvalidInputError)
    assert message in str(error)


def test_a_page_escapes_what_it_shows(folders):
    from saapindex.learn.evaluation.page import html_page

    report = evaluate([folders[0]], methods=["window"], protocol=SMALL, budgets=[0.3], show=False)
    named = dataclasses.replace(report, tests=['<script>alert("x")</script>'])
    assert "<script>alert" not in html_page(named, b"")


def test_reports_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from saapindex.files import write_whole

    path = tmp_path / "report.json"
    write_whole(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(sx.InvalidInputError, match="does not exist"):
        write_whole(tmp_path / "none" / "report.json", b"")
