"""Taking keys back from lists on a device, and giving sequences pages of their own there."""

from __future__ import annotations

from typing import Any

import numpy as np

from saapindex.backends.base import LANES
from saapindex.backends.cuda.streams import Streams
from saapindex.lists.device_pool import DevicePool

__all__ = ["EMPTY", "copy_open_pages", "cut_lists", "in_lists", "near_places", "slots"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
EMPTY = ("anchors", "anchor_scales", "sums", "means", "mean_scales", "squares")
"""What is zero where no key is in lists."""
_TABLES = ("pages", "labels", "orders", "before")


def near_places(streams: Streams, positions: Array) -> Array:
    """Return the places of near keys at `positions`."""
    sinks, ring = streams.sinks, streams.near_keys.shape[1] - streams.sinks
    return positions - (positions >= sinks) * ((positions - sinks) // ring * ring)


def slots(streams: Streams, xp: Any) -> Array:
    """Return which pages there are, bool (S, P)."""
    return xp.arange(streams.pages.shape[1]) < streams.counts[:, None]


def copy_open_pages(streams: Streams, pool: DevicePool, xp: Any) -> None:
    """Let streams hold the full pages that others hold too, and copy those that are not full."""
    there = slots(streams, xp)
    open_ = there & (streams.labels & 31 < LANES)
    old = streams.pages[open_]
    fresh = pool.take(len(old))
    pool.hold(streams.pages[there & ~open_])
    for array in pool.arrays.values():
        array[fresh] = array[old]
    streams.pages[open_] = fresh


def in_lists(streams: Streams, s: int, first: int, last: int, xp: Any) -> tuple[Array, Array, Array]:
    """Return page in the pool, lane and position of a stream's keys in lists at ``first : last``."""
    count = int(streams.counts[s])
    pages, lanes = streams.pages[s, :count], streams.labels[s, :count] & 31
    ids = streams.ids[pages]
    found = (xp.arange(LANES) < lanes[:, None]) & (ids >= first) & (ids < last)
    slot, lane = xp.nonzero(found)
    return pages[slot], lane, ids[slot, lane]


def cut_lists(
    streams: Streams, pool: DevicePool, of: range, start: int, first: int, length: int, base: Array, xp: Any
) -> None:
    """Take the keys at positions from `start` up out of the lists of the streams `of`: one sequence's.

    Those below `length` go to the ring.

    Parameters
    ----------
    start, first
        The first position in the ring after and before.
    length
        Of the sequence, after.
    base
        Of the codes, (H,).
    """
    for s in of:
        page, lane, position = in_lists(streams, s, start, min(first, length), xp)
        places = near_places(streams, position)
        streams.near_keys[s, places] = streams.keys[page, lane]
        streams.near_values[s, places] = streams.values[page, lane]
        _cut_stream(streams, pool, s, start, base[s - of.start], xp)
    if not int(streams.sizes[of.start : of.stop].sum()):
        for name in EMPTY:
            getattr(streams, name)[of.start : of.stop] = 0


def _cut_stream(streams: Streams, pool: DevicePool, s: int, start: int, base: Array, xp: Any) -> None:
    count, lists = int(streams.counts[s]), streams.sizes.shape[1]
    table = {name: getattr(streams, name)[s, :count].copy() for name in _TABLES}
    label = table["labels"] >> 5
    there = xp.arange(LANES) < (table["labels"] & 31)[:, None]
    lanes = (there & (streams.ids[table["pages"]] < start)).sum(axis=1).astype(np.int32)
    kept = xp.flatnonzero(lanes)
    pool.drop(table["pages"][lanes == 0])

    # A page that is cut and that others hold too: what they have in it must stay.
    shared = xp.flatnonzero((lanes > 0) & (lanes < LANES) & (pool.holders[table["pages"]] > 1))
    if len(shared):
        old = table["pages"][shared]
        fresh = pool.take(len(shared))
        for array in pool.arrays.values():
            array[fresh] = array[old]
        pool.drop(old)
        table["pages"][shared] = fresh
    table["labels"] = label << 5 | lanes
    number = xp.cumsum(lanes > 0) - 1
    before = table["before"]
    table["before"] = xp.where(before >= 0, number[xp.maximum(before, 0)], -1).astype(np.int32)
    for name in _TABLES:
        getattr(streams, name)[s, : len(kept)] = table[name][kept]
    streams.counts[s] = len(kept)
    last = xp.full(lists, -1, np.int64)
    xp.maximum.at(last, label[kept], xp.arange(len(kept)))
    streams.last[s] = last

    sizes = xp.zeros(lists, np.int64)
    xp.add.at(sizes, label, lanes.astype(np.int64))
    changed = sizes < streams.sizes[s]
    streams.sizes[s] = sizes
    streams.coded[s] = xp.minimum(streams.coded[s], sizes)
    slot, lane = xp.nonzero((xp.arange(LANES) < lanes[:, None]) & changed[label][:, None])
    page, owner = table["pages"][slot], label[slot]
    sums = xp.zeros(streams.sums.shape[1:], np.float64)
    xp.add.at(sums, owner, wide(streams.values[page, lane], xp).astype(np.float64))
    sums = xp.where(changed[:, None], sums.astype(np.float32), streams.sums[s])
    scale = base * xp.exp2((streams.exponents[page, lane].astype(np.float32) - 128) / 16)
    squares = xp.zeros(lists, np.float64)
    xp.add.at(squares, owner, (scale * scale).astype(np.float64))
    streams.sums[s] = sums
    streams.squares[s] = xp.where(changed, squares.astype(np.float32), streams.squares[s])
    means, scales = _quantised(sums.astype(np.float64) / xp.maximum(sizes, 1)[:, None], xp)
    streams.means[s] = xp.where(changed[:, None], means, streams.means[s])
    streams.mean_scales[s] = xp.where(changed, scales, streams.mean_scales[s])


def wide(x: Array, xp: Any) -> Array:
    """Return stored elements as float32; uint16 holds the bits of bfloat16."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def _quantised(x: Array, xp: Any) -> tuple[Array, Array]:
    """`saapindex.codes.quantise_rows` on a device."""
    scales = (xp.abs(x).max(axis=-1) / 127).astype(np.float32)
    inverse = xp.where(scales > 0, np.float32(1) / xp.where(scales > 0, scales, np.float32(1)), np.float32(0))
    return xp.clip(xp.rint(x * inverse[:, None]), -127, 127).astype(np.int8), scales
