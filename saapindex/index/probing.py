"""The lists that each query visits: by number, by a budget of keys, or by predicted mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints, Ops
from saapindex.index.state import Routing
from saapindex.params import RankBy, SearchParameters

__all__ = ["Probes", "choose_lists", "same_limit"]


class Probes(NamedTuple):
    """What each query visits.

    Attributes
    ----------
    lists
        (q, p) int64, best first, -1 where there are no more.
    limits
        (q,) int64, keys to read at most; the list that crosses the limit is read in part.
    """

    lists: Ints
    limits: Ints

    def keys_read(self, sizes: Ints) -> Ints:
        """Return how many keys each query reads from lists of these sizes, (q,)."""
        visited = np.where(self.lists >= 0, sizes[self.lists], 0).sum(axis=1)
        read: Ints = np.minimum(visited, self.limits)
        return read


def same_limit(queries: int, keys: int) -> Ints:
    """Return the same limit for every query."""
    limits = np.empty(queries, np.int64)  # np.full takes longer than the search of a list
    limits.fill(keys)
    return limits


def choose_lists(
    queries: NDArray[np.float32],
    routing: Routing,
    rank: RankBy,
    nprobe: int,
    params: SearchParameters,
    ops: Ops,
) -> Probes:
    """Choose the lists to visit.

    Parameters
    ----------
    queries
        (q, d), in the view of the partition.
    routing
        The router, with the sizes of the lists.
    rank
        What lists are ranked by, if `params` does not say otherwise.
    nprobe
        Lists to visit if `params` does not say otherwise.
    params
        Number, budget or top-p.
    ops
        The backend.
    """
    sizes = routing.sizes
    nlist, ntotal = len(sizes), routing.ntotal
    bias = routing.bias(params.rank or rank)
    features = routing.router.features(queries)

    if params.budget is not None:

        def best(p: int) -> Ints:
            return ops.route(features, routing.table, bias, p)[0]

        return _by_budget(best, sizes, params.keys(ntotal), len(queries))
    if params.top_p is None:
        lists, _ = ops.route(features, routing.table, bias, min(params.nprobe or nprobe, nlist))
    else:
        lists, scores = ops.route(features, routing.table, bias, nlist)
        with np.errstate(invalid="ignore"):  # lists that are empty
            to_mass = np.nan_to_num(routing.by_mass - bias, nan=-np.inf)
        lists = _by_mass(lists, scores + np.where(lists >= 0, to_mass[lists], 0), params.top_p)
    return Probes(lists, same_limit(len(queries), ntotal))


def _by_budget(best: Callable[[int], Ints], sizes: Ints, budget: int, queries: int) -> Probes:
    """As many lists as hold `budget` keys for every query."""
    nlist, ntotal = len(sizes), int(sizes.sum())
    limits = same_limit(queries, min(budget, ntotal))
    p = min(nlist, 8 + 2 * -(-min(budget, ntotal) * nlist // max(ntotal, 1)))
    while True:
        probes = Probes(best(p), limits)
        if p == nlist or (probes.keys_read(sizes) >= limits).all():
            return probes
        p = min(nlist, 2 * p)


def _by_mass(lists: Ints, logs: Floats, top_p: float) -> Ints:
    """The first lists in rank order that hold `top_p` of the predicted mass."""
    top = logs.max(axis=1, keepdims=True, initial=-np.inf)
    masses = np.exp(logs - np.where(np.isfinite(top), top, 0), dtype=np.float64)
    before = np.cumsum(masses, axis=1) - masses
    # Masses too small to count in the sum are wanted all the same if the whole is.
    wanted = (before < top_p * masses.sum(axis=1, keepdims=True)) | (top_p == 1)
    lists = np.where(wanted, lists, -1)
    width = max(1, int((lists >= 0).sum(axis=1).max(initial=0)))
    return np.ascontiguousarray(lists[:, :width])
