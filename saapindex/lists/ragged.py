"""Ragged inverted lists in one pool: each list is one run of whole blocks, with room to grow.

Every change returns new lists and leaves the old ones as they were, so a change that fails halfway is lost
without a trace, and a reader keeps what it holds. Old and new share a pool, so only the newest may be
appended to. Appending writes only to rows that no list uses yet, and copies nothing but the lists that
outgrow their room (twice the room each time) and, when the pool is full, the pool: an amortised constant
a key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.base import LANES, Ints, Lists

__all__ = ["InvertedLists", "KeyCodes", "Stored", "ranges"]


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate ``arange(start, start + length)`` of each pair.

    Examples
    --------
    >>> ranges(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


class KeyCodes(NamedTuple):
    """Codes of `n` keys: words (n, W) uint32, exponents (n, 1) uint8, norms (n, 0 or 1) float32."""

    words: NDArray[np.uint32]
    exponents: NDArray[np.uint8]
    norms: NDArray[np.float32]

    def take(self, order: Ints) -> KeyCodes:
        """Return the codes in another order."""
        return KeyCodes(self.words[order], self.exponents[order], self.norms[order])


class Stored(NamedTuple):
    """What is stored of keys, in blocks of `LANES` rows; what is not stored has a width of zero.

    Attributes
    ----------
    vectors
        float32 or float16, (blocks, d, LANES): keys to scan; row `r` is lane ``r % LANES`` of block
        ``r // LANES``.
    exact
        float32 or float16, (blocks, LANES, d): keys to fetch one by one.
    words, exponents, norms
        (blocks, W, LANES) uint32, (blocks, 1, LANES) uint8 and (blocks, 1, LANES) float32: codes to scan.
    """

    vectors: NDArray[np.floating[Any]]
    exact: NDArray[np.floating[Any]]
    words: NDArray[np.uint32]
    exponents: NDArray[np.uint8]
    norms: NDArray[np.float32]

    @classmethod
    def zeros(cls, blocks: int, like: Stored) -> Stored:
        """Return `blocks` blocks of zeros of the same widths."""
        return cls(*(np.zeros((blocks, *part.shape[1:]), part.dtype) for part in like))

    def write(self, rows: Ints, x: NDArray[np.floating[Any]], codes: KeyCodes | None) -> None:
        """Put keys `x`, (n, d), and their codes at `rows`."""
        block, lane = rows // LANES, rows % LANES
        if self.vectors.shape[1]:
            self.vectors[block, :, lane] = x
        if self.exact.shape[2]:
            self.exact[block, lane] = x
        if codes is not None:
            self.words[block, :, lane] = codes.words
            self.exponents[block, :, lane] = codes.exponents
            self.norms[block, :, lane] = codes.norms

    def keys(self, rows: Ints) -> NDArray[np.floating[Any]]:
        """Return the keys at `rows`, (n, d); (n, 0) where only codes are stored."""
        if self.exact.shape[2]:
            return self.exact[rows // LANES, rows % LANES]
        return self.vectors[rows // LANES, :, rows % LANES]

    def codes(self, rows: Ints) -> KeyCodes | None:
        """Return the codes at `rows`, if codes are stored."""
        if not self.words.shape[1]:
            return None
        block, lane = rows // LANES, rows % LANES
        return KeyCodes(
            self.words[block, :, lane], self.exponents[block, :, lane], self.norms[block, :, lane]
        )


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """The keys of `nlist` lists.

    Attributes
    ----------
    stored
        The pool: keys, codes or both.
    ids, positions
        int64, (rows,).
    offsets, sizes, room
        int64, (nlist,): list `j` is rows ``offsets[j] : offsets[j] + sizes[j]`` and may grow to ``room[j]``;
        offsets and room are whole blocks.
    used
        Rows of the pool that are given out.
    """

    stored: Stored
    ids: Ints
    positions: Ints
    offsets: Ints
    sizes: Ints
    room: Ints
    used: int

    @classmethod
    def empty(
        cls,
        nlist: int,
        d: int,
        dtype: DTypeLike = np.float32,
        *,
        words: int = 0,
        norms: bool = False,
        exact: bool = True,
    ) -> InvertedLists:
        """Return lists without keys, to hold keys of `dtype`, or codes of `words` words.

        Parameters
        ----------
        nlist, d
            Number of lists, and dimension of keys.
        dtype
            Of the keys.
        words
            Words of a code; without any, keys are scanned.
        norms
            Whether a code has a norm.
        exact
            Whether keys are stored beside their codes.

        Examples
        --------
        >>> InvertedLists.empty(4, 8).ntotal
        0
        """
        stored = Stored(
            np.zeros((0, 0 if words else d, LANES), dtype),
            np.zeros((0, LANES, d if words and exact else 0), dtype),
            np.zeros((0, words, LANES), np.uint32),
            np.zeros((0, int(words > 0), LANES), np.uint8),
            np.zeros((0, int(norms), LANES), np.float32),
        )
        rows, zeros = np.zeros(0, np.int64), np.zeros(nlist, np.int64)
        return cls(stored, rows, rows, zeros, zeros, zeros, 0)

    @property
    def vectors(self) -> NDArray[np.floating[Any]]:
        """The keys that are scanned, (blocks, d, LANES)."""
        return self.stored.vectors

    @cached_property
    def ntotal(self) -> int:
        """Keys in all lists."""
        return int(self.sizes.sum())

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        arrays = (*self.stored, self.ids, self.positions, self.offsets, self.sizes, self.room)
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

    def labels_at(self, rows: Ints) -> Ints:
        """Return the list of each of `rows`, all of which are in use."""
        held = np.flatnonzero(self.sizes > 0)
        held = held[np.argsort(self.offsets[held])]
        found: Ints = held[np.searchsorted(self.offsets[held], rows, side="right") - 1]
        return found

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

    def allowed(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint16], Ints]:
        """Return the lanes of each block that `mask`, in the order of `rows`, allows; and how many a list."""
        lanes = np.zeros(len(self.ids), np.bool_)
        lanes[self.rows()] = mask
        bits = np.packbits(lanes.reshape(-1, LANES), axis=1, bitorder="little").view("<u2")[:, 0]
        counts = np.concatenate([[0], np.cumsum(mask)])
        ends = np.cumsum(self.sizes)
        return bits.astype(np.uint16), counts[ends] - counts[ends - self.sizes]

    def append(
        self,
        x: NDArray[np.floating[Any]],
        ids: Ints,
        positions: Ints,
        labels: Ints,
        codes: KeyCodes | None = None,
    ) -> InvertedLists:
        """Return the lists with row `i` of `x`, and of its codes, at the end of list ``labels[i]``."""
        order, counts = _group(labels, len(self.sizes))
        grown = self._with_room(self.sizes + counts)
        target = ranges(grown.offsets + grown.sizes, counts)
        coded = None if codes is None else codes.take(order)
        grown.stored.write(target, x[order], coded)
        grown.ids[target] = ids[order]
        grown.positions[target] = positions[order]
        return replace(grown, sizes=grown.sizes + counts)

    def keep(self, mask: NDArray[np.bool_]) -> InvertedLists:
        """Return compact lists of the rows where `mask`, in the order of `rows`, is true."""
        rows, labels = self.rows()[mask], self.labels()[mask]
        return self.cleared().append(
            self.stored.keys(rows), self.ids[rows], self.positions[rows], labels, self.stored.codes(rows)
        )

    def cleared(self) -> InvertedLists:
        """Return lists without keys, to hold the same."""
        none, zeros = np.zeros(0, np.int64), np.zeros(len(self.sizes), np.int64)
        return InvertedLists(Stored.zeros(0, self.stored), none, none, zeros, zeros, zeros, 0)

    def compact(self) -> InvertedLists:
        """Return a copy without room, list by list, with zeros in the lanes that no list uses."""
        room = -(-self.sizes // LANES) * LANES
        moved = self._in_new_pool(room, int(room.sum()))
        rest = ranges(moved.offsets + moved.sizes, room - moved.sizes)
        for part in (moved.stored.vectors, *moved.stored[2:]):
            part[rest // LANES, :, rest % LANES] = 0
        moved.stored.exact[rest // LANES, rest % LANES] = 0
        moved.ids[rest] = moved.positions[rest] = 0
        return moved

    @classmethod
    def packed(cls, stored: Stored, ids: Ints, positions: Ints, sizes: Ints) -> InvertedLists:
        """Return the lists that `compact` made these arrays of; appending to them copies the pool first."""
        room = -(-sizes // LANES) * LANES
        return cls(stored, ids, positions, np.cumsum(room) - room, sizes, room, int(room.sum()))

    def keys(self, rows: Ints) -> NDArray[np.float32]:
        """Return the keys at `rows`, float32 (n, d); (n, 0) where only codes are stored."""
        return self.stored.keys(rows).astype(np.float32, copy=False)

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
        return replace(self, offsets=offsets, room=room, used=self.used + demand)

    def _moved_to_new_pool(self, room: Ints) -> InvertedLists:
        used = int(room.sum())
        # Tight when filled at once; half as much again once keys arrive bit by bit.
        pool = used if self.used == 0 else used + used // 2
        return self._in_new_pool(room, -(-pool // LANES) * LANES)

    def _in_new_pool(self, room: Ints, pool: int) -> InvertedLists:
        offsets = np.cumsum(room) - room
        stored = Stored.zeros(pool // LANES, self.stored)
        ids, positions = np.zeros(pool, np.int64), np.zeros(pool, np.int64)
        moved = InvertedLists(stored, ids, positions, offsets, self.sizes, room, int(room.sum()))
        self._copy_to(moved, np.arange(len(room)), offsets)
        return moved

    def _copy_to(self, other: InvertedLists, lists: Ints, offsets: Ints) -> None:
        """Copy some lists, as whole blocks, to `offsets` in the pool of `other`."""
        blocks = -(-self.sizes[lists] // LANES)
        source = ranges(self.offsets[lists] // LANES, blocks)
        target = ranges(offsets[lists] // LANES, blocks)
        parts: Any = zip(self.stored, other.stored, strict=True)
        for part, copy in parts:
            copy[target] = part[source]
        for array, copy in ((self.ids, other.ids), (self.positions, other.positions)):
            copy.reshape(-1, LANES)[target] = array.reshape(-1, LANES)[source]


def _group(labels: Ints, nlist: int) -> tuple[Ints, Ints]:
    """Stable order of the rows by label, and how many have each label."""
    # NumPy's stable sort is a radix sort, linear in n, for 16-bit integers.
    small = labels.astype(np.uint16) if nlist <= 1 << 16 else labels
    return np.argsort(small, kind="stable"), np.bincount(labels, minlength=nlist)
