"""Exact scores of the keys in the probed lists, on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saapindex.backends.base import LANES, Floats, Ints, Lists
from saapindex.backends.cuda.launch import element, host, mapped, multiprocessors, on_device, power_of_two
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.route import ENTRY, THREADS
from saapindex.backends.reference.scan import range_scan as range_scan_reference
from saapindex.backends.reference.scan import scan as scan_reference
from saapindex.devices import get_cupy

__all__ = ["MOST_RESULTS", "best_of", "part_shape", "planned", "range_scan", "ready", "scan", "scan_shape"]

_STEP = 512  # keys that a block of threads reads at once
MOST_RESULTS = 2048
"""Results of a query that a block of threads sorts."""
_BLOCKS = 8  # blocks of keys that are worth a block of threads
_MERGED = 3000  # results of all parts of a query that are worth merging
_ROUNDS = 4  # blocks of threads for each multiprocessor


def _splits(q: int, p: int, lists: Lists, k: int = 1) -> int:
    """Return in how many parts the scan of a query is cut, so that the device is busy."""
    blocks = len(lists.ids) // LANES * p // max(len(lists.sizes), 1)
    threads = _ROUNDS * multiprocessors(lists.vectors.device.id)  # type: ignore[attr-defined]
    most = min(-(-threads // max(q, 1)), blocks // _BLOCKS, _MERGED // k, 256)
    return max(1, int(most))


def scan_shape(q: int, p: int, lists: Lists, k: int) -> tuple[int, int, int, int, int]:
    """Return the parts of the scan of a query, what a part has room for, and bytes of shared memory.

    Returns
    -------
    splits, room, capacity, shared, merging : shared memory of a part, and of what merges them
    """
    room, capacity = part_shape(k)
    shared = (room + capacity) * ENTRY + 4 * lists.vectors.shape[1]
    return _splits(q, p, lists, k), room, capacity, shared, room * ENTRY


def part_shape(k: int) -> tuple[int, int]:
    """Return the entries that a part has room for: the best, a power of two, and those on the way."""
    return power_of_two(k), max(2048, k + 2 * _STEP)


def planned(lists: Lists, probes: Any, limits: Any) -> tuple[Any, Any]:
    """Launch the plan of a scan: blocks of keys before each probe, and keys read of it."""
    cupy = get_cupy()
    q, p = probes.shape
    limits = cupy.ascontiguousarray(limits, np.int64)
    before, takes = cupy.empty((q, p + 1), np.int32), cupy.empty((q, p), np.int32)
    kernel("scan", "scan_plan", **_macros(lists))(
        (q,), (THREADS,), (probes, lists.sizes, limits, np.int32(p), before, takes)
    )
    return before, takes


def _macros(lists: Lists) -> dict[str, int]:
    return {"ELEMENT": element(lists.vectors), "D": lists.vectors.shape[1]}


def _allowed(lists: Lists) -> Any:
    """Return which keys may be read, or a null pointer for all."""
    allowed = getattr(lists, "allowed", None)
    return np.uint64(0) if allowed is None else allowed


def best_of(
    queries: Any, lists: Lists, probes: Any, before: Any, takes: Any, k: int, l2: bool
) -> tuple[Any, Any]:
    """Launch the scan of probes that are planned; see `Ops.scan`."""
    cupy = get_cupy()
    q, p = probes.shape
    if k > MOST_RESULTS:
        return _best_of_many(queries, lists, probes, before, takes, k, l2)
    best, found = cupy.empty((q, k), np.float32), cupy.empty((q, k), np.int64)
    splits, room, capacity, shared, merging = scan_shape(q, p, lists, k)
    some, some_found = best, found
    if splits > 1:
        some, some_found = cupy.empty((q, splits, k), np.float32), cupy.empty((q, splits, k), np.int64)
    kernel("scan", "scan_l2" if l2 else "scan_ip", shared=shared, **_macros(lists))(
        (q, splits),
        (THREADS,),
        (
            queries,
            lists.vectors,
            lists.ids,
            lists.offsets,
            _allowed(lists),
            probes,
            before,
            takes,
            *map(np.int32, (p, k, room, capacity)),
            some,
            some_found,
        ),
        shared_mem=shared,
    )
    if splits > 1:
        kernel("scan", "scan_merge", shared=merging, **_macros(lists))(
            (q,),
            (THREADS,),
            (some, some_found, *map(np.int32, (splits * k, k, room, l2)), best, found),
            shared_mem=merging,
        )
    return best, found


def _best_of_many(
    queries: Any, lists: Lists, probes: Any, before: Any, takes: Any, k: int, l2: bool
) -> tuple[Any, Any]:
    """Sort every score, for more results than a block of threads sorts."""
    cupy = get_cupy()
    q = len(queries)
    lims, scores, ids = _within(queries, lists, probes, before, takes, -np.inf, l2)
    owners = cupy.searchsorted(lims[1:], cupy.arange(len(ids)), side="right")
    order = cupy.argsort(ids)  # stable, as the other two
    for key in (scores if l2 else -scores, owners):
        order = order[cupy.argsort(key[order])]
    best = cupy.full((q, k), np.inf if l2 else -np.inf, np.float32)
    found = cupy.full((q, k), -1, np.int64)
    places = cupy.arange(len(ids)) - lims[owners]
    kept = places < k
    best[owners[kept], places[kept]] = scores[order][kept]
    found[owners[kept], places[kept]] = ids[order][kept]
    return best, found


def _within(
    queries: Any, lists: Lists, probes: Any, before: Any, takes: Any, threshold: float, l2: bool
) -> tuple[Any, Any, Any]:
    """Launch the range scan, once to count and once to write; larger than `threshold` is within."""
    cupy = get_cupy()
    q, p = probes.shape
    splits = _splits(q, p, lists)
    reading = (queries, lists.vectors, lists.ids, lists.offsets, _allowed(lists))
    run = kernel("scan", "range_l2" if l2 else "range_ip", **_macros(lists))
    inputs = (*reading, probes, before, takes, np.int32(p))
    counts, nothing = cupy.empty((q, splits), np.int64), np.uint64(0)
    limit = np.float32(threshold)
    run((q, splits), (THREADS,), (*inputs, limit, counts, nothing, nothing, nothing))
    ends = cupy.concatenate([cupy.zeros(1, np.int64), cupy.cumsum(counts.reshape(-1))])
    total = int(ends[-1])
    scores, found = cupy.empty(total, np.float32), cupy.empty(total, np.int64)
    if total:
        run((q, splits), (THREADS,), (*inputs, limit, counts, ends, scores, found))
    return ends[::splits].copy(), scores, found


def ready(queries: Any, lists: Lists) -> tuple[Any, Lists]:
    """Return queries and lists as kernels read them."""
    cupy = get_cupy()
    tables = {
        name: cupy.ascontiguousarray(getattr(lists, name), np.int64) for name in ("ids", "offsets", "sizes")
    }
    lists = lists._replace(vectors=cupy.ascontiguousarray(lists.vectors), **tables)
    return cupy.ascontiguousarray(queries, np.float32), lists


def _limits(lists: Lists, limits: Any) -> Any:
    """Return the limits as the kernels count, all keys of a list; None where they must count allowed ones."""
    allowed = getattr(lists, "allowed", None)
    if allowed is None:
        return limits
    cupy = get_cupy()
    most = int((allowed[:, None] >> cupy.arange(LANES, dtype=np.uint16) & np.uint16(1)).sum())
    limits = cupy.asarray(limits)
    return None if bool((limits < most).any()) else cupy.full(len(limits), len(lists.ids), np.int64)


def _on_host(run: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """Compute as the reference does, and bring the results to the device."""
    return mapped(run(*(mapped(value, host) for value in arguments)), get_cupy().asarray)  # type: ignore[no-any-return]


@on_device
def scan(queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool) -> tuple[Floats, Ints]:
    """See `Ops.scan`."""
    cupy = get_cupy()
    if not len(queries):
        return cupy.empty((0, k), np.float32), cupy.empty((0, k), np.int64)
    given, limits = limits, _limits(lists, limits)
    if limits is None:
        return _on_host(scan_reference, queries, lists, probes, given, k, l2)
    queries, lists = ready(queries, lists)
    probes = cupy.ascontiguousarray(probes, np.int64)
    return best_of(queries, lists, probes, *planned(lists, probes, limits), k, l2)


@on_device
def range_scan(
    queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan`: once to count, once to write."""
    cupy = get_cupy()
    if not len(queries):
        return cupy.zeros(1, np.int64), cupy.empty(0, np.float32), cupy.empty(0, np.int64)
    given, limits = limits, _limits(lists, limits)
    if limits is None:
        return _on_host(range_scan_reference, queries, lists, probes, given, radius, l2)
    queries, lists = ready(queries, lists)
    probes = cupy.ascontiguousarray(probes, np.int64)
    return _within(queries, lists, probes, *planned(lists, probes, limits), -radius if l2 else radius, l2)
