"""The keys of an index: what can be added, removed and given back, and where they are kept."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.backends import get_ops
from saapindex.backends.base import Ints
from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.index.state import Routing, State
from saapindex.params import IndexParameters, check_integer, get_preset
from saapindex.partition import Partition, Router
from saapindex.rope import Rope

__all__ = ["METRIC_INNER_PRODUCT", "METRIC_L2", "KeyStore"]

METRIC_INNER_PRODUCT = 0
"""Faiss's number for the inner product."""
METRIC_L2 = 1
"""Faiss's number for the squared Euclidean distance."""


class KeyStore:
    """The keys of an index in the lists of its partition; base of `IndexSAAP`.

    Every change makes a new `State` and puts it in place at the end, so a change that fails leaves the
    index as it was.
    """

    def __init__(
        self,
        d: int,
        nlist: int,
        metric_type: int = METRIC_INNER_PRODUCT,
        *,
        params: IndexParameters | str = "best",
        rope: Rope | None = None,
        nprobe: int = 1,
        backend: str = "cpu",
        verbose: bool = False,
    ) -> None:
        check_integer("d", d, 1)
        check_integer("nlist", nlist, 1)
        check_integer("nprobe", nprobe, 1)
        if metric_type not in (METRIC_INNER_PRODUCT, METRIC_L2):
            raise InvalidInputError(
                f"metric_type is {metric_type!r}, expected METRIC_INNER_PRODUCT or METRIC_L2"
            )
        if rope is not None and rope.dim > d:
            raise InvalidInputError(f"rope rotates {rope.dim} dimensions, expected at most d = {d}")
        params = get_preset(params) if isinstance(params, str) else params
        self.d = int(d)
        self.nlist = int(nlist)
        self.metric_type = metric_type
        # The query-aware metric is about inner products; a distance is measured as it is.
        self.params = params.replace(query_aware=False, spherical=False) if self._l2 else params
        self.rope = rope
        self.nprobe = nprobe
        self.ops = get_ops(backend)
        self.verbose = verbose
        self._partition: Partition | None = None
        self._router: Router | None = None
        self._state = State.empty(self.nlist, self.d)
        self._routing: Routing | None = None

    def __repr__(self) -> str:
        trained = "trained" if self.is_trained else "not trained"
        return (
            f"IndexSAAP(d={self.d}, nlist={self.nlist}, {self.params.view}, {self.params.router}, "
            f"{trained}, ntotal={self.ntotal})"
        )

    @property
    def _l2(self) -> bool:
        return self.metric_type == METRIC_L2

    @property
    def scale(self) -> float:
        """Factor that makes an inner product a logit: ``1 / sqrt(d)``."""
        return 1.0 if self._l2 else 1 / math.sqrt(self.d)

    @property
    def ntotal(self) -> int:
        """Keys in the index."""
        return self._state.lists.ntotal

    @property
    def is_trained(self) -> bool:
        """Whether keys can be added and searched."""
        return self._partition is not None and self._router is not None

    @property
    def list_sizes(self) -> Ints:
        """Keys in each list, int64 (nlist,)."""
        return self._state.lists.sizes.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and their lists hold."""
        return self._state.lists.nbytes + self._state.sums.nbytes

    @property
    def partition(self) -> Partition:
        """The trained partition."""
        if self._partition is None:
            raise NotTrainedError("the index is not trained: call train(x, xq_train=queries) first")
        return self._partition

    @property
    def router(self) -> Router:
        """The router; a trained one of any kind may be put in its place."""
        if self._router is None:
            self.partition  # noqa: B018  an index without a partition says so first
            raise NotTrainedError(
                f"the {self.params.router!r} router is not trained: "
                "call saapindex.learn.train_router(index, keys, queries)"
            )
        return self._router

    @router.setter
    def router(self, router: Router) -> None:
        table = router.table(self.partition, self._state.sums, self._state.lists.sizes)
        width = router.features(np.zeros((1, self.d), np.float32)).shape[1]
        if table.shape != (self.nlist, width):
            raise InvalidInputError(
                f"router scores {table.shape[0]} lists, expected {self.nlist} of this index"
            )
        self._router, self.params = router, self.params.replace(router=router.name)
        self._publish(self._state)

    def _adopt(self, partition: Partition | None, router: Router | None, state: State) -> None:
        self._partition, self._router = partition, router
        self._publish(state)

    def _publish(self, state: State) -> None:
        """Make `state` the one that is searched."""
        routing = None
        if self._router is not None:
            sizes = state.lists.sizes
            table = self._router.table(self.partition, state.sums, sizes)
            routing = Routing(self._router, table, sizes, self._l2)
        self._state, self._routing = state, routing

    # Adding and removing

    def add(self, x: ArrayLike, *, positions: ArrayLike | None = None) -> None:
        """Add keys `x`, (n, d), with ids from `ntotal` up.

        After keys were removed, ids go on from the largest that is left, so none is given twice.

        Parameters
        ----------
        x
            (n, d); rotated at `positions` where the index has a `Rope`.
        positions
            int, (n,), by default the ids.

        Raises
        ------
        InvalidInputError, NotTrainedError
            The index is unchanged.
        """
        self._add(x, None, positions)

    def add_with_ids(self, x: ArrayLike, ids: ArrayLike, *, positions: ArrayLike | None = None) -> None:
        """Add keys `x`, (n, d), under `ids`, int (n,), not negative and not yet in the index.

        Raises
        ------
        InvalidInputError, NotTrainedError
            The index is unchanged.
        """
        self._add(x, ids, positions)

    def _add(self, x: ArrayLike, ids: ArrayLike | None, positions: ArrayLike | None) -> None:
        self.router  # noqa: B018  raises if the index is not trained
        state = self._state
        keys = arrays.vectors(x, "x", self.d)
        fresh = np.arange(state.next_id, state.next_id + len(keys), dtype=np.int64)
        places = self._positions(positions, "positions", len(keys), fresh)
        if ids is not None:
            fresh = arrays.integers(ids, "ids", (len(keys),), minimum=0)
            _refuse_duplicates(fresh, state.lists.contains(fresh))
        if len(keys):
            self.partition.check_positions(places)
            self._publish(state.append(keys, fresh, places, self.partition, self.ops))

    def remove_ids(self, ids: ArrayLike) -> int:
        """Remove the keys with these ids; return how many there were. Unknown ids are passed over."""
        wanted = arrays.as_numpy(ids, "ids")
        wanted = arrays.integers(wanted, "ids", (wanted.size,))
        lists = self._state.lists
        keep = ~np.isin(lists.ids[lists.rows()], wanted)
        removed = int(len(keep) - keep.sum())
        if removed:
            self._publish(self._state.keep(keep, self.partition, self.ops))
        return removed

    def reset(self) -> None:
        """Remove every key; the index stays trained."""
        self._publish(State.empty(self.nlist, self.d))

    def reconstruct(self, key: int) -> NDArray[np.float32]:
        """Return the key with id `key`, float32 (d,)."""
        return self.reconstruct_batch([key])[0]

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> NDArray[np.float32]:
        """Return the keys with ids `n0` to ``n0 + ni - 1``, float32 (ni, d); -1 for all from `n0` on."""
        ni = self._state.next_id - n0 if ni == -1 else ni
        return self.reconstruct_batch(np.arange(n0, n0 + ni, dtype=np.int64))

    def reconstruct_batch(self, keys: ArrayLike) -> NDArray[np.float32]:
        """Return the keys with these ids, float32 (n, d).

        Raises
        ------
        InvalidInputError
            If an id is not in the index.
        """
        ids = arrays.as_numpy(keys, "keys")
        ids = arrays.integers(ids, "keys", (ids.size,))
        lists = self._state.lists
        known = lists.contains(ids)
        if not known.all():
            raise InvalidInputError(f"id {ids[~known][0]} is not in the index")
        found: NDArray[np.float32] = lists.vectors[lists.find(ids)]
        return found

    def _positions(
        self, given: ArrayLike | None, name: str, n: int, default: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        return default if given is None else arrays.integers(given, name, (n,), minimum=0)


def _refuse_duplicates(ids: Ints, present: NDArray[np.bool_]) -> None:
    if present.any():
        raise InvalidInputError(f"id {ids[present][0]} is in the index already, expected new ids")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InvalidInputError(f"id {values[counts > 1][0]} is given twice, expected distinct ids")
