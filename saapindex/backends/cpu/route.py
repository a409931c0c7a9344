"""Routing: scores of all lists, and the best of them by a bound, so that only what is kept is sorted.

Scores stay in the cache of the thread that made them: no matrix of queries times lists is ever held.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.best import LOWEST, keep_best, kth_largest, sort_best, to_float
from saapindex.backends.cpu.block import TILE, block_products, first_bit, raise_peaks, reaching, tile_products
from saapindex.backends.cpu.scan import FEW, STEP
from saapindex.backends.cpu.threads import launch


@njit(cache=True, nogil=True)
def _bound(total, p, peaks, spare):  # type: ignore[no-untyped-def]
    """Return a score that at least `p` lists reach, if as many may be visited, and not many more.

    The `p`-th best of the peaks of groups is one, since every peak is the score of a list.
    """
    groups = (2 * p + LANES - 1) // LANES * LANES
    if 2 * groups > total.shape[0]:
        return LOWEST
    peaks[:groups] = LOWEST
    for start in range(0, total.shape[0], LANES):
        raise_peaks(total, start, peaks, start % groups)
    return to_float(kth_largest(peaks[:groups], p, spare), spare)


@njit(cache=True, nogil=True)
def _top(total, lists, best, in_order, kept, names, peaks, spare):  # type: ignore[no-untyped-def]
    """Choose the best of `total`, of whole blocks; if not in order, then with the best one first."""
    p, count = lists.shape[0], 0
    bound = _bound(total, p, peaks, spare)
    for start in range(0, total.shape[0], LANES):
        bits = reaching(total, start, bound)
        while bits:
            j = start + first_bit(bits)
            kept[count], names[count] = total[j], j
            count += 1
            bits &= bits - 1
    if count > p:
        keep_best(kept, names, count, p, spare)
        count = p
    if in_order:
        sort_best(kept, names, count, best, lists)
        return
    first = 0
    for j in range(p):
        lists[j] = names[j] if j < count else -1
        if j < count and kept[j] > kept[first]:
            first = j
    lists[0], lists[first] = lists[first], lists[0]


@njit(cache=True, nogil=True)
def route_some(features, table, bias, lists, best, in_order):  # type: ignore[no-untyped-def]
    """Route some queries, a tile of them at a time; scores are written if lists are to be in order."""
    nlist, n, width = bias.shape[0], features.shape[0], table.shape[0] * LANES
    scores, padded = np.empty((TILE, width), np.float32), np.full(width, np.float32(-np.inf))
    padded[:nlist] = bias
    kept, names = np.empty(width, np.float32), np.empty(width, np.int64)
    peaks, spare = np.empty(width, np.float32), np.empty(width, np.int32)
    rows, nothing = np.empty(TILE, np.int64), np.zeros(TILE, np.float32)
    for first in range(0, n, TILE):
        many = min(TILE, n - first)
        for t in range(TILE):
            rows[t] = first + min(t, many - 1)
        for block in range(table.shape[0]):
            if many == 1:
                block_products(features[first], table, block, np.float32(0), scores[0, block * LANES :])
            else:
                tile_products(features, rows, table, block, nothing, scores, block * LANES)
        for t in range(many):
            total = scores[t]
            for j in range(width):
                total[j] += padded[j]
            into = best[first + t] if in_order else kept
            _top(total, lists[first + t], into, in_order, kept, names, peaks, spare)


@njit(cache=True, nogil=True, parallel=True)
def _route_many(features, table, bias, lists, best):  # type: ignore[no-untyped-def]
    for part in prange((features.shape[0] + STEP - 1) // STEP):
        rows = slice(part * STEP, min((part + 1) * STEP, features.shape[0]))
        route_some(features[rows], table, bias, lists[rows], best[rows], True)


def route(features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.route`."""
    features = np.ascontiguousarray(features, np.float32)
    lists = np.empty((len(features), p), np.int64)
    best = np.empty((len(features), p), np.float32)
    if len(features) < FEW:
        route_some(features, table, bias, lists, best, True)
    else:
        launch(_route_many, features, table, bias, lists, best)
    return lists, best
