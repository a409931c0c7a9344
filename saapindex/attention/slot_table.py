"""The slots of a sequence: a row that grows at its end, of which several sequences may hold the beginning."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from saapindex.backends.base import Ints

__all__ = ["SlotTable"]

_SPARE = 64


@dataclass(eq=False)
class _Buffer:
    places: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    used: int = 0


class SlotTable:
    """The slot of each token of a sequence; a value, though what follows it may be written behind it.

    Examples
    --------
    >>> one = SlotTable().appended(np.array([7, 3]))
    >>> other, again = one.appended(np.array([4])), one.appended(np.array([5]))
    >>> one.slots.tolist(), other.slots.tolist(), again.slots.tolist()
    ([7, 3], [7, 3, 4], [7, 3, 5])
    """

    def __init__(self, buffer: _Buffer | None = None, n: int = 0) -> None:
        self._buffer = _Buffer() if buffer is None else buffer
        self.slots: Ints = self._buffer.places[:n]

    @classmethod
    def of(cls, slots: Ints) -> SlotTable:
        """Return a table of `slots`, which nobody else may change."""
        return cls(_Buffer(slots, len(slots)), len(slots))

    def __len__(self) -> int:
        return len(self.slots)

    def appended(self, new: Ints) -> SlotTable:
        """Return the table with `new` slots at its end; copied only where another was written there."""
        n, buffer = len(self.slots), self._buffer
        end = n + len(new)
        if buffer.used != n or end > len(buffer.places):
            buffer = _Buffer(np.empty(end + end // 16 + _SPARE, np.int64))
            buffer.places[:n] = self.slots
        buffer.places[n:end] = new
        buffer.used = end
        return SlotTable(buffer, end)

    def first(self, n: int) -> SlotTable:
        """Return the first `n` slots."""
        return self if n >= len(self.slots) else SlotTable(self._buffer, n)

    @property
    def places(self) -> Ints:
        """All that is held for it, and for those that share it."""
        return self._buffer.places
