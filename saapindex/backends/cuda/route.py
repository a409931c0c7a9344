"""Routing on a device: scores of all lists, and the best of them in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cuda.launch import on_device, power_of_two
from saapindex.backends.cuda.module import kernel
from saapindex.devices import get_cupy

__all__ = ["MOST_LISTS", "THREADS", "choose", "route", "routing_shape"]

THREADS = 256
_QUERIES = 8  # that share a load of the table
MOST_LISTS = 4096
"""Lists that a block of threads sorts."""
ENTRY = 12  # bytes of a key and an id


def choose(features: Any, table: Any, bias: Any, p: int, sizes: Any = None) -> tuple[Any, Any, Any, Any]:
    """Launch routing; with `sizes` also plan the scan of the lists, whole.

    Returns
    -------
    lists, scores
        As `Ops.route` gives them.
    before, takes
        (q, p + 1) and (q, p) int32: blocks of keys before each list, and keys read of it; None without
        `sizes`, or if there are too many lists for the kernel that plans.
    """
    cupy = get_cupy()
    q, h = features.shape
    nlist = len(bias)
    lists, best = cupy.empty((q, p), np.int64), cupy.empty((q, p), np.float32)
    before = takes = None
    if sizes is not None and p <= MOST_LISTS:
        before, takes = cupy.empty((q, p + 1), np.int32), cupy.empty((q, p), np.int32)
    if not q:
        return lists, best, before, takes
    features, table, bias = (cupy.ascontiguousarray(x, np.float32) for x in (features, table, bias))
    scores = cupy.empty((q, nlist), np.float32)
    grid, room, shared = routing_shape(q, nlist, p)
    kernel("route", "route_scores")(
        grid,
        (THREADS,),
        (features, table, bias, scores, *map(np.int32, (q, h, nlist))),
    )
    if p > MOST_LISTS:
        return *_sorted(scores, p), None, None
    kernel("route", "route_select", shared=shared)(
        (q,),
        (THREADS,),
        (
            scores,
            lists,
            best,
            *map(np.int32, (nlist, p, room)),
            *(
                np.uint64(0) if x is None else x
                for x in (sizes if takes is not None else None, before, takes)
            ),
        ),
        shared_mem=shared,
    )
    return lists, best, before, takes


def routing_shape(q: int, nlist: int, p: int) -> tuple[tuple[int, int], int, int]:
    """Return the grid of the scores, the room for what is chosen, and its bytes of shared memory."""
    blocks, room = -(-nlist // LANES), power_of_two(p)
    return (-(-q // _QUERIES), -(-blocks // (THREADS // 32))), room, room * ENTRY


def _sorted(scores: Any, p: int) -> tuple[Any, Any]:
    """Return the `p` best by a full sort, for more than fit a block of threads."""
    cupy = get_cupy()
    scores = cupy.where(scores > -np.inf, scores + np.float32(0), -np.inf)  # NaN too is not visited
    numbers = cupy.broadcast_to(cupy.arange(scores.shape[1]), scores.shape)
    bits = scores.view(np.uint32)
    keys = cupy.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF)).astype(np.uint64)
    order = cupy.sort(keys << np.uint64(32) | numbers.astype(np.uint64), axis=1)[:, :p]
    lists = (order & np.uint64(0xFFFFFFFF)).astype(np.int64)
    best = cupy.take_along_axis(scores, lists, axis=1)
    return cupy.where(best > -np.inf, lists, -1), best


@on_device
def route(features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.route`."""
    lists, best, _, _ = choose(features, table, bias, p)
    return lists, best
