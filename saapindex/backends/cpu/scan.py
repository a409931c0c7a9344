"""Exact scores of the keys in the probed lists: one thread a query, one pass over the keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints, Lists
from saapindex.backends.cpu.best import LOWEST, deliver, keep_best, make_room, take
from saapindex.backends.cpu.block import block_distances, block_products
from saapindex.backends.cpu.threads import launch

# Starting the threads costs more than a few queries.
FEW = 4
# Queries that a thread takes at once.
STEP = 16
# What kernels take in the place of `Lists.allowed` where all may be read.
EVERY_LANE = np.zeros(0, np.uint16)


@njit(cache=True, nogil=True)
def _scan_query(  # type: ignore[no-untyped-def]
    query, vectors, ids, offsets, sizes, probes, limit, kept, names, spare, scores, best, found, l2
):
    """Visit the lists of one query, and sort what is best into `best` and `found`."""
    k, count, worst = best.shape[0], 0, LOWEST
    for list_ in probes:
        if list_ < 0:
            continue
        read = min(sizes[list_], limit)
        limit -= read
        end = offsets[list_] + read
        for start in range(offsets[list_], end, LANES):
            if l2:
                lanes = block_distances(query, vectors, start // LANES, worst, scores)
            else:
                lanes = block_products(query, vectors, start // LANES, worst, scores)
            if not lanes:
                continue
            if end - start < LANES:
                lanes &= (1 << (end - start)) - 1
            if count + LANES > kept.shape[0]:
                worst = keep_best(kept, names, count, k, spare)
                count = k
            count = take(lanes, scores, ids, start, kept, names, count)
    deliver(kept, names, count, spare, best, found, l2)


@njit(cache=True, nogil=True, inline="always")
def allowed_lanes(allowed, start, end, limit):  # type: ignore[no-untyped-def]
    """Return which lanes of the block at row `start` may be read, as bits, and how many: at most `limit`."""
    many = min(LANES, end - start)
    if not allowed.shape[0]:
        many = max(min(many, limit), 0)
        return (1 << many) - 1, many
    bits = np.int64(allowed[start // LANES]) & ((1 << many) - 1)
    count, rest = 0, bits
    while rest:
        rest &= rest - 1
        count += 1
    while count > limit:
        many -= 1
        if (bits >> many) & 1:
            bits ^= 1 << many
            count -= 1
    return bits, count


@njit(cache=True, nogil=True)
def _scan_allowed(query, lists, probes, limit, best, found, l2):  # type: ignore[no-untyped-def]
    """As `_scan_query`, of the keys that may be read alone; blocks without any are not touched."""
    vectors, ids, offsets, sizes, allowed = lists
    k, count, worst = best.shape[0], 0, LOWEST
    kept, names, spare, scores = make_room(k)
    for list_ in probes:
        if list_ < 0 or limit <= 0:
            continue
        end = offsets[list_] + sizes[list_]
        for start in range(offsets[list_], end, LANES):
            lanes, read = allowed_lanes(allowed, start, end, limit)
            if not read:
                continue
            limit -= read
            if l2:
                lanes &= block_distances(query, vectors, start // LANES, worst, scores)
            else:
                lanes &= block_products(query, vectors, start // LANES, worst, scores)
            if count + LANES > kept.shape[0]:
                worst = keep_best(kept, names, count, k, spare)
                count = k
            count = take(lanes, scores, ids, start, kept, names, count)
    deliver(kept, names, count, spare, best, found, l2)


@njit(cache=True, nogil=True, parallel=True)
def _scan_many_allowed(queries, lists, probes, limits, best, found, l2):  # type: ignore[no-untyped-def]
    for i in prange(queries.shape[0]):
        _scan_allowed(queries[i], lists, probes[i], limits[i], best[i], found[i], l2)


@njit(cache=True, nogil=True)
def scan_some(queries, vectors, ids, offsets, sizes, probes, limits, best, found, l2):  # type: ignore[no-untyped-def]
    """Scan for a few queries, one after the other."""
    kept, names, spare, scores = make_room(best.shape[1])
    # With the metric a constant, each branch is compiled to its own loop.
    if l2:
        for i in range(queries.shape[0]):
            _scan_query(
                queries[i], vectors, ids, offsets, sizes, probes[i], limits[i], kept, names, spare, scores,
                best[i], found[i], True,
            )  # fmt: skip
    else:
        for i in range(queries.shape[0]):
            _scan_query(
                queries[i], vectors, ids, offsets, sizes, probes[i], limits[i], kept, names, spare, scores,
                best[i], found[i], False,
            )  # fmt: skip


@njit(cache=True, nogil=True, parallel=True)
def _scan_many(queries, vectors, ids, offsets, sizes, probes, limits, best, found, l2):  # type: ignore[no-untyped-def]
    for part in prange((queries.shape[0] + STEP - 1) // STEP):
        rows = slice(part * STEP, min((part + 1) * STEP, queries.shape[0]))
        scan_some(
            queries[rows],
            vectors,
            ids,
            offsets,
            sizes,
            probes[rows],
            limits[rows],
            best[rows],
            found[rows],
            l2,
        )


def kernel_view(lists: Lists) -> tuple[NDArray[Any], Ints, Ints, Ints]:
    """Show float16 as the integers that hold it, since numba knows no float16."""
    if lists.vectors.dtype != np.float16:
        return lists[:4]
    return lists.vectors.view(np.uint16), lists.ids, lists.offsets, lists.sizes


def scan(queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.scan`."""
    queries = np.ascontiguousarray(queries, np.float32)
    best = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    if lists.allowed is not None:
        parts = (*kernel_view(lists), lists.allowed)
        launch(_scan_many_allowed, queries, parts, probes, limits, best, found, l2)
        return best, found
    arguments = (queries, *kernel_view(lists), probes, limits, best, found, l2)
    if len(queries) < FEW:
        scan_some(*arguments)
    else:
        launch(_scan_many, *arguments)
    return best, found


@njit(cache=True, nogil=True)
def _range_query(query, lists, probes, limit, radius, l2, scores, found):  # type: ignore[no-untyped-def]
    """Write what is better than `radius`, as far as there is room; return how much there is."""
    vectors, ids, offsets, sizes, allowed = lists
    hits = 0
    block_scores = np.empty(LANES, np.float32)
    for list_ in probes:
        if list_ < 0 or limit <= 0:
            continue
        end = offsets[list_] + sizes[list_]
        for start in range(offsets[list_], end, LANES):
            lanes, read = allowed_lanes(allowed, start, end, limit)
            if not read:
                continue
            limit -= read
            if l2:
                lanes &= block_distances(query, vectors, start // LANES, radius, block_scores)
            else:
                lanes &= block_products(query, vectors, start // LANES, radius, block_scores)
            for lane in range(LANES if lanes else 0):
                score = block_scores[lane]
                if (lanes >> lane) & 1 and score > radius:
                    if hits < scores.shape[0]:
                        scores[hits] = -score if l2 else score
                        found[hits] = ids[start + lane]
                    hits += 1
    return hits


@njit(cache=True, nogil=True, parallel=True)
def _range_many(queries, lists, probes, limits, radius, l2, lims, scores, found):  # type: ignore[no-untyped-def]
    """Fill each query's room ``lims[i] : lims[i + 1]``; return how many results each one has."""
    hits = np.empty(queries.shape[0], np.int64)
    for i in prange(queries.shape[0]):
        room = slice(lims[i], lims[i + 1])
        hits[i] = _range_query(queries[i], lists, probes[i], limits[i], radius, l2, scores[room], found[room])
    return hits


def range_scan(
    queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan`: once to count, once to write."""
    queries = np.ascontiguousarray(queries, np.float32)
    lims = np.zeros(len(queries) + 1, np.int64)
    threshold = np.float32(-radius if l2 else radius)
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)
    parts = (*kernel_view(lists), EVERY_LANE if lists.allowed is None else lists.allowed)
    hits = launch(_range_many, queries, parts, probes, limits, threshold, l2, lims, *nothing)
    np.cumsum(hits, out=lims[1:])
    scores, found = np.empty(lims[-1], np.float32), np.empty(lims[-1], np.int64)
    launch(_range_many, queries, parts, probes, limits, threshold, l2, lims, scores, found)
    return lims, scores, found
