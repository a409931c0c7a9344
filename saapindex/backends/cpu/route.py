"""Choice of the lists that a query visits."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from saapindex.backends.base import Floats, Ints
from saapindex.backends.cpu.heap import replace_root, sort_heap

# Below this many scores the threads cost more than they save.
FEW = 1 << 14


@njit(cache=True, nogil=True)
def _top_query(scores, bias, lists, best):  # type: ignore[no-untyped-def]
    best[:] = -np.inf
    lists[:] = -1
    for list_ in range(scores.shape[0]):
        # Lists come in rising order, so an equal score never displaces one that is kept.
        score = scores[list_] + bias[list_]
        if score > best[0]:
            replace_root(best, lists, best.shape[0], score, np.int64(list_))
    sort_heap(best, lists)


@njit(cache=True, nogil=True)
def _top_few(scores, bias, lists, best):  # type: ignore[no-untyped-def]
    for i in range(scores.shape[0]):
        _top_query(scores[i], bias, lists[i], best[i])


@njit(cache=True, nogil=True, parallel=True)
def _top_many(scores, bias, lists, best):  # type: ignore[no-untyped-def]
    for i in prange(scores.shape[0]):
        _top_query(scores[i], bias, lists[i], best[i])


def top_lists(scores: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.top_lists`."""
    lists = np.empty((len(scores), p), np.int64)
    best = np.empty((len(scores), p), np.float32)
    run = _top_few if scores.size < FEW else _top_many
    run(np.ascontiguousarray(scores), bias, lists, best)
    return lists, best
