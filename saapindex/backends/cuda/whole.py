"""The step that reads whole lists: on clusters of blocks, which only some devices have."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from saapindex.backends.cuda.launch import SHARED_MOST, by_value, element, has_clusters, multiprocessors
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.step import BINS, POLICIES, DeviceCode, Limits, NewToken, Workspace, step
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Scaling

__all__ = ["Shape", "attend_whole", "most_fetched", "shape_of", "whole_shape", "whole_shared"]

Array = Any  # cupy.ndarray
# Blocks of a cluster, and how many of 132 multiprocessors do not fit into such clusters: those of an H100
# come in groups of different sizes.
_CLUSTERS = ((16, 20), (8, 12), (4, 12), (2, 0))
# Lists in the bin of a cut, and pages that each of eight blocks gets before some get another, as in
# cuda/attend_whole.cu.
_OWN, _ROUNDS = 512, 4
# Warps that choose and that attend, as many as there are registers and shared memory for.
_WARPS = tuple((8, attending) for attending in (8, 7, 6, 5, 4, 3, 2))
_FEW_WARPS = tuple((4, attending) for attending in (4, 3, 2))


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
    shape: Shape, d: int, group: int, lists: int, fetched: int, itemsize: int, *, mixed: bool = False
) -> int:
    """Return the shared memory of a block in bytes.

    Parameters
    ----------
    shape
        Of the launch.
    d, group, lists
        Dimensions of a head, query heads of a KV head, lists.
    fetched
        The most pages of a unit that may be fetched, see `most_fetched`.
    itemsize
        Bytes of a stored element.
    mixed
        Whether queries are of another type than keys.
    """
    cluster, warps, steps = shape.cluster, shape.threads // 32, -(-d // 16)
    attending, pairs = warps - shape.choosers // 32, -(-lists // 2)
    own = 2 * -(-pairs // cluster)
    fixed = (
        64
        + 4 * group * d
        + 192 * group * -(-d // 64)
        + (3 if mixed or itemsize == 4 else 1) * 32 * (8 * steps + 4)
        + max(4 * (BINS + 4 * _OWN), 16 * cluster * -(-group * d // 4 // cluster))
        + 8 * group * warps
        + 4 * group * (5 * cluster + cluster * attending + 6)
        + 96
    )
    tile = 32 * (16 * steps * itemsize + 16)
    tiles = max(attending * shape.stages * tile, 4 * warps * group * (d + 4))
    even, some = -(-fetched // cluster), -(-fetched // (8 * _ROUNDS + 4)) * (_ROUNDS + 1)
    dealt = some if cluster == 8 else even
    return fixed + tiles + 16 * pairs + 4 * own * (group + 3) + 16 + 4 * dealt + 16


def most_fetched(limits: Limits, lists: int, most_pages: int) -> int:
    """Return the most pages of a unit that a step may fetch: at most one of each list is not full."""
    if limits.nprobe or limits.top_p:
        return most_pages
    return min(most_pages, math.ceil(limits.budget * max(limits.weight, 1) * most_pages) + lists + 1)


@functools.cache
def whole_shape(
    units: int,
    multiprocessors: int,
    d: int,
    group: int,
    lists: int,
    fetched: int,
    itemsize: int,
    *,
    mixed: bool = False,
) -> Shape | None:
    """Return how to launch the kernel, or None where it is not made for that.

    Clusters are as large as there are multiprocessors for all of them at once. Of those some are spare: not
    every group of them (GPC) has room for another whole cluster.

    Parameters
    ----------
    units
        Query tokens, of all streams.
    multiprocessors
        Of the device.
    d, group, lists, fetched, itemsize, mixed
        As for `whole_shared`.
    """
    if d % 16 or group > 8:
        return None
    cluster = next((c for c, spare in _CLUSTERS if units * c <= multiprocessors - spare), 1)
    for choosers, attending in _WARPS if d <= 128 else _FEW_WARPS:
        shape = Shape(cluster, 32 * (choosers + attending), 32 * choosers, 2)
        if whole_shared(shape, d, group, lists, fetched, itemsize, mixed=mixed) <= SHARED_MOST:
            return shape
    return None


def shape_of(
    limits: Limits, streams: Streams, group: int, tokens: int, device: int, *, mixed: bool = False
) -> Shape | None:
    """Return how to launch the kernel for a step, or None where another kernel has to."""
    if limits.refine or tokens > 1 or (limits.policy == "union" and group > 1) or not has_clusters(device):
        return None
    (units, pages), lists = streams.pages.shape, streams.anchors.shape[1]
    return whole_shape(
        units,
        multiprocessors(device),
        streams.keys.shape[2],
        group,
        lists,
        most_fetched(limits, lists, pages),
        streams.keys.dtype.itemsize,
        mixed=mixed,
    )


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
    token: NewToken | None = None,
    stamps: Array | None = None,
) -> None:
    """Do what `attend_streams` does, without codes and for the newest token of each sequence."""
    common = queries, streams, code, scaling, limits, space, out, lse
    argument = step(*common, near=near, token=token, stamps=stamps)
    units, (group, d) = queries.shape[0] * queries.shape[1], queries.shape[2:]
    lists, fetched = (
        streams.anchors.shape[1],
        most_fetched(limits, streams.anchors.shape[1], streams.pages.shape[1]),
    )
    shared = whole_shared(
        shape,
        d,
        group,
        lists,
        fetched,
        streams.keys.dtype.itemsize,
        mixed=queries.dtype != streams.keys.dtype,
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
    run((units * shape.cluster,), (shape.threads,), (by_value(argument),), shared_mem=shared)
