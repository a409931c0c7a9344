"""The scan of every backend against the definition: exact keys, ties by id, limits, holes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists, to_blocks

REFERENCE = get_ops("reference")
CASES = {
    "q": st.sampled_from([0, 1, 3, 4, 9]),
    "n": st.sampled_from([0, 1, 63, 100]),
    "d": st.sampled_from([1, 3, 64, 65]),
    "nlist": st.sampled_from([1, 2, 7]),
    "share": st.floats(0, 1),
    "l2": st.booleans(),
    "half": st.booleans(),
    "seed": st.integers(0, 1000),
}


def make(q, n, d, nlist, share, half, seed, *, whole, cut=True):
    """Queries, lists with holes of NaN between them, probes with -1 among them, limits.

    Whole numbers make every sum exact and ties many.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(nlist, size=n) * rng.integers(2, size=n)  # the first list is the largest
    sizes = np.bincount(labels, minlength=nlist)
    room = -(-(sizes + rng.integers(LANES, size=nlist)) // LANES) * LANES
    offsets = np.cumsum(room) - room
    vectors = np.full((room.sum(), d), np.nan, np.float16 if half else np.float32)
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
    return queries.astype(np.float32), Lists(to_blocks(vectors), ids, offsets, sizes), probes.copy(), limits


def keys_of(ids, lists):
    """The keys with these ids, float32; anything where the id is -1."""
    order = np.argsort(lists.ids)
    place = np.searchsorted(lists.ids, ids, sorter=order)
    return lists.rows(order[np.minimum(place, len(order) - 1)]).astype(np.float32)


def widened(queries, lists):
    return queries.astype(np.float64), lists._replace(vectors=lists.vectors.astype(np.float64))


@pytest.mark.parametrize("k", [1, 5, 120])
@given(**CASES)
@example(q=9, n=100, d=1, nlist=1, share=1, l2=True, half=False, seed=0)
@example(q=9, n=0, d=3, nlist=7, share=1, l2=False, half=True, seed=0)
def test_ids_match_exactly_with_ties(backend, k, q, n, d, nlist, share, l2, half, seed):
    queries, *rest = make(q, n, d, nlist, share, half, seed, whole=True)
    scores, ids = get_ops(backend).scan(queries, *rest, k, l2)
    known_scores, known_ids = REFERENCE.scan(queries, *rest, k, l2)
    np.testing.assert_array_equal(ids, known_ids)
    np.testing.assert_array_equal(scores, known_scores)
    assert (scores.dtype, ids.dtype, ids.shape) == (np.float32, np.int64, (q, k))


@given(k=st.sampled_from([1, 5, 120]), **CASES)
def test_reads_what_it_says(backend, k, q, n, d, nlist, share, l2, half, seed):
    queries, lists, probes, limits = make(q, n, d, nlist, share, half, seed, whole=True)
    scores, ids = get_ops(backend).scan(queries, lists, probes, limits, k, l2)
    for i in range(q):
        read = [lists.offsets[j] + row for j in probes[i] if j >= 0 for row in range(lists.sizes[j])]
        read = np.array(read[: limits[i]], np.int64)
        keys = lists.rows(read).astype(np.float32)
        losses = ((keys - queries[i]) ** 2).sum(axis=1) if l2 else -(keys @ queries[i])
        found = sorted(zip(losses, lists.ids[read], strict=True))[:k]
        rest = k - len(found)
        assert ids[i].tolist() == [id for _, id in found] + [-1] * rest
        worst = np.inf if l2 else -np.inf
        assert scores[i].tolist() == [loss if l2 else -loss for loss, _ in found] + [worst] * rest


@given(**CASES)
def test_chooses_right_up_to_rounding(backend, q, n, d, nlist, share, l2, half, seed):
    queries, lists, probes, limits = make(q, n, d, nlist, share, half, seed, whole=False, cut=False)
    scores, ids = get_ops(backend).scan(queries, lists, probes, limits, 10, l2)
    truth, _ = REFERENCE.scan(*widened(queries, lists), probes, limits, 10, l2)
    filled = np.isfinite(truth)
    np.testing.assert_array_equal(ids >= 0, filled)
    np.testing.assert_array_equal(scores[~filled], truth[~filled])
    rounding = 1e-6 * (d + 10)
    assert (np.abs(scores[filled] - truth[filled]) <= rounding).all()
    if lists.ids.size:
        keys, query = keys_of(ids, lists).astype(np.float64), queries[:, None].astype(np.float64)
        own = ((keys - query) ** 2).sum(axis=2) if l2 else (keys * query).sum(axis=2)
        assert (np.abs(own - truth)[filled] <= 2 * rounding).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("d", [3, 64, 65, 128])
def test_error_is_at_most_twice_that_of_numpy_in_float32(backend, d, l2, half):
    queries, lists, *rest = make(9, 1000, d, 2, 1, half, 0, whole=False, cut=False)
    scores, ids = get_ops(backend).scan(queries, lists, *rest, 2000, l2)
    read, keys = ids >= 0, keys_of(ids, lists)
    wide, query = keys.astype(np.float64), queries[:, None].astype(np.float64)
    truth = ((wide - query) ** 2).sum(axis=2) if l2 else (wide * query).sum(axis=2)
    numpy = ((keys - queries[:, None]) ** 2).sum(axis=2) if l2 else (keys @ queries[:, :, None])[..., 0]
    assert read.sum() > 1000
    assert np.abs(scores - truth)[read].max() <= 2 * np.abs(numpy - truth)[read].max()


@given(radius=st.integers(-5, 20), **CASES)
@example(radius=0, q=9, n=100, d=1, nlist=1, share=1, l2=True, half=False, seed=0)
def test_range_matches_exactly(backend, radius, q, n, d, nlist, share, l2, half, seed):
    queries, *rest = make(q, n, d, nlist, share, half, seed, whole=True)
    found = get_ops(backend).range_scan(queries, *rest, float(radius), l2)
    known = REFERENCE.range_scan(queries, *rest, float(radius), l2)
    for part, (ours, theirs) in enumerate(zip(found, known, strict=True)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == (np.float32 if part == 1 else np.int64)


@given(radius=st.integers(-5, 20), **CASES)
def test_range_is_strict_and_agrees_with_scan(backend, radius, q, n, d, nlist, share, l2, half, seed):
    queries, *rest = make(q, n, d, nlist, share, half, seed, whole=True)
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
    lists = Lists(to_blocks(keys), np.arange(5, 5 + LANES), np.array([0]), np.array([2]))
    probes, limits = np.zeros((1, 2), np.int64), np.array([3])
    _, ids = get_ops(backend).scan(np.ones((1, 1), np.float32), lists, probes, limits, 4, False)
    assert ids.tolist() == [[6, 5, 5, -1]]


def test_strided_queries(backend):
    queries, *rest = make(9, 63, 6, 2, 1, False, 0, whole=True)
    wide, ops = np.repeat(queries, 2, axis=1)[:, ::2], get_ops(backend)
    np.testing.assert_array_equal(ops.scan(wide, *rest, 5, True)[1], ops.scan(queries, *rest, 5, True)[1])
    found, known = (ops.range_scan(x, *rest, 1.0, False) for x in (wide, queries))
    np.testing.assert_array_equal(found[2], known[2])


@pytest.mark.parametrize("half", [False, True])
def test_scores_that_overflow_are_the_best(backend, half):
    largest = np.finfo(np.float16 if half else np.float32).max
    keys = np.array([[0, 0], [largest, largest], [-largest, 0]], np.float16 if half else np.float32)
    lists = Lists(to_blocks(keys), np.arange(LANES), np.array([0]), np.array([3]))
    queries, all_of_it = np.full((5, 2), 3e38, np.float32), (np.zeros((5, 1), np.int64), np.full(5, 3))
    with np.errstate(over="ignore"):
        scores, ids = get_ops(backend).scan(queries, lists, *all_of_it, 2, False)
    assert ids.tolist() == [[1, 0]] * 5
    assert scores.tolist() == [[np.inf, 0]] * 5


def test_no_probes_at_all(backend):
    queries, lists, _, limits = make(3, 63, 3, 2, 1, False, 0, whole=True)
    none = np.empty((3, 0), np.int64)
    scores, ids = get_ops(backend).scan(queries, lists, none, limits, 2, True)
    assert (ids == -1).all()
    assert np.isposinf(scores).all()
    assert get_ops(backend).range_scan(queries, lists, none, limits, 1.0, True)[0].tolist() == [0] * 4
