"""saapindex for ann-benchmarks: copy this folder to ``ann_benchmarks/algorithms/saapindex``.

ann-benchmarks gives no training queries and draws its test queries from the distribution of the keys, so the
keys stand in for queries where the metric is angular.
"""

from __future__ import annotations

import numpy as np

import saapindex as sx

from ..base.module import BaseANN

# The metric of the queries is their second moments: more than this many add nothing.
_TRAINING_QUERIES = 20_000


class SaapIndex(BaseANN):
    """An index of one factory string; ``angular`` is the inner product of unit vectors."""

    def __init__(self, metric, storage, n_list):
        if metric not in ("angular", "euclidean"):
            raise ValueError(f"metric is {metric!r}, expected 'angular' or 'euclidean'")
        self._metric, self._storage, self._n_list = metric, storage, n_list
        self._params = sx.SearchParameters()
        self._stats = sx.SearchStatistics()
        self.name = f"SaapIndex(SAAP{n_list},{storage})"

    def fit(self, X):
        keys = self._prepare(X)
        angular = self._metric == "angular"
        metric = sx.METRIC_INNER_PRODUCT if angular else sx.METRIC_L2
        params = sx.IndexParameters(augment=0, query_aware=angular)
        self.index = sx.index_factory(
            keys.shape[1], f"SAAP{self._n_list},{self._storage}", metric, params=params
        )
        queries = None
        if angular:
            rng = np.random.default_rng(0)
            queries = keys[rng.permutation(len(keys))[:_TRAINING_QUERIES]]
        self.index.train(keys, xq_train=queries)
        self.index.add(keys)

    def set_query_arguments(self, n_probe, k_factor=None):
        self._params = sx.SearchParameters(nprobe=min(n_probe, self._n_list), k_factor=k_factor)
        self._stats.reset()
        refined = "" if k_factor is None else f", k_factor={k_factor}"
        self.name = f"SaapIndex(SAAP{self._n_list},{self._storage}, n_probe={n_probe}{refined})"

    def query(self, q, n):
        ids = self._search(q[None], n)[0]
        return ids[ids >= 0]

    def batch_query(self, X, n):
        self.res = self._search(X, n)

    def get_batch_results(self):
        return [ids[ids >= 0] for ids in self.res]

    def get_additional(self):
        return {"dist_comps": self._stats.ndis + self._stats.nrefined + self._stats.nq * self._n_list}

    def _search(self, X, n):
        return self.index.search(self._prepare(X), n, params=self._params, stats=self._stats)[1]

    def _prepare(self, X):
        X = np.ascontiguousarray(X, dtype=np.float32)
        if self._metric == "angular":
            norms = np.linalg.norm(X, axis=1, keepdims=True)
            X = X / np.where(norms > 0, norms, 1)
        return X
