"""``bench/run.py pareto``: made-up data is as described, and operating points are the cheapest."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import typer

pytest.importorskip("faiss")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
try:
    import pareto
    import pareto_data
    import pareto_methods
    import run_pareto
finally:
    sys.path.pop(0)


def test_steps():
    ladder = pareto_methods.steps(100)
    assert ladder == sorted(set(ladder))
    assert (ladder[0], ladder[-1]) == (1, 100)


@pytest.mark.parametrize("step", [1, 3])
def test_least(step):
    """Value v of the ladder finds the v best of ten: a target of t is reached by the first v >= 10 t."""
    truth = np.arange(20).reshape(2, 10)
    asked = []

    def search(queries, k, value):
        asked.append(value)
        return np.where(np.arange(10) < value, truth, -1)

    ladder = list(range(1, 11, step))
    built = pareto_methods.Built(search, ladder, 0, lambda queries, k, value: None)
    chosen = pareto.least(built, np.zeros((2, 4), np.float32), truth, (0.35, 0.8, 0.99))
    wanted = [next(v for v in ladder if v >= 10 * t) for t in (0.35, 0.8, 0.99) if ladder[-1] >= 10 * t]
    assert list(chosen) == list(dict.fromkeys(wanted))
    assert list(chosen.values()) == [v / 10 for v in chosen]
    assert len(asked) == len(set(asked))


def test_least_reaches_nothing():
    built = pareto_methods.Built(lambda q, k, v: np.full((2, 10), -1), [1, 2], 0, lambda q, k, v: None)
    assert pareto.least(built, np.zeros((2, 4), np.float32), np.arange(20).reshape(2, 10), (0.5,)) == {}


def test_cross_modal_queries_are_out_of_distribution():
    """Queries are nearer to their own mean than to the keys', and vary along other directions."""
    data = pareto_data.text_to_image_like(4000, 3000, 500, d=32)
    np.testing.assert_allclose(np.linalg.norm(data.keys, axis=1), 1, rtol=1e-5)
    assert data.keys.shape == (4000, 32)
    to_train = np.linalg.norm(data.queries.mean(axis=0) - data.train.mean(axis=0))
    to_keys = np.linalg.norm(data.queries.mean(axis=0) - data.keys.mean(axis=0))
    assert to_keys > 5 * to_train
    assert not (data.train[:500] == data.queries).all()
    again = pareto_data.text_to_image_like(4000, 3000, 500, d=32)
    np.testing.assert_array_equal(data.queries, again.queries)


def test_mixture_queries_are_in_distribution():
    data = pareto_data.in_distribution(4000, 3000, 2000, d=32)
    assert np.linalg.norm(data.queries.mean(axis=0) - data.keys.mean(axis=0)) < 0.1
    assert not (data.keys[:2000] == data.queries).all()


def _point(group, recall, speed, build=1.0, k=10):
    return {
        "group": group,
        "k": k,
        "recall": recall,
        "queries/s, batch": speed,
        "queries/s, batch 1": speed / 2,
        "keys read": None,
        "build seconds": build,
        "bytes a key": 4.0,
    }


def test_summary():
    """The best point of enough recall counts, means are geometric, and what falls short has none."""
    results = [
        {
            "kind": "made",
            "points": [
                _point("saapindex", 0.92, fast),
                _point("saapindex", 0.8, 100 * fast),
                _point("Faiss HNSW", 0.91, 50.0, build=9.0),
            ],
            "short of every target": [{"group": "usearch", "k": 10}],
        }
        for fast in (100.0, 400.0)
    ]
    part = pareto.summary(results)["made"]
    rows = part["groups"]
    assert rows["saapindex"]["recall@10, queries/s, batch"] == pytest.approx(200)
    assert rows["usearch"]["recall@10, queries/s, batch"] is None
    assert rows["usearch"]["data sets that reach it"] == 0
    ratio = part["ratios"]["Faiss HNSW"]["recall@10, queries/s, batch"]
    assert ratio == pytest.approx({"mean": 4, "least": 2, "most": 8, "data sets": 2})
    assert part["ratios"]["usearch"]["recall@10, queries/s, batch"] is None
    seconds = rows["Faiss HNSW"]["seconds for the build and 10000 queries"]
    assert seconds == pytest.approx(9 + 10_000 / 25)


def test_front():
    points = [_point("a", 0.9, 10.0), _point("a", 0.95, 20.0), _point("a", 0.8, 30.0)]
    assert [p["recall"] for p in pareto._front(points, "queries/s, batch")] == [0.95, 0.8]


def test_groups():
    """Every method has a group that `--groups` knows, and that option leaves the others out."""
    everything = run_pareto._methods((16, 32), (8,), 1, [])
    assert {method.group for method in everything} <= set(pareto_methods.GROUPS)
    chosen = run_pareto._methods((16, 32), (8,), 1, ["Faiss HNSW", "saapindex"])
    assert {method.group for method in chosen} == {"Faiss HNSW", "saapindex"}


def test_kinds():
    """Data sets are of the kind that `--kinds` chooses them by."""
    demo = Path("no traces here")
    made = list(run_pareto._datasets(demo, (0,), (0,), 64, 8))
    assert [kind for kind, make in made if make().kind == kind] == ["text-to-image-like", "in-distribution"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"kinds": ["attention"]}, "no kind"),
        ({"groups": ["faiss"]}, "no method"),
        ({"kinds": ["attention, one context"]}, "no traces"),
    ],
)
def test_unknown_choices(option, said, tmp_path):
    with pytest.raises(typer.BadParameter, match=said):
        run_pareto.pareto(traces=tmp_path, **option)
