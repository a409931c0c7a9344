"""From scores to the lists that each query visits: by number, by a budget of keys, or by predicted mass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints, Ops
from saapindex.index.state import Routing
from saapindex.params import SearchParameters

__all__ = ["Probes", "choose_lists"]


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


def choose_lists(
    scores: Floats,
    bias: NDArray[np.float32],
    routing: Routing,
    nprobe: int,
    params: SearchParameters,
    ops: Ops,
) -> Probes:
    """Choose the lists to visit.

    Parameters
    ----------
    scores
        (q, nlist), what the router says of each list.
    bias
        (nlist,), added to rank the lists.
    routing
        The sizes of the lists, and what makes scores the logarithm of a mass.
    nprobe
        Lists to visit if `params` does not say otherwise.
    params
        Number, budget or top-p.
    ops
        The backend.
    """
    sizes = routing.sizes
    nlist, ntotal = len(sizes), int(sizes.sum())
    if params.top_p is not None:
        return _by_mass(scores, bias, routing.by_mass, ntotal, params.top_p, ops)
    if params.budget is not None:
        return _by_budget(scores, bias, sizes, params.keys(ntotal), ops)
    lists, _ = ops.top_lists(scores, bias, min(params.nprobe or nprobe, nlist))
    return Probes(lists, np.full(len(scores), ntotal, np.int64))


def _by_budget(scores: Floats, bias: NDArray[np.float32], sizes: Ints, budget: int, ops: Ops) -> Probes:
    """As many lists as hold `budget` keys for every query."""
    nlist, ntotal = len(sizes), int(sizes.sum())
    budget = min(budget, ntotal)
    p = min(nlist, 8 + 2 * -(-budget * nlist // max(ntotal, 1)))
    while True:
        lists, _ = ops.top_lists(scores, bias, p)
        probes = Probes(lists, np.full(len(scores), budget, np.int64))
        if p == nlist or (probes.keys_read(sizes) >= budget).all():
            return probes
        p = min(nlist, 2 * p)


def _by_mass(
    scores: Floats,
    bias: NDArray[np.float32],
    mass_bias: NDArray[np.float32],
    ntotal: int,
    top_p: float,
    ops: Ops,
) -> Probes:
    """The first lists in rank order that hold `top_p` of the predicted mass."""
    lists, _ = ops.top_lists(scores, bias, scores.shape[1])
    logs = np.where(lists >= 0, np.take_along_axis(scores + mass_bias, np.maximum(lists, 0), 1), -np.inf)
    top = logs.max(axis=1, keepdims=True, initial=-np.inf)
    masses = np.exp(logs - np.where(np.isfinite(top), top, 0), dtype=np.float64)
    before = np.cumsum(masses, axis=1) - masses
    total = masses.sum(axis=1, keepdims=True)
    lists = np.where(before < top_p * total, lists, -1)
    width = max(1, int((lists >= 0).sum(axis=1).max(initial=0)))
    return Probes(np.ascontiguousarray(lists[:, :width]), np.full(len(scores), ntotal, np.int64))
