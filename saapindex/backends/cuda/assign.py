"""Assignment of rows to centroids on a device, and the sums that k-means needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints
from saapindex.backends.cuda.launch import element, multiprocessors, on_device, rows
from saapindex.backends.cuda.module import ELEMENTS, kernel
from saapindex.devices import get_cupy

__all__ = ["Centroids", "accumulate", "assign", "assign_heads", "prepare"]

_THREADS = 256
_SIDE = 128  # rows of a block of threads, and lists of a tile of the plain kernel
_RUN = 256  # rows of a piece of the sums


class Centroids(NamedTuple):
    """Centroids of `H` heads, ready to assign to.

    Attributes
    ----------
    rows, bias
        (H, nlist, d) and (H, nlist) float32.
    parts, terms
        (H, lists, 2, padded d) float16 bits and (H, lists, 2) float32 for tensor cores, `lists` being `nlist`
        padded; None where they cannot be used.
    """

    rows: Any
    bias: Any
    parts: Any
    terms: Any


def _tile(d: int) -> int:
    """Return how many lists the tensor-core kernel holds at once."""
    return 64 if d <= 128 else 32


def prepare(centroids: Any, bias: Any) -> Centroids:
    """Launch the split of centroids, (H, nlist, d) and (H, nlist), into what tensor cores take."""
    cupy = get_cupy()
    centroids, bias = (cupy.ascontiguousarray(x, np.float32) for x in (centroids, bias))
    heads, nlist, d = centroids.shape
    if d % 8 or d > 256:
        return Centroids(centroids, bias, None, None)
    lists = -(-nlist // _tile(d)) * _tile(d)
    parts = cupy.empty((heads, lists, 2, -(-d // 32) * 32), np.uint16)
    terms = cupy.empty((heads, lists, 2), np.float32)
    kernel("assign", "assign_split", ELEMENT=ELEMENTS["float16"], D=d)(
        (-(-lists // 8), heads),
        (_THREADS,),
        (centroids, bias, parts, terms, np.int32(nlist), np.int32(lists)),
    )
    return Centroids(centroids, bias, parts, terms)


def _stage_bytes(d: int) -> int:
    """Return the shared memory of the tensor-core kernel, as ``assign.cu`` lays it out."""
    row = -(-d // 32) * 64
    return 2 * _tile(d) * (2 * (row if row % 128 == 64 else row + 64) + 8)


def assign_heads(x: Any, centroids: Centroids) -> tuple[Any, Any]:
    """Launch the assignment of the keys of `H` heads, each to the centroids of its own.

    Parameters
    ----------
    x
        (H, n, d) float16, float32 or uint16 (bfloat16), any strides between heads and rows.
    centroids
        What `prepare` made.

    Returns
    -------
    labels : (H, n) int64
    scores : (H, n) float32
    """
    cupy = get_cupy()
    x = rows(x)
    heads, n, d = x.shape
    nlist = centroids.rows.shape[1]
    labels, scores = cupy.empty((heads, n), np.int64), cupy.empty((heads, n), np.float32)
    if not heads * n:
        return labels, scores
    processors = multiprocessors(x.device.id)
    strides = [np.int64(stride // x.itemsize) for stride in (x.strides[1], x.strides[0])]
    aligned = x.data.ptr % 16 == 0 and not any(stride * x.itemsize % 16 for stride in strides)
    tiles = centroids.parts is not None and aligned
    lists, unit = (centroids.parts.shape[1], _tile(d)) if tiles else (nlist, _SIDE)
    many = _SIDE * 4 // (x.itemsize // 2) // (1 if d <= 128 else 2)
    large = tiles and heads * -(-n // many) >= processors
    blocks = -(-n // (many if large else _SIDE))
    units = -(-lists // unit)
    wanted = 1 if large else max(1, 2 * processors // (heads * blocks))
    split = -(-units // min(wanted, units)) * unit
    splits = -(-lists // split)
    some = cupy.empty((splits, heads, n), np.int32)
    some_scores = cupy.empty((splits, heads, n), np.float32)
    shared, macros = 0, {"ELEMENT": element(x)}
    if tiles:
        shared, macros["D"] = _stage_bytes(d), d
        run = kernel("assign", "assign_many" if large else "assign_few", shared=shared, **macros)
        middle: tuple[Any, ...] = (centroids.parts, centroids.terms, np.int32(lists), np.int32(split))
    else:
        run = kernel("assign", "assign_plain", **macros)
        middle = (centroids.rows, centroids.bias, np.int32(nlist), np.int32(split), np.int32(d))
    run(
        (blocks, heads, splits),
        (_THREADS,),
        (x, *strides, np.int32(n), *middle, some, some_scores),
        shared_mem=shared,
    )
    kernel("assign", "assign_merge", **macros)(
        (-(-heads * n // _THREADS),),
        (_THREADS,),
        (some, some_scores, np.int32(splits), np.int64(heads * n), labels, scores),
    )
    return labels, scores


@on_device
def assign(x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
    """See `Ops.assign`; rows in float16, float32 or bfloat16 (as uint16) are taken as they are."""
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    labels, scores = assign_heads(x[None], prepare(centroids[None], bias[None]))
    return labels[0], scores[0]


@on_device
def accumulate(x: Floats, labels: Ints, nlist: int) -> tuple[NDArray[np.float64], Ints]:
    """See `Ops.accumulate`; the same bits from run to run."""
    cupy = get_cupy()
    x = rows(x if x.dtype != np.float64 else x.astype(np.float32))
    n, d = x.shape
    sums = cupy.zeros((nlist, d), np.float64)
    if not n:
        return sums, cupy.zeros(nlist, np.int64)
    labels = cupy.ascontiguousarray(labels, np.int64)
    order = cupy.argsort(labels.astype(np.uint16) if nlist <= 1 << 16 else labels)
    ends = cupy.searchsorted(labels[order], cupy.arange(nlist), side="right")
    counts = cupy.diff(ends, prepend=cupy.zeros(1, ends.dtype))
    pieces = -(-n // _RUN)
    edges = cupy.empty((pieces, 2, d), np.float64)
    kernel("assign", "accumulate_pieces", ELEMENT=element(x))(
        (pieces,),
        (_THREADS,),
        (x, np.int64(x.strides[0] // x.itemsize), order, labels, np.int64(n), np.int32(d), sums, edges),
    )
    kernel("assign", "accumulate_edges", ELEMENT=element(x))(
        (nlist,), (_THREADS,), (ends, np.int32(d), sums, edges)
    )
    return sums, counts
