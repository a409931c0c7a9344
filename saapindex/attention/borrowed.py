"""Sequences whose keys and values stay in the cache of another runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.cache import PagedCache
from saapindex.attention.near import Run
from saapindex.attention.sequence import Keeping
from saapindex.backends.base import Ints
from saapindex.lists.paged import PagePool

__all__ = ["CodePool", "Span", "borrowing"]


class CodePool(PagePool):
    """Pages of codes and positions alone."""

    def __init__(self, dtype: Any, words: int, span: int) -> None:
        super().__init__(0, dtype, words, span)


class _Borrowed:
    """A `CodePool` as one sequence sees it: keys and values come from the slots of a cache."""

    def __init__(self, pool: CodePool, cache: PagedCache, slots: Ints) -> None:
        self._pool, self._cache, self._slots = pool, cache, slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def vectors(self, field: str, rows: Ints, heads: Ints) -> NDArray[Any]:
        """See `PagePool.vectors`."""
        return self._cache.take(field, self._slots[self._pool.pages.take("ids", rows)], heads)

    def consecutive(self, field: str, first: int, last: int) -> NDArray[Any]:
        """Return keys or values of positions ``first : last``, (H, last - first, d)."""
        heads = np.arange(self._cache.heads)[:, None]
        return self._cache.take(field, self._slots[first:last], heads)

    def forget(self) -> None:
        """Let go of the slots: page sets that were made here live longer than they are good for."""
        self._slots = np.empty(0, np.int64)

    def write(
        self,
        rows: Ints,
        keys: NDArray[Any],
        values: NDArray[Any],
        ids: Ints,
        words: NDArray[np.uint32] | None = None,
        exponents: NDArray[np.uint8] | None = None,
    ) -> None:
        """See `PagePool.write`; keys and values are where they were."""
        self._pool.write(rows, keys[:, :0], values[:, :0], ids, words, exponents)


@contextlib.contextmanager
def borrowing(keeping: Keeping, cache: PagedCache, slots: Ints) -> Iterator[Keeping]:
    """Give how a sequence is kept whose token at position `i` is in slot ``slots[i]`` of `cache`.

    What is made of it stays good afterwards, but cannot read keys any more.
    """
    pool = _Borrowed(cast(CodePool, keeping.pool), cache, slots)
    try:
        yield replace(keeping, pool=cast(PagePool, pool))
    finally:
        pool.forget()


@dataclass(frozen=True, eq=False)
class Span(Run):
    """Consecutive keys of a sequence, which are not held: only where they begin, and how many they are."""

    def taken(self, pool: PagePool, field: str, first: int, last: int) -> NDArray[Any]:
        """See `Run.taken`."""
        return cast(_Borrowed, pool).consecutive(field, first, last)

    def appended(self, pool: PagePool, keys: NDArray[Any], values: NDArray[Any]) -> Span:
        """See `Run.appended`."""
        return Span(self.held, self.start, self.count + keys.shape[1])  # each token of a decode comes here

    def without_first(self, pool: PagePool, count: int) -> Span:
        """See `Run.without_first`."""
        return replace(self, start=self.start + count, count=self.count - count)

    def first(self, pool: PagePool, count: int) -> Span:
        """See `Run.first`."""
        return replace(self, count=count)

    def after(self, pool: PagePool, front: Run) -> Span:
        """See `Run.after`."""
        return replace(self, start=front.start, count=front.count + self.count)
