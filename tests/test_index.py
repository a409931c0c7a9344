"""The contracts of `IndexSAAP`: what comes out, and what is there when little or nothing is."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import saapindex as sx
from saapindex.index import searcher

FULL = sx.SearchParameters(nprobe=8)


def test_answers_have_the_types_of_faiss(index, queries):
    scores, ids = index.search(queries, 5)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    assert scores.shape == ids.shape == (7, 5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert repr(index) == "IndexSAAP(d=16, nlist=8, rotated, mean, trained, ntotal=400)"
    assert (index.d, index.nlist, index.nprobe, index.ntotal, index.is_trained) == (16, 8, 3, 400, True)
    assert index.list_sizes.sum() == 400
    assert index.nbytes >= 400 * (16 * 4 + 16)


@pytest.mark.parametrize(("metric", "worst"), [(sx.METRIC_INNER_PRODUCT, -np.inf), (sx.METRIC_L2, np.inf)])
def test_missing_results_are_minus_one(make_index, queries, metric, worst):
    index = make_index(n=3, metric_type=metric)
    scores, ids = index.search(queries, 5, params=FULL)
    assert (ids[:, :3] >= 0).all()
    assert (ids[:, 3:] == -1).all()
    assert (scores[:, 3:] == worst).all()


@pytest.mark.parametrize(("metric", "worst"), [(sx.METRIC_INNER_PRODUCT, -np.inf), (sx.METRIC_L2, np.inf)])
def test_an_empty_index_answers(make_index, queries, metric, worst):
    index = make_index(n=0, metric_type=metric)
    for params in (None, FULL, sx.SearchParameters(budget=0.5)):
        scores, ids = index.search(queries, 2, params=params)
        assert (ids == -1).all()
        assert (scores == worst).all()
        lists, keys = index.route(queries, params=params)
        assert (lists == -1).all()
        assert (keys == 0).all()
    assert index.range_search(queries, 0.0)[0].tolist() == [0] * 8
    assert index.reconstruct_n().shape == (0, 16)
    assert index.remove_ids([1]) == 0


def test_empty_batches_do_nothing(make_index, queries, same):
    index, nothing = make_index(), np.zeros((0, 16), np.float32)
    before = index.search(queries, 5, params=FULL)
    index.add(nothing)
    index.add_with_ids(nothing, [])
    index.remove_ids([])
    same(index.search(queries, 5, params=FULL), before)
    scores, ids = index.search(nothing, 5)
    assert scores.shape == ids.shape == (0, 5)
    assert index.range_search(nothing, 0.0)[0].tolist() == [0]
    assert len(index.route(nothing)[0]) == len(index.route(nothing)[1]) == 0
    assert index.search_preassigned(nothing, 5, np.zeros((0, 3), int))[1].shape == (0, 5)


def test_blocks_of_queries_do_not_show(monkeypatch, index, queries, same):
    calls = [
        lambda: index.search(queries, 5),
        lambda: index.search(queries, 5, params=sx.SearchParameters(budget=0.5)),
        lambda: index.range_search(queries, 2.0),
        lambda: index.route(queries, params=sx.SearchParameters(top_p=0.9)),
    ]
    whole = [call() for call in calls]
    monkeypatch.setattr(searcher, "_BLOCK", 2 * index.nlist)
    for call, answer in zip(calls, whole, strict=True):
        same(call(), answer)


def test_more_probes_than_lists_visit_all(index, queries, exact, blobs):
    _, ids = index.search(queries, 5, params=sx.SearchParameters(nprobe=10**6))
    np.testing.assert_array_equal(ids, exact(queries, blobs(400, 16), 5)[1])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(make_index, blobs, queries, duplicate, same):
    index, keys = make_index(), blobs(9, 16, seed=4)
    before = index.search(queries, 5, params=FULL)
    twins = duplicate(index), duplicate(index)
    for twin, key in zip(twins, keys, strict=False):
        twin.add(key[None])
    same(index.search(queries, 5, params=FULL), before)
    assert [twin.ntotal for twin in (index, *twins)] == [400, 401, 401]
    np.testing.assert_array_equal([twin.reconstruct(400) for twin in twins], keys[:2])


def test_nprobe_is_a_default(make_index, queries, same):
    index = make_index()
    assert index.nprobe == 1
    index.nprobe = 4
    same(index.search(queries, 5), index.search(queries, 5, params=sx.SearchParameters(nprobe=4)))


def test_ids_go_on_from_the_largest(make_index, blobs):
    index = make_index(n=5)
    index.remove_ids([1, 4])
    index.add(blobs(2, 16))
    index.add_with_ids(blobs(1, 16), [100])
    index.add(blobs(1, 16))
    known = [id for id in range(110) if index._state.lists.contains(np.array([id]))[0]]
    assert known == [0, 2, 3, 4, 5, 100, 101]
