"""What an index holds at one moment, as one value that is replaced whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.base import Floats, Ints, Ops, to_blocks
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
    def empty(cls, nlist: int, d: int, dtype: DTypeLike) -> State:
        """Return the state of an index without keys, to hold keys of `dtype`."""
        return cls(InvertedLists.empty(nlist, d, dtype), np.zeros((nlist, d)), 0)

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
        seen = partition.view.apply(lists.keys(rows), lists.positions[rows], ops)
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
        float32, (blocks, h, LANES): one row a list, in blocks.
    shift
        float32, (nlist,): added to every score.
    sizes
        int64, (nlist,).
    """

    router: Router
    table: Floats
    shift: NDArray[np.float32]
    sizes: Ints

    @classmethod
    def of(cls, router: Router, partition: Partition, state: State, l2: bool) -> Routing:
        """Make `router` ready for `state`, ranking lists by distance if `l2`."""
        rows, sizes = router.table(partition, state.sums, state.lists.sizes), state.lists.sizes
        # |q - c|^2 = |q|^2 - 2 (q . c - |c|^2 / 2)
        shift = -np.einsum("ij,ij->i", rows, rows) / 2 if l2 else np.zeros(len(rows), np.float32)
        return cls(router, to_blocks(rows), shift, sizes)

    @cached_property
    def ntotal(self) -> int:
        """Keys in all lists."""
        return int(self.sizes.sum())

    def bias(self, rank: RankBy) -> NDArray[np.float32]:
        """What makes scores a ranking by `rank`; minus infinity on empty lists."""
        return self.by_mass if rank == "mass" else self.by_key

    @cached_property
    def by_key(self) -> NDArray[np.float32]:
        """Bias that ranks lists by mass per key."""
        return self._bias("key")

    @cached_property
    def by_mass(self) -> NDArray[np.float32]:
        """Bias that makes scores the logarithm of a list's mass."""
        return self._bias("mass")

    def _bias(self, rank: RankBy) -> NDArray[np.float32]:
        return self.router.bias(self.sizes, rank) + self.shift
