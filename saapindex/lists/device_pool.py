"""Pages of keys on a device: those that streams hold, and a stack of free ones that kernels take from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from saapindex.backends.base import LANES

__all__ = ["DevicePool"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
_FIELDS = ("keys", "values", "codes", "exponents", "ids")


class DevicePool:
    """Pages of `LANES` keys with their values, codes and ids; see `saapindex.backends.cuda.streams.Streams`.

    Parameters
    ----------
    xp
        ``cupy``, whose current device has the pages; or ``numpy``.
    d, dtype, words
        Dimension and type of keys and values, and words of a code.

    Attributes
    ----------
    holders
        (N,) int32: how many streams hold each page.
    free, available
        (N,) int32, of which the first ``available[0]`` are free pages.
    bound
        So many pages at least are free: what the host knows without waiting for the device.
    version, moved
        How often arrays of the pool, or of streams that have pages in it, have moved: on the host, and on the
        device, (1,) int32.
    captured
        Whether a graph may still know of arrays that have moved: then these are kept.
    shared
        Whether streams may share pages.
    """

    def __init__(self, xp: Any, d: int, dtype: DTypeLike, words: int) -> None:
        self.xp, self.d, self.words = xp, d, words
        self._shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "keys": ((LANES, d), dtype),
            "values": ((LANES, d), dtype),
            "codes": ((words, LANES), np.uint32),
            "exponents": ((LANES,), np.uint8),
            "ids": ((LANES,), np.int32),
        }
        self.arrays = {name: xp.empty((0, *shape), kind) for name, (shape, kind) in self._shapes.items()}
        self.holders, self.free = xp.zeros(0, np.int32), xp.zeros(0, np.int32)
        self.available = xp.zeros(1, np.int32)
        self.bound = 0
        self.version = 0
        self.moved = xp.zeros(1, np.int32)
        self.captured = False
        self._gone: list[Array] = []
        self.shared = False
        self._left: list[tuple[Array, Array]] = []

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self._shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes held, free pages included."""
        return len(self) * (self.page_nbytes + 8)

    @property
    def used(self) -> int:
        """Pages that are held. Waits for the device."""
        self.settle()
        return len(self) - self.bound

    def settle(self) -> None:
        """Take back the pages that nobody holds any more, and learn how many are free."""
        left, self._left = self._left, []  # more may be left while these are counted
        for pages, counts in left:
            self._count(pages[self.xp.arange(pages.shape[1]) < counts[:, None]], -1)
        if self.shared:
            self.shared = bool((self.holders > 1).any())
        idle = self.xp.flatnonzero(self.holders == 0).astype(np.int32)[::-1]
        self.free[: len(idle)] = idle
        self.available[0] = self.bound = len(idle)

    def _count(self, pages: Array, more: int) -> None:
        if len(pages):
            self.holders += more * self.xp.bincount(pages, minlength=len(self)).astype(np.int32)

    def hold(self, pages: Array) -> None:
        """Count one holder more of each of `pages`, (n,)."""
        self._count(pages, 1)

    def drop(self, pages: Array) -> None:
        """Count one holder less of each of `pages`, (n,)."""
        self._count(pages, -1)

    def abandon(self, pages: Array, counts: Array) -> None:
        """Drop the first `counts`, (S,), of `pages`, (S, P), at the next change; no work is done now."""
        self._left.append((pages, counts))

    def take(self, count: int) -> Array:
        """Return `count` pages, held once, (count,) int32."""
        self.ensure(count)
        taken = self.free[self.bound - count : self.bound].copy()
        self.bound -= count
        self.available[0] = self.bound
        self.holders[taken] = 1
        return taken

    def ensure(self, count: int) -> None:
        """See to it that `count` pages are free, and know how many are; waits for the device."""
        self.settle()
        if self.bound < count:
            self._grow(max(count - self.bound, len(self) // 4))

    def _grow(self, more: int) -> None:
        xp, old = self.xp, len(self)
        for name, (shape, kind) in self._shapes.items():
            if len(self.arrays[name]) < old + more:  # not so if an attempt to grow has failed halfway
                grown = xp.empty((old + more, *shape), kind)
                grown[:old] = self.arrays[name][:old]
                self.move(self.arrays[name])
                self.arrays[name] = grown
        holders, free = xp.zeros(old + more, np.int32), xp.empty(old + more, np.int32)
        holders[:old] = self.holders
        self.move(self.holders, self.free)
        self.holders, self.free = holders, free
        self.settle()

    def move(self, *old: Array) -> None:
        """Note that others have taken the place of these arrays: graphs of these do nothing any more."""
        self.version += 1
        self.moved[...] = self.version
        if self.captured:
            self._gone.extend(old)
