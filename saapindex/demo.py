"""The demo: IndexSAAP against Faiss IVF on one head of a real model, from data that the package ships."""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saapindex.errors import MissingDependencyError
from saapindex.index import IndexSAAP, read_index
from saapindex.learn.curves import Curve, exact_curve, ground_truth, measure
from saapindex.learn.routers import train_router
from saapindex.learn.search_peers import FaissIVF, Peer, Saap
from saapindex.learn.traces import Trace, read_trace
from saapindex.params import IndexParameters, get_preset
from saapindex.progress import track

__all__ = ["BUDGETS", "NLIST", "Row", "draw", "paper_index", "run"]

NLIST = 256
BUDGETS = (0.01, 0.025, 0.05, 0.1)
"""Shares of the keys read at which the table compares."""
NPROBES = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 96)
K = 10


@dataclass(frozen=True)
class Row:
    """One method: its name, its curve, and the seconds that its training, adding and searches took."""

    name: str
    curve: Curve
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        at = {f"{share:g}": self.curve.at(share) for share in BUDGETS}
        return {
            "method": self.name,
            "recall@10": {share: recall for share, (recall, _) in at.items()},
            "mass": {share: mass for share, (_, mass) in at.items()},
            "curve": {
                "keys": self.curve.keys.tolist(),
                "recall@10": self.curve.recall.tolist(),
                "mass": self.curve.mass.tolist(),
            },
            "seconds": self.seconds,
        }


def _data(name: str) -> Path:
    return Path(str(importlib.resources.files("saapindex") / "data" / name))


def paper_index(train: Trace, *, show: bool = False) -> IndexSAAP:
    """Train the paper's setting on the training sequence: partition and MLP classifier. Needs torch."""
    index = _trained(train, get_preset("paper"))
    queries, positions = train.head_queries(0)
    keys = train.keys[0].astype(np.float32)
    train_router(
        index, keys, queries, positions=train.key_positions, positions_xq=positions, hidden=128, show=show
    )
    return index


def _trained(train: Trace, params: IndexParameters) -> IndexSAAP:
    queries, positions = train.head_queries(0)
    index = IndexSAAP(train.d, NLIST, params=params, rope=train.rope)
    index.train(train.keys[0], xq_train=queries, positions=train.key_positions, positions_xq=positions)
    return index


def run(*, retrain: bool = False, show: bool = True) -> tuple[list[Row], dict[str, Any]]:
    """Train, add and search with every method; return the rows and what they were measured on.

    Parameters
    ----------
    retrain
        Train the paper's classifier anew instead of reading the weights that ship.
    show
        Show progress on stderr.
    """
    train, test = read_trace(_data("train.safetensors")), read_trace(_data("test.safetensors"))
    keys, queries = test.keys[0].astype(np.float32), test.head_queries(0)
    truth = ground_truth(queries[0], keys, K, scale=test.d**-0.5)
    train_keys, train_at = train.keys[0].astype(np.float32), train.key_positions

    def paper() -> IndexSAAP:
        return paper_index(train) if retrain else read_index(_data("paper.safetensors"))

    best = get_preset("best").replace(max_position=int(test.query_positions.max()) + 1)
    methods: dict[str, Callable[[], Peer]] = {
        "Faiss IVFFlat, rotated keys": lambda: FaissIVF(train_keys, train_at, NLIST),
        "Faiss IVFFlat, rotated, L2 k-means": lambda: FaissIVF(train_keys, train_at, NLIST, quantizer="l2"),
        "Faiss IVFFlat, un-rotated keys": lambda: FaissIVF(train_keys, train_at, NLIST, rope=train.rope),
        "SAAP as published (un-rotated, MLP)": lambda: Saap(paper()),
        "saapindex, centroid router": lambda: Saap(_trained(train, best.replace(router="centroid"))),
        "saapindex, mean router (default)": lambda: Saap(_trained(train, best)),
    }
    rows = []
    for name, make in track(list(methods.items()), "comparing methods", show=show):
        start = time.perf_counter()
        peer = make()
        peer.add(keys, test.key_positions)
        curve = measure(peer, *queries, truth, NPROBES)
        rows.append(Row(name, curve, time.perf_counter() - start))
    start = time.perf_counter()
    exact = exact_curve(truth, np.geomspace(K / len(keys), 0.25, 40).tolist())
    rows.append(Row("exact search", exact, time.perf_counter() - start))
    setting = {
        "model": test.info.get("model"),
        "layer": test.info.get("layer"),
        "kv_head": test.info.get("kv_head"),
        "keys": len(keys),
        "queries": len(queries[0]),
        "nlist": NLIST,
        "train_text": train.info.get("text"),
        "test_text": test.info.get("text"),
    }
    return rows, setting


def draw(rows: list[Row], path: Path) -> None:
    """Draw recall and mass against the share of keys read, as a PNG.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "drawing the curves", "demo") from error
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    styles = ("C0:", "C0-.", "C0--", "C1-.", "C2-", "C3-", "k-")
    for panel, title in zip(panels, ("recall@10", "attention mass"), strict=True):
        for row, style in zip(rows, styles, strict=True):
            line = row.curve.recall if title == "recall@10" else row.curve.mass
            panel.plot(100 * row.curve.keys, line, style, label=row.name, linewidth=1.8)
        panel.set(xscale="log", xlim=(0.4, 25), ylim=(0, 1.02), xlabel="keys read, %", title=title)
        ticks = [0.5, 1, 2.5, 5, 10, 25]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share found")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
