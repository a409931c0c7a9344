"""Route and scan in one pass over the queries: one start of the threads, nothing held between the two.

A batch whose queries share lists is scanned list by list (see `grouped`), a smaller one query by query. For a
few queries there is `prepare`: what stays the same from one search to the next is handed over as a record of
addresses, since numba looks at every array that it is given, which takes longer than a short scan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, prange
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints, Lists, QuickSearch
from saapindex.backends.cpu.grouped import scan_grouped
from saapindex.backends.cpu.memory import pointer
from saapindex.backends.cpu.route import route_some
from saapindex.backends.cpu.scan import FEW, kernel_view, scan_some
from saapindex.backends.cpu.threads import get_threads, launch

# Queries that a thread takes at once: many share lists, and what they have found stays in the cache.
_MOST, _LEAST = 1024, 16
# Queries that must visit a list, on average, for lists to be scanned by several at once.
_SHARED = 0.25


@njit(cache=True, nogil=True)
def _search_some(features, queries, table, bias, vectors, ids, offsets, sizes, p, best, found, l2):  # type: ignore[no-untyped-def]
    n = queries.shape[0]
    probes = np.empty((n, p), np.int64)
    shared = n * p >= _SHARED * sizes.shape[0] and n >= FEW
    route_some(features, table, bias, probes, np.empty((0 if shared else n, p), np.float32), not shared)
    if shared:
        scan_grouped(queries, vectors, ids, offsets, sizes, probes, best, found, l2)
    else:
        limits = np.full(n, ids.shape[0])
        scan_some(queries, vectors, ids, offsets, sizes, probes, limits, best, found, l2)


@njit(cache=True, nogil=True, parallel=True)
def _search_many(features, queries, table, bias, vectors, ids, offsets, sizes, p, best, found, l2, step):  # type: ignore[no-untyped-def]
    for part in prange((queries.shape[0] + step - 1) // step):
        rows = slice(part * step, min((part + 1) * step, queries.shape[0]))
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
        step = min(_MOST, max(_LEAST, -(-len(queries) // get_threads())))
        launch(_search_many, *arguments, step)
    return best, found


@njit(cache=True, nogil=True)
def _finite(bits):  # type: ignore[no-untyped-def]
    """Whether floats of these bits are neither NaN nor infinite."""
    largest = np.int32(0)
    for value in bits:
        largest = max(largest, np.int32(value & np.int32(0x7FFFFFFF)))
    return largest < 0x7F800000


@njit(cache=True, nogil=True)
def _search_at(queries, record, p, best, found):  # type: ignore[no-untyped-def]
    """Search by a record that `prepare` made, if all queries are finite; tell whether they are."""
    if not _finite(queries.reshape(-1).view(np.int32)):
        return False
    nlist, d, blocks, lists = record[7], queries.shape[1], record[9], record[10]
    table = carray(pointer(record[0]), (lists, d, LANES), np.float32)
    bias = carray(pointer(record[1]), (nlist,), np.float32)
    ids = carray(pointer(record[3]), (blocks * LANES,), np.int64)
    offsets = carray(pointer(record[4]), (nlist,), np.int64)
    sizes = carray(pointer(record[5]), (nlist,), np.int64)
    l2 = record[8] != 0
    if record[6]:
        half = carray(pointer(record[2]), (blocks, d, LANES), np.uint16)
        _search_some(queries, queries, table, bias, half, ids, offsets, sizes, p, best, found, l2)
    else:
        whole = carray(pointer(record[2]), (blocks, d, LANES), np.float32)
        _search_some(queries, queries, table, bias, whole, ids, offsets, sizes, p, best, found, l2)
    return True


def prepare(table: Floats, bias: Floats, lists: Lists, l2: bool) -> QuickSearch | None:
    """See `Ops.prepare`."""
    vectors, ids, offsets, sizes = kernel_view(lists)
    held: tuple[NDArray[Any], ...] = (table, bias, vectors, ids, offsets, sizes)
    if lists.allowed is not None or not all(array.flags.c_contiguous for array in held):
        return None
    half, nlist = vectors.dtype == np.uint16, len(sizes)
    record = np.array(
        [*(array.ctypes.data for array in held), half, nlist, l2, len(vectors), len(table)], np.int64
    )

    def run(queries: NDArray[np.float32], p: int, k: int) -> tuple[Floats, Ints] | None:
        best, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        return (best, found) if held and _search_at(queries, record, p, best, found) else None

    return run
