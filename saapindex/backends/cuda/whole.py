"""The step that reads whole lists: on clusters of blocks, which only some devices have."""

from __future__ import annotations

from typing import Any, NamedTuple

from saapindex.backends.cuda.launch import element
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.step import BINS, POLICIES, DeviceCode, Limits, Workspace, step
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Scaling

__all__ = ["Shape", "attend_whole", "whole_shared"]

Array = Any  # cupy.ndarray


class Shape(NamedTuple):
    """How the kernel is launched.

    Attributes
    ----------
    cluster
        Blocks of a unit: a query token of a stream.
    threads, choosers
        Of a block, and how many of them choose lists.
    stages
        Tiles of a warp that are on their way at once.
    """

    cluster: int
    threads: int
    choosers: int
    stages: int


def whole_shared(
    shape: Shape, d: int, group: int, lists: int, most_pages: int, itemsize: int, *, mixed: bool = False
) -> int:
    """Return the shared memory of a block in bytes; `mixed` if queries are of another type than keys."""
    cluster, warps, steps = shape.cluster, shape.threads // 32, -(-d // 16)
    attending, own = warps - shape.choosers // 32, -(-(-(-lists // 2)) // cluster) * 2
    fixed = (
        48
        + 4 * group * d
        + (3 if mixed or itemsize == 4 else 1) * 32 * (8 * steps + 4)
        + max(4 * (BINS + 3 * 512), 16 * cluster * -(-group * d // 4 // cluster))
        + 8 * group * warps
        + 4 * group * (5 * cluster + 5)
        + 64
    )
    tile = 32 * (16 * steps * itemsize + 16)
    tiles = max(attending * shape.stages * tile, 4 * warps * group * (d + 4))
    return fixed + tiles + 16 * -(-lists // 2) + 4 * own * (group + 1) + 4 * -(-most_pages // cluster) + 16


def attend_whole(
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    scaling: Scaling,
    limits: Limits,
    space: Workspace,
    out: Array,
    lse: Array,
    *,
    shape: Shape,
    near: bool = True,
    stamps: Array | None = None,
) -> None:
    """Do what `attend_streams` does, without codes and for the newest token of each sequence."""
    argument = step(
        queries, streams, code, scaling, limits, space, out, lse, near=near, stamps=stamps
    )
    units, (group, d) = queries.shape[0] * queries.shape[1], queries.shape[2:]
    lists, pages = streams.anchors.shape[1], streams.pages.shape[1]
    shared = whole_shared(
        shape, d, group, lists, pages, streams.keys.dtype.itemsize, mixed=queries.dtype != streams.keys.dtype
    )
    run = kernel(
        "attend_whole",
        "attend_whole",
        shared=shared,
        D=d,
        G=group,
        ELEMENT=element(streams.keys),
        QUERY=element(queries),
        POLICY=POLICIES[limits.policy] if group > 1 else 0,
        CLUSTER=shape.cluster,
        THREADS=shape.threads,
        CHOOSERS=shape.choosers,
        STAGES=shape.stages,
        **({"CAPPED": 1} if scaling.softcap else {}),
        **({} if stamps is None else {"STAMPS": 1}),
    )
    run((units * shape.cluster,), (shape.threads,), (argument,), shared_mem=shared)
