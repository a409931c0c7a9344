"""Scanning chosen lists: keys or codes, all of them or those that a selector allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints, Ops
from saapindex.errors import InvalidInputError
from saapindex.index.coder import Coder
from saapindex.index.probing import Probes
from saapindex.index.state import Held
from saapindex.index.statistics import SearchStatistics
from saapindex.lists import InvertedLists
from saapindex.params import Selector

__all__ = ["Allowed", "Scanner"]


@dataclass(frozen=True, eq=False)
class Allowed:
    """What a selector leaves of the lists.

    Attributes
    ----------
    lists, sel
        What it was made of.
    lanes
        uint16, (blocks,): see `Lists.allowed`.
    sizes
        int64, (nlist,): keys that may be read.
    """

    lists: InvertedLists
    sel: Selector
    lanes: NDArray[np.uint16]
    sizes: Ints

    @classmethod
    def of(cls, lists: InvertedLists, sel: Selector) -> Allowed:
        """Ask `sel` for every id in the lists."""
        ids = lists.ids[lists.rows()]
        mask = np.asarray(sel.members(ids))
        if mask.shape != ids.shape or mask.dtype != np.bool_:
            raise InvalidInputError(
                f"sel.members gave {mask.dtype} of shape {mask.shape}, expected bool of {ids.shape}"
            )
        return cls(lists, sel, *lists.allowed(mask))


class Scanner:
    """Scans the lists of one search.

    Parameters
    ----------
    held
        What is searched.
    allowed
        What may be read of it; None for all.
    l2
        Whether scores are distances.
    k_factor
        Candidates for each result that are scored exactly.
    stats
        Counts what is read, if given.
    ops
        The backend.
    """

    def __init__(
        self,
        held: Held,
        allowed: Allowed | None,
        l2: bool,
        k_factor: float,
        stats: SearchStatistics | None,
        ops: Ops,
    ) -> None:
        self.lists: InvertedLists = held.state.lists
        self.coder: Coder | None = held.coder
        self.table_bytes = 0 if held.routing is None else held.routing.table.nbytes
        self.lanes = None if allowed is None else allowed.lanes
        self.sizes = self.lists.sizes if allowed is None else allowed.sizes
        self.l2, self.k_factor, self.stats, self.ops = l2, k_factor, stats, ops

    @property
    def refines(self) -> bool:
        """Whether keys are stored beside their codes."""
        return bool(self.lists.stored.exact.shape[2])

    def search(self, queries: NDArray[np.float32], probes: Probes, k: int) -> tuple[Floats, Ints]:
        """Return the `k` best of what `probes` says."""
        lists, ops = self.lists, self.ops
        self._count(probes, k)
        if self.coder is None:
            return ops.scan(queries, lists.view._replace(allowed=self.lanes), *probes, k, self.l2)
        coded = self.coder.view(lists, self.lanes)
        if not self.refines:
            return ops.scan_coded(queries, coded, *probes, k, self.l2, False)
        # More candidates than any query can read would be empty places.
        most = int(probes.keys_read(self.sizes).max(initial=1))
        candidates = min(math.ceil(k * self.k_factor), max(most, k))
        _, rows = ops.scan_coded(queries, coded, *probes, candidates, self.l2, True)
        if self.stats is not None:
            refined = int((rows >= 0).sum())
            self.stats.nrefined += refined
            self.stats.nbytes += refined * _width(lists.stored.exact)
        return ops.rescore(queries, lists.stored.exact, lists.ids, rows, k, self.l2)

    def within(
        self, queries: NDArray[np.float32], probes: Probes, radius: float
    ) -> tuple[Ints, Floats, Ints]:
        """Return what is better than `radius` of what `probes` says."""
        self._count(probes, 0)
        view = self.lists.view._replace(allowed=self.lanes)
        if self.coder is None:
            return self.ops.range_scan(queries, view, *probes, radius, self.l2)
        coded = self.coder.view(self.lists, self.lanes)
        if not self.refines:
            return self.ops.range_scan_coded(queries, coded, *probes, radius, self.l2)
        return self._within_exactly(queries, probes, radius)

    def _within_exactly(
        self, queries: NDArray[np.float32], probes: Probes, radius: float
    ) -> tuple[Ints, Floats, Ints]:
        """Score every key that is read, and cut where it is no longer better."""
        lists, coded = self.lists, self.coder.view(self.lists, self.lanes)  # type: ignore[union-attr]
        lims, scores, ids = np.zeros(len(queries) + 1, np.int64), [np.empty(0, np.float32)], [_NONE]
        for i, count in enumerate(probes.keys_read(self.sizes)):
            row, k = slice(i, i + 1), max(1, int(count))
            here = queries[row], probes.lists[row], probes.limits[row]
            _, rows = self.ops.scan_coded(here[0], coded, here[1], here[2], k, self.l2, True)
            best, found = self.ops.rescore(here[0], lists.stored.exact, lists.ids, rows, k, self.l2)
            hit = (best[0] < radius if self.l2 else best[0] > radius) & (found[0] >= 0)
            lims[i + 1] = lims[i] + hit.sum()
            scores.append(best[0][hit])
            ids.append(found[0][hit])
            if self.stats is not None:
                self.stats.nrefined += int(count)
                self.stats.nbytes += int(count) * _width(lists.stored.exact)
        return lims, np.concatenate(scores), np.concatenate(ids)

    def _count(self, probes: Probes, k: int) -> None:
        if self.stats is None:
            return
        stored = self.lists.stored
        kept = np.where(probes.lists >= 0, self.sizes[probes.lists], 0)
        visited = (kept > 0) & (np.cumsum(kept, axis=1) - kept < probes.limits[:, None])
        read = probes.keys_read(self.sizes)
        scanned = (stored.vectors,) if self.coder is None else stored[2:]
        self.stats.nq += len(read)
        self.stats.nlist += int(visited.sum())
        self.stats.ndis += int(read.sum())
        self.stats.nbytes += int(read.sum()) * sum(map(_width, scanned))
        self.stats.nbytes += len(read) * self.table_bytes + 8 * int(np.minimum(read, k).sum())


_NONE = np.empty(0, np.int64)


def _width(part: NDArray[Any]) -> int:
    """Bytes of a key in a part of what is stored."""
    return int(part.shape[1] * part.shape[2] * part.itemsize) // LANES
