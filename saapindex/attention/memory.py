"""What an attention index holds in memory."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryStatement"]


@dataclass(frozen=True, kw_only=True)
class MemoryStatement:
    """Bytes held by an index, beside what its keys and values alone would take.

    Attributes
    ----------
    plain
        Keys and values of all sequences in plain arrays, shared ones counted for each that has them.
    pages
        The pool: keys, values, codes and ids, in pages that are in use and in free ones. An index and its
        forks share it.
    used
        Of these, pages that are in use.
    statistics
        Statistics of lists and tables of pages.

    Examples
    --------
    >>> MemoryStatement(plain=1000, pages=1100, used=1050, statistics=50).overhead
    1.15
    """

    plain: int
    pages: int
    used: int
    statistics: int

    @property
    def total(self) -> int:
        """All bytes held."""
        return self.pages + self.statistics

    @property
    def overhead(self) -> float:
        """Bytes held over those of plain keys and values; infinite without keys."""
        return self.total / self.plain if self.plain else float("inf")
