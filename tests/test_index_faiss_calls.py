"""Calls that Faiss has beside train, add and search: merging, given lists, statistics, threads."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx

FULL = sx.SearchParameters(nprobe=8)
STORAGE = [{}, {"bits": 2}, {"bits": 4, "refine": True}]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("metric", [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
def test_merging_is_adding(make_index, blobs, same, storage, metric):
    params = sx.IndexParameters(niter=3, **storage)
    whole = make_index(metric_type=metric, params=params)
    one, other = (make_index(n=0, metric_type=metric, params=params) for _ in range(2))
    one.add(blobs(400, 16)[:150])
    other.add(blobs(400, 16)[150:], positions=np.arange(150, 400))
    one.merge_from(other, add_id=150)
    assert (one.ntotal, other.ntotal, other.is_trained) == (400, 0, True)
    queries = blobs(9, 16, seed=2)
    for params in (FULL, sx.SearchParameters(nprobe=2), sx.SearchParameters(budget=0.2)):
        same(one.search(queries, 7, params=params), whole.search(queries, 7, params=params))
    same([one._state.sums], [whole._state.sums])
    np.testing.assert_array_equal(one.reconstruct_n(), whole.reconstruct_n())
    for index in (one, other):
        index.add(blobs(3, 16))
    assert one.search(blobs(3, 16), 1, params=FULL)[1].max() < 403
    assert other.ntotal == 3


def _other(make_index, name):
    ordinary = sx.IndexParameters(niter=3)
    kinds = {
        "metric_type": {"metric_type": sx.METRIC_L2},
        "centroids": {"params": ordinary.replace(seed=5)},
        "storage": {"dtype": "float16"},
        "views of the partition": {"rope": sx.Rope(dim=16)},
        "storage, codes": {"params": ordinary.replace(bits=2)},
        "nlist": {"nlist": 4},
        "d": {"d": 8},
    }
    return make_index(**kinds[name])


@pytest.mark.parametrize(
    "name", ["metric_type", "centroids", "storage", "views of the partition", "storage, codes", "nlist", "d"]
)
def test_what_does_not_fit_is_not_merged(make_index, blobs, same, name):
    index, other = make_index(), _other(make_index, name)
    before = index.search(blobs(9, 16), 5, params=FULL)
    with pytest.raises(sx.InvalidInputError, match="the two indexes differ in their"):
        index.merge_from(other, add_id=1000)
    assert (index.ntotal, other.ntotal) == (400, 400)
    same(index.search(blobs(9, 16), 5, params=FULL), before)


@pytest.mark.parametrize(
    ("add_id", "message"),
    [
        (0, "is in the index already"),
        (-500, "ids would reach from -500"),
        (1 << 62, "ids would reach"),
        ("1", "add_id is '1'"),
    ],
)
def test_ids_that_clash_are_not_merged(make_index, add_id, message):
    index, other = make_index(), make_index()
    with pytest.raises(sx.InvalidInputError, match=message):
        index.merge_from(other, add_id=add_id)
    assert (index.ntotal, other.ntotal) == (400, 400)


def test_merging_with_nothing_and_with_itself(make_index):
    index = make_index()
    with pytest.raises(sx.InvalidInputError, match="no second index"):
        index.merge_from(index)
    with pytest.raises(sx.InvalidInputError, match="no second index"):
        index.merge_from(None)
    with pytest.raises(sx.NotTrainedError):
        index.merge_from(sx.IndexSAAP(16, 8))
    index.merge_from(make_index(n=0))
    assert index.ntotal == 400


def test_faiss_merges_the_same(make_index, blobs):
    faiss = pytest.importorskip("faiss")
    known = [faiss.IndexFlatIP(16) for _ in range(2)]
    ours = [make_index(n=0) for _ in range(2)]
    for index in (*known, *ours):
        index.add(blobs(20, 16, seed=3))
    known[0].merge_from(known[1])
    ours[0].merge_from(ours[1], 20)
    assert [i.ntotal for i in known] == [i.ntotal for i in ours] == [40, 0]


def test_keys_go_to_the_lists_that_are_given(make_index, blobs):
    index, keys = make_index(n=0), blobs(50, 16)
    lists = np.arange(50) % 8
    index.add_preassigned(keys, lists)
    np.testing.assert_array_equal(index.list_sizes, np.bincount(lists))
    index.add_preassigned(keys[:3], [7, 7, 7], ids=[100, 200, 300], positions=[5, 6, 7])
    assert index.list_sizes[7] == np.bincount(lists)[7] + 3
    found = index.search_preassigned(keys, 60, np.full((50, 1), 7))[1]
    assert {*found[0].tolist()} == {*np.flatnonzero(lists == 7).tolist(), 100, 200, 300, -1}
    for a, message in (
        [[8] * 3, "a holds list 8"],
        [[-1] * 3, "a holds -1"],
        [[0], "a has shape"],
        [[0.5] * 3, "integers"],
    ):
        with pytest.raises(sx.InvalidInputError, match=message):
            index.add_preassigned(keys[:3], a)
    assert index.ntotal == 53


def test_range_search_preassigned(make_index, blobs, same):
    index, queries = make_index(), blobs(9, 16, seed=2)
    lists, _ = index.route(queries, params=sx.SearchParameters(nprobe=3))
    known = index.range_search(queries, 2.0, params=sx.SearchParameters(nprobe=3))
    same(index.range_search_preassigned(queries, 2.0, lists), known)
    same(index.range_search_preassigned(queries, 2.0, lists, np.zeros(lists.shape)), known)
    with pytest.raises(sx.InvalidInputError, match="Iq holds lists from 8"):
        index.range_search_preassigned(queries, 2.0, np.full((9, 1), 8))
    with pytest.raises(sx.InvalidInputError, match="thresh is nan"):
        index.range_search_preassigned(queries, np.nan, lists)


def test_found_keys_come_along(make_index, blobs):
    index, queries = make_index(n=3), blobs(4, 16, seed=2)
    scores, ids, keys = index.search_and_reconstruct(queries, 5, params=FULL)
    assert keys.shape == (4, 5, 16)
    assert np.isnan(keys[:, 3:]).all()
    np.testing.assert_array_equal(keys[:, :3], index.reconstruct_batch(ids[:, :3].ravel()).reshape(4, 3, 16))
    np.testing.assert_allclose((keys[:, :3] * queries[:, None]).sum(axis=2), scores[:, :3], rtol=1e-4)


@pytest.mark.parametrize("storage", STORAGE)
def test_statistics_say_what_is_read(make_index, blobs, storage):
    index, queries = make_index(params=sx.IndexParameters(niter=3, **storage)), blobs(9, 16, seed=2)
    stats = sx.SearchStatistics()
    for params in (FULL, sx.SearchParameters(nprobe=2), sx.SearchParameters(budget=50)):
        stats.reset()
        index.search(queries, 5, params=params, stats=stats)
        lists, keys = index.route(queries, params=params)
        sizes = np.where(lists >= 0, index.list_sizes[lists], 0)
        before = np.cumsum(sizes, axis=1) - sizes
        visited = (sizes > 0) & (before < (50 if params.budget else 10**9))
        assert (stats.nq, stats.ndis, stats.nlist) == (9, keys.sum(), visited.sum())
        words = -(-16 * storage.get("bits", 0) // 32)
        scanned = 4 * words + 1 if words else 64
        assert stats.nrefined == (9 * 20 if storage.get("refine") else 0)
        table = index._routing.table.nbytes
        assert stats.nbytes == keys.sum() * scanned + 64 * stats.nrefined + 9 * (table + 40)
    index.search(queries, 5, stats=stats)
    assert stats.nq == 18
    index.range_search(queries, 1.0, stats=stats)
    index.search_preassigned(queries, 5, np.zeros((9, 1), int), stats=stats)
    assert stats.nq == 36
    with pytest.raises(sx.InvalidInputError, match="stats is a dict"):
        index.search(queries, 5, stats={})


def test_threads(make_index, blobs, same):
    index, queries = make_index(), blobs(40, 16, seed=2)
    most = sx.omp_get_max_threads()
    known = index.search(queries, 5)
    try:
        sx.omp_set_num_threads(1)
        assert sx.omp_get_max_threads() == 1
        same(index.search(queries, 5), known)
    finally:
        sx.omp_set_num_threads(most)
    for n in (0, 10**6, 1.5):
        with pytest.raises(sx.InvalidInputError, match="num_threads is"):
            sx.omp_set_num_threads(n)
    assert sx.omp_get_max_threads() == most
