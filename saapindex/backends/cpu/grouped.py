"""The scan of many queries, list by list: keys are read once for a tile of queries, not once a query.

A query's best list goes first, in a pass of its own, so that most keys of its other lists fall below what it
has found already.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu.best import LOWEST, deliver, keep_best, room, take
from saapindex.backends.cpu.block import TILE, tile_distances, tile_products


@njit(cache=True, nogil=True)
def _by_list(probes, first, last, starts, members):  # type: ignore[no-untyped-def]
    """Sort the pairs of a query and one of its probes `first` to `last` by list, by counting."""
    starts[:] = 0
    for i in range(probes.shape[0]):
        for j in range(first, last):
            starts[probes[i, j] + 2] += 1  # a list of -1 is counted in front of all
    for j in range(2, starts.shape[0]):
        starts[j] += starts[j - 1]
    for i in range(probes.shape[0]):
        for j in range(first, last):
            place = probes[i, j] + 1
            members[starts[place]] = i
            starts[place] += 1


@njit(cache=True, nogil=True)
def _scan_tile(  # type: ignore[no-untyped-def]
    queries, tile, many, vectors, ids, start, size, k, kept, names, counts, worst, thresholds, scores,
    spare, l2,
):  # fmt: skip
    """Scan one list for the queries ``tile[:many]``."""
    for t in range(TILE):
        thresholds[t] = worst[tile[t]] if t < many else np.inf
    for row in range(start, start + size, LANES):
        if l2:
            bits = tile_distances(queries, tile, vectors, row // LANES, thresholds, scores, 0)
        else:
            bits = tile_products(queries, tile, vectors, row // LANES, thresholds, scores, 0)
        if not bits:
            continue
        here = min(LANES, start + size - row)
        for t in range(many):
            lanes = (bits >> (LANES * t)) & ((1 << here) - 1)
            if not lanes:
                continue
            i = tile[t]
            if counts[i] + LANES > kept.shape[1]:
                worst[i] = thresholds[t] = keep_best(kept[i], names[i], counts[i], k, spare)
                counts[i] = k
            counts[i] = take(lanes, scores[t], ids, row, kept[i], names[i], counts[i])


@njit(cache=True, nogil=True)
def scan_grouped(queries, vectors, ids, offsets, sizes, probes, best, found, l2):  # type: ignore[no-untyped-def]
    """Scan all of the probed lists for all queries, as `scan_some` does without limits."""
    p, nlist, n, k = probes.shape[1], sizes.shape[0], queries.shape[0], best.shape[1]
    starts = np.empty(nlist + 2, np.int64)
    members = np.empty(n * p, np.int64)
    kept, names = np.empty((n, room(k)), np.float32), np.empty((n, room(k)), np.int64)
    counts, worst = np.zeros(n, np.int64), np.full(n, LOWEST)
    spare = np.empty(room(k), np.int32)
    tile, thresholds = np.empty(TILE, np.int64), np.empty(TILE, np.float32)
    scores = np.empty((TILE, LANES), np.float32)
    for first, last in ((0, min(1, p)), (min(1, p), p)):
        _by_list(probes, first, last, starts, members)
        for list_ in range(nlist):
            start, size = offsets[list_], sizes[list_]
            for at in range(starts[list_], starts[list_ + 1] if size else 0, TILE):
                many = min(TILE, starts[list_ + 1] - at)
                for t in range(TILE):
                    tile[t] = members[at + min(t, many - 1)]
                if l2:
                    _scan_tile(
                        queries, tile, many, vectors, ids, start, size, k, kept, names, counts, worst,
                        thresholds, scores, spare, True,
                    )  # fmt: skip
                else:
                    _scan_tile(
                        queries, tile, many, vectors, ids, start, size, k, kept, names, counts, worst,
                        thresholds, scores, spare, False,
                    )  # fmt: skip
    for i in range(n):
        deliver(kept[i], names[i], counts[i], spare, best[i], found[i], l2)
