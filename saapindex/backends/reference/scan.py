"""Exact scores of the keys in the probed lists."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import Floats, Ints, Lists


def _visit(query: Floats, lists: Lists, probes: Ints, limit: int, l2: bool) -> tuple[Floats, Ints]:
    """Scores and ids of the keys that one query reads, in the order it reads them."""
    rows = [lists.offsets[j] + np.arange(lists.sizes[j]) for j in probes if j >= 0]
    read = np.concatenate([*rows, np.empty(0, np.int64)])[:limit]
    keys = lists.rows(read)
    scores = ((keys - query) ** 2).sum(axis=1) if l2 else keys @ query
    return scores, lists.ids[read]


def scan(queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.scan`."""
    best = np.full((len(queries), k), np.inf if l2 else -np.inf, queries.dtype)
    ids = np.full((len(queries), k), -1, np.int64)
    for i, query in enumerate(queries):
        scores, found = _visit(query, lists, probes[i], limits[i], l2)
        order = np.lexsort((found, scores if l2 else -scores))[:k]
        best[i, : len(order)], ids[i, : len(order)] = scores[order], found[order]
    return best, ids


def range_scan(
    queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan`."""
    visits = [_visit(query, lists, probes[i], limits[i], l2) for i, query in enumerate(queries)]
    hits = [scores < radius if l2 else scores > radius for scores, _ in visits]
    lims = np.cumsum([0, *(hit.sum() for hit in hits)], dtype=np.int64)
    scores = [scores[hit] for (scores, _), hit in zip(visits, hits, strict=True)]
    ids = [ids[hit] for (_, ids), hit in zip(visits, hits, strict=True)]
    return (
        lims,
        np.concatenate([np.empty(0, queries.dtype), *scores]),
        np.concatenate([np.empty(0, np.int64), *ids]),
    )
