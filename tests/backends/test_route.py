"""The choice of lists of every backend against the definition."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from saapindex.backends import get_ops


@given(
    q=st.sampled_from([0, 1, 2, 63]),
    nlist=st.sampled_from([1, 2, 17, 64]),
    share=st.floats(0, 1),
    closed=st.floats(0, 1),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(q=200, nlist=100, share=0.1, closed=0.3, whole=True, seed=0)  # enough for threads
@example(q=200, nlist=100, share=1, closed=0.3, whole=False, seed=0)
@example(q=3, nlist=9, share=1, closed=1, whole=False, seed=0)  # no list may be visited
def test_lists_come_best_first_and_ties_by_number(backend, q, nlist, share, closed, whole, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (q, nlist)) if whole else rng.standard_normal((q, nlist))
    scores = scores.astype(np.float32)
    bias = np.where(rng.random(nlist) < closed, -np.inf, rng.integers(3, size=nlist)).astype(np.float32)
    p = max(1, round(share * nlist))
    lists, best = get_ops(backend).top_lists(scores, bias, p)
    total = scores + bias
    assert (lists.dtype, lists.shape, best.dtype, best.shape) == (np.int64, (q, p), np.float32, (q, p))
    for i in range(q):
        order = sorted((j for j in range(nlist) if np.isfinite(bias[j])), key=lambda j: (-total[i, j], j))[:p]
        assert lists[i].tolist() == order + [-1] * (p - len(order))
        assert best[i].tolist() == total[i, order].tolist() + [-np.inf] * (p - len(order))


def test_strided_scores(backend):
    scores = np.random.default_rng(0).standard_normal((10, 20)).astype(np.float32)
    ops, bias = get_ops(backend), np.zeros(10, np.float32)
    lists, _ = ops.top_lists(scores[::2, ::2], bias, 4)
    np.testing.assert_array_equal(lists, ops.top_lists(scores[::2, ::2].copy(), bias, 4)[0])
