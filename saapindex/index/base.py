"""What an index is made of, and the one place where what it holds is replaced."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.backends.base import Ints
from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.index.coder import Coder, code_words
from saapindex.index.device import device_memory, device_number, get_device_ops, hold_on_device
from saapindex.index.state import Held, Routing, State
from saapindex.params import IndexParameters, check_integer, check_k_factor, get_preset
from saapindex.partition import Partition, Router
from saapindex.rope import Rope

__all__ = ["METRIC_INNER_PRODUCT", "METRIC_L2", "IndexBase"]

METRIC_INNER_PRODUCT = 0
"""Faiss's number for the inner product."""
METRIC_L2 = 1
"""Faiss's number for the squared Euclidean distance."""


class IndexBase:
    """What an index is made of, and what it holds; base of `IndexSAAP`.

    Every change makes a new `Held` and puts it in place at the end, in one step: a change that fails leaves
    the index as it was, and a reader in another thread, which takes it once, sees it before or after a change
    and never between. Changes wait for each other.
    """

    _short: Any = None
    """Short searches of what is held, see `Searcher`."""

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
        k_factor: float = 4.0,
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
        self.k_factor = k_factor
        self._lock = threading.RLock()
        self._held = Held(None, None, None, self._nothing(), None)

    def __repr__(self) -> str:
        trained = "trained" if self.is_trained else "not trained"
        return (
            f"IndexSAAP(d={self.d}, nlist={self.nlist}, {self.params.view}, {self.params.router}, "
            f"{trained}, ntotal={self.ntotal})"
        )

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # two indexes must not write to one pool

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_allowed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def _partition(self) -> Partition | None:
        return self._held.partition

    @property
    def _router(self) -> Router | None:
        return self._held.router

    @property
    def _coder(self) -> Coder | None:
        return self._held.coder

    @property
    def _state(self) -> State:
        return self._held.state

    @property
    def _routing(self) -> Routing | None:
        return self._held.routing

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
        return State.empty(
            self.nlist,
            self.d,
            self.dtype,
            words=code_words(self.d, self.params.bits),
            norms=bool(self._l2 and self.params.bits),
            exact=self.params.refine,
        )

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
    def k_factor(self) -> float:
        """Candidates for each result that are scored exactly, where codes are refined: at least 1."""
        return self._k_factor

    @k_factor.setter
    def k_factor(self, k_factor: float) -> None:
        check_k_factor(k_factor)
        self._k_factor = float(k_factor)

    @property
    def ntotal(self) -> int:
        """Keys in the index."""
        return self._state.lists.ntotal

    @property
    def is_trained(self) -> bool:
        """Whether keys can be added and searched."""
        held = self._held
        return held.partition is not None and held.router is not None

    @property
    def list_sizes(self) -> Ints:
        """Keys in each list, int64 (nlist,)."""
        return self._state.lists.sizes.copy()

    @property
    def factory_string(self) -> str:
        """The string that `index_factory` makes such an index of.

        An index with Faiss's partition, Euclidean or spherical, and the `centroid` router is ``IVF``, any
        other ``SAAP``; further parameters are not in the string.

        Examples
        --------
        >>> import saapindex as sx
        >>> sx.IndexSAAP(64, 256, dtype="float16").factory_string
        'SAAP256,SQfp16'
        """
        params, half = self.params, self.dtype == np.float16
        lists = "SAAP" if params.query_aware or params.router != "centroid" else "IVF"
        if not params.bits:
            storage = "SQfp16" if half else "Flat"
        else:
            refine = (",Refine(SQfp16)" if half else ",RFlat") if params.refine else ""
            storage = f"Bits{params.bits}{refine}"
        return f"{lists}{self.nlist},{storage}"

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and their lists hold."""
        return self._state.lists.nbytes + self._state.sums.nbytes

    @property
    def partition(self) -> Partition:
        """The trained partition."""
        partition = self._held.partition
        if partition is None:
            raise NotTrainedError("the index is not trained: call train(x, xq_train=queries) first")
        return partition

    @property
    def router(self) -> Router:
        """The router; a trained one of any kind may be put in its place."""
        router = self._held.router
        if router is None:
            self.partition  # noqa: B018  an index without a partition says so first
            raise NotTrainedError(
                f"the {self.params.router!r} router is not trained: "
                "call saapindex.learn.train_router(index, keys, queries)"
            )
        return router

    @router.setter
    def router(self, router: Router) -> None:
        if self._l2 and router.tensors():
            raise InvalidInputError(
                f"the {router.name!r} router predicts attention mass, so it needs METRIC_INNER_PRODUCT"
            )
        with self._lock:
            held = self._held
            table = router.table(self.partition, held.state.sums, held.state.lists.sizes)
            try:
                width = router.features(np.zeros((1, self.d), np.float32)).shape[1]
            except ValueError as error:
                raise InvalidInputError(f"router takes no queries of dimension {self.d}: {error}") from error
            if table.shape != (self.nlist, width):
                raise InvalidInputError(
                    f"router has a table of shape {table.shape}, expected {(self.nlist, width)} for this "
                    "index"
                )
            self.params = self.params.replace(router=router.name)
            self._adopt(held.partition, router, held.state, held.coder)

    def _adopt(
        self,
        partition: Partition | None,
        router: Router | None,
        state: State,
        coder: Coder | None = None,
    ) -> None:
        """Make these what is searched, in one step."""
        held = Held.of(partition, router, coder, state, self._l2)
        hold_on_device(self.ops, state)
        self._held, self._short = held, None  # not to hold on to what was searched before

    def _publish(self, state: State) -> None:
        """Make `state` the one that is searched."""
        held = self._held
        self._adopt(held.partition, held.router, state, held.coder)

    def _positions(
        self, given: ArrayLike | None, name: str, n: int, default: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        return default if given is None else arrays.integers(given, name, (n,), minimum=0)
