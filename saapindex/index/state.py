"""What an index holds at one moment, as one value that is replaced whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.base import Floats, Ints, Ops, to_blocks
from saapindex.index.coder import Coder
from saapindex.lists import InvertedLists
from saapindex.params import RankBy
from saapindex.partition import Partition, Router

__all__ = ["Held", "Routing", "State", "difference", "keys_at"]


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
    def empty(
        cls,
        nlist: int,
        d: int,
        dtype: DTypeLike,
        *,
        words: int = 0,
        norms: bool = False,
        exact: bool = True,
    ) -> State:
        """Return the state of an index without keys: see `InvertedLists.empty`."""
        lists = InvertedLists.empty(nlist, d, dtype, words=words, norms=norms, exact=exact)
        return cls(lists, np.zeros((nlist, d)), 0)

    def append(
        self,
        x: NDArray[np.float32],
        ids: Ints,
        positions: Ints,
        labels: Ints,
        partition: Partition,
        coder: Coder | None,
        ops: Ops,
    ) -> State:
        """Return the state with these keys added to lists `labels`."""
        seen = partition.view.apply(x, positions, ops)
        sums, _ = ops.accumulate(seen, labels, partition.nlist)
        sums += self.sums
        codes = None if coder is None else coder.encode(x, labels, ops)
        lists = self.lists.append(x, ids, positions, labels, codes)
        return State(lists, sums, max(self.next_id, int(ids.max(initial=-1)) + 1))

    def joined(self, other: State, ids: Ints) -> State:
        """Return the state with the keys of `other`, in the order of its ``lists.rows()`` under `ids`."""
        rows, labels = other.lists.rows(), other.lists.labels()
        stored = other.lists.stored
        lists = self.lists.append(
            stored.keys(rows), ids, other.lists.positions[rows], labels, stored.codes(rows)
        )
        return State(lists, self.sums + other.sums, max(self.next_id, int(ids.max(initial=-1)) + 1))

    def keep(self, mask: NDArray[np.bool_], partition: Partition, coder: Coder | None, ops: Ops) -> State:
        """Return the state with only the keys, in the order of ``lists.rows()``, where `mask` is true."""
        lists = self.lists.keep(mask)
        changed = lists.sizes < self.lists.sizes
        rows, labels = lists.rows(), lists.labels()
        here = changed[labels]
        rows, labels = rows[here], labels[here]
        seen = partition.view.apply(keys_at(lists, rows, labels, coder), lists.positions[rows], ops)
        sums, _ = ops.accumulate(seen, labels, partition.nlist)
        sums = np.where(changed[:, None], sums, self.sums)
        next_id = int(lists.ids[lists.rows()].max(initial=-1)) + 1
        return State(lists, sums, max(next_id, lists.ntotal))


def keys_at(lists: InvertedLists, rows: Ints, labels: Ints, coder: Coder | None) -> NDArray[np.float32]:
    """Return the keys at `rows` of lists `labels`, float32 (n, d): decoded where only codes are stored."""
    keys, codes = lists.keys(rows), lists.stored.codes(rows)
    if keys.shape[1] or coder is None or codes is None:
        return keys
    return coder.decode(codes, labels)


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

    def among(self, sizes: Ints) -> Routing:
        """Return the routing as if lists had these sizes."""
        return replace(self, sizes=sizes)


def difference(one: Held, other: Held) -> str | None:
    """Return what keeps keys of `other` out of the lists of `one`: None if nothing does."""
    if one.partition is None or other.partition is None:
        return "training"
    partitions = one.partition, other.partition
    if partitions[0].view != partitions[1].view or partitions[0].spherical != partitions[1].spherical:
        return "views of the partition"
    if not _equal(*(partition.centroids for partition in partitions)):
        return "centroids"
    if not _equal(*(partition.metric for partition in partitions)):
        return "metrics of the partition"
    stored = one.state.lists.stored, other.state.lists.stored
    if [(part.shape[1:], part.dtype) for part in stored[0]] != [
        (part.shape[1:], part.dtype) for part in stored[1]
    ]:
        return "storage"
    if one.coder is not None and other.coder is not None:
        parts = ({"anchors": coder.anchors, **coder.code.tensors()} for coder in (one.coder, other.coder))
        if not all(_equal(*pair) for pair in zip(*(part.values() for part in parts), strict=True)):
            return "codes"
    return None


def _equal(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


@dataclass(frozen=True, eq=False)
class Held:
    """All that a search looks at: what training made, and the keys. A reader takes it once.

    Attributes
    ----------
    partition, router, coder
        None before training; no coder where keys are scanned as they are.
    state
        The keys.
    routing
        The router made ready for them.
    """

    partition: Partition | None
    router: Router | None
    coder: Coder | None
    state: State
    routing: Routing | None

    @classmethod
    def of(
        cls,
        partition: Partition | None,
        router: Router | None,
        coder: Coder | None,
        state: State,
        l2: bool,
    ) -> Held:
        """Make the router ready, if there is one."""
        routing = None
        if router is not None and partition is not None:
            routing = Routing.of(router, partition, state, l2)
        return cls(partition, router, coder, state, routing)
