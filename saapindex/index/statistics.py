"""What searches read, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["SearchStatistics"]


@dataclass
class SearchStatistics:
    """Sums over the searches that it is given to, as ``stats=``; Faiss's names where Faiss has one.

    Threads that search at once need one each.

    Attributes
    ----------
    nq
        Queries.
    nlist
        Lists that were visited.
    ndis
        Keys that were scored, by their codes where the index has codes.
    nrefined
        Keys that were then scored exactly.
    nbytes
        Bytes of all these, of the ids of what was found, and of the router's table, once a query.

    Examples
    --------
    >>> stats = SearchStatistics(nq=2, ndis=50)
    >>> stats.reset()
    >>> stats.ndis
    0
    """

    nq: int = 0
    nlist: int = 0
    ndis: int = 0
    nrefined: int = 0
    nbytes: int = 0

    def reset(self) -> None:
        """Begin again at zero."""
        for field in fields(self):
            setattr(self, field.name, 0)
