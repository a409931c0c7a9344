"""What an index holds at one moment, as one value that is replaced whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Ints, Ops
from saapindex.lists import InvertedLists
from saapindex.params import RankBy
from saapindex.partition import Partition, Router

__all__ = ["State"]


@dataclass(frozen=True, eq=False)
class State:
    """Lists with their running statistics.

    Attributes
    ----------
    lists
        The keys.
    sums
        float64, (nlist, d): sum of each list's keys in the view of the partition.
    next_id
        Id, and position, that the next key gets by default.
    """

    lists: InvertedLists
    sums: NDArray[np.float64]
    next_id: int

    @classmethod
    def empty(cls, nlist: int, d: int) -> State:
        """Return the state of an index without keys."""
        return cls(InvertedLists.empty(nlist, d), np.zeros((nlist, d)), 0)

    def append(
        self,
        x: NDArray[np.float32],
        ids: Ints,
        positions: Ints,
        partition: Partition,
        ops: Ops,
    ) -> State:
        """Return the state with these keys added to the lists that the partition puts them in."""
        seen = partition.view.apply(x, positions, ops)
        labels = partition.assign(seen, ops)
        sums, _ = ops.accumulate(seen, labels, partition.nlist)
        sums += self.sums
        lists = self.lists.append(x, ids, positions, labels)
        return State(lists, sums, max(self.next_id, int(ids.max()) + 1))

    def keep(self, mask: NDArray[np.bool_], partition: Partition, ops: Ops) -> State:
        """Return the state with only the keys, in the order of ``lists.rows()``, where `mask` is true."""
        lists = self.lists.keep(mask)
        rows = lists.rows()
        seen = partition.view.apply(lists.vectors[rows], lists.positions[rows], ops)
        sums, _ = ops.accumulate(seen, lists.labels(), partition.nlist)
        next_id = int(lists.ids[rows].max(initial=-1)) + 1
        return State(lists, sums, max(next_id, lists.ntotal))


@dataclass(frozen=True, eq=False)
class Routing:
    """A router made ready for one state: scores are one matrix product away.

    Attributes
    ----------
    router
        Gives the features of queries.
    table
        float32, (nlist, h).
    sizes
        int64, (nlist,).
    l2
        Whether lists are ranked by distance.
    """

    router: Router
    table: NDArray[np.float32]
    sizes: Ints
    l2: bool

    @cached_property
    def by_key(self) -> NDArray[np.float32]:
        """Bias that ranks lists by mass per key."""
        return self._bias("key")

    @cached_property
    def by_mass(self) -> NDArray[np.float32]:
        """Bias that makes scores the logarithm of a list's mass."""
        return self._bias("mass")

    def _bias(self, rank: RankBy) -> NDArray[np.float32]:
        bias = self.router.bias(self.sizes, rank)
        if self.l2:  # |q - c|^2 = |q|^2 - 2 (q . c - |c|^2 / 2)
            bias = bias - np.einsum("ij,ij->i", self.table, self.table) / 2
        return bias
