"""A step of sparse attention in one launch: what `Ops.attend_lists` defines, on streams of a device."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from saapindex.backends.cuda.launch import by_value, element
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.step import (
    POLICIES,
    DeviceCode,
    Limits,
    NewToken,
    Workspace,
    launch_shape,
    shared_bytes,
    step,
)
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.cuda.whole import attend_whole, shape_of
from saapindex.backends.paged import Scaling

__all__ = ["DeviceCode", "Limits", "Workspace", "attend_streams", "launch_shape", "select_streams"]

Array = Any  # cupy.ndarray


def attend_streams(
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    scaling: Scaling,
    limits: Limits,
    space: Workspace,
    out: Array,
    lse: Array,
    *,
    positions: Array | None = None,
    near: bool = True,
    everything: bool = False,
    token: NewToken | None = None,
    stamps: Array | None = None,
) -> None:
    """Attend: see `Ops.attend_lists` and `Ops.attend_all`.

    Where whole lists are read, one token of each sequence at a time, clusters of blocks do it if the device
    has them: see `attend_whole`.

    Allocates nothing and waits for nothing, so that it can be captured in a graph.

    Parameters
    ----------
    queries
        (S, t, g, d), float16, float32, or uint16 that holds bfloat16.
    streams, code
        Keys, values and their codes.
    scaling, limits
        How logits are formed, and what may be read.
    space
        Buffers.
    out, lse
        Written: the shape and type of `queries`; (S, t, g) float32.
    positions
        (B, t) int32: the last position that each query sees, by default the newest.
    near
        Whether sinks and recent keys are attended to.
    everything
        Attend to every key instead.
    token
        What is added first, where whole lists are read by clusters.
    stamps
        (grid, 12) int64, written: clocks of each block at the beginning of each stage. Slower.
    """
    if not everything and positions is None:
        tokens, group = queries.shape[1:3]
        mixed = queries.dtype != streams.keys.dtype
        shape = shape_of(limits, streams, group, tokens, queries.device.id, mixed=mixed)
        if shape is not None:
            common = queries, streams, code, scaling, limits, space, out, lse
            attend_whole(*common, shape=shape, near=near, token=token, stamps=stamps)
            return
    argument = step(
        queries,
        streams,
        code,
        scaling,
        limits,
        space,
        out,
        lse,
        positions=positions,
        near=near,
        everything=everything,
        stamps=stamps,
    )
    macros = {} if stamps is None else {"STAMPS": 1}
    _launch(argument, queries, streams, code, space, scaling, limits, macros)


def select_streams(
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    scaling: Scaling,
    limits: Limits,
    space: Workspace,
    *,
    everything: bool = False,
) -> None:
    """Set the bits of what `attend_streams` would fetch, in ``space.bits``; see `choose_streams`."""
    argument = step(
        queries, streams, code, scaling, limits, space, queries, queries, everything=everything, deciding=True
    )
    _launch(argument, queries, streams, code, space, scaling, limits, {})


def _launch(
    argument: NDArray[Any],
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    space: Workspace,
    scaling: Scaling,
    limits: Limits,
    macros: dict[str, int],
) -> None:
    units, (group, d) = queries.shape[0] * queries.shape[1], queries.shape[2:]
    words, lists = code.quads.shape[1] // 8, streams.anchors.shape[1]
    shared = shared_bytes(d, group, words, lists, space.threads, streams.keys.dtype.itemsize)
    run = kernel(
        "attend",
        "attend",
        shared=shared,
        D=d,
        G=group,
        WORDS=words,
        ELEMENT=element(streams.keys),
        QUERY=element(queries),
        THREADS=space.threads,
        POLICY=POLICIES[limits.policy] if group > 1 else 0,
        **({"CAPPED": 1} if scaling.softcap else {}),
        **macros,
    )
    run((units * space.blocks,), (space.threads,), (by_value(argument),), shared_mem=shared)
