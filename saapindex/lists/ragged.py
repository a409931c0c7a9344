"""Ragged inverted lists in one pool: each list is one run of whole blocks, with room to grow.

Every change returns new lists and leaves the old ones as they were, so a change that fails halfway is lost
without a trace, and a reader keeps what it holds. Old and new share a pool, so only the newest may be
appended to. Appending writes only to rows that no list uses yet, and copies nothing but the lists that
outgrow their room (twice the room each time) and, when the pool is full, the pool: an amortised constant
a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.base import LANES, Ints, Lists

__all__ = ["InvertedLists", "ranges"]


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate ``arange(start, start + length)`` of each pair.

    Examples
    --------
    >>> ranges(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """The keys of `nlist` lists.

    Attributes
    ----------
    vectors
        float32 or float16, (blocks, d, LANES): row `r` is lane ``r % LANES`` of block ``r // LANES``.
    ids, positions
        int64, (rows,).
    offsets, sizes, room
        int64, (nlist,): list `j` is rows ``offsets[j] : offsets[j] + sizes[j]`` and may grow to ``room[j]``;
        offsets and room are whole blocks.
    used
        Rows of the pool that are given out.
    """

    vectors: NDArray[np.floating[Any]]
    ids: Ints
    positions: Ints
    offsets: Ints
    sizes: Ints
    room: Ints
    used: int

    @classmethod
    def empty(cls, nlist: int, d: int, dtype: DTypeLike = np.float32) -> InvertedLists:
        """Return lists without keys, to hold keys of `dtype`.

        Examples
        --------
        >>> InvertedLists.empty(4, 8).ntotal
        0
        """
        rows, zeros = np.zeros(0, np.int64), np.zeros(nlist, np.int64)
        return cls(np.zeros((0, d, LANES), dtype), rows, rows, zeros, zeros, zeros, 0)

    @cached_property
    def ntotal(self) -> int:
        """Keys in all lists."""
        return int(self.sizes.sum())

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        arrays = (self.vectors, self.ids, self.positions, self.offsets, self.sizes, self.room)
        return sum(array.nbytes for array in arrays)

    @cached_property
    def view(self) -> Lists:
        """The lists as kernels see them."""
        return Lists(self.vectors, self.ids, self.offsets, self.sizes)

    def rows(self) -> Ints:
        """Return the rows in use, list by list."""
        return ranges(self.offsets, self.sizes)

    def labels(self) -> Ints:
        """Return the list of each row that `rows` returns."""
        return np.repeat(np.arange(len(self.sizes), dtype=np.int64), self.sizes)

    @cached_property
    def _by_id(self) -> tuple[Ints, Ints]:
        """Ids in rising order, and their rows."""
        rows = self.rows()
        order = np.argsort(self.ids[rows], kind="stable")
        return self.ids[rows][order], rows[order]

    def contains(self, ids: Ints) -> NDArray[np.bool_]:
        """Return which of `ids` are in the lists."""
        known, _ = self._by_id
        if not known.size:
            return np.zeros(len(ids), np.bool_)
        place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return known[place] == ids  # type: ignore[no-any-return]

    def find(self, ids: Ints) -> Ints:
        """Return the rows of `ids`, all of which are in the lists."""
        known, rows = self._by_id
        return rows[np.searchsorted(known, ids)]

    def append(self, x: NDArray[np.float32], ids: Ints, positions: Ints, labels: Ints) -> InvertedLists:
        """Return the lists with row `i` of `x` at the end of list ``labels[i]``."""
        order, counts = _group(labels, len(self.sizes))
        grown = self._with_room(self.sizes + counts)
        target = ranges(grown.offsets + grown.sizes, counts)
        grown.vectors[target // LANES, :, target % LANES] = x[order]
        grown.ids[target] = ids[order]
        grown.positions[target] = positions[order]
        return InvertedLists(
            grown.vectors,
            grown.ids,
            grown.positions,
            grown.offsets,
            grown.sizes + counts,
            grown.room,
            grown.used,
        )

    def keep(self, mask: NDArray[np.bool_]) -> InvertedLists:
        """Return compact lists of the rows where `mask`, in the order of `rows`, is true."""
        rows, labels = self.rows()[mask], self.labels()[mask]
        nothing = InvertedLists.empty(len(self.sizes), self.vectors.shape[1], self.vectors.dtype)
        return nothing.append(self.keys(rows), self.ids[rows], self.positions[rows], labels)

    def keys(self, rows: Ints) -> NDArray[np.float32]:
        """Return the keys at `rows`, float32 (n, d)."""
        return self.view.rows(rows).astype(np.float32, copy=False)

    def _with_room(self, needed: Ints) -> InvertedLists:
        """Return the same lists with room for `needed` keys each."""
        short = needed > self.room
        if not short.any():
            return self
        # A list gets just what it needs the first time, and twice of it when it moves.
        wanted = np.where(self.sizes > 0, 2 * needed, needed)
        room = np.where(short, -(-wanted // LANES) * LANES, self.room)
        demand = int(room[short].sum())
        if self.used + demand > len(self.ids):
            return self._moved_to_new_pool(room)
        offsets = self.offsets.copy()
        offsets[short] = self.used + np.cumsum(room[short]) - room[short]
        self._copy_to(self, np.flatnonzero(short), offsets)
        return InvertedLists(
            self.vectors, self.ids, self.positions, offsets, self.sizes, room, self.used + demand
        )

    def _moved_to_new_pool(self, room: Ints) -> InvertedLists:
        used = int(room.sum())
        # Tight when filled at once; half as much again once keys arrive bit by bit.
        pool = used if self.used == 0 else used + used // 2
        pool = -(-pool // LANES) * LANES
        offsets = np.cumsum(room) - room
        vectors = np.zeros((pool // LANES, *self.vectors.shape[1:]), self.vectors.dtype)
        ids, positions = np.zeros(pool, np.int64), np.zeros(pool, np.int64)
        moved = InvertedLists(vectors, ids, positions, offsets, self.sizes, room, used)
        self._copy_to(moved, np.arange(len(room)), offsets)
        return moved

    def _copy_to(self, other: InvertedLists, lists: Ints, offsets: Ints) -> None:
        """Copy some lists, as whole blocks, to `offsets` in the pool of `other`."""
        blocks = -(-self.sizes[lists] // LANES)
        source = ranges(self.offsets[lists] // LANES, blocks)
        target = ranges(offsets[lists] // LANES, blocks)
        other.vectors[target] = self.vectors[source]
        for array, copy in ((self.ids, other.ids), (self.positions, other.positions)):
            copy.reshape(-1, LANES)[target] = array.reshape(-1, LANES)[source]


def _group(labels: Ints, nlist: int) -> tuple[Ints, Ints]:
    """Stable order of the rows by label, and how many have each label."""
    # NumPy's stable sort is a radix sort, linear in n, for 16-bit integers.
    small = labels.astype(np.uint16) if nlist <= 1 << 16 else labels
    return np.argsort(small, kind="stable"), np.bincount(labels, minlength=nlist)
