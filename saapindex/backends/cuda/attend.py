"""A step of sparse attention in one launch: what `Ops.attend_lists` defines, on streams of a device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from saapindex.backends.cuda.module import ELEMENTS, get_cupy, kernel
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Code, Scaling

__all__ = ["DeviceCode", "Limits", "Workspace", "attend_streams", "launch_shape", "select_streams"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
POLICIES = {"sum": 0, "max": 1, "union": 2}
BINS, CANDIDATES = 1024, 4096
_SHARED_FIXED = 4 * (BINS + 2 * 1024 + 4096 + 2 * 1024) + 256

_TABLE_MOST = 120 * 1024

_POINTERS = (
    "lengths first near_keys near_values keys values codes exponents ids pages labels orders counts sizes anchors "
    "anchor_scales means mean_scales squares inverse steps base spread distortion widths coded queries positions "
    "out lse bits dots rotated estimates masses visited bins kept histogram candidates counters partial stamps"
).split()
_INTEGERS = (
    "heads tokens lists ring sinks most_pages coded_most blocks width code_bytes row_bytes nprobe policy by_mass "
    "refine remainder near everything cached"
).split()
STEP = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [("budget", np.float64), ("share", np.float64)]
    + [(name, np.float32) for name in ("scale", "cap", "top_p")]
    + [(name, np.int32) for name in _INTEGERS],
    align=True,
)
"""The struct `Step` of ``cuda/attend.cu``."""


class DeviceCode(NamedTuple):
    """`saapindex.backends.paged.Code` as the kernels read it, on the device.

    Attributes
    ----------
    inverse
        (H, R, d) float32: transposed.
    steps, spread, distortion
        (H, R) float32.
    base
        (H,) float32.
    widths
        (H, W) int32.
    coded
        (H,) int32, dimensions that each head codes.
    """

    inverse: Array
    steps: Array
    base: Array
    spread: Array
    distortion: Array
    widths: Array
    coded: Array

    @classmethod
    def of(cls, code: Code, coded: Any, xp: Any) -> DeviceCode:
        """Return a code of the host in arrays of `xp`."""
        most = 32 * code.widths.shape[1]
        rows, (steps, spread, distortion) = (
            np.swapaxes(code.inverse, 1, 2)[:, :most],
            (array[:, :most] for array in (code.step, code.spread, code.distortion)),
        )
        floats = [
            np.ascontiguousarray(array, np.float32) for array in (rows, steps, code.base, spread, distortion)
        ]
        whole = [np.ascontiguousarray(array, np.int32) for array in (code.widths, coded)]
        return cls(*(xp.asarray(array) for array in (*floats, *whole)))


class Limits(NamedTuple):
    """What a step may read, as `AttendParameters` says it; see there."""

    budget: float = 0.05
    share: float = 0.3
    nprobe: int = 0
    top_p: float = 0.0
    policy: str = "sum"
    by_mass: bool = False
    refine: bool = True
    remainder: bool = True


class Workspace(NamedTuple):
    """Buffers of a step; zero before the first, and left as they were found by every step.

    Attributes
    ----------
    blocks
        Blocks that work on a unit: a query token of a stream.
    threads
        Of a block.
    width
        32-bit words of a bitmap of positions.
    """

    dots: Array
    rotated: Array
    estimates: Array
    masses: Array
    visited: Array
    bins: Array
    kept: Array
    histogram: Array
    candidates: Array
    counters: Array
    partial: Array
    bits: Array
    blocks: int
    threads: int
    width: int

    @classmethod
    def empty(
        cls,
        streams: Streams,
        code: DeviceCode,
        group: int,
        tokens: int,
        shape: tuple[int, int],
        xp: Any,
        *,
        most_positions: int = 0,
    ) -> Workspace:
        """Return buffers for `tokens` query tokens of every stream and `group` heads, and bitmaps of positions."""
        blocks, threads = shape
        units = streams.pages.shape[0] * tokens
        lists, d = streams.anchors.shape[1:]
        most = -(-(-(-streams.pages.shape[1] // 8)) // blocks) * 8 * blocks
        width = -(-most_positions // 32)
        return cls(
            dots=xp.empty((units, lists, group), np.float32),
            rotated=xp.empty((units, group, code.inverse.shape[1]), np.float32),
            estimates=xp.empty((units, most * 16, group), np.float32),
            masses=xp.empty((units, most, group), np.float32),
            visited=xp.empty((units, most, 2), np.int32),
            bins=xp.empty((units, most * 16, group), np.uint16),
            kept=xp.empty((units, most * 16), np.uint8),
            histogram=xp.zeros((units, group, 2, BINS), np.int32),
            candidates=xp.empty((units, group, CANDIDATES, 2), np.float32),
            counters=xp.zeros((units, 3 + 3 * group), np.uint32),
            partial=xp.empty((units, blocks, group, d + 2), np.float32),
            bits=xp.zeros((units, width), np.uint32),
            blocks=blocks,
            threads=threads,
            width=width,
        )


def shared_bytes(d: int, group: int, words: int, lists: int, threads: int) -> int:
    """Return the shared memory of a block in bytes."""
    warps = threads // 32
    fixed = _SHARED_FIXED + 4 * group * (d + 8 * words + 2 * warps + 16) + 32 * words
    table = 4 * lists * (2 + group if _cached(lists, group) else 1)
    codes = warps * 8 * (64 * words + 16)
    merged = 4 * warps * group * (d + 1)
    return fixed + 4 * lists + 64 + max(table, codes, merged)


def _cached(lists: int, group: int) -> bool:
    """Return whether a block keeps what it knows of the lists in its shared memory."""
    return 4 * lists * (2 + group) <= _TABLE_MOST


def launch_shape(units: int, multiprocessors: int, group: int) -> tuple[int, int]:
    """Return the blocks of a unit, and the threads of a block.

    All blocks of a unit wait for each other, so where there are several all must be resident at once.
    """
    return max(1, multiprocessors // units), 512 if group <= 4 else 256


def step(
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
    deciding: bool = False,
    stamps: Array | None = None,
) -> np.ndarray[Any, Any]:
    """Return the argument of the kernel."""
    heads, lists, d = len(code.base), *streams.anchors.shape[1:]
    arrays: dict[str, Any] = {
        **streams._asdict(),
        **code._asdict(),
        **space._asdict(),
        "queries": queries,
        "positions": positions,
        "out": out,
        "lse": lse,
        "stamps": stamps,
    }
    if not deciding:
        arrays["bits"] = None
    numbers = {
        "budget": limits.budget,
        "share": limits.share,
        "scale": scaling.scale,
        "cap": scaling.softcap,
        "top_p": limits.top_p,
        "heads": heads,
        "tokens": queries.shape[1],
        "lists": lists,
        "ring": streams.near_keys.shape[1] - streams.sinks,
        "sinks": streams.sinks,
        "most_pages": streams.pages.shape[1],
        "coded_most": code.inverse.shape[1],
        "blocks": space.blocks,
        "width": space.width,
        "code_bytes": 4 * code.widths.shape[1] + 1,
        "row_bytes": 2 * d * streams.keys.dtype.itemsize,
        "nprobe": limits.nprobe,
        "policy": POLICIES[limits.policy if queries.shape[2] > 1 else "sum"],
        "by_mass": limits.by_mass,
        "refine": limits.refine,
        "remainder": limits.remainder,
        "near": near,
        "everything": everything,
        "cached": _cached(lists, queries.shape[2]),
    }
    made = np.zeros(1, STEP)
    for name in _POINTERS:
        made[name] = _address(arrays[name])
    for name, value in numbers.items():
        made[name] = value
    return made


def _address(array: Array | None) -> int:
    if array is None:
        return 0
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _element(array: Array) -> int:
    names = {
        np.dtype(np.float16): "float16",
        np.dtype(np.uint16): "bfloat16",
        np.dtype(np.float32): "float32",
    }
    return ELEMENTS[names[array.dtype]]


@functools.cache
def _multiprocessors(device: int) -> int:
    count: int = get_cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]
    return count


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
    stamps: Array | None = None,
) -> None:
    """Attend: see `Ops.attend_lists` and `Ops.attend_all`.

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
    stamps
        (grid, 12) int64, written: clocks of each block at the beginning of each stage. Slower.
    """
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
    _launch(argument, queries, streams, code, space, scaling, {} if stamps is None else {"STAMPS": 1})


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
    """Set the bits of the positions that `attend_streams` would fetch from the lists, in ``space.bits``."""
    argument = step(
        queries, streams, code, scaling, limits, space, queries, queries, everything=everything, deciding=True
    )
    _launch(argument, queries, streams, code, space, scaling, {})


def _launch(
    argument: np.ndarray[Any, Any],
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    space: Workspace,
    scaling: Scaling,
    macros: dict[str, int],
) -> None:
    units, group, d = queries.shape[0] * queries.shape[1], *queries.shape[2:]
    words, lists = code.widths.shape[1], streams.anchors.shape[1]
    shared = shared_bytes(d, group, words, lists, space.threads)
    run = kernel(
        "attend",
        "attend",
        shared=shared,
        D=d,
        G=group,
        WORDS=words,
        ELEMENT=_element(streams.keys),
        QUERY=_element(queries),
        THREADS=space.threads,
        **({"CAPPED": 1} if scaling.softcap else {}),
        **macros,
    )
    run((units * space.blocks,), (space.threads,), (argument,), shared_mem=shared)
