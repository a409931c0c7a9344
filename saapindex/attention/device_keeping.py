"""How sequences are kept on a CUDA device, and what is asked of the device itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saapindex.attention.device_book import DeviceBook
from saapindex.attention.streams import kept_near, ring_places
from saapindex.backends.base import LANES, Ints
from saapindex.errors import DeviceMemoryError
from saapindex.lists.device_pool import DevicePool

__all__ = ["DeviceKeeping", "allocating", "capturing"]


@dataclass(frozen=True, eq=False)
class DeviceKeeping:
    """How sequences are kept on a device: what `AttentionIndex` was made with, and the pool of pages.

    Attributes
    ----------
    xp
        ``cupy``, with the right device current; or ``numpy``.
    """

    book: DeviceBook
    pool: DevicePool
    dtype: str
    window: int
    sinks: int
    flush: int
    adapt: int
    dense_below: int
    xp: Any

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.book.codebook.heads

    @property
    def ring(self) -> int:
        """Places of the ring."""
        return ring_places(self.window, self.flush, self.dense_below)

    def window_start(self, length: Ints, first: Ints) -> Ints:
        """Return the first position that stays out of the lists, see `Sequence`."""
        kept = kept_near(self.window)
        end = np.maximum(length, self.sinks)
        stays = ((end < self.dense_below) & (first == self.sinks)) | (end - first < kept + self.flush)
        moved = self.sinks + (end - kept - self.sinks) // LANES * LANES
        return np.where(stays, first, moved)

    def truncated_start(self, length: int, first: int) -> int:
        """Return the first position out of the lists after a cut, see `Sequence.truncated`."""
        sinks, window = self.sinks, self.window
        if length <= sinks or length < self.dense_below - self.flush:
            return sinks
        if length - first < window:
            return min(first, sinks + max(0, length - kept_near(window) - sinks) // LANES * LANES)
        return first


def capturing(xp: Any) -> bool:
    """Whether the current stream is being captured in a graph."""
    return xp is not np and xp.cuda.get_current_stream().is_capturing()


@contextlib.contextmanager
def allocating(what: str) -> Iterator[None]:
    """Say what was needed where the memory of the device is too small for it."""
    try:
        yield
    except MemoryError as error:  # CuPy's OutOfMemoryError is one
        raise DeviceMemoryError(f"the device has no memory for {what}: {error}") from error
