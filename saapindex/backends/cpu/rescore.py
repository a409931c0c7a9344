"""Exact scores of a few keys for each query, and the best of them."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from saapindex.backends.base import Floats, Ints
from saapindex.backends.cpu.heap import replace_root, sort_heap
from saapindex.backends.cpu.scan import FEW
from saapindex.backends.cpu.threads import launch


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def dot(x, y):  # type: ignore[no-untyped-def]
    """Return the inner product, its sums in any order."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def distance(x, y):  # type: ignore[no-untyped-def]
    """Return the squared distance, its sums in any order."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += (x[i] - y[i]) * (x[i] - y[i])
    return total


@njit(cache=True, nogil=True)
def _one(query, keys, ids, rows, places, best, found, l2):  # type: ignore[no-untyped-def]
    best[:] = -np.inf
    found[:] = -1
    for i in range(rows.shape[0]):
        if rows[i] < 0:
            continue
        key, id = keys[places[i]], ids[rows[i]]
        score = -distance(query, key) if l2 else dot(query, key)
        if score > best[0] or (score == best[0] and id < found[0]):
            replace_root(best, found, best.shape[0], score, id)
    sort_heap(best, found)
    if l2:
        for i in range(best.shape[0]):
            best[i] = -best[i]


@njit(cache=True, nogil=True)
def _some(queries, keys, ids, rows, places, best, found, l2):  # type: ignore[no-untyped-def]
    for i in range(queries.shape[0]):
        _one(queries[i], keys, ids, rows[i], places[i], best[i], found[i], l2)


@njit(cache=True, nogil=True, parallel=True)
def _many(queries, keys, ids, rows, places, best, found, l2):  # type: ignore[no-untyped-def]
    for i in prange(queries.shape[0]):
        _one(queries[i], keys, ids, rows[i], places[i], best[i], found[i], l2)


def rescore(queries: Floats, vectors: Floats, ids: Ints, rows: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.rescore`."""
    queries = np.ascontiguousarray(queries, np.float32)
    rows = np.ascontiguousarray(rows)
    keys, places = vectors.reshape(-1, vectors.shape[2]), rows
    if keys.dtype != np.float32:  # numba knows no float16: widen what is read
        keys = keys[rows.reshape(-1)].astype(np.float32)
        places = np.arange(rows.size).reshape(rows.shape)
    best = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    arguments = (queries, keys, ids, rows, places, best, found, l2)
    if len(queries) < FEW:
        _some(*arguments)
    else:
        launch(_many, *arguments)
    return best, found
