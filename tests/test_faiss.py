"""Faiss as the oracle: the same lists give the same answers, under the same contracts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import saapindex as sx
from saapindex.index.state import State
from saapindex.partition import Partition, View
from saapindex.partition.routers import CentroidRouter

faiss = pytest.importorskip("faiss")
D, NLIST, N, NPROBE = 16, 20, 600, 4
METRICS = {
    "ip": (sx.METRIC_INNER_PRODUCT, faiss.IndexFlatIP),
    "l2": (sx.METRIC_L2, faiss.IndexFlatL2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Faiss's OpenMP threads and ours shall not wait for each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module", params=METRICS)
def metric(request):
    return request.param


@pytest.fixture(scope="module")
def ours(metric, make_index):
    return make_index(NLIST, D, N, METRICS[metric][0], nprobe=NPROBE)


@pytest.fixture(scope="module")
def theirs(metric, ours, blobs):
    """Faiss's index with our keys in our lists."""
    quantizer = METRICS[metric][1](D)
    quantizer.add(ours.partition.centroids)
    index = faiss.IndexIVFFlat(quantizer, D, NLIST, ours.metric_type)
    index.nprobe = NPROBE
    keys, ids = blobs(N, D), np.arange(N)
    labels = ours.partition.assign(keys, ours.ops)
    index.add_core(N, *map(faiss.swig_ptr, (keys, ids, labels)))
    return index


@pytest.fixture(scope="module")
def queries(blobs):
    return blobs(30, D, seed=3)


def same(ours, theirs):
    """Equal ids, scores up to rounding, the same dtypes and shapes.

    Where there is no result Faiss documents an infinite score, and gives the largest finite one.
    """
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    np.testing.assert_array_equal(ours[1], theirs[1])
    found = ours[1] >= 0
    np.testing.assert_allclose(ours[0][found], theirs[0][found], rtol=1e-5, atol=1e-5)
    largest = np.copysign(np.finfo(np.float32).max, ours[0][~found])
    assert np.isinf(ours[0][~found]).all()
    np.testing.assert_array_equal(theirs[0][~found], largest)


def test_metric_numbers():
    assert (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2) == (sx.METRIC_INNER_PRODUCT, sx.METRIC_L2)


def test_keys_go_to_the_nearest_centroid_as_in_faiss(metric, make_index, blobs):
    params = sx.IndexParameters(query_aware=False, spherical=metric == "ip", niter=3)
    index, keys = make_index(NLIST, D, 0, METRICS[metric][0], params=params), blobs(N, D)
    quantizer = METRICS[metric][1](D)
    quantizer.add(index.partition.centroids)
    np.testing.assert_array_equal(index.partition.assign(keys, index.ops), quantizer.assign(keys, 1)[:, 0])


@pytest.mark.parametrize("k", [1, 10, N])
def test_search_preassigned(ours, theirs, queries, k):
    lists, _ = ours.route(queries)
    same(ours.search_preassigned(queries, k, lists), theirs.search_preassigned(queries, k, lists, None))
    same(ours.search(queries, k), theirs.search_preassigned(queries, k, lists, None))


def test_lists_of_minus_one_are_passed_over(ours, theirs, queries):
    lists, _ = ours.route(queries)
    lists[::2, 1:3] = -1
    lists[3] = -1
    distances = np.zeros(lists.shape, np.float32)
    same(
        ours.search_preassigned(queries, 50, lists, distances),
        theirs.search_preassigned(queries, 50, lists, distances),
    )


@pytest.mark.parametrize("nprobe", [NLIST, NLIST + 5])
def test_full_search(ours, theirs, queries, nprobe):
    found = ours.search(queries, 10, params=sx.SearchParameters(nprobe=nprobe))
    same(found, theirs.search(queries, 10, params=faiss.SearchParametersIVF(nprobe=nprobe)))


@pytest.mark.parametrize("n", [0, 3])
def test_padding(metric, make_index, queries, blobs, n):
    index, known = make_index(4, D, n, METRICS[metric][0]), METRICS[metric][1](D)
    known.add(blobs(n, D))
    same(index.search(queries, 5, params=sx.SearchParameters(nprobe=4)), known.search(queries, 5))


def test_assign(ours, theirs, queries):
    labels = np.empty((30, 3), np.int64)
    lists, _ = ours.route(queries)
    assert ours.assign(queries, 3, labels=labels) is labels
    np.testing.assert_array_equal(labels, theirs.search_preassigned(queries, 3, lists, None)[1])
    assert ours.assign(queries).shape == theirs.assign(queries, 1).shape


def test_range_search(ours, theirs, queries):
    threshold = float(np.quantile(ours.search(queries, 20)[0], 0.5))
    params = sx.SearchParameters(nprobe=NLIST)
    lims, scores, ids = ours.range_search(queries, threshold, params=params)
    known = theirs.range_search(queries, threshold, params=faiss.SearchParametersIVF(nprobe=NLIST))
    np.testing.assert_array_equal(lims, known[0])
    assert lims[-1] > 100
    assert (scores.dtype, ids.dtype) == (known[1].dtype, known[2].dtype)
    for start, end in itertools.pairwise(lims):
        order, known_order = np.argsort(ids[start:end]), np.argsort(known[2][start:end])
        np.testing.assert_array_equal(ids[start:end][order], known[2][start:end][known_order])
        np.testing.assert_allclose(
            scores[start:end][order], known[1][start:end][known_order], rtol=1e-5, atol=1e-5
        )


def test_reconstruction(ours, theirs):
    theirs.make_direct_map()
    for call in (
        lambda index: index.reconstruct(7),
        lambda index: index.reconstruct_n(),
        lambda index: index.reconstruct_n(5),
        lambda index: index.reconstruct_n(5, 9),
        lambda index: index.reconstruct_batch(np.array([5, 599, 5])),
    ):
        mine, known = call(ours), call(theirs)
        assert mine.dtype == known.dtype
        np.testing.assert_array_equal(mine, known)


def test_removal(metric, make_index, blobs):
    index = make_index(NLIST, D, N, METRICS[metric][0])
    known = faiss.IndexIDMap2(METRICS[metric][1](D))
    known.add_with_ids(blobs(N, D), np.arange(N))
    for ids in ([3, 5, 5, 10**6, 599], [3], [], [0]):
        assert index.remove_ids(np.array(ids, np.int64)) == known.remove_ids(np.array(ids, np.int64))
        assert index.ntotal == known.ntotal
    full = sx.SearchParameters(nprobe=NLIST)
    same(index.search(blobs(9, D), 10, params=full), known.search(blobs(9, D), 10))


def test_ids_of_adding(metric, make_index, blobs):
    index, known = make_index(NLIST, D, 0, METRICS[metric][0]), METRICS[metric][1](D)
    for n in (5, 0, 7):
        index.add(blobs(n, D))
        known.add(blobs(n, D))
        assert index.ntotal == known.ntotal
    same(
        index.search(blobs(9, D), 12, params=sx.SearchParameters(nprobe=NLIST)), known.search(blobs(9, D), 12)
    )


def test_the_preset_visits_the_lists_of_faiss(blobs, queries):
    """Faiss trains its centroids; with them our preset puts keys and queries where Faiss does."""
    keys = blobs(1000, D, seed=7)
    quantizer = faiss.IndexFlatIP(D)
    known = faiss.IndexIVFFlat(quantizer, D, NLIST, faiss.METRIC_INNER_PRODUCT)
    known.cp.niter = 5
    known.train(keys)
    known.add(keys)
    known.nprobe = NPROBE
    centroids = quantizer.reconstruct_n(0, NLIST)
    index = sx.IndexSAAP(D, NLIST, params="faiss-ivf", nprobe=NPROBE)
    partition = Partition(View(), centroids, None, True, None)
    index._adopt(partition, CentroidRouter(index.scale), State.empty(NLIST, D, np.float32))
    index.add(keys)
    sizes = [known.invlists.list_size(j) for j in range(NLIST)]
    assert min(sizes) > 0
    assert index.list_sizes.tolist() == sizes
    np.testing.assert_array_equal(index.route(queries)[0], quantizer.search(queries, NPROBE)[1])
    same(index.search(queries, 10), known.search(queries, 10))


def test_the_preset_trains_as_well_as_faiss(blobs):
    """Spherical k-means: our mean similarity of a key to its centroid is within 2 % of Faiss's."""
    train = blobs(1000, D, seed=7)
    known = faiss.Kmeans(D, NLIST, niter=10, spherical=True, seed=5)
    known.train(train)
    index = sx.IndexSAAP(D, NLIST, params="faiss-ivf")
    index.train(train)
    mine, theirs = ((train @ c.T).max(axis=1).mean() for c in (index.partition.centroids, known.centroids))
    np.testing.assert_allclose(np.linalg.norm(known.centroids, axis=1), 1, atol=1e-5)
    assert mine > 0.98 * theirs
