"""Methods to compare, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.index import IndexSAAP
from saapindex.learn.peers.coarse import CoarseName, require_faiss, train_coarse
from saapindex.params import SearchParameters
from saapindex.rope import Rope

__all__ = ["FaissIVF", "Peer", "Saap"]

Vectors = NDArray[np.float32]
Ints = NDArray[np.int64]


class Peer(ABC):
    """A method that partitions keys into lists and visits some of them for each query."""

    nlist: int
    labels: Ints
    """The list of each key, in the order they were added."""

    @abstractmethod
    def add(self, keys: Vectors, positions: Ints) -> None:
        """Fill the trained method with `keys`, (n, d)."""

    @abstractmethod
    def search(self, queries: Vectors, positions: Ints, k: int, nprobe: int) -> tuple[Ints, Ints]:
        """Return the ids found, (q, k), and the lists visited, (q, p), -1 for none."""


class Saap(Peer):
    """An `IndexSAAP`, trained."""

    def __init__(self, index: IndexSAAP) -> None:
        self.index, self.nlist = index, index.nlist

    def add(self, keys: Vectors, positions: Ints) -> None:
        """Fill the index."""
        self.index.reset()
        self.index.add(keys, positions=positions)
        seen = self.index.partition.view.apply(keys, positions, self.index.ops)
        self.labels = self.index.partition.assign(seen, self.index.ops)

    def search(self, queries: Vectors, positions: Ints, k: int, nprobe: int) -> tuple[Ints, Ints]:
        """Search, and route once more to tell the lists."""
        params = SearchParameters(nprobe=nprobe)
        _, ids = self.index.search(queries, k, params=params, positions=positions)
        lists, _ = self.index.route(queries, params=params, positions=positions)
        return ids, lists


class FaissIVF(Peer):
    """The real Faiss `IndexIVFFlat` with inner product.

    On un-rotated keys, Faiss partitions and routes in un-rotated space, while the lists hold the keys as they
    are, so that scores are true inner products.

    Parameters
    ----------
    keys, positions
        Training keys, (n, d), and their positions, (n,).
    nlist
        Number of lists.
    rope
        Given, keys and queries are un-rotated before they are assigned.
    quantizer
        ``"ip"``: spherical k-means and inner products, Faiss's default for this metric; ``"l2"``: plain
        k-means, keys go to the nearest centroid and queries to the centroids of the largest inner product.
    """

    def __init__(
        self,
        keys: Vectors,
        positions: Ints,
        nlist: int,
        *,
        rope: Rope | None = None,
        quantizer: CoarseName = "ip",
    ) -> None:
        self.nlist, self.rope = nlist, rope
        faiss, d = require_faiss(), keys.shape[1]
        self._assigner, self._coarse = train_coarse(self._seen(keys, positions), nlist, quantizer)
        self.index: Any = faiss.IndexIVFFlat(self._coarse, d, nlist, faiss.METRIC_INNER_PRODUCT)
        self.index.is_trained = True

    def _seen(self, x: Vectors, positions: Ints) -> Vectors:
        return x if self.rope is None else self.rope.unrotate(x, positions)

    def add(self, keys: Vectors, positions: Ints) -> None:
        """Fill the index, with the keys as they are, in the lists of what Faiss sees."""
        faiss = require_faiss()
        self.index.reset()
        self.labels = self._assigner.search(self._seen(keys, positions), 1)[1][:, 0]
        self.index.add_core(
            len(keys), faiss.swig_ptr(keys), None, faiss.swig_ptr(np.ascontiguousarray(self.labels))
        )

    def search(self, queries: Vectors, positions: Ints, k: int, nprobe: int) -> tuple[Ints, Ints]:
        """Search with Faiss, in the lists that Faiss chooses."""
        scores, lists = self._coarse.search(self._seen(queries, positions), nprobe)
        self.index.nprobe = nprobe
        _, ids = self.index.search_preassigned(queries, k, lists, scores)
        return ids, lists
