"""How the gain of a query-aware partition depends on the queries that it is trained with.

No wall clock: the figure is the keys that must be read for a recall@10 of 0.9, against Faiss's IVFFlat (the
better of its two k-means) with as many lists.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pareto import least
from pareto_data import Dataset, Vectors, attention, cross_modal, text_to_image_like
from pareto_methods import Built, make_ivf, steps

import saapindex as sx
from saapindex.errors import TrainingWarning

COUNTS = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
SHIFTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NLIST, TARGET, SEED, REPEATS = 256, 0.9, 0, 3


def _keys_read(built: Built, data: Dataset, truth: NDArray[np.int64]) -> float:
    (value,) = least(built, data.queries, truth, (TARGET,))
    read = built.read(data.queries, truth.shape[1], value)
    assert read is not None
    return read


def _ours(data: Dataset, train: Vectors | None, seed: int) -> Built:
    index = sx.IndexSAAP(data.keys.shape[1], NLIST, params=sx.IndexParameters(augment=0, seed=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)  # too few queries are what is measured
        index.train(data.keys, xq_train=train)
    index.add(data.keys)

    def search(queries: Vectors, k: int, nprobe: int, stats: sx.SearchStatistics | None = None) -> Any:
        return index.search(queries, k, params=sx.SearchParameters(nprobe=nprobe), stats=stats)[1]

    def read(queries: Vectors, k: int, nprobe: int) -> float:
        stats = sx.SearchStatistics()
        search(queries, k, nprobe, stats)
        return stats.ndis / stats.nq

    return Built(search, steps(NLIST), index.nbytes, read)


def _row(data: Dataset, train: Vectors | None, truth: NDArray[np.int64], base: float) -> dict[str, float]:
    """Train with the queries, from `REPEATS` seeds; keys read are their mean."""
    reads = [_keys_read(_ours(data, train, seed), data, truth) for seed in range(REPEATS)]
    read = float(np.mean(reads))
    return {
        "keys read": read,
        "least": min(reads),
        "most": max(reads),
        "share of keys": read / len(data.keys),
        "times fewer than Faiss": base / read,
    }


def _base(data: Dataset, truth: NDArray[np.int64]) -> float:
    """Keys that the better of Faiss's partitions reads."""
    return min(
        float(np.mean([_keys_read(_theirs(data, plain, seed), data, truth) for seed in range(REPEATS)]))
        for plain in (False, True)
    )


def _theirs(data: Dataset, plain: bool, seed: int) -> Built:
    return make_ivf(data, storage="Flat", nlist=NLIST, plain=plain, seed=seed)


def measure(traces: Path, keys: int) -> dict[str, Any]:
    """Vary the number of training queries, then their shift, on made-up and on attention vectors."""
    rng = np.random.default_rng(SEED)
    number, shift = [], []
    made = text_to_image_like(keys, max(COUNTS), 1000, seed=SEED)
    cases = [made, *(make() for make in attention(traces, (0,), 1000, together=False))]
    for data in cases:
        truth = data.truth(10)
        base = _base(data, truth)
        order = rng.permutation(len(data.train))
        for count in (0, *(count for count in COUNTS if count <= len(order))):
            train = data.train[order[:count]] if count else None
            number.append({"data": data.name, "training queries": count, **_row(data, train, truth, base)})
        if data is made:
            # Test queries are at a shift of 1 from the keys; training queries fall short of it.
            for place in SHIFTS:
                train = cross_modal(10_000, data.keys.shape[1], SEED, shift=place, which=3)
                row = _row(data, train, truth, base)
                shift.append({"data": data.name, "training queries": f"shift {place} of 1", **row})
        else:
            for name, train in (
                ("another text", data.train),
                ("another head", _other_head(traces, data)),
                ("the keys themselves", data.keys),
            ):
                row = _row(data, train, truth, base)
                shift.append({"data": data.name, "training queries": name, **row})
    return {"lists": NLIST, "recall@10": TARGET, "number": number, "shift": shift}


def _other_head(traces: Path, data: Dataset) -> Vectors:
    """Training queries of the next head of the same layer."""
    layer = data.name.split()[0]
    others = (make() for make in attention(traces, (1,), 1, together=False))
    return next(other.train for other in others if other.name.startswith(layer))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw how many times fewer keys are read than by Faiss, against the number of training queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["data"] for row in result["number"]):
        rows = [row for row in result["number"] if row["data"] == name and row["training queries"]]
        panel.plot(
            [row["training queries"] for row in rows],
            [row["times fewer than Faiss"] for row in rows],
            "-o",
            label=name,
        )
    panel.set_xscale("log")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xlabel="training queries", ylabel="times fewer keys read than Faiss IVFFlat")
    panel.set_title(f"recall@10 of {TARGET}, {NLIST} lists")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
