"""Routing: scores of all lists, and the best of them by a histogram, so that only what is kept is sorted.

Scores stay in the cache of the thread that made them: no matrix of queries times lists is ever held.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.block import block_products
from saapindex.backends.cpu.scan import FEW, STEP
from saapindex.backends.cpu.threads import launch

BINS = 256
# A bin of more than this is sorted by merging, a smaller one by insertion.
CROWDED = 32


@njit(cache=True, nogil=True, inline="always")
def _ordered(bits):  # type: ignore[no-untyped-def]
    """Map the bits of a float to an integer of the same order, and back: integer maxima become SIMD."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(cache=True, nogil=True)
def _range(total, ends):  # type: ignore[no-untyped-def]
    """Return the lowest score that is not minus infinity, and the highest."""
    bits, end_bits = total.view(np.int32), ends.view(np.int32)
    ends[0], ends[1] = -np.inf, np.inf
    nothing, most = _ordered(end_bits[0]), _ordered(end_bits[1])
    low, high = most, nothing
    for j in range(bits.shape[0]):
        high = max(high, _ordered(bits[j]))
    for j in range(bits.shape[0]):
        value = _ordered(bits[j])
        low = min(low, value if value > nothing else most)
    end_bits[0], end_bits[1] = _ordered(low), _ordered(high)
    return ends[0], ends[1]


@njit(cache=True, nogil=True, fastmath={"nsz"})
def _bins(total, low, high, bins):  # type: ignore[no-untyped-def]
    """Count down from the highest score; what must not be visited, or is no number, falls behind."""
    spread = high - low
    if not spread < np.inf:  # more than float32 holds, or nothing to visit
        for j in range(total.shape[0]):
            bins[j] = 0 if total[j] > -np.inf else BINS
        return
    scale = np.float32(BINS - 1) / max(spread, np.float32(1e-30))
    for j in range(total.shape[0]):
        place = (high - total[j]) * scale
        bins[j] = np.int32(place if place < BINS else np.float32(BINS))


@njit(cache=True, nogil=True)
def _insert(scores, lists):  # type: ignore[no-untyped-def]
    """Sort by insertion: larger scores first, among equals the lower list."""
    for i in range(1, scores.shape[0]):
        score, list_ = scores[i], lists[i]
        hole = i
        while hole > 0 and (
            scores[hole - 1] < score or (scores[hole - 1] == score and lists[hole - 1] > list_)
        ):
            scores[hole], lists[hole] = scores[hole - 1], lists[hole - 1]
            hole -= 1
        scores[hole], lists[hole] = score, list_


@njit(cache=True, nogil=True)
def _top(total, lists, best, ends, bins, starts):  # type: ignore[no-untyped-def]
    p = lists.shape[0]
    low, high = _range(total, ends)
    _bins(total, low, high, bins)
    starts[:] = 0
    for bin_ in bins:
        starts[bin_ + 1] += 1
    last, taken, crowd = 0, starts[1], starts[1]
    while last < BINS - 1 and taken < p:
        last += 1
        taken += starts[last + 1]
        crowd = max(crowd, starts[last + 1])
    for bin_ in range(1, last + 1):
        starts[bin_ + 1] += starts[bin_]
    kept = np.empty(taken, np.float32)
    names = np.empty(taken, np.int64)
    for j in range(total.shape[0]):
        bin_ = bins[j]
        if bin_ <= last:
            place = starts[bin_]
            starts[bin_] += 1
            kept[place], names[place] = total[j], j
    if crowd > CROWDED:
        order = np.argsort(-kept, kind="mergesort")
        # Within equal scores the lists already rise, since they were placed in rising order.
        kept, names = kept[order], names[order]
    else:
        _insert(kept, names)
    for i in range(p):
        best[i] = kept[i] if i < taken else -np.inf
        lists[i] = names[i] if i < taken else -1


@njit(cache=True, nogil=True)
def route_some(features, table, bias, lists, best):  # type: ignore[no-untyped-def]
    """Route a few queries, one after the other."""
    nlist = bias.shape[0]
    scores = np.empty(table.shape[0] * LANES, np.float32)
    total = scores[:nlist]
    ends, bins, starts = np.empty(2, np.float32), np.empty(nlist, np.int32), np.empty(BINS + 2, np.int64)
    for i in range(features.shape[0]):
        for block in range(table.shape[0]):
            block_products(features[i], table, block, np.float32(0), scores[block * LANES :])
        for j in range(nlist):
            total[j] += bias[j]
        _top(total, lists[i], best[i], ends, bins, starts)


@njit(cache=True, nogil=True, parallel=True)
def _route_many(features, table, bias, lists, best):  # type: ignore[no-untyped-def]
    for part in prange((features.shape[0] + STEP - 1) // STEP):
        rows = slice(part * STEP, min((part + 1) * STEP, features.shape[0]))
        route_some(features[rows], table, bias, lists[rows], best[rows])


def route(features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.route`."""
    features = np.ascontiguousarray(features, np.float32)
    lists = np.empty((len(features), p), np.int64)
    best = np.empty((len(features), p), np.float32)
    if len(features) < FEW:
        route_some(features, table, bias, lists, best)
    else:
        launch(_route_many, features, table, bias, lists, best)
    return lists, best
