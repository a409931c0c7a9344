"""What a step of sparse attention is launched with: codes, buffers, limits, and the argument itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Code, Scaling

__all__ = ["DeviceCode", "Limits", "Workspace", "launch_shape", "shared_bytes", "step"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
POLICIES = {"sum": 0, "max": 1, "union": 2}
# As in cuda/attend.cu.
BINS, CANDIDATES, ROUND, QUEUE, OWN = 1024, 4096, 1024, 4096, 1024
# What is known of the lists stays in shared memory if it takes no more than this.
_TABLE_MOST = 120 * 1024

# The members of the struct `Step` of cuda/attend.cu.
# fmt: off
_POINTERS = (
    "lengths", "first", "near_keys", "near_values", "keys", "values", "codes", "exponents", "ids", "pages",
    "labels", "orders", "counts", "sizes", "anchors", "anchor_scales", "means", "mean_scales", "squares",
    "inverse", "steps", "base", "spread", "distortion", "widths", "coded", "queries", "positions", "out",
    "lse", "bits", "dots", "rotated", "estimates", "masses", "visited", "bins", "kept", "histogram",
    "candidates", "counters", "partial", "stamps",
)
_INTEGERS = (
    "heads", "tokens", "lists", "ring", "sinks", "most_pages", "coded_most", "blocks", "width",
    "code_bytes", "row_bytes", "nprobe", "policy", "by_mass", "refine", "remainder", "near", "everything",
    "cached",
)
# fmt: on
STEP = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [("budget", np.float64), ("share", np.float64)]
    + [(name, np.float32) for name in ("scale", "cap", "top_p")]
    + [(name, np.int32) for name in _INTEGERS],
    align=True,
)


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
        32-bit words of a row of `bits`, see `saapindex.backends.cuda.chosen`.
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
    ) -> Workspace:
        """Return buffers for `tokens` tokens of every stream and `group` heads, without bits."""
        blocks, threads = shape
        units = streams.pages.shape[0] * tokens
        lists, d = streams.anchors.shape[1:]
        groups = (streams.pages.shape[1] + 7) // 8
        most = (groups + blocks - 1) // blocks * 8 * blocks
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
            bits=xp.zeros((units, 0), np.uint32),
            blocks=blocks,
            threads=threads,
            width=0,
        )


def shared_bytes(d: int, group: int, words: int, lists: int, threads: int) -> int:
    """Return the shared memory of a block in bytes."""
    warps = threads // 32
    fixed = (
        4 * (BINS + 2 * ROUND + QUEUE + 2 * OWN)
        + 256
        + 4 * group * (d + 8 * words + 2 * warps + 16)
        + 32 * words
    )
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
) -> NDArray[Any]:
    """Return the argument of the kernel."""
    lists, d = streams.anchors.shape[1:]
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
        "heads": len(code.base),
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
