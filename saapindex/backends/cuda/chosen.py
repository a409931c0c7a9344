"""What a step would fetch, as padded rows of positions: two launches, no allocation, no waiting."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES
from saapindex.backends.cuda.attend import select_streams
from saapindex.backends.cuda.launch import address, by_value, packed
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.step import DeviceCode, Limits, Workspace
from saapindex.backends.cuda.streams import Streams
from saapindex.backends.paged import Scaling

__all__ = ["Bits", "Chosen", "choose_streams", "chosen_step", "most_chosen"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
THREADS = 512
_WORDS = 1024  # of a row, from so many on another block pays
# The members of the struct `Step` of cuda/chosen.cu.
_POINTERS = ("bits", "sizes", "lengths", "first", "ids", "counts", "partitions", "starts", "ends", "done")
_INTEGERS = ("heads", "lists", "width", "most", "blocks", "everything")
_STEP = np.dtype(
    [(name, np.uint64) for name in _POINTERS] + [(name, np.int32) for name in _INTEGERS], align=True
)


class Bits(NamedTuple):
    """Which positions and lists were chosen: zero before a step, and after it.

    Attributes
    ----------
    bits
        (S, width) uint32: words for positions, then words for lists.
    done
        (S,) uint32, a counter of blocks.
    """

    bits: Array
    done: Array

    @classmethod
    def empty(cls, streams: Streams, xp: Any) -> Bits:
        """Return bits for all positions that these streams have room for."""
        words = -(-(streams.sinks + LANES * streams.pages.shape[1]) // 32)
        width = words + -(-streams.anchors.shape[1] // 32)
        count = len(streams.counts)
        return cls(xp.zeros((count, width), np.uint32), xp.zeros(count, np.uint32))


class Chosen(NamedTuple):
    """Where a selection is written; all int64.

    Attributes
    ----------
    ids
        (S, most), rising, -1 beyond.
    lengths
        (S,)
    partitions
        (S, L): lists that were visited, rising, -1 beyond.
    starts, ends
        (B,): the first key out of the lists, and how many keys there are.
    """

    ids: Array
    lengths: Array
    partitions: Array
    starts: Array
    ends: Array


def most_chosen(streams: Streams, limits: Limits, *, everything: bool) -> int:
    """Return how many keys of a stream may be chosen, at most, until its table of pages grows.

    Examples
    --------
    >>> from collections import namedtuple
    >>> streams = namedtuple("Streams", ["pages"])(np.zeros((2, 100)))
    >>> most_chosen(streams, Limits(budget=0.05), everything=False)
    80
    >>> most_chosen(streams, Limits(budget=0.0, nprobe=4), everything=False)
    1600
    """
    room: int = LANES * streams.pages.shape[1]
    return (
        room
        if everything or not limits.budget
        else min(room, int(limits.budget * max(limits.weight, 1) * room))
    )


def chosen_step(
    streams: Streams, bits: Bits, out: Chosen, multiprocessors: int, *, everything: bool
) -> NDArray[Any]:
    """Return the argument of the kernel that turns bits to rows."""
    count, width = bits.bits.shape
    parts = max(1, min(-(-width // _WORDS), 4 * multiprocessors // count))
    arrays = {
        **bits._asdict(),
        **out._asdict(),
        "counts": out.lengths,
        "sizes": streams.sizes,
        "lengths": streams.lengths,
        "first": streams.first,
    }
    numbers = {
        "heads": count // len(streams.lengths),
        "lists": streams.anchors.shape[1],
        "width": width,
        "most": out.ids.shape[1],
        "blocks": parts + 1,
        "everything": everything,
    }
    return packed(_STEP, {name: address(arrays[name]) for name in _POINTERS} | numbers)


def choose_streams(
    queries: Array,
    streams: Streams,
    code: DeviceCode,
    scaling: Scaling,
    limits: Limits,
    space: Workspace,
    bits: Bits,
    out: Chosen,
    multiprocessors: int,
    *,
    everything: bool,
) -> None:
    """Write what `attend_streams` would fetch from the lists.

    Allocates nothing and waits for nothing, so that it can be captured in a graph.

    Parameters
    ----------
    queries
        (S, 1, g, d).
    streams, code, scaling, limits, space, everything
        As for `attend_streams`.
    bits
        Buffers.
    out
        Written.
    multiprocessors
        Of the device.
    """
    wide = space._replace(bits=bits.bits, width=bits.bits.shape[1])
    select_streams(queries, streams, code, scaling, limits, wide, everything=everything)
    argument = chosen_step(streams, bits, out, multiprocessors, everything=everything)
    grid = len(bits.bits) * int(argument["blocks"][0])
    kernel("chosen", "chosen", THREADS=THREADS)((grid,), (THREADS,), (by_value(argument),), shared_mem=1024)
