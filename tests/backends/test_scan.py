"""The scan of every backend against the definition: exact keys, ties by id, limits, holes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.base import Lists

REFERENCE = get_ops("reference")
CASES = {
    "q": st.sampled_from([0, 1, 3, 4, 9]),
    "n": st.sampled_from([0, 1, 63, 100]),
    "d": st.sampled_from([1, 3, 64, 65]),
    "nlist": st.sampled_from([1, 2, 7]),
    "share": st.floats(0, 1),
    "l2": st.booleans(),
    "seed": st.integers(0, 1000),
}


def make(q, n, d, nlist, share, seed, *, whole, cut=True):
    """Queries, lists with holes of NaN between them, probes with -1 among them, limits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(nlist, size=n) * rng.integers(2, size=n)  # the first list is the largest
    sizes = np.bincount(labels, minlength=nlist)
    holes = rng.integers(3, size=nlist)
    offsets = np.cumsum(sizes + holes) - sizes
    vectors = np.full((n + holes.sum(), d), np.nan, np.float32)
    ids = np.full(len(vectors), -7)
    for j in range(nlist):
        rows = slice(offsets[j], offsets[j] + sizes[j])
        vectors[rows] = rng.integers(-2, 3, (sizes[j], d)) if whole else rng.standard_normal((sizes[j], d))
        ids[rows] = rng.choice(10 * n, sizes[j], replace=False) * nlist + j
    queries = rng.integers(-2, 3, (q, d)) if whole else rng.standard_normal((q, d))
    p = max(1, round(share * nlist))
    probes = np.argsort(rng.random((q, nlist)), axis=1)[:, :p]
    probes[rng.random(probes.shape) < 0.2] = -1
    limits = rng.integers(n + 2, size=q) if cut else np.full(q, n)
    return queries.astype(np.float32), Lists(vectors, ids, offsets, sizes), probes.copy(), limits


def widened(queries, lists):
    return queries.astype(np.float64), lists._replace(vectors=lists.vectors.astype(np.float64))


@pytest.mark.parametrize("k", [1, 5, 120])
@given(**CASES)
@example(q=9, n=100, d=1, nlist=1, share=1, l2=True, seed=0)
@example(q=9, n=0, d=3, nlist=7, share=1, l2=False, seed=0)
def test_ids_match_exactly_with_ties(k, q, n, d, nlist, share, l2, seed):
    queries, *rest = make(q, n, d, nlist, share, seed, whole=True)
    scores, ids = get_ops("cpu").scan(queries, *rest, k, l2)
    known_scores, known_ids = REFERENCE.scan(queries, *rest, k, l2)
    np.testing.assert_array_equal(ids, known_ids)
    np.testing.assert_array_equal(scores, known_scores)
    assert (scores.dtype, ids.dtype, ids.shape) == (np.float32, np.int64, (q, k))


@given(k=st.sampled_from([1, 5, 120]), **CASES)
def test_reads_what_it_says(backend, k, q, n, d, nlist, share, l2, seed):
    queries, lists, probes, limits = make(q, n, d, nlist, share, seed, whole=True)
    scores, ids = get_ops(backend).scan(queries, lists, probes, limits, k, l2)
    for i in range(q):
        rows = [lists.offsets[j] + r for j in probes[i] if j >= 0 for r in range(lists.sizes[j])][: limits[i]]
        found = [
            (
                ((queries[i] - lists.vectors[r]) ** 2).sum() if l2 else -(queries[i] @ lists.vectors[r]),
                lists.ids[r],
            )
            for r in rows
        ]
        found = sorted(found)[:k]
        rest = k - len(found)
        assert ids[i].tolist() == [id for _, id in found] + [-1] * rest
        worst = np.inf if l2 else -np.inf
        assert scores[i].tolist() == [loss if l2 else -loss for loss, _ in found] + [worst] * rest


@given(**CASES)
def test_is_as_exact_as_float32_allows(backend, q, n, d, nlist, share, l2, seed):
    queries, lists, probes, limits = make(q, n, d, nlist, share, seed, whole=False, cut=False)
    scores, ids = get_ops(backend).scan(queries, lists, probes, limits, 10, l2)
    truth, _ = REFERENCE.scan(*widened(queries, lists), probes, limits, 10, l2)
    same_precision, _ = REFERENCE.scan(queries, lists, probes, limits, 10, l2)
    filled = np.isfinite(truth)
    np.testing.assert_array_equal(ids >= 0, filled)
    np.testing.assert_array_equal(scores[~filled], truth[~filled])
    rounding = 2 * np.abs(same_precision[filled] - truth[filled]).max(initial=0) + 1e-6
    assert (np.abs(scores[filled] - truth[filled]) <= rounding).all()
    row_of = {int(id): row for row, id in enumerate(lists.ids)}
    for i, rank in np.argwhere(filled):
        key, query = lists.vectors[row_of[ids[i, rank]]].astype(np.float64), queries[i].astype(np.float64)
        own = ((key - query) ** 2).sum() if l2 else key @ query
        assert abs(own - truth[i, rank]) <= 2 * rounding


@given(radius=st.integers(-5, 20), **CASES)
@example(radius=0, q=9, n=100, d=1, nlist=1, share=1, l2=True, seed=0)
def test_range_matches_exactly(radius, q, n, d, nlist, share, l2, seed):
    queries, *rest = make(q, n, d, nlist, share, seed, whole=True)
    found = get_ops("cpu").range_scan(queries, *rest, float(radius), l2)
    known = REFERENCE.range_scan(queries, *rest, float(radius), l2)
    for part, (ours, theirs) in enumerate(zip(found, known, strict=True)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == (np.float32 if part == 1 else np.int64)


@given(radius=st.integers(-5, 20), **CASES)
def test_range_is_strict_and_agrees_with_scan(backend, radius, q, n, d, nlist, share, l2, seed):
    queries, *rest = make(q, n, d, nlist, share, seed, whole=True)
    ops = get_ops(backend)
    lims, scores, ids = ops.range_scan(queries, *rest, float(radius), l2)
    best, found = ops.scan(queries, *rest, n + 1, l2)
    inside = (best < radius) if l2 else (best > radius)
    assert lims[0] == 0
    for i in range(q):
        part = slice(lims[i], lims[i + 1])
        assert sorted(ids[part]) == sorted(found[i][inside[i]])
        assert sorted(scores[part]) == sorted(best[i][inside[i]])


def test_a_list_probed_twice_is_read_twice(backend):
    keys = np.array([[1.0], [2.0]], np.float32)
    lists = Lists(keys, np.array([5, 6]), np.array([0]), np.array([2]))
    probes, limits = np.zeros((1, 2), np.int64), np.array([3])
    _, ids = get_ops(backend).scan(np.ones((1, 1), np.float32), lists, probes, limits, 4, False)
    assert ids.tolist() == [[6, 5, 5, -1]]


def test_no_probes_at_all(backend):
    queries, lists, _, limits = make(3, 63, 3, 2, 1, 0, whole=True)
    none = np.empty((3, 0), np.int64)
    scores, ids = get_ops(backend).scan(queries, lists, none, limits, 2, True)
    assert (ids == -1).all()
    assert np.isposinf(scores).all()
    assert get_ops(backend).range_scan(queries, lists, none, limits, 1.0, True)[0].tolist() == [0] * 4
