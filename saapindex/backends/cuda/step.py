"""What a step of sparse attention is launched with: codes, buffers, limits, and the argument itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES
from saapindex.backends.cuda.launch import SHARED_MOST, address, packed
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Code, Scaling

__all__ = [
    "POLICIES",
    "DeviceCode",
    "Limits",
    "NewToken",
    "Workspace",
    "launch_shape",
    "shared_bytes",
    "step",
]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
POLICIES = {"sum": 0, "max": 1, "union": 2}
"""What the macro POLICY stands for."""
# As in cuda/attend.cu.
BINS, CANDIDATES, ROUND, QUEUE, OWN = 2048, 4096, 1024, 4096, 1024
# What is known of the lists stays in shared memory if it takes no more than this.
_TABLE_MOST = 120 * 1024

# The members of the struct `Step` of cuda/attend.cu.
# fmt: off
_POINTERS = (
    "lengths", "first", "near_keys", "near_values", "keys", "values", "codes", "exponents", "ids",
    "pages", "labels", "orders", "counts", "sizes", "anchors", "anchor_scales", "means", "mean_scales",
    "squares", "inverse", "steps", "base", "spread", "distortion", "coded", "slots", "chunks", "quads",
    "weights", "least_codes", "scarce", "asks",
    "queries", "positions", "out", "lse", "bits", "dots", "rotated", "estimates", "masses", "visited",
    "bins", "kept", "rows", "histogram", "candidates", "counters", "partial",
    "new_keys", "new_values", "moved", "tickets", "stamps",
)
_STRIDES = ("key_batch", "key_head", "value_batch", "value_head")
_INTEGERS = (
    "heads", "tokens", "lists", "ring", "sinks", "most_pages", "coded_most", "blocks", "width",
    "code_bytes", "row_bytes", "nprobe", "by_mass", "refine", "remainder", "near", "everything",
    "cached", "by_head", "version",
)
# fmt: on
STEP = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in _STRIDES]
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
    coded
        (H,) int32, dimensions that each head codes.
    slots
        (H, R) int32: where the factor of a dimension stands among those of its head, and in the upper half
        the mask of its field.
    chunks
        (H,) int32: products of eight quads.
    quads
        (H, 8 W) int32: offset in a page, shift (from bit 16) and mask (from bit 24) of four fields that lie
        in the four bytes of a word.
    weights, least_codes
        (H,) float32: what each head takes of a budget, and which part of it goes to codes at least.
    scarce, asks
        (H,) and (3,) float32: what each head takes where bytes are scarce, and when they are; see
        `saapindex.attention.shares.HeadShares`.
    """

    inverse: Array
    steps: Array
    base: Array
    spread: Array
    distortion: Array
    coded: Array
    slots: Array
    chunks: Array
    quads: Array
    weights: Array
    least_codes: Array
    scarce: Array
    asks: Array

    @classmethod
    def of(cls, code: Code, coded: Any, xp: Any, shares: tuple[Any, ...] | None = None) -> DeviceCode:
        """Return a code of the host, and the shares of its heads, in arrays of `xp`."""
        most = 32 * code.widths.shape[1]
        rows, (steps, spread, distortion) = (
            np.swapaxes(code.inverse, 1, 2)[:, :most],
            (array[:, :most] for array in (code.step, code.spread, code.distortion)),
        )
        floats = [
            np.ascontiguousarray(array, np.float32) for array in (rows, steps, code.base, spread, distortion)
        ]
        plans = [_plan(widths, rows.shape[1]) for widths in code.widths.tolist()]
        plan = (np.stack([one[i] for one in plans]) for i in range(3))
        whole = [np.ascontiguousarray(array, np.int32) for array in (coded, *plan)]
        heads = len(code.base)
        given = (np.ones(heads), np.zeros(heads), None, None) if shares is None else shares
        weights, least, scarce, asks = given
        scarce, asks = (weights, np.ones(3)) if scarce is None else (scarce, asks)
        own = [np.ascontiguousarray(array, np.float32) for array in (weights, least, scarce, asks)]
        return cls(*(xp.asarray(array) for array in (*floats, *whole, *own)))


def _plan(widths: list[int], dimensions: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return slots, chunks and quads of one head: its words in the order in which products take them.

    Field ``4 k + c`` of a word with fields of `b` bits lies in byte `c`, bits ``b k`` and up. Narrow words
    come first: one of one-bit fields fills a product alone.
    """
    begins = np.cumsum([0, *(32 // bits for bits in widths)])
    slots = np.zeros(dimensions, np.int64)
    quads: list[int] = []
    for bits in sorted(set(widths)):
        mask = (1 << bits) - 1
        for word in (word for word, other in enumerate(widths) if other == bits):
            for field in range(32 // bits):
                if begins[word] + field < dimensions:
                    slots[begins[word] + field] = 4 * len(quads) + field | mask << 16
            quads += [word * LANES * 4 | bits * k << 16 | mask << 24 for k in range(8 // bits)]
        # A product holds fields of one width.
        quads += [bits * (k % (8 // bits)) << 16 | mask << 24 for k in range(-len(quads) % 8)]
    chunks = len(quads) // 8
    quads += [0] * (8 * len(widths) - len(quads))
    return slots, np.asarray(chunks), np.asarray(quads)


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
    by_head: bool = False
    weight: float = 1.0
    """The largest of the weights of heads."""


class NewToken(NamedTuple):
    """A token of every sequence that a step adds before it attends, where no keys are due to leave the ring.

    Attributes
    ----------
    keys, values
        (B, H, 1, d) as stored; the last dimension is contiguous, rows are at multiples of 16 bytes.
    moved, version
        How often arrays have moved, on the device and as the host knows it: after that nothing is added.
    tickets
        (B,) uint32, zero before and after.
    """

    keys: Array
    values: Array
    moved: Array
    version: int
    tickets: Array


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
    rows: Array
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
        pairs = (streams.pages.shape[1] + 1) // 2
        most = (pairs + blocks - 1) // blocks * 2 * blocks
        return cls(
            dots=xp.empty((units, lists, group), np.float32),
            rotated=xp.empty((units, group, code.inverse.shape[1]), np.float32),
            estimates=xp.empty((units, most * 16, group), np.float32),
            masses=xp.zeros((units, lists, group), np.float32),
            visited=xp.empty((units, most, 2), np.int32),
            bins=xp.empty((units, most * 16, group), np.uint16),
            kept=xp.empty((units, most * 16), np.uint8),
            rows=xp.empty((units, most * 16), np.int32),
            histogram=xp.zeros((units, group, BINS), np.int32),
            candidates=xp.empty((units, group, CANDIDATES, 2), np.float32),
            counters=xp.zeros((units, 4 + 3 * group), np.uint32),
            partial=xp.empty((units, blocks, group, d + 2), np.float32),
            bits=xp.zeros((units, 0), np.uint32),
            blocks=blocks,
            threads=threads,
            width=0,
        )


def shared_bytes(d: int, group: int, words: int, lists: int, threads: int, itemsize: int) -> int:
    """Return the shared memory of a block in bytes."""
    warps, steps, shares = threads // 32, -(-d // 16), max(1, threads // 32 // (d // 8))
    fixed = (
        4 * (BINS + QUEUE + 2 * max(ROUND, OWN))
        + 4 * group * (d + 8 * words + 32 * words + 2 * warps + 12)
        + 64 * words
        + 3 * 32 * (8 * steps + 4)
        + 256
    )
    kept = 4 * lists + 32 + 4 * warps * (16 * steps * group + 64)
    table = 4 * lists * (2 + group if _cached(lists, group) else 1)
    codes = warps * 8 * (64 * words + 16)
    rows = warps * 32 * (16 * steps * itemsize + 16)
    merged = 4 * (warps * group * (d + 1) + shares * group * d + group)
    return fixed + kept + max(table, codes, rows, merged)


def _cached(lists: int, group: int) -> bool:
    """Return whether a block keeps what it knows of the lists in its shared memory."""
    return 4 * lists * (2 + group) <= _TABLE_MOST


def launch_shape(
    units: int, multiprocessors: int, d: int, group: int, words: int, lists: int, itemsize: int
) -> tuple[int, int]:
    """Return the blocks of a unit, and the threads of a block.

    All blocks of a unit wait for each other, so where there are several all must be resident at once.
    """
    threads = 384 if d <= 128 else 256  # registers enough for all
    while threads > 64 and shared_bytes(d, group, words, lists, threads, itemsize) > SHARED_MOST:
        threads -= 64
    return max(1, multiprocessors // units), threads


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
    token: NewToken | None = None,
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
        "new_keys": None if token is None else token.keys,
        "new_values": None if token is None else token.values,
        "moved": None if token is None else token.moved,
        "tickets": None if token is None else token.tickets,
        "stamps": stamps,
    }
    if not deciding:
        arrays["bits"] = None
    values: dict[str, Any] = {name: address(arrays[name]) for name in _POINTERS}
    values |= {
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
        "code_bytes": code.quads.shape[1] // 2 + 1,
        "row_bytes": 2 * d * streams.keys.dtype.itemsize,
        "nprobe": limits.nprobe,
        "by_mass": limits.by_mass,
        "refine": limits.refine,
        "remainder": limits.remainder,
        "near": near,
        "everything": everything,
        "by_head": limits.by_head,
        "cached": _cached(lists, queries.shape[2]),
    }
    if token is not None:
        item = token.keys.dtype.itemsize
        places = *token.keys.strides[:2], *token.values.strides[:2]
        values |= {name: at // item for name, at in zip(_STRIDES, places, strict=True)}
        values["version"] = token.version
    return packed(STEP, values)
