"""Exact scores of the keys in the probed lists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES, CodedLists, Floats, Ints, Lists

Visit = Callable[[int], tuple[Floats, Ints]]
"""Scores and names of what query `i` reads, in the order it reads them."""


def read_rows(lists: Lists | CodedLists, probes: Ints, limit: int) -> tuple[Ints, Ints]:
    """Return the rows that one query reads, those allowed in its lists up to the limit, and their lists."""
    visited = probes[probes >= 0]
    rows = [lists.offsets[j] + np.arange(lists.sizes[j]) for j in visited]
    read = np.concatenate([*rows, np.empty(0, np.int64)])
    labels = np.repeat(visited, lists.sizes[visited])
    if lists.allowed is not None:
        kept = (lists.allowed[read // LANES] >> (read % LANES).astype(np.uint16)) & 1 > 0
        read, labels = read[kept], labels[kept]
    return read[:limit], labels[:limit]


def exact_scores(query: Floats, keys: Floats, l2: bool) -> Floats:
    """Return inner products with keys, (n, d), or squared distances."""
    scores: Floats = ((keys - query) ** 2).sum(axis=1) if l2 else keys @ query
    return scores


def keep_best(visit: Visit, queries: Floats, k: int, l2: bool) -> tuple[Floats, Ints]:
    """Return the `k` best of what each query visits, of equal scores the lowest name first."""
    best = np.full((len(queries), k), np.inf if l2 else -np.inf, queries.dtype)
    names = np.full((len(queries), k), -1, np.int64)
    for i in range(len(queries)):
        scores, found = visit(i)
        order = np.lexsort((found, scores if l2 else -scores))[:k]
        best[i, : len(order)], names[i, : len(order)] = scores[order], found[order]
    return best, names


def keep_within(visit: Visit, queries: Floats, radius: float, l2: bool) -> tuple[Ints, Floats, Ints]:
    """Return what is better than `radius` of what each query visits."""
    visits = [visit(i) for i in range(len(queries))]
    hits: list[NDArray[np.bool_]] = [scores < radius if l2 else scores > radius for scores, _ in visits]
    lims = np.cumsum([0, *(hit.sum() for hit in hits)], dtype=np.int64)
    scores = [scores[hit] for (scores, _), hit in zip(visits, hits, strict=True)]
    ids = [ids[hit] for (_, ids), hit in zip(visits, hits, strict=True)]
    return (
        lims,
        np.concatenate([np.empty(0, queries.dtype), *scores]),
        np.concatenate([np.empty(0, np.int64), *ids]),
    )


def _visit(queries: Floats, lists: Lists, probes: Ints, limits: Ints, l2: bool) -> Visit:
    def visit(i: int) -> tuple[Floats, Ints]:
        rows, _ = read_rows(lists, probes[i], limits[i])
        return exact_scores(queries[i], lists.rows(rows), l2), lists.ids[rows]

    return visit


def scan(queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.scan`."""
    return keep_best(_visit(queries, lists, probes, limits, l2), queries, k, l2)


def range_scan(
    queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan`."""
    return keep_within(_visit(queries, lists, probes, limits, l2), queries, radius, l2)


def rescore(queries: Floats, vectors: Floats, ids: Ints, rows: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.rescore`."""

    def visit(i: int) -> tuple[Floats, Ints]:
        wanted = rows[i][rows[i] >= 0]
        return exact_scores(queries[i], vectors[wanted // LANES, wanted % LANES], l2), ids[wanted]

    return keep_best(visit, queries, k, l2)
