"""A pool of pages of keys, shared by sequences without copies.

A page is filled lane by lane, and a lane that has been filled is never written again while anybody holds
the page. So tables of pages can be shared freely: whoever wants to go on in a page that another has filled
further, or has cut back, takes a copy of it. Pages are held by `PageSet` objects and return to the pool
with the last of them.

The pool grows by chunks and never moves what it holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.base import LANES, Ints
from saapindex.backends.paged import Pages, by_number

__all__ = ["PagePool", "PageSet"]

_FIELDS = ("keys", "values", "codes", "exponents", "ids")


class PagePool:
    """Pages of `LANES` keys with their values, codes and ids.

    Parameters
    ----------
    d
        Dimension of keys and values.
    dtype
        float16, float32, or uint16 for bfloat16.
    words
        32-bit words of a key's code.
    span
        Pages that the pool grows by at a time.

    Attributes
    ----------
    filled
        int64, (pages,): lanes of each page that have been written.

    Examples
    --------
    >>> pool = PagePool(8, np.float16, 2, span=4)
    >>> pages = pool.allocate((3,))
    >>> pool.used, len(pool.filled)
    (3, 4)
    >>> del pages
    >>> pool.used
    0
    """

    def __init__(self, d: int, dtype: DTypeLike, words: int, span: int) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "keys": ((LANES, d), np.dtype(dtype)),
            "values": ((LANES, d), np.dtype(dtype)),
            "codes": ((words, LANES), np.dtype(np.uint32)),
            "exponents": ((LANES,), np.dtype(np.uint8)),
            "ids": ((LANES,), np.dtype(np.int32)),
        }
        self.d, self.words, self.span = d, words, span
        self.filled: Ints = np.zeros(0, np.int64)
        self._holders = np.zeros(0, np.int32)
        self._free = np.zeros(0, np.int32)
        self.pages = Pages((), (), (), (), (), np.zeros((len(_FIELDS), 0), np.int64), span)
        self._grow(1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored elements; uint16 for bfloat16."""
        return self._shapes["keys"][1]

    @property
    def used(self) -> int:
        """Pages that are held."""
        return len(self.filled) - len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes held, free pages included."""
        tables = self.filled.nbytes + self._holders.nbytes + self._free.nbytes
        return len(self.filled) * self.page_nbytes + tables

    def vectors(self, field: str, rows: Ints, heads: Ints) -> NDArray[Any]:
        """Return keys or values at `rows`, (n, d), which belong to KV heads `heads`, (n,)."""
        return self.pages.take(field, rows)

    def allocate(self, shape: tuple[int, ...]) -> PageSet:
        """Take empty pages; the numbers rise along `shape`, in memory too if the pool has just grown."""
        count = int(np.prod(shape))
        if count > len(self._free):
            self._grow(count - len(self._free))
        left = len(self._free) - count
        taken, self._free = self._free[left:][::-1].reshape(shape).copy(), self._free[:left]
        self.filled[taken] = 0
        return PageSet(self, taken)

    def _grow(self, count: int) -> None:
        count = -(-count // self.span)
        first, more = len(self.filled), count * self.span
        columns: dict[str, Any] = {
            name: (*getattr(self.pages, name), *chunks) for name, chunks in self._chunks(count).items()
        }
        addresses = [[chunk.ctypes.data for chunk in column] for column in columns.values()]
        filled, holders = np.pad(self.filled, (0, more)), np.pad(self._holders, (0, more))
        fresh = np.arange(first + more - 1, first - 1, -1, dtype=np.int32)
        free = np.concatenate([fresh, self._free])
        # Nothing below can fail, so a pool that could not grow is what it was.
        self.pages = Pages(**columns, addresses=np.array(addresses, np.int64), span=self.span)
        self.filled, self._holders, self._free = filled, holders, free

    def _chunks(self, count: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of `count` chunks, (count, span, ...) of each field, in one piece of memory.

        NumPy asks the system for huge pages where a piece is of some size: keys are read here and there, and
        for each the processor has to look up where its page lies.
        """
        pages, line, start = count * self.span, 64, 0
        memory = np.empty(pages * self.page_nbytes + line, np.uint8)
        memory = memory[-memory.ctypes.data % line :]
        found = {}
        for name, (shape, dtype) in self._shapes.items():
            end = start + pages * int(np.prod(shape)) * dtype.itemsize
            found[name] = memory[start:end].view(dtype).reshape(count, self.span, *shape)
            start = end
        return found

    def hold(self, pages: NDArray[np.int32]) -> None:
        """Count one holder more of each of `pages`, which are distinct."""
        self._holders[pages] += 1

    def release(self, pages: NDArray[np.int32]) -> None:
        """Count one holder less of each of `pages`; those without any are free."""
        self._holders[pages] -= 1
        idle = pages[self._holders[pages] == 0]
        if len(idle):
            self._free = np.concatenate([self._free, idle[::-1]])

    def write(
        self,
        rows: Ints,
        keys: NDArray[Any],
        values: NDArray[Any],
        ids: Ints,
        words: NDArray[np.uint32] | None = None,
        exponents: NDArray[np.uint8] | None = None,
    ) -> None:
        """Fill `rows`, (n,), with keys and values, (n, d), and their ids; codes are (n, W) and (n,)."""
        page, lane = np.divmod(rows, LANES)
        number, place = np.divmod(page, self.span)
        pages = self.pages
        for chunk, here in by_number(number):
            where = place[here], lane[here]
            pages.keys[chunk][where] = keys[here]
            pages.values[chunk][where] = values[here]
            pages.ids[chunk][where] = ids[here]
            if words is not None and exponents is not None:
                pages.codes[chunk][where[0], :, where[1]] = words[here]
                pages.exponents[chunk][where] = exponents[here]
        np.maximum.at(self.filled, page, lane + 1)

    def fill(
        self, pages: NDArray[np.int32], lane: int, keys: NDArray[Any], values: NDArray[Any], first: int
    ) -> None:
        """Fill lanes from `lane` on of each of `pages`, (H,), with keys and values, (H, m, d), that fit.

        Their ids are `first` and following.
        """
        end = lane + keys.shape[1]
        ids = np.arange(first, first + end - lane)
        for h, page in enumerate(pages.tolist()):  # few: a view costs less than to find out what is together
            chunk, place = divmod(page, self.span)
            self.pages.keys[chunk][place, lane:end] = keys[h]
            self.pages.values[chunk][place, lane:end] = values[h]
            self.pages.ids[chunk][place, lane:end] = ids
        self.filled[pages] = end


class PageSet:
    """Pages that are held as long as this object lives.

    Attributes
    ----------
    pages
        int32, any shape, distinct; never changed.
    """

    __slots__ = ("_pool", "pages")

    def __init__(self, pool: PagePool, pages: NDArray[np.int32]) -> None:
        pool.hold(pages.reshape(-1))
        self._pool, self.pages = pool, pages

    def __del__(self) -> None:
        if hasattr(self, "pages"):  # otherwise it never came to hold them
            self._pool.release(self.pages.reshape(-1))
