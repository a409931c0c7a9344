"""What the kernel that adds keys is given: structs of ``cuda/append_state.cuh`` and ``cuda/append.cu``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from saapindex.backends.base import LANES
from saapindex.backends.cuda.launch import address, packed
from saapindex.backends.cuda.streams import Streams
from saapindex.errors import InvalidInputError

__all__ = [
    "APPEND",
    "COUNTERS",
    "STATES_MOST",
    "STATUS",
    "THREADS",
    "AppendRules",
    "AppendSpace",
    "Forms",
    "PagesInPool",
    "argument",
    "flush_argument",
    "most_pages",
    "shared_bytes",
    "with_keys",
]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device

THREADS = 256
COUNTERS = 7
"""int32 counters of a state. The first is its status: 0, or what `STATUS` names."""
STATUS = {
    1: "keys that were due stayed out of the lists, for want of pages",
    2: "keys were lost, for want of room",
    4: "nothing was added, since the arrays of the index have moved",
}
_KEYS, _WINDOW, _LISTS_AT_ONCE, _FEW = 64, 2048, 1024, 6  # as in append.cu
_TABLES = 48 * 1024
_SHARED_MOST = 99 * 1024
_TASK = np.dtype([("numbers", np.int32, 12)])

_POINTERS = [
    *(name for name in Streams._fields if name != "sinks"),
    *[
        "holders",
        "free",
        "available",
        "parts",
        "unit",
        "bias",
        "forward",
        "step",
        "base",
        "widths",
        "turns",
        "amplitudes",
        "new_keys",
        "new_values",
        "fresh",
    ],
    *["labels_in", "best", "order", "rows", "tasks", "heavy", "work", "amounts"],
    *["counters", "moved", "stamps"],
]
_STRIDES = ["key_batch", "key_head", "key_token", "value_batch", "value_head", "value_token"]
_INTEGERS = [
    "batch",
    "heads",
    "lists",
    "room",
    "ring",
    "sinks",
    "kept",
    "flush",
    "dense_below",
    "words",
    "coded_dimensions",
    "pairs",
    "interleaved",
    "own_forms",
    "most",
    "tokens",
    "tables",
    "version",
    "later",
]
APPEND = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in _STRIDES]
    + [(name, np.int32) for name in _INTEGERS],
    align=True,
)
"""The struct `State` of ``cuda/append_state.cuh``."""
STATES_MOST = 32
"""States of one launch at most: what is passed to a kernel is limited to 32 kB by some."""
_LOOK = np.dtype(
    [(name, np.uint64) for name in ("lengths", "first")]
    + [(name, np.int32) for name in ("batch", "sinks", "dense_below", "most")],
    align=True,
)
STATES = np.dtype(
    [("count", np.int32), ("looks", _LOOK, (STATES_MOST,)), ("of", APPEND, (STATES_MOST,))], align=True
)


class PagesInPool(NamedTuple):
    """Which pages of a pool are free.

    Attributes
    ----------
    holders
        (N,) int32: how many streams hold each page.
    free
        (N,) int32: a stack of free pages.
    available
        (1,) int32: its height.
    moved
        (1,) int32: how often arrays have moved.
    version
        The same as the host knows it.
    """

    holders: Array
    free: Array
    available: Array
    moved: Array
    version: int


class Forms(NamedTuple):
    """How keys are assigned to lists and coded.

    Attributes
    ----------
    forms, bias
        (H, L, d) and (H, L) float32, or one for each stream: a key `x` in its view belongs to the list of the
        largest ``x . form + bias``.
    parts, unit
        uint32 and float32, of `forms`: see `saapindex.backends.cuda.halves.halves`.
    forward, step
        Of the codes: see `saapindex.backends.cuda.halves.fragments`.
    base, widths
        Of the codes, see `saapindex.backends.paged.Code`; widths are int32.
    turns, amplitudes
        (H, pairs) float64 and float32: turns a position, and factor, of the rotation that takes a key to its
        view; None where keys are assigned as they are.
    interleaved
        Whether a pair is two neighbours.
    """

    forms: Array
    bias: Array
    parts: Array
    unit: Array
    forward: Array
    step: Array
    base: Array
    widths: Array
    turns: Array | None
    amplitudes: Array | None
    interleaved: bool


class AppendRules(NamedTuple):
    """When keys leave the ring: at least `flush` of them when all but `kept` are that many."""

    kept: int
    flush: int
    dense_below: int


class AppendSpace(NamedTuple):
    """Buffers of an append, in which at most `most` keys of each stream enter lists.

    Attributes
    ----------
    best
        (S, most) uint64, zero before and after.
    order, rows
        (S, most) and (S, most, 2) int32.
    tasks, heavy
        Of lists that keys enter.
    work
        (S, pages, 2) int32, of pages that are coded anew.
    amounts
        (S, 4) int32, zero before and after: how many those are, keys that enter other lists, and pages that
        are coded together with their anchor.
    counters
        (7,) int32, zero before; the first is the status, the others are zero after.
    """

    best: Array
    order: Array
    rows: Array
    tasks: Array
    heavy: Array
    work: Array
    amounts: Array
    counters: Array

    @classmethod
    def empty(cls, streams: Streams, most: int, xp: Any, counters: Array | None = None) -> AppendSpace:
        """Return buffers."""
        count, lists = streams.sizes.shape
        room = streams.pages.shape[1]
        tasks = count * min(most, lists)
        return cls(
            best=xp.zeros((count, most), np.uint64),
            order=xp.empty((count, most), np.int32),
            rows=xp.empty((count, most, 2), np.int32),
            tasks=xp.empty((tasks, _TASK.itemsize // 4), np.int32),
            heavy=xp.zeros((_FEW * tasks, _TASK.itemsize // 4), np.int32),
            work=xp.empty((count, room, 2), np.int32),
            amounts=xp.zeros((count, 4), np.int32),
            counters=xp.zeros(COUNTERS, np.int32) if counters is None else counters,
        )


def most_pages(entering: int, lists: int) -> int:
    """Return how many pages a stream may need at most when so many keys enter its lists at once.

    Examples
    --------
    >>> most_pages(256, 1024), most_pages(4096, 100)
    (256, 356)
    """
    return min(entering, entering // LANES + min(entering, lists))


def argument(
    streams: Streams, pool: PagesInPool, forms: Forms, rules: AppendRules, space: AppendSpace
) -> np.ndarray[Any, Any]:
    """Return the argument of the kernel, but for the new keys."""
    count, lists = streams.sizes.shape
    heads = len(forms.base)
    arrays: dict[str, Any] = {**streams._asdict(), **pool._asdict(), **forms._asdict(), **space._asdict()}
    values = {name: address(arrays.get(name)) for name in _POINTERS} | {
        "batch": count // heads,
        "heads": heads,
        "lists": lists,
        "room": streams.pages.shape[1],
        "ring": streams.near_keys.shape[1] - streams.sinks,
        "sinks": streams.sinks,
        **rules._asdict(),
        "words": forms.widths.shape[1],
        "coded_dimensions": forms.step.shape[1],
        "pairs": 0 if forms.turns is None else forms.turns.shape[1],
        "interleaved": forms.interleaved,
        "own_forms": len(forms.forms) != heads,
        "most": space.order.shape[1],
        "tables": _tables(lists),
        "version": pool.version,
    }
    return packed(APPEND, values)


def with_keys(
    made: np.ndarray[Any, Any],
    keys: Array,
    values: Array,
    fresh: Array | None = None,
    labels: Array | None = None,
    *,
    later: bool = False,
) -> np.ndarray[Any, Any]:
    """Complete an argument by the new keys and values, (B, H, m, d), whose last dimension is contiguous.

    `later` says that these are added by the step that follows, and that only a flush is to be done here.
    """
    item = keys.dtype.itemsize
    made["new_keys"], made["new_values"] = address(keys), address(values)
    made["fresh"], made["labels_in"] = address(fresh), address(labels)
    made["tokens"], made["later"] = keys.shape[2], later
    for name, stride in zip(_STRIDES, (*keys.strides[:3], *values.strides[:3]), strict=True):
        made[name] = stride // item
    return made


def flush_argument(made: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the argument of the kernel for several states, whose next token comes later."""
    states = np.zeros(1, STATES)
    states["count"] = len(made)
    for i, one in enumerate(made):
        states["of"][0, i] = one[0]
        for name in ("lengths", "first", "batch", "sinks", "dense_below"):
            states["looks"][name][0, i] = one[name][0]
        states["looks"]["most"][0, i] = one["kept"][0] + one["flush"][0] - 1
    states["of"]["tokens"], states["of"]["later"] = 1, 1
    return states


def _tables(lists: int) -> int:
    return max(1, min(THREADS // 32, _TABLES // (4 * lists)))


def shared_bytes(d: int, lists: int, coded: int, batch: int) -> int:
    """Return the shared memory of a block in bytes.

    Raises
    ------
    InvalidInputError
        If there are more lists than fit.
    """
    elements = -(-d // 64) * 2  # of a lane, at most
    steps, tiles, slabs = -(-d // 16), -(-coded // 8), -(-d // 32)
    assign = 2 * _KEYS * (32 * steps + 16) + 4 * _KEYS * (1 + 2 * THREADS // 32)
    place = 80 + 12 * _LISTS_AT_ONCE + 4 * _tables(lists) * lists
    enter = 8 * elements * THREADS + 8 * _WINDOW + 16
    encode = 1024 * tiles * min(slabs, (64 if d <= 128 else 56) // tiles)
    shared = max(assign, place, enter + encode) + 16 * (batch + 1)
    if shared > _SHARED_MOST:
        raise InvalidInputError(
            f"{lists} lists, {batch} sequences and {d} dimensions need {shared} bytes of shared memory on "
            f"the device, expected at most {_SHARED_MOST}"
        )
    return shared
