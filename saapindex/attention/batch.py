"""Sequences side by side, as the kernels see them; made anew only when a table has changed."""

from __future__ import annotations

from collections.abc import Sequence as Several
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.limits import reading, takes_slopes
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.sequence import Keeping, Sequence
from saapindex.backends.base import LANES, Ints
from saapindex.backends.paged import Near, PagedLists, Reading
from saapindex.params import AttendParameters

__all__ = ["Batch"]


class Batch:
    """The sequences of an index.

    Parameters
    ----------
    keeping
        How they are kept.
    sequences
        Values, the same one perhaps several times.
    before
        The batch that this one takes the place of, whose views may still be good.
    """

    def __init__(self, keeping: Keeping, sequences: Several[Sequence], before: Batch | None = None) -> None:
        self.keeping, self.sequences = keeping, tuple(sequences)
        if before is None or len(before.sequences) != len(self.sequences):
            return
        pairs = list(zip(before.sequences, self.sequences, strict=True))
        same_lists = all(old.lists is new.lists for old, new in pairs)
        same_near = all(_same_pages(old, new) for old, new in pairs)
        same_sinks = all(old.sinks is new.sinks for old, new in pairs)
        for name, same in (
            ("lists", same_lists),
            ("_lists_for", same_lists),
            ("first", same_lists),
            ("first_of_streams", same_lists),
            ("long", same_lists),
            ("is_long", same_lists),
            ("_readings", same_lists),
            ("_near_pages", same_near),
            ("_sinks", same_sinks),
        ):
            if same and name in before.__dict__:
                self.__dict__[name] = before.__dict__[name]

    known = True
    """Whether lengths are known without waiting for a device."""

    def added(
        self, keys: NDArray[Any], values: NDArray[Any], wanted: NDArray[np.bool_] | None = None
    ) -> Batch:
        """Return the batch with keys and values, (B, H, m, d), at the end of each sequence.

        Parameters
        ----------
        wanted
            (B, m): which of them belong to each sequence; None for all.
        """
        grown = []
        for b, sequence in enumerate(self.sequences):
            new_keys, new_values = keys[b], values[b]
            if wanted is not None and not wanted[b].all():
                new_keys, new_values = new_keys[:, wanted[b]], new_values[:, wanted[b]]
            if new_keys.shape[1]:
                sequence = sequence.added(self.keeping, new_keys, new_values)
            grown.append(sequence)
        return Batch(self.keeping, grown, self)

    def truncated(self, wanted: Ints, sequence: int | None = None) -> Batch:
        """Return the first `wanted` keys, (B,), of each sequence, or of one."""
        kept = [
            old.truncated(self.keeping, int(length)) if sequence in (None, b) else old
            for b, (old, length) in enumerate(zip(self.sequences, wanted, strict=True))
        ]
        return Batch(self.keeping, kept, self)

    def reordered(self, numbers: Ints) -> Batch:
        """Return a batch whose sequence `i` is number ``numbers[i]`` of this one."""
        return Batch(self.keeping, [self.sequences[i] for i in numbers], self)

    def cleared(self) -> Batch | None:
        """Return the batch without keys: none at all, so that memory is free again."""
        return None

    def forked(self, numbers: Ints | None = None) -> Batch:
        """Return a batch of these sequences, by default all, that changes independently."""
        return self if numbers is None else self.reordered(numbers)

    def content(self, sequence: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the keys and values of a sequence in order of position, (H, length, d)."""
        return self.sequences[sequence].content(self.keeping)

    @cached_property
    def list_sizes(self) -> Ints:
        """Keys in each list, (B, H, L)."""
        codebook = self.keeping.codebook
        return self.lists.sizes.reshape(-1, codebook.heads, codebook.nlist)

    def memory(self) -> MemoryStatement:
        """Return what is held, each shared table counted once."""
        keeping = self.keeping
        pool, codebook = keeping.pool, keeping.codebook
        row = 2 * codebook.heads * codebook.d * pool.dtype.itemsize
        tables = {id(sequence.lists): sequence.lists.nbytes for sequence in self.sequences}
        runs = {id(run.held): run.held.pages.nbytes for s in self.sequences for run in (s.sinks, s.recent)}
        stacked = sum(array.nbytes for array in self.lists)
        return MemoryStatement(
            plain=int(self.lengths.sum()) * row,
            pages=pool.nbytes,
            used=pool.used * pool.page_nbytes,
            statistics=sum(tables.values()) + sum(runs.values()) + stacked,
        )

    @cached_property
    def lengths(self) -> Ints:
        """Keys of each sequence."""
        return np.array([sequence.length for sequence in self.sequences], np.int64)

    @cached_property
    def first(self) -> Ints:
        """Position of the first recent key of each sequence: keys between the sinks and it are in lists."""
        return np.array([sequence.recent.start for sequence in self.sequences], np.int64)

    @cached_property
    def long(self) -> Ints:
        """Keys in lists of each stream."""
        return self.first_of_streams - self.keeping.sinks

    @cached_property
    def first_of_streams(self) -> Ints:
        """`first` of each stream."""
        return self._by_head(self.first)

    @cached_property
    def is_long(self) -> bool:
        """Whether there are keys in lists."""
        return bool(self.long.any())

    @cached_property
    def _readings(self) -> dict[AttendParameters, Reading]:
        return {}

    def reading(self, params: AttendParameters) -> Reading:
        """Return what a step may read in each stream."""
        if params not in self._readings:
            codebook, element = self.keeping.codebook, self.keeping.pool.dtype.itemsize
            self._readings[params] = reading(
                params, self.long, codebook.code, codebook.nlist, element, codebook.shares
            )
        return self._readings[params]

    def _by_head(self, x: Ints) -> Ints:
        return np.repeat(x, self.keeping.codebook.heads)

    @cached_property
    def lists(self) -> PagedLists:
        """The lists of all streams."""
        codebook = self.keeping.codebook
        tables = [sequence.lists for sequence in self.sequences]
        sizes = np.stack([table.sizes for table in tables])
        counts = np.array([len(table.held.pages) for table in tables])
        starts = np.stack([table.starts for table in tables]) + (np.cumsum(counts) - counts)[:, None]
        squares = np.stack([table.squares for table in tables])
        streams = len(tables) * codebook.heads, codebook.nlist
        stacked: dict[str, NDArray[Any]] = {
            name: np.stack([getattr(table, name) for table in tables])
            for name in ("anchors", "anchor_scales", "means", "mean_scales")
        }
        slopes = np.stack([table.slopes for table in tables])
        return PagedLists(
            **{name: array.reshape(*streams, *array.shape[2:]) for name, array in stacked.items()},
            spreads=(squares / np.maximum(sizes, 1)).astype(np.float32).reshape(streams),
            slopes=slopes.reshape(streams[0], *slopes.shape[2:]),
            sizes=sizes.reshape(streams),
            starts=starts.reshape(streams),
            table=np.concatenate([table.held.pages for table in tables]),
        )

    def lists_for(self, params: AttendParameters) -> PagedLists:
        """Return the lists of all streams, without slopes where these are not to be taken."""
        if params not in self._lists_for:
            codebook, element = self.keeping.codebook, self.keeping.pool.dtype.itemsize
            taken = takes_slopes(params, self.long, codebook.code, element)
            lists = self.lists
            if not taken.all():
                lists = lists._replace(slopes=np.where(taken[:, None, None], lists.slopes, np.float32(0)))
            self._lists_for[params] = lists
        return self._lists_for[params]

    @cached_property
    def _lists_for(self) -> dict[AttendParameters, PagedLists]:
        return {}

    @cached_property
    def _near_pages(self) -> NDArray[np.int32]:
        heads, split = self.keeping.codebook.heads, self._sink_pages
        most = max((sequence.recent.held.pages.shape[1] for sequence in self.sequences), default=0)
        pages = np.full((len(self.sequences), heads, split + most), -1, np.int32)
        for all_pages, sequence in zip(pages, self.sequences, strict=True):
            sinks, recent = sequence.sinks.held.pages, sequence.recent.held.pages
            all_pages[:, : sinks.shape[1]] = sinks
            all_pages[:, split : split + recent.shape[1]] = recent
        return pages.reshape(len(self.sequences) * heads, split + most)

    @property
    def _sink_pages(self) -> int:
        return -(-self.keeping.sinks // LANES)

    @cached_property
    def near(self) -> Near:
        """Sinks and recent keys of all streams."""
        recent = self._by_head(np.maximum(self.lengths - self.first, 0))
        return Near(self._near_pages, self._sink_pages, self._sinks, self.first_of_streams, recent)

    @cached_property
    def newest(self) -> Ints:
        """Position of the newest key of each stream, (S, 1)."""
        return self._by_head(self.lengths - 1)[:, None]

    def any_early(self, last: Ints) -> bool:
        """Whether queries that see keys up to `last`, (S, t), lie before the window, and keys in lists after
        it.
        """
        early = (last < self.first_of_streams[:, None] - 1) & (self.long > 0)[:, None]
        return bool(early.any())

    def list_order(self, page_size: int, near: bool) -> Ints:
        """See `AttentionStore.list_order`."""
        heads, sinks = self.keeping.codebook.heads, self.keeping.sinks
        lists, pages = self.lists, self.keeping.pool.pages
        room = -(-lists.sizes // page_size) * page_size
        starts, ends = np.cumsum(room, axis=1) - room, room.sum(axis=1)
        close = [
            np.concatenate([np.arange(min(sinks, s.length)), np.arange(s.recent.start, s.length)])
            for s in self.sequences
        ]
        most = max(int(ends[b * heads : (b + 1) * heads].max()) + near * len(c) for b, c in enumerate(close))
        order = np.full((len(ends), -(-most // page_size) * page_size), -1, np.int64)
        for stream, sizes in enumerate(lists.sizes):
            rows, labels = lists.rows(stream, sizes)
            place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            order[stream, starts[stream][labels] + place] = pages.take("ids", rows)
            if near:
                kept = close[stream // heads]
                order[stream, ends[stream] : ends[stream] + len(kept)] = kept
        return order.reshape(len(self.sequences), heads, -1)

    @cached_property
    def _sinks(self) -> Ints:
        return self._by_head(np.array([sequence.sinks.count for sequence in self.sequences], np.int64))

    @cached_property
    def nothing_near(self) -> Near:
        """No key at all, where another runtime attends to the near ones."""
        none = np.zeros(len(self.long), np.int64)
        return Near(np.empty((len(none), 0), np.int32), 0, none, none, none)


def _same_pages(one: Sequence, other: Sequence) -> bool:
    return one.sinks.held is other.sinks.held and one.recent.held is other.recent.held
