"""Consecutive keys of one sequence, in pages of their own: its sinks, and its recent keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Ints
from saapindex.lists.paged import PagePool, PageSet

__all__ = ["Run"]


@dataclass(frozen=True, eq=False)
class Run:
    """Keys at positions ``start : start + count`` of every KV head; a value, so a change makes a new one.

    Attributes
    ----------
    held
        int32 pages, (H, pages), in order of position; all are full but the last.
    start, count
        Position of the first key, and how many there are.
    """

    held: PageSet
    start: int
    count: int

    @classmethod
    def empty(cls, pool: PagePool, heads: int, start: int) -> Run:
        """Return a run without keys that begins at `start`."""
        return cls(pool.allocate((heads, 0)), start, 0)

    @property
    def end(self) -> int:
        """Position after the last key."""
        return self.start + self.count

    def rows(self, first: int, last: int) -> Ints:
        """Return the rows of positions ``first : last``, (H, last - first)."""
        place = np.arange(first - self.start, last - self.start)
        rows: Ints = self.held.pages[:, place // LANES].astype(np.int64) * LANES + place % LANES
        return rows

    def appended(self, pool: PagePool, keys: NDArray[Any], values: NDArray[Any]) -> Run:
        """Return the run with keys and values, (H, m, d), at its end."""
        heads, m, d = keys.shape
        if not m:
            return self
        held, lane = self.held, self.count % LANES
        if lane and (pool.filled[held.pages[:, -1]] != lane).any():
            held = self._with_own_last_page(pool, lane)
        if lane and lane + m <= LANES:
            pool.fill(held.pages[:, -1], lane, keys, values, self.end)
            return Run(held, self.start, self.count + m)
        missing = -(-(self.count + m) // LANES) - held.pages.shape[1]
        if missing:
            fresh = pool.allocate((heads, missing))
            held = PageSet(pool, np.concatenate([held.pages, fresh.pages], axis=1))
        grown = Run(held, self.start, self.count + m)
        rows = grown.rows(self.end, grown.end).reshape(-1)
        ids = np.tile(np.arange(self.end, grown.end), heads)
        pool.write(rows, keys.reshape(-1, d), values.reshape(-1, d), ids)
        return grown

    def _with_own_last_page(self, pool: PagePool, lane: int) -> PageSet:
        """Return the pages with a copy of the last one, which another has filled further."""
        fresh = pool.allocate((len(self.held.pages), 1))
        source = self.rows(self.end - lane, self.end).reshape(-1)
        target = (fresh.pages.astype(np.int64) * LANES + np.arange(lane)).reshape(-1)
        taken = (pool.pages.take(field, source) for field in ("keys", "values", "ids"))
        pool.write(target, *taken)
        return PageSet(pool, np.concatenate([self.held.pages[:, :-1], fresh.pages], axis=1))

    def without_first(self, pool: PagePool, count: int) -> Run:
        """Return the run without its first `count` keys, a multiple of `LANES` or all."""
        left = self.held.pages[:, -(-count // LANES) :]
        return Run(PageSet(pool, left), self.start + count, self.count - count)

    def first(self, pool: PagePool, count: int) -> Run:
        """Return the first `count` keys of the run."""
        pages = self.held.pages[:, : -(-count // LANES)]
        held = self.held if pages.shape == self.held.pages.shape else PageSet(pool, pages)
        return Run(held, self.start, count)

    def after(self, pool: PagePool, front: Run) -> Run:
        """Return `front`, whose pages are all full, and this run behind it."""
        pages = np.concatenate([front.held.pages, self.held.pages], axis=1)
        return Run(PageSet(pool, pages), front.start, front.count + self.count)
