"""The choice of lists of every backend against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.base import to_blocks

CASES = {
    "q": st.sampled_from([0, 1, 3, 4, 63]),
    "h": st.sampled_from([1, 3, 64, 65]),
    "nlist": st.sampled_from([1, 2, 16, 17, 100]),
    "share": st.floats(0, 1),
    "closed": st.floats(0, 1),
    "seed": st.integers(0, 1000),
}


def make(q, h, nlist, closed, seed, *, whole):
    """Features, table, bias; whole numbers make every score exact and ties many."""
    rng = np.random.default_rng(seed)
    features, table, bias = (
        (rng.integers(-2, 3, shape) if whole else rng.standard_normal(shape)).astype(np.float32)
        for shape in ((q, h), (nlist, h), (nlist,))
    )
    bias[rng.random(nlist) < closed] = -np.inf
    return features, table, bias


def check(answer, scores, p):
    """Best first, equal scores by number, what must not be visited left out."""
    lists, best = answer
    assert (lists.dtype, best.dtype) == (np.int64, np.float32)
    assert lists.shape == best.shape == (len(scores), p)
    for i, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")[: min(p, np.isfinite(row).sum())]
        assert lists[i].tolist() == order.tolist() + [-1] * (p - len(order))
        assert best[i].tolist() == row[order].tolist() + [-np.inf] * (p - len(order))


@given(**CASES)
@example(q=9, h=3, nlist=100, share=1, closed=1, seed=0)  # no list may be visited
@example(q=9, h=1, nlist=1000, share=0.5, closed=0, seed=0)  # hundreds of equal scores
def test_lists_come_best_first_and_ties_by_number(backend, q, h, nlist, share, closed, seed):
    features, table, bias = make(q, h, nlist, closed, seed, whole=True)
    p = max(1, round(share * nlist))
    check(get_ops(backend).route(features, to_blocks(table), bias, p), features @ table.T + bias, p)


@given(**CASES)
def test_chooses_right_up_to_rounding(backend, q, h, nlist, share, closed, seed):
    features, table, bias = make(q, h, nlist, closed, seed, whole=False)
    p = max(1, round(share * nlist))
    lists, best = get_ops(backend).route(features, to_blocks(table), bias, p)
    truth = features.astype(np.float64) @ table.T.astype(np.float64) + bias
    filled = lists >= 0
    own = np.where(filled, np.take_along_axis(truth, lists, axis=1), -np.inf)
    np.testing.assert_array_equal(filled.sum(axis=1), min(p, np.isfinite(bias).sum()))
    rounding = 1e-6 * (h + 10)
    np.testing.assert_allclose(best, own, atol=rounding, rtol=0)
    np.testing.assert_allclose(own, -np.sort(-truth, axis=1)[:, :p], atol=2 * rounding, rtol=0)
    assert all(len({*row} - {-1}) == (row >= 0).sum() for row in lists)


@given(
    exponents=st.lists(st.integers(-44, 38), min_size=2, max_size=60),
    closed=st.booleans(),
    p=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
@example(exponents=[38] * 40, closed=False, p=40, seed=0)
@example(exponents=[38, -44, 0], closed=True, p=3, seed=0)
def test_scores_of_any_magnitude(backend, exponents, closed, p, seed):
    rng = np.random.default_rng(seed)
    table = (rng.choice([-3.0, 3.0], len(exponents)) * 10.0 ** np.array(exponents)).astype(np.float32)
    bias = np.zeros(len(table), np.float32)
    bias[0] = -np.inf if closed else 0
    p = min(p, len(table))
    answer = get_ops(backend).route(np.ones((5, 1), np.float32), to_blocks(table[:, None]), bias, p)
    check(answer, np.tile(table + bias, (5, 1)), p)


@pytest.mark.parametrize("q", [1, 9])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_scores_that_overflow_do_no_harm(backend, q):
    """Infinity counts as the largest score; what is not a number is not visited first."""
    table = np.array([[3e38, 0], [3e38, 3e38], [3e38, -3e38], [1, 1], [-3e38, 0]], np.float32)
    features, bias = np.full((q, 2), 3e38, np.float32), np.zeros(5, np.float32)
    lists, _ = get_ops(backend).route(features, to_blocks(table), bias, 3)
    assert {*lists[0, :2].tolist()} == {0, 1}
    assert lists.min() >= -1
    assert lists.max() < 5


def test_strided_features(backend):
    features, table, bias = make(20, 6, 17, 0.1, 0, whole=True)
    ops = get_ops(backend)
    wide = np.repeat(features, 2, axis=1)[:, ::2]
    for found, known in zip(
        ops.route(wide, to_blocks(table), bias, 4),
        ops.route(features, to_blocks(table), bias, 4),
        strict=True,
    ):
        np.testing.assert_array_equal(found, known)
