"""Route and scan in one pass over the queries: one start of the threads, nothing held between the two."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from saapindex.backends.base import Floats, Ints, Lists
from saapindex.backends.cpu.route import route_some
from saapindex.backends.cpu.scan import FEW, STEP, kernel_view, scan_some
from saapindex.backends.cpu.threads import launch


@njit(cache=True, nogil=True)
def _search_some(features, queries, table, bias, vectors, ids, offsets, sizes, p, best, found, l2):  # type: ignore[no-untyped-def]
    probes = np.empty((queries.shape[0], p), np.int64)
    route_some(features, table, bias, probes, np.empty((queries.shape[0], p), np.float32))
    limits = np.full(queries.shape[0], ids.shape[0])
    scan_some(queries, vectors, ids, offsets, sizes, probes, limits, best, found, l2)


@njit(cache=True, nogil=True, parallel=True)
def _search_many(features, queries, table, bias, vectors, ids, offsets, sizes, p, best, found, l2):  # type: ignore[no-untyped-def]
    for part in prange((queries.shape[0] + STEP - 1) // STEP):
        rows = slice(part * STEP, min((part + 1) * STEP, queries.shape[0]))
        _search_some(
            features[rows],
            queries[rows],
            table,
            bias,
            vectors,
            ids,
            offsets,
            sizes,
            p,
            best[rows],
            found[rows],
            l2,
        )


def search(
    features: Floats,
    queries: Floats,
    table: Floats,
    bias: Floats,
    p: int,
    lists: Lists,
    k: int,
    l2: bool,
) -> tuple[Floats, Ints]:
    """See `Ops.search`."""
    features, queries = np.ascontiguousarray(features, np.float32), np.ascontiguousarray(queries, np.float32)
    best = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    arguments = (features, queries, table, bias, *kernel_view(lists), p, best, found, l2)
    if len(queries) < FEW:
        _search_some(*arguments)
    else:
        launch(_search_many, *arguments)
    return best, found
