"""Scores estimated from codes: one thread a query, one pass over the codes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from saapindex.backends.base import LANES, CodedLists, Floats, Ints
from saapindex.backends.cpu.coded_block import block_estimates, masks
from saapindex.backends.cpu.heap import replace_root, sort_heap
from saapindex.backends.cpu.rescore import distance, dot
from saapindex.backends.cpu.scan import EVERY_LANE, FEW, allowed_lanes
from saapindex.backends.cpu.threads import launch
from saapindex.backends.reference.codes import fields

_TINY = np.float32(1e-30)


@njit(cache=True, nogil=True)
def _round(u, step, half, turned, elements, terms):  # type: ignore[no-untyped-def]
    """Round ``(u - turned) * step`` to 8 bits; set the factor and the offset of the estimates."""
    peak = _TINY
    for i in range(step.shape[0]):
        peak = max(peak, abs((u[i] - turned[i]) * step[i]))
    factor, offset = peak / np.float32(127), np.float32(0)
    for i in range(step.shape[0]):
        element = np.rint((u[i] - turned[i]) * step[i] / factor)
        elements[i] = np.int8(element)
        offset += element * half[i]
    terms[1], terms[2] = factor, offset


@njit(cache=True, nogil=True)
def _scan_query(query, lists, shape, probes, limit, l2, as_rows, best, found):  # type: ignore[no-untyped-def]
    """Visit the lists of one query, and keep what is best in the heap of `best` and `found`."""
    words, exponents, norms, ids, offsets, sizes, anchors, turned, allowed = lists
    inverse, step, half, groups, table = shape
    u = np.zeros(step.shape[0], np.float32)
    for i in range(query.shape[0]):
        for j in range(u.shape[0]):
            u[j] += query[i] * inverse[i, j]
    elements = np.zeros(4 * groups.shape[0], np.int8)
    packed = elements.view(np.int32)
    terms, scores = np.zeros(4, np.float32), np.empty(LANES, np.float32)
    if not l2:
        _round(u, step, half, np.zeros_like(u), elements, terms)
    for list_ in probes:
        if list_ < 0 or limit <= 0:
            continue
        if l2:
            _round(u, step, half, turned[list_], elements, terms)
            terms[0], terms[1] = -distance(query, anchors[list_]), 2 * terms[1]
        else:
            terms[0] = dot(query, anchors[list_])
        for start in range(offsets[list_], offsets[list_] + sizes[list_], LANES):
            lanes, read = allowed_lanes(allowed, start, offsets[list_] + sizes[list_], limit)
            if not read:
                continue
            limit -= read
            terms[3] = best[0]
            reached = block_estimates(
                packed, groups, words, exponents, norms, table, start // LANES, terms, scores
            )
            reached &= lanes
            lane = 0
            while reached:
                if reached & 1:
                    score, id = scores[lane], start + lane if as_rows else ids[start + lane]
                    if score > best[0] or (score == best[0] and id < found[0]):
                        replace_root(best, found, best.shape[0], score, id)
                reached >>= 1
                lane += 1


@njit(cache=True, nogil=True)
def _scan_one(query, lists, shape, probes, limit, l2, as_rows, best, found):  # type: ignore[no-untyped-def]
    best[:] = -np.inf
    found[:] = -1
    _scan_query(query, lists, shape, probes, limit, l2, as_rows, best, found)
    sort_heap(best, found)
    if l2:
        for i in range(best.shape[0]):
            best[i] = -best[i]


@njit(cache=True, nogil=True)
def _scan_some(queries, lists, shape, probes, limits, l2, as_rows, best, found):  # type: ignore[no-untyped-def]
    for i in range(queries.shape[0]):
        _scan_one(queries[i], lists, shape, probes[i], limits[i], l2, as_rows, best[i], found[i])


@njit(cache=True, nogil=True, parallel=True)
def _scan_many(queries, lists, shape, probes, limits, l2, as_rows, best, found):  # type: ignore[no-untyped-def]
    for i in prange(queries.shape[0]):
        _scan_one(queries[i], lists, shape, probes[i], limits[i], l2, as_rows, best[i], found[i])


@functools.lru_cache(maxsize=64)
def _groups(widths: tuple[int, ...]) -> NDArray[np.int32]:
    """Word, shift and mask of each group of four fields."""
    word, shift, _ = fields(np.array(widths, np.int64))
    return np.stack([word[::4], shift[::4], masks(widths)], axis=1).astype(np.int32)


def _views(lists: CodedLists) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the lists, and the shape of the codes, fit for kernels."""
    code = lists.code
    shape = (code.inverse, code.step, code.half, _groups(tuple(code.widths.tolist())), code.scales)
    allowed = EVERY_LANE if lists.allowed is None else lists.allowed
    return (*lists[:6], lists.anchors, lists.turned, allowed), shape


def scan_coded(
    queries: Floats,
    lists: CodedLists,
    probes: Ints,
    limits: Ints,
    k: int,
    l2: bool,
    as_rows: bool,
) -> tuple[Floats, Ints]:
    """See `Ops.scan_coded`."""
    queries = np.ascontiguousarray(queries, np.float32)
    best = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    arguments = (queries, *_views(lists), probes, limits, l2, as_rows, best, found)
    if len(queries) < FEW:
        _scan_some(*arguments)
    else:
        launch(_scan_many, *arguments)
    return best, found


def range_scan_coded(
    queries: Floats, lists: CodedLists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan_coded`: every key that is read, sorted, and cut where it is no longer better."""
    held = np.where(probes >= 0, lists.sizes[probes], 0).sum(axis=1)
    lims = np.zeros(len(queries) + 1, np.int64)
    scores, ids = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for i, count in enumerate(np.minimum(held, limits)):
        row = slice(i, i + 1)
        best, found = scan_coded(queries[row], lists, probes[row], limits[row], max(1, int(count)), l2, False)
        hit = (best[0] < radius if l2 else best[0] > radius) & (found[0] >= 0)
        lims[i + 1] = lims[i] + hit.sum()
        scores.append(best[0][hit])
        ids.append(found[0][hit])
    return lims, np.concatenate(scores), np.concatenate(ids)
