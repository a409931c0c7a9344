"""One sequence: its sinks, its recent keys, and the lists that hold all keys between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.layer import LayerCodebook
from saapindex.attention.near import Run
from saapindex.attention.table import Table
from saapindex.backends.base import LANES, Ops
from saapindex.lists.paged import PagePool

__all__ = ["Keeping", "Sequence"]

_SLACK = LANES
"""Keys kept beyond the window, so that taking back a few tokens fetches nothing from the lists."""


@dataclass(frozen=True, eq=False)
class Keeping:
    """How sequences are kept: what `AttentionIndex` was made with, and the pool of pages."""

    codebook: LayerCodebook
    pool: PagePool
    ops: Ops
    window: int
    sinks: int
    flush: int
    adapt: int
    dense_below: int


@dataclass(frozen=True, eq=False)
class Sequence:
    """The keys of one sequence; a value, so a change makes a new one and a change that fails is lost.

    Attributes
    ----------
    length
        Keys held; the next one gets this position.
    sinks
        The first keys.
    recent
        The last keys: at least the window, and all but the sinks while the lists are empty.
    lists
        Those between.
    """

    length: int
    sinks: Run
    recent: Run
    lists: Table

    @classmethod
    def empty(cls, keeping: Keeping, run: type[Run] = Run) -> Sequence:
        """Return a sequence without keys, whose sinks and recent keys are held in a `run`."""
        pool, heads = keeping.pool, keeping.codebook.heads
        return cls(
            0,
            run.empty(pool, heads, 0),
            run.empty(pool, heads, keeping.sinks),
            Table.empty(keeping.codebook, pool),
        )

    def added(self, keeping: Keeping, keys: NDArray[Any], values: NDArray[Any]) -> Sequence:
        """Return the sequence with keys and values, (H, m, d), at its end."""
        pool, length = keeping.pool, self.length + keys.shape[1]
        split = max(0, keeping.sinks - self.sinks.count)
        sinks = self.sinks.appended(pool, keys[:, :split], values[:, :split])
        keys, values = keys[:, split:], values[:, split:]
        first = self._window_start(keeping, self.recent.end + keys.shape[1])
        leaving = first - self.recent.start
        if not leaving:
            return Sequence(length, sinks, self.recent.appended(pool, keys, values), self.lists)
        old = min(leaving, self.recent.count)
        start = self.recent.start
        entering_keys, entering_values = (
            np.concatenate(
                [self.recent.taken(pool, field, start, start + old), new[:, : leaving - old]], axis=1
            )
            for field, new in (("keys", keys), ("values", values))
        )
        lists = self.lists.entered(
            keeping.codebook,
            pool,
            entering_keys,
            entering_values,
            self.recent.start,
            adapt=keeping.adapt,
            ops=keeping.ops,
        )
        recent = self.recent.empty(pool, len(keys), first)
        if old < self.recent.count:
            recent = self.recent.without_first(pool, old)
        recent = recent.appended(pool, keys[:, leaving - old :], values[:, leaving - old :])
        return Sequence(length, sinks, recent, lists)

    def flushes(self, keeping: Keeping, count: int) -> bool:
        """Return whether keys enter the lists when `count` are added."""
        sinks = max(0, keeping.sinks - self.sinks.count)
        return self._window_start(keeping, self.recent.end + max(0, count - sinks)) != self.recent.start

    def _window_start(self, keeping: Keeping, length: int) -> int:
        """Return the first position that stays out of the lists when the sequence has grown to `length`."""
        start, kept = self.recent.start, keeping.window + _SLACK
        if length < keeping.dense_below and start == keeping.sinks:
            return start
        if length - start < kept + keeping.flush:
            return start
        return keeping.sinks + (length - kept - keeping.sinks) // LANES * LANES

    def content(self, keeping: Keeping) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return all keys and values in order of position, (H, length, d), as they are stored."""
        pool, first, last = keeping.pool, keeping.sinks, self.recent.start
        between = self.lists.between(pool, first, last, keeping.codebook.heads)
        keys, values = (
            np.concatenate(
                [
                    self.sinks.taken(pool, name, 0, self.sinks.end),
                    middle,
                    self.recent.taken(pool, name, last, self.recent.end),
                ],
                axis=1,
            )
            for name, middle in zip(("keys", "values"), between, strict=True)
        )
        return keys, values

    def truncated(self, keeping: Keeping, length: int) -> Sequence:
        """Return the first `length` keys of the sequence.

        Keys come back from the lists where the window would be short of them, and all of them where the
        sequence is now so short that it is attended to densely.
        """
        if length >= self.length:
            return self
        pool, sinks, start = keeping.pool, keeping.sinks, self.recent.start
        if length <= sinks:
            short = Sequence.empty(keeping, type(self.recent))
            return Sequence(length, self.sinks.first(pool, length), short.recent, short.lists)
        first = start
        if length < keeping.dense_below - keeping.flush:
            first = sinks
        elif length - start < keeping.window:
            wanted = max(0, length - keeping.window - _SLACK - sinks)
            first = min(start, sinks + wanted // LANES * LANES)
        kept = self.recent.first(pool, max(0, length - start))
        if first == start:
            return Sequence(length, self.sinks, kept, self.lists)
        back = self.lists.between(pool, first, min(length, start), keeping.codebook.heads)
        front = self.recent.empty(pool, keeping.codebook.heads, first).appended(pool, *back)
        lists = self.lists.before(keeping.codebook, pool, first, ops=keeping.ops)
        recent = kept.after(pool, front) if kept.count else front
        return Sequence(length, self.sinks, recent, lists)
