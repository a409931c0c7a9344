"""What holds for every index, whatever it holds and however it came to hold it.

Keys and queries are whole numbers, so that every score is exact and equal scores are many: answers must
then match to the bit, equal scores by rising id.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx

D, NLIST = 6, 5
ROPE = sx.Rope(theta=100.0, dim=4)
LEAST = {sx.METRIC_INNER_PRODUCT: -np.inf, sx.METRIC_L2: np.inf}
metrics = st.sampled_from([sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
views = st.sampled_from([None, "rotated", "unrotated", "windowed"])
seeds = st.integers(0, 1000)
sizes = st.sampled_from([0, 1, 16, 17, 90])


def whole(rng, n):
    return rng.integers(-3, 4, (n, D)).astype(np.float32)


def trained(backend="cpu", metric=sx.METRIC_INNER_PRODUCT, view=None, seed=0, **changes):
    """An index without keys; with a rope unless `view` is None."""
    rng = np.random.default_rng(seed)
    params = sx.IndexParameters(view=view or "rotated", niter=2, max_position=10_000, cutoff=20.0, **changes)
    rope = None if view is None else ROPE
    index = sx.IndexSAAP(D, NLIST, metric, params=params, rope=rope, backend=backend)
    index.train(whole(rng, 60), xq_train=whole(rng, 40))
    return index


def brute_force(queries, keys, ids, k, metric):
    """The contract of search, by definition."""
    l2 = metric == sx.METRIC_L2
    scores = ((queries[:, None] - keys) ** 2).sum(axis=2) if l2 else queries @ keys.T
    best = np.full((len(queries), k), LEAST[metric], np.float32)
    found = np.full((len(queries), k), -1)
    for i, row in enumerate(scores):
        order = np.lexsort((ids, row if l2 else -row))[:k]
        best[i, : len(order)], found[i, : len(order)] = row[order], ids[order]
    return best, found


def same(answer, expected):
    for ours, theirs in zip(answer, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


EVERYTHING = [{"nprobe": NLIST}, {"nprobe": 99}, {"budget": 1.0}, {"budget": 10**9}, {"top_p": 1.0}]


@pytest.mark.parametrize("given_params", EVERYTHING)
@given(n=sizes, k=st.sampled_from([1, 7, 100]), metric=metrics, view=views, seed=seeds)
def test_reading_everything_is_exact_search(backend, given_params, n, k, metric, view, seed):
    if "top_p" in given_params:
        metric = sx.METRIC_INNER_PRODUCT
    rng = np.random.default_rng(seed)
    index, keys, queries = trained(backend, metric, view), whole(rng, n), whole(rng, 5)
    index.add(keys)
    answer = index.search(queries, k, params=sx.SearchParameters(**given_params))
    same(answer, brute_force(queries, keys, np.arange(n), k, metric))


@given(n=sizes, radius=st.integers(-9, 30), metric=metrics, view=views, seed=seeds)
def test_range_search_over_everything_is_exact(backend, n, radius, metric, view, seed):
    rng = np.random.default_rng(seed)
    index, keys, queries = trained(backend, metric, view), whole(rng, n), whole(rng, 5)
    index.add(keys)
    lims, scores, ids = index.range_search(queries, radius, params=sx.SearchParameters(nprobe=NLIST))
    best, found = brute_force(queries, keys, np.arange(n), max(n, 1), metric)
    inside = (best < radius) if metric == sx.METRIC_L2 else (best > radius)
    np.testing.assert_array_equal(lims, [0, *inside.sum(axis=1).cumsum()])
    assert (lims.dtype, scores.dtype, ids.dtype) == (np.int64, np.float32, np.int64)
    for i, row in enumerate(inside):
        part = slice(lims[i], lims[i + 1])
        assert sorted(zip(ids[part], scores[part], strict=True)) == sorted(
            zip(found[i][row], best[i][row], strict=True)
        )


@given(data=st.data(), n=st.integers(1, 60), router=st.sampled_from(["mean", "centroid"]), seed=seeds)
def test_order_and_batches_of_adding_do_not_show(backend, data, n, router, seed):
    rng = np.random.default_rng(seed)
    keys, queries = whole(rng, n), whole(rng, 5)
    ids = rng.choice(500, n, replace=False)
    once = trained(backend, router=router)
    once.add_with_ids(keys, ids)
    bit_by_bit = trained(backend, router=router)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=5))
    for rows in np.split(rng.permutation(n), sorted(cuts)):
        bit_by_bit.add_with_ids(keys[rows], ids[rows])
    assert bit_by_bit.ntotal == once.ntotal == n
    np.testing.assert_array_equal(bit_by_bit.list_sizes, once.list_sizes)
    for params in ({"nprobe": 2}, {"budget": 7}, {"top_p": 0.8}):
        params = sx.SearchParameters(**params)
        same(bit_by_bit.route(queries, params=params), once.route(queries, params=params))
        if params.budget is None:  # within a list that is read in part, the order decides
            same(bit_by_bit.search(queries, 9, params=params), once.search(queries, 9, params=params))


@given(n=st.integers(1, 60), share=st.floats(0, 1), metric=metrics, view=views, seed=seeds)
def test_what_is_removed_is_gone_and_the_rest_is_left(backend, n, share, metric, view, seed):
    rng = np.random.default_rng(seed)
    keys, queries, gone = whole(rng, n), whole(rng, 5), rng.random(n) < share
    index = trained(backend, metric, view)
    index.add(keys)
    removed = index.remove_ids(np.concatenate([np.flatnonzero(gone), [n + 5, -1]]))
    kept = np.flatnonzero(~gone)
    assert removed == gone.sum()
    assert index.ntotal == index.list_sizes.sum() == len(kept)
    answer = index.search(queries, n, params=sx.SearchParameters(nprobe=NLIST))
    same(answer, brute_force(queries, keys[kept], kept, n, metric))
    assert not np.isin(answer[1], np.flatnonzero(gone)).any()
    assert index.remove_ids(np.flatnonzero(gone)) == 0
    index.add(keys[:1])
    new = kept.max(initial=-1) + 1
    np.testing.assert_array_equal(index.reconstruct(new), keys[0])


@given(n=st.integers(1, 60), view=views, seed=seeds)
def test_removing_and_adding_again_changes_nothing(backend, n, view, seed):
    rng = np.random.default_rng(seed)
    keys, queries, gone = whole(rng, n), whole(rng, 5), rng.random(n) < 0.5
    index = trained(backend, view=view)
    index.add(keys)
    before = index.search(queries, 9, params=sx.SearchParameters(nprobe=NLIST))
    index.remove_ids(np.flatnonzero(gone))
    index.add_with_ids(keys[gone], np.flatnonzero(gone))
    same(index.search(queries, 9, params=sx.SearchParameters(nprobe=NLIST)), before)


@given(n=sizes, view=views, seed=seeds)
def test_keys_are_given_back_as_they_were_added(n, view, seed):
    rng = np.random.default_rng(seed)
    index, keys = trained(view=view), rng.standard_normal((n, D)).astype(np.float32)
    index.add(keys[: n // 3])
    index.add(keys[n // 3 :])
    np.testing.assert_array_equal(index.reconstruct_n(), keys)
    np.testing.assert_array_equal(index.reconstruct_n(n // 2, n // 4), keys[n // 2 : n // 2 + n // 4])
    order = rng.integers(n, size=9) if n else np.zeros(0, int)
    np.testing.assert_array_equal(index.reconstruct_batch(order), keys[order])


@given(
    n=sizes,
    given_params=st.sampled_from(
        [{}, {"nprobe": 3}, {"nprobe": 2, "rank": "mass"}, {"budget": 11}, {"budget": 0.3}, {"top_p": 0.7}]
    ),
    view=views,
    seed=seeds,
)
def test_search_is_route_and_then_search_preassigned(backend, n, given_params, view, seed):
    rng = np.random.default_rng(seed)
    index, queries = trained(backend, view=view), whole(rng, 5)
    index.add(whole(rng, n))
    params = sx.SearchParameters(**given_params)
    lists, keys_read = index.route(queries, params=params)
    same(index.search_preassigned(queries, 8, lists, params=params), index.search(queries, 8, params=params))
    visited = np.where(lists >= 0, index.list_sizes[lists], 0).sum(axis=1)
    np.testing.assert_array_equal(keys_read, np.minimum(visited, params.keys(n)))


@given(n=sizes, budget=st.integers(1, 120), rank=st.sampled_from(["key", "mass"]), metric=metrics, seed=seeds)
def test_a_budget_is_read_exactly(backend, n, budget, rank, metric, seed):
    rng = np.random.default_rng(seed)
    index, queries = trained(backend, metric), whole(rng, 5)
    index.add(whole(rng, n))
    rank = None if metric == sx.METRIC_L2 else rank
    params = sx.SearchParameters(budget=budget, rank=rank)
    assert (index.route(queries, params=params)[1] == min(budget, n)).all()
    _, ids = index.search(queries, n + 1, params=params)
    np.testing.assert_array_equal((ids >= 0).sum(axis=1), min(budget, n))


@given(n=st.integers(1, 60), niter=st.integers(1, 3), metric=metrics, view=views, seed=seeds)
def test_adapting_keeps_every_key(backend, n, niter, metric, view, seed):
    rng = np.random.default_rng(seed)
    keys, queries = whole(rng, n), whole(rng, 5)
    index = trained(backend, metric, view)
    ids = rng.choice(500, n, replace=False)
    index.add_with_ids(keys, ids)
    index.adapt(niter)
    assert index.ntotal == index.list_sizes.sum() == n
    np.testing.assert_array_equal(index.reconstruct_batch(ids), keys)
    answer = index.search(queries, 9, params=sx.SearchParameters(nprobe=NLIST))
    same(answer, brute_force(queries, keys, ids, 9, metric))
    index.add(keys[:1])
    assert index.ntotal == n + 1


@given(n=sizes, metric=metrics, seed=seeds)
def test_backends_give_the_same_answers(n, metric, seed):
    rng = np.random.default_rng(seed)
    keys, queries = whole(rng, n), whole(rng, 5)
    reference, cpu = trained("reference", metric), trained("cpu", metric)
    for index in (reference, cpu):
        index.add(keys)
    np.testing.assert_allclose(cpu.partition.centroids, reference.partition.centroids, atol=1e-5)
    full = sx.SearchParameters(nprobe=NLIST)
    same(cpu.search(queries, 9, params=full), reference.search(queries, 9, params=full))
