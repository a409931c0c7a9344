"""`IndexSAAP`: an inverted file whose keys and queries are partitioned by different models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.errors import InvalidInputError, TrainingWarning
from saapindex.index.coder import train_coder
from saapindex.index.device import keeping_keys, on_any_device
from saapindex.index.exchange import FaissLists, make_ivf, read_ivf
from saapindex.index.searcher import Searcher
from saapindex.index.store import METRIC_INNER_PRODUCT, METRIC_L2
from saapindex.params import IndexParameters, RouterName, check_choice, check_integer
from saapindex.partition import Partition, View, train_partition
from saapindex.partition.routers import make_router

__all__ = ["IndexSAAP", "clone_index"]

# A training set of fewer queries than this many a dimension makes a poor metric.
_QUERIES_PER_DIMENSION = 4


class IndexSAAP(Searcher):
    """Inverted file for searches where queries are distributed differently from keys.

    Keys go to the list of the nearest centroid in the query-aware metric; a router says which lists a
    query visits; their keys are scored exactly, or by their codes. The contracts are Faiss's: float32 `D`
    and int64 `I` of shape (n, k), best first, ids from `ntotal` up, -1 where there are fewer than k results.

    Any number of threads may search while others change the index: every answer is that of one whole state,
    before a change or after it. Changes wait for each other.

    Parameters
    ----------
    d
        Dimension of keys and queries.
    nlist
        Number of lists.
    metric_type
        `METRIC_INNER_PRODUCT`, or `METRIC_L2` (then partition and routing are Euclidean).
    params
        `IndexParameters`, or the name of a preset: ``"best"``, ``"paper"``, ``"faiss-ivf"``.
    rope
        The rotary embedding that keys and queries carry; None for a plain asymmetric index.
    nprobe
        Lists that a search visits by default.
    dtype
        Precision that keys are kept in: ``"float32"``, or ``"float16"``, which loses nothing where keys come
        in it and is faster to read. Scores are float32.
    k_factor
        Where `params` refines codes: candidates for each result that are scored exactly.
    backend
        ``"cpu"`` (numba, all cores), ``"reference"`` (NumPy) or ``"cuda"``.
    device
        Where it searches, adds and trains: ``"cpu"``, ``"cuda"`` or ``"cuda:0"`` and so on; see `to`.
    verbose
        Show progress while training.

    Raises
    ------
    InvalidInputError
        On parameters out of their range.

    References
    ----------
    Mazaré et al., *Inference-time sparse attention with asymmetric indexing*, arXiv 2502.08246.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.standard_normal((2000, 16), dtype=np.float32)
    >>> queries = rng.standard_normal((500, 16), dtype=np.float32)
    >>> index = IndexSAAP(16, 32)
    >>> index.train(keys, xq_train=queries)
    >>> index.add(keys)
    >>> index.nprobe = 8
    >>> D, I = index.search(queries[:3], 5)
    >>> I.shape, index.ntotal
    ((3, 5), 2000)
    """

    @on_any_device
    def train(
        self,
        x: ArrayLike,
        *,
        xq_train: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        positions_xq: ArrayLike | None = None,
    ) -> None:
        """Train the partition on keys `x` in the metric of the queries `xq_train`.

        Parameters
        ----------
        x
            Keys, (n, d), ``n >= nlist``; rotated at their positions where the index has a `Rope`.
        xq_train
            Queries, (q, d). Without them the metric is Euclidean and a warning is given.
        positions
            int, (n,): positions of the keys, by default 0 to n - 1.
        positions_xq
            int, (q,): positions of the queries, by default n.

        Raises
        ------
        InvalidInputError
            On bad arrays, on fewer keys than lists, and if the index holds keys.
        """
        if self.ntotal:
            raise InvalidInputError(
                f"the index holds {self.ntotal} keys in the old partition: call reset() before training"
            )
        keys = arrays.vectors(x, "x", self.d)
        if len(keys) < self.nlist:
            raise InvalidInputError(
                f"{len(keys)} training keys for {self.nlist} lists, expected at least as many"
            )
        key_positions = self._positions(positions, "positions", len(keys), np.arange(len(keys)))
        queries, query_positions = None, None
        if xq_train is not None:
            queries = arrays.vectors(xq_train, "xq_train", self.d)
            end = np.full(len(queries), len(keys), np.int64)
            query_positions = self._positions(positions_xq, "positions_xq", len(queries), end)
            if not len(queries):
                queries = query_positions = None
        if self.params.query_aware:
            _warn_of_few_queries(0 if queries is None else len(queries), self.d)
        with keeping_keys(self.ops):
            partition = train_partition(
                keys,
                key_positions,
                queries,
                query_positions,
                self.nlist,
                self.params,
                rope=self.rope,
                ops=self.ops,
                show=self.verbose,
            )
        coder = train_coder(
            keys,
            key_positions,
            queries,
            query_positions,
            partition,
            self.params,
            l2=self.metric_type == METRIC_L2,
            ops=self.ops,
        )
        with self._lock:
            if self.ntotal:
                raise InvalidInputError("keys were added while the index was trained; it stays as it was")
            self._adopt(partition, make_router(self.params.router, self.scale), self._nothing(), coder)

    def adapt(self, niter: int = 4) -> None:
        """Move the centroids to the keys that the index holds, by a few Lloyd steps.

        The offline partition is the start; the context's own keys make it fit. Costs a pass over the
        keys for each step and one to refill the lists.

        Raises
        ------
        InvalidInputError
            If there are no keys, or a learned router belongs to the partition as it is.
        """
        check_integer("niter", niter, 1)
        if self.router.tensors():
            raise InvalidInputError(
                f"the {self.router.name!r} router was learned for this partition, so it cannot move"
            )
        with self._lock:
            held = self._held
            lists = held.state.lists
            if not self.ntotal:
                raise InvalidInputError("the index holds no keys to adapt to: call add first")
            if held.coder is not None and not self.params.refine:
                raise InvalidInputError(
                    "the index stores codes alone, and keys cannot be assigned anew from their codes: "
                    "use refine=True ('RFlat') to keep the keys"
                )
            rows = np.sort(lists.rows())
            x, ids, positions = lists.keys(rows), lists.ids[rows], lists.positions[rows]
            seen = self.partition.view.apply(x, positions, self.ops)
            rng = np.random.default_rng(self.params.seed)
            with keeping_keys(self.ops):
                partition = self.partition.adapt(seen, niter, rng, self.ops)
            labels = partition.assign(seen, self.ops)
            coder = None if held.coder is None else held.coder.moved(x, labels, self.ops)
            state = self._nothing().append(x, ids, positions, labels, partition, coder, self.ops)
            self._adopt(partition, held.router, state, coder)

    def to_faiss(self) -> Any:
        """Return a ``faiss.IndexIVFFlat`` with the same lists: the same keys, in the same order.

        Searched by ``search_preassigned`` in the lists that `route` says, it gives the same answers. Its
        quantizer holds the centroids, so on its own it routes as Faiss does; keys that it adds go to the
        nearest centroid, not by the query-aware metric.

        Raises
        ------
        InvalidInputError
            If the index stores codes alone.
        MissingDependencyError
            Without Faiss.

        Examples
        --------
        >>> import numpy as np
        >>> keys = np.random.default_rng(0).standard_normal((500, 8), dtype=np.float32)
        >>> index = IndexSAAP(8, 4, params="faiss-ivf", nprobe=2)
        >>> index.train(keys)
        >>> index.add(keys)
        >>> lists, _ = index.route(keys)
        >>> D, I = index.to_faiss().search_preassigned(keys, 3, lists, None)
        >>> bool((I == index.search(keys, 3)[1]).all())
        True
        """
        partition, held = self.partition, self._held
        lists = held.state.lists
        if held.coder is not None and not self.params.refine:
            raise InvalidInputError("the index stores codes alone, expected one that keeps keys")
        rows = lists.rows()
        return make_ivf(
            FaissLists(
                partition.centroids,
                self._l2,
                partition.spherical,
                self.nprobe,
                lists.keys(rows),
                lists.ids[rows],
                lists.labels(),
            )
        )

    @classmethod
    def from_faiss(
        cls,
        index: Any,
        *,
        router: RouterName = "mean",
        dtype: str | None = None,
        backend: str = "cpu",
    ) -> IndexSAAP:
        """Return an index with the lists of a trained Faiss inverted file, and a router of our own.

        Keys stay in the lists that Faiss put them in, and new ones go where Faiss would put them; only
        queries are routed anew. A learned router is trained afterwards, by `saapindex.learn.train_router`.

        Parameters
        ----------
        index
            A ``faiss.IndexIVFFlat``, or ``IndexIVFScalarQuantizer`` of float16, without residuals.
        router
            ``"mean"``, by the mean of the keys in a list, or ``"centroid"``, as Faiss does.
        dtype
            Precision that keys are kept in, by default Faiss's.
        backend
            As for `IndexSAAP`.

        Raises
        ------
        InvalidInputError
            If it is another kind of index, is not trained, or holds ids twice or below zero.
        """
        check_choice("router", router, ("mean", "centroid"))
        content = read_ivf(index)
        nlist, d = content.centroids.shape
        spherical = content.spherical and not content.l2
        made = cls(
            d,
            nlist,
            METRIC_L2 if content.l2 else METRIC_INNER_PRODUCT,
            params=IndexParameters(query_aware=False, spherical=spherical, router=router, augment=0),
            nprobe=content.nprobe,
            dtype=content.keys.dtype.name if dtype is None else dtype,
            backend=backend,
        )
        partition = Partition(View(), content.centroids, None, spherical, None)
        made._adopt(partition, make_router(router, made.scale), made._nothing())
        made.add_preassigned(content.keys, content.labels, content.ids)
        return made


def clone_index(index: IndexSAAP) -> IndexSAAP:
    """Return a copy that shares nothing with `index`.

    Examples
    --------
    >>> clone_index(IndexSAAP(8, 4)).nlist
    4
    """
    return copy.deepcopy(index)


def _warn_of_few_queries(count: int, d: int) -> None:
    if not count:
        warnings.warn(
            "no training queries: the partition is plain k-means, which puts keys together that no query "
            "tells apart and costs recall at the same keys read; pass xq_train=queries",
            TrainingWarning,
            stacklevel=4,
        )
    elif count < _QUERIES_PER_DIMENSION * d:
        warnings.warn(
            f"{count} training queries for {d} dimensions make a noisy metric; "
            f"pass {_QUERIES_PER_DIMENSION * d} or more",
            TrainingWarning,
            stacklevel=4,
        )
