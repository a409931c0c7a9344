"""The keys of an index: what can be added, removed and given back, and where they are kept."""

from __future__ import annotations

import copy
import math
from typing import Self

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.backends.base import Ints
from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.index.device import (
    device_memory,
    device_number,
    get_device_ops,
    hold_on_device,
    keeping_keys,
    on_any_device,
)
from saapindex.index.state import Routing, State
from saapindex.params import IndexParameters, check_integer, get_preset
from saapindex.partition import Partition, Router
from saapindex.rope import Rope

__all__ = ["METRIC_INNER_PRODUCT", "METRIC_L2", "KeyStore"]

METRIC_INNER_PRODUCT = 0
"""Faiss's number for the inner product."""
METRIC_L2 = 1
"""Faiss's number for the squared Euclidean distance."""
# Ids stay below this, so that the next one is an int64 too.
_IDS_END = 1 << 62

_LARGEST_HALF = float(np.finfo(np.float16).max)


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
        dtype: str = "float32",
        backend: str = "cpu",
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        check_integer("d", d, 1)
        check_integer("nlist", nlist, 1)
        if metric_type not in (METRIC_INNER_PRODUCT, METRIC_L2):
            raise InvalidInputError(
                f"metric_type is {metric_type!r}, expected METRIC_INNER_PRODUCT or METRIC_L2"
            )
        if rope is not None and not isinstance(rope, Rope):
            raise InvalidInputError(f"rope is a {type(rope).__name__}, expected a Rope or None")
        if dtype not in ("float16", "float32"):
            raise InvalidInputError(f"dtype is {dtype!r}, expected 'float32' or 'float16'")
        if rope is not None and rope.dim > d:
            raise InvalidInputError(f"rope rotates {rope.dim} dimensions, expected at most d = {d}")
        params = get_preset(params) if isinstance(params, str) else params
        if not isinstance(params, IndexParameters):
            raise InvalidInputError(
                f"params is a {type(params).__name__}, expected IndexParameters or the name of a preset"
            )
        if metric_type == METRIC_L2 and params.router in ("linear", "mlp"):
            raise InvalidInputError(
                f"the {params.router!r} router predicts attention mass, so it needs METRIC_INNER_PRODUCT"
            )
        self.d = int(d)
        self.nlist = int(nlist)
        self.metric_type = metric_type
        # The query-aware metric is about inner products; a distance is measured as it is.
        euclidean = params.replace(query_aware=False, spherical=False, rank="key")
        self.params = euclidean if self._l2 else params
        self.rope = rope
        self.nprobe = nprobe
        self.dtype = np.dtype(dtype)
        self.ops = get_device_ops(device, backend)
        self.verbose = verbose
        self._partition: Partition | None = None
        self._router: Router | None = None
        self._state = self._nothing()
        self._routing: Routing | None = None

    def __repr__(self) -> str:
        trained = "trained" if self.is_trained else "not trained"
        return (
            f"IndexSAAP(d={self.d}, nlist={self.nlist}, {self.params.view}, {self.params.router}, "
            f"{trained}, ntotal={self.ntotal})"
        )

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # two indexes must not write to one pool

    @property
    def device(self) -> str:
        """Where searches run: ``"cpu"``, or ``"cuda:0"`` and so on."""
        number = device_number(self.ops)
        return "cpu" if number is None else f"cuda:{number}"

    def to(self, device: str) -> Self:
        """Return a copy of the index that searches on `device`; the index itself if it does so already.

        Parameters
        ----------
        device
            ``"cpu"``, ``"cuda"`` (the current device) or ``"cuda:0"`` and so on.

        Raises
        ------
        InvalidInputError, MissingDependencyError
            If there is no such device, or no CuPy.
        DeviceMemoryError
            If the keys do not fit there.
        """
        ops = get_device_ops(device, "cpu")
        if device_number(ops) == device_number(self.ops):
            return self
        other = copy.copy(self)
        other.ops = ops
        with device_memory(other, "to"):
            other._publish(other._state)
        return other

    @property
    def _l2(self) -> bool:
        return self.metric_type == METRIC_L2

    def _nothing(self) -> State:
        return State.empty(self.nlist, self.d, self.dtype)

    @property
    def scale(self) -> float:
        """Factor that makes an inner product a logit: ``1 / sqrt(d)``."""
        return 1.0 if self._l2 else 1 / math.sqrt(self.d)

    @property
    def nprobe(self) -> int:
        """Lists that a search visits by default; more than there are visits all."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, nprobe: int) -> None:
        check_integer("nprobe", nprobe, 1)
        self._nprobe = int(nprobe)

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
        if self._l2 and router.tensors():
            raise InvalidInputError(
                f"the {router.name!r} router predicts attention mass, so it needs METRIC_INNER_PRODUCT"
            )
        table = router.table(self.partition, self._state.sums, self._state.lists.sizes)
        try:
            width = router.features(np.zeros((1, self.d), np.float32)).shape[1]
        except ValueError as error:
            raise InvalidInputError(f"router takes no queries of dimension {self.d}: {error}") from error
        if table.shape != (self.nlist, width):
            raise InvalidInputError(
                f"router has a table of shape {table.shape}, expected {(self.nlist, width)} for this index"
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
            routing = Routing.of(self._router, self.partition, state, self._l2)
        hold_on_device(self.ops, state)
        self._state, self._routing = state, routing

    # Adding and removing

    @on_any_device
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

    @on_any_device
    def add_with_ids(self, x: ArrayLike, ids: ArrayLike, *, positions: ArrayLike | None = None) -> None:
        """Add keys `x`, (n, d), under `ids`, int (n,), not negative and not yet in the index.

        `positions` are by default the ids, as for `add`.

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
        if ids is None:
            fresh = np.arange(state.next_id, state.next_id + len(keys), dtype=np.int64)
        else:
            fresh = arrays.integers(ids, "ids", (len(keys),), minimum=0)
            _refuse_duplicates(fresh, state.lists.contains(fresh))
        if fresh.size and int(fresh.max()) >= _IDS_END:
            raise InvalidInputError(f"ids reach {fresh.max()}, expected less than {_IDS_END}")
        places = self._positions(positions, "positions", len(keys), fresh)
        if self.dtype == np.float16 and np.abs(keys).max(initial=0) > _LARGEST_HALF:
            raise InvalidInputError(
                f"x holds {np.abs(keys).max():g}, expected at most {_LARGEST_HALF:g} in an index of float16"
            )
        if len(keys):
            self.partition.check_position(int(places.max()))
            with keeping_keys(self.ops):
                appended = state.append(keys, fresh, places, self.partition, self.ops)
            self._publish(appended)

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
        self._publish(self._nothing())

    def reconstruct(self, key: int) -> NDArray[np.float32]:
        """Return the key with id `key`, float32 (d,)."""
        found: NDArray[np.float32] = self.reconstruct_batch([key])[0]
        return found

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> NDArray[np.float32]:
        """Return the keys with ids `n0` to ``n0 + ni - 1``, float32 (ni, d); -1 for all from `n0` on."""
        check_integer("n0", n0, 0)
        check_integer("ni", ni, -1)
        ni = max(self._state.next_id - n0, 0) if ni == -1 else ni
        if ni > self.ntotal:
            raise InvalidInputError(
                f"{ni} ids from {n0} up are asked for, but the index holds {self.ntotal} keys"
            )
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
        return lists.keys(lists.find(ids))

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
