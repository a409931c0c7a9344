"""Attention of an index on a device: one launch, and outputs in the caller's framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_array
from saapindex.attention.device_batch import DeviceBatch
from saapindex.attention.device_keeping import allocating
from saapindex.attention.device_tensors import buffer, placed
from saapindex.attention.limits import check_by_head
from saapindex.attention.streams import as_host
from saapindex.attention.tensors import element_type
from saapindex.backends.cuda.attend import Limits, Workspace, attend_streams, launch_shape
from saapindex.backends.cuda.finite import Finiteness
from saapindex.backends.cuda.launch import multiprocessors
from saapindex.backends.cuda.whole import shape_of
from saapindex.backends.paged import Scaling
from saapindex.devices import device_of
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

__all__ = ["attend_on_device", "limits_of", "type_of", "workspace"]

Array = Any  # cupy.ndarray


def attend_on_device(
    batch: DeviceBatch,
    q: ArrayLike,
    device: int,
    scaling: Scaling,
    wanted: AttendParameters,
    *,
    positions: ArrayLike | None,
    near: bool,
    sink_logits: NDArray[np.float32] | None,
    new: tuple[Array, Array, Finiteness | None] | None = None,
) -> tuple[ArrayLike, ArrayLike]:
    """See `AttentionIndex.attend`; what is returned is on the device where `q` is, else in host memory.

    `new` are keys and values, as stored, that are added before, and what finds out whether they are finite.
    """
    xp, shape = batch.keeping.xp, tuple(q.shape)
    single, heads = len(shape) == 3, batch.keeping.heads
    count, d = len(batch.centroids), batch.keeping.book.codebook.d
    x = placed(q, "q", (count, None, d) if single else (count, None, None, d), type_of(q), device)
    t, g = 1 if single else shape[2], shape[1] // heads
    grouped = x.reshape(count * heads, g, t, d)
    x = grouped.reshape(-1, 1, g, d) if t == 1 else xp.ascontiguousarray(grouped.transpose(0, 2, 1, 3))
    last = None
    if positions is not None:
        last = as_array(positions, "positions", device)
        if last.shape != (count, t) or last.dtype.kind not in "iu":
            raise InvalidInputError(
                f"positions are {last.dtype} of {last.shape}, expected integers of {(count, t)}"
            )
        last = xp.ascontiguousarray(last, np.int32)
    if device_of(q) is None:
        out, lse = xp.empty(shape, x.dtype), xp.empty(shape[:-1], np.float32)
        given: tuple[Any, Any] = out, lse
    else:
        (given_out, out), (given_lse, lse) = (
            buffer(q, shape, "same", device),
            buffer(q, shape[:-1], "float32", device),
        )
        given = given_out, given_lse
    straight = out.reshape(x.shape) if t == 1 else xp.empty_like(x)
    logs = lse.reshape(x.shape[:-1]) if t == 1 else xp.empty(x.shape[:-1], np.float32)
    limits, token = limits_of(wanted, batch, g, device), None
    if new is not None:
        mixed = x.dtype != batch.streams.keys.dtype
        fits = positions is None and wanted.budget != 1 and new[0].shape[2] == 1
        if fits and shape_of(limits, batch.streams, g, t, device, mixed=mixed) is not None:
            token = batch.taken(*new[:2])
        if token is None:
            batch.added(*new[:2], looks=new[2])
    try:
        attend_streams(
            x,
            batch.streams,
            batch.keeping.book.code,
            scaling,
            limits,
            workspace(batch, g, t, device),
            straight,
            logs,
            positions=last,
            near=near,
            everything=wanted.budget == 1,
            token=token,
        )
    except BaseException:
        batch.forget_lengths()  # perhaps nothing was added
        raise
    if t > 1:
        out.reshape(count * heads, g, t, d)[...] = straight.transpose(0, 2, 1, 3)
        lse.reshape(count * heads, g, t)[...] = logs.transpose(0, 2, 1)
    if near and sink_logits is not None:
        _join(out, lse, batch.sinks_on_device(sink_logits).reshape(1, -1, *(1,) * (lse.ndim - 2)), xp)
    if device_of(q) is None:
        return as_host(out), as_host(lse)
    return given


def type_of(q: ArrayLike) -> str:
    """Return the type of queries, of which there are one or several for each sequence."""
    if len(getattr(q, "shape", ())) not in (3, 4):
        raise InvalidInputError(
            f"q has shape {getattr(q, 'shape', None)}, expected (batch, q_heads, d) or (batch, q_heads, t, d)"
        )
    return element_type(q, "q")


def limits_of(wanted: AttendParameters, batch: DeviceBatch, group: int, device: int) -> Limits:
    """Return what a step may read, as kernels take it."""
    shares = batch.keeping.book.codebook.shares
    by_head = check_by_head(wanted, shares)
    limits = Limits(
        budget=wanted.budget or 0.0,
        share=wanted.scan_share,
        nprobe=wanted.nprobe or 0,
        top_p=wanted.top_p or 0.0,
        policy=wanted.policy,
        by_mass=wanted.ranks_by_mass,
        refine=False,
        remainder=wanted.remainder,
        by_head=by_head,
        weight=shares.most if by_head and shares is not None else 1.0,
    )
    whole = shape_of(limits, batch.streams, group, 1, device) is not None
    looks_up = by_head and shares is not None and bool(shares.codes.any())
    return limits._replace(refine=wanted.reads_codes(default=looks_up or not whole))


def workspace(batch: DeviceBatch, group: int, tokens: int, device: int) -> Workspace:
    """Return the buffers of a step; of one token, or with room reserved, the same each time, for graphs.

    Those of several tokens are large, and every layer and fork would keep its own.
    """
    key = group, tokens
    space: Workspace | None = batch.spaces.get(key)
    if space is None:
        xp, streams = batch.keeping.xp, batch.streams
        code = batch.keeping.book.code
        shape = launch_shape(
            streams.pages.shape[0] * tokens,
            multiprocessors(device),
            streams.keys.shape[2],
            group,
            code.quads.shape[1] // 8,
            streams.anchors.shape[1],
            streams.keys.dtype.itemsize,
        )
        with allocating(f"what attention of {tokens} tokens works in"):
            space = Workspace.empty(streams, batch.keeping.book.code, group, tokens, shape, xp)
        if tokens == 1 or batch.reserved:
            batch.spaces[key] = space
    return space


def _join(out: Array, lse: Array, logits: Array, xp: Any) -> None:
    """Let a learned logit of each query head take part in the softmax, in place."""
    total = xp.logaddexp(lse, logits)
    factor = xp.exp(lse - total)[..., None]
    if out.dtype == np.uint16:  # the bits of bfloat16
        exact = (out.astype(np.uint32) << np.uint32(16)).view(np.float32) * factor
        bits = exact.view(np.uint32)
        out[...] = (bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    else:
        out[...] = out * factor
    lse[...] = total
