"""saapindex for VIBE: copy this folder to ``vibe/algorithms/saapindex``.

Out-of-distribution data sets bring queries to train with (`fit_ood`). On the others the keys stand in for
queries where the metric is an inner product. Everything runs in one thread, as VIBE asks.
"""

from __future__ import annotations

import numpy as np

import saapindex as sx

from ..base.module import BaseANN

# The metric of the queries is their second moments: more than this many add nothing.
_TRAINING_QUERIES = 20_000


class SaapIndex(BaseANN):
    """An index of one factory string; ``cosine`` is the inner product of unit vectors."""

    def __init__(self, metric, storage, n_list):
        if metric not in ("cosine", "normalized", "ip", "euclidean"):
            raise ValueError(f"metric is {metric!r}, expected 'cosine', 'normalized', 'ip' or 'euclidean'")
        self.metric, self.storage, self.n_list = metric, storage, n_list
        self.params = sx.SearchParameters()
        self.stats = sx.SearchStatistics()
        self.name = f"SaapIndex(SAAP{n_list},{storage})"

    def fit(self, X):
        rng = np.random.default_rng(0)
        self.fit_ood(X, X[np.sort(rng.permutation(len(X))[:_TRAINING_QUERIES])], None)

    def fit_ood(self, X_train, X_learn, X_learn_neighbors):
        sx.omp_set_num_threads(1)
        euclidean = self.metric == "euclidean"
        keys = self._prepare(X_train)
        metric = sx.METRIC_L2 if euclidean else sx.METRIC_INNER_PRODUCT
        params = sx.IndexParameters(augment=0, query_aware=not euclidean)
        self.index = sx.index_factory(
            keys.shape[1], f"SAAP{self.n_list},{self.storage}", metric, params=params
        )
        self.index.train(keys, xq_train=None if euclidean else self._prepare(X_learn))
        self.index.add(keys)

    def set_query_arguments(self, n_probe, k_factor=None):
        self.params = sx.SearchParameters(nprobe=min(n_probe, self.n_list), k_factor=k_factor)
        self.stats.reset()
        refined = "" if k_factor is None else f", k_factor={k_factor}"
        self.name = f"SaapIndex(SAAP{self.n_list},{self.storage}, n_probe={n_probe}{refined})"

    def query(self, v, n):
        ids = self._search(v[None], n)[0]
        return ids[ids >= 0]

    def batch_query(self, X, n):
        self.res = self._search(X, n)

    def get_batch_results(self):
        return self.res

    def get_additional(self):
        return {"dist_comps": self.stats.ndis + self.stats.nrefined + self.stats.nq * self.n_list}

    def _search(self, X, n):
        return self.index.search(self._prepare(X), n, params=self.params, stats=self.stats)[1]

    def _prepare(self, X):
        X = np.ascontiguousarray(X, dtype=np.float32)
        if self.metric == "cosine":
            norms = np.linalg.norm(X, axis=1, keepdims=True)
            X = X / np.where(norms > 0, norms, 1)
        return X
