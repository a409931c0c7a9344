"""To Faiss and from it: the same lists both ways, to the bit, and the same answers."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import saapindex as sx
from saapindex.partition import LinearRouter

faiss = pytest.importorskip("faiss")
D, NLIST, N = 16, 12, 500
METRICS = [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Faiss's OpenMP threads and ours shall not wait for each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(params=METRICS, ids=["ip", "l2"])
def metric(request):
    return request.param


def contents(index):
    """Keys, ids of each list of a Faiss index, as bytes."""
    index, found = faiss.downcast_index(index), []
    for j in range(index.nlist):
        size = index.invlists.list_size(j)
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(j), size * index.code_size) if size else b""
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(j), size) if size else b""
        found.append((bytes(codes), bytes(ids)))
    return found, faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist).tobytes()


def theirs(blobs, metric, kind="flat", quantizer=None):
    """A trained Faiss index with keys under ids of their own."""
    flat = faiss.IndexFlatL2 if metric == sx.METRIC_L2 else faiss.IndexFlatIP
    quantizer = (quantizer or flat)(D)
    if kind == "flat":
        index = faiss.IndexIVFFlat(quantizer, D, NLIST, metric)
    else:
        qtype = getattr(faiss.ScalarQuantizer, kind)
        index = faiss.IndexIVFScalarQuantizer(quantizer, D, NLIST, qtype, metric, False)
    index.cp.niter = 3
    index.train(blobs(N, D))
    index.add_with_ids(blobs(N, D), np.random.default_rng(0).permutation(5000)[:N])
    index.nprobe = 3
    return index


@pytest.mark.parametrize("storage", [{}, {"bits": 2, "refine": True}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_theirs_of_ours_has_our_lists_and_answers(make_index, blobs, same, metric, dtype, storage):
    params = sx.IndexParameters(niter=3, **storage)
    index = make_index(NLIST, D, N, metric, nprobe=3, dtype=dtype, params=params)
    index.remove_ids(np.arange(0, N, 7))
    index.add(blobs(30, D, seed=4))
    ivf, queries = index.to_faiss(), blobs(20, D, seed=3)
    assert type(ivf) is faiss.IndexIVFFlat
    assert (ivf.ntotal, ivf.nlist, ivf.nprobe, ivf.is_trained) == (index.ntotal, NLIST, 3, True)
    assert [ivf.invlists.list_size(j) for j in range(NLIST)] == index.list_sizes.tolist()
    lists, _ = index.route(queries)
    scores, ids = index.search_preassigned(queries, 9, lists, params=sx.SearchParameters(k_factor=99))
    known = ivf.search_preassigned(queries, 9, lists, None)
    np.testing.assert_array_equal(ids, known[1])
    np.testing.assert_allclose(scores, known[0], rtol=1e-4, atol=1e-4)
    again = sx.IndexSAAP.from_faiss(ivf, dtype=dtype)
    assert contents(again.to_faiss()) == contents(ivf)
    lists_of = index._state.lists
    rows, back = lists_of.rows(), again._state.lists
    same([back.keys(back.rows()), back.ids[back.rows()]], [lists_of.keys(rows), lists_of.ids[rows]])
    np.testing.assert_array_equal(again.partition.centroids, index.partition.centroids)
    same(again.search_preassigned(queries, 9, lists), index.search_preassigned(queries, 9, lists)) if (
        not storage
    ) else None


@pytest.mark.parametrize("kind", ["flat", "QT_fp16"])
def test_ours_of_theirs_has_their_lists_and_answers(blobs, metric, kind):
    ivf, queries = theirs(blobs, metric, kind), blobs(20, D, seed=3)
    index = sx.IndexSAAP.from_faiss(ivf, router="centroid")
    assert (index.ntotal, index.nlist, index.nprobe, index.d) == (N, NLIST, 3, D)
    assert index.dtype == (np.float16 if kind == "QT_fp16" else np.float32)
    assert index.factory_string == f"IVF{NLIST}," + ("Flat" if kind == "flat" else "SQfp16")
    scores, ids = index.search(queries, 9)
    known = ivf.search(queries, 9)
    np.testing.assert_array_equal(ids, known[1])
    np.testing.assert_allclose(scores[ids >= 0], known[0][ids >= 0], rtol=1e-4, atol=1e-4)
    if kind == "flat":
        assert contents(index.to_faiss()) == contents(ivf)
    fresh = blobs(40, D, seed=9)
    index.add_with_ids(fresh, np.arange(6000, 6040))
    ivf.add_with_ids(fresh, np.arange(6000, 6040))
    assert index.list_sizes.tolist() == [ivf.invlists.list_size(j) for j in range(NLIST)]


def test_an_asymmetric_router_in_faiss_lists(blobs, metric):
    """Our routing finds more of the nearest in as many lists, and a learned router takes its place."""
    ivf, queries = theirs(blobs, metric), blobs(200, D, seed=3)
    index = sx.IndexSAAP.from_faiss(ivf)
    assert index.params.router == "mean"
    lists, _ = index.route(queries)
    np.testing.assert_array_equal(
        index.search(queries, 9)[1], ivf.search_preassigned(queries, 9, lists, None)[1]
    )
    if metric == sx.METRIC_INNER_PRODUCT:
        index.router = LinearRouter(index.partition.centroids, np.zeros(NLIST))
        np.testing.assert_array_equal(
            index.route(queries, params=sx.SearchParameters(nprobe=1, rank="key"))[0],
            ivf.quantizer.search(queries, 1)[1],
        )


def test_other_quantizers_with_flat_vectors(blobs, metric):
    ivf = theirs(blobs, metric)
    mixed = theirs(blobs, sx.METRIC_INNER_PRODUCT, quantizer=faiss.IndexFlatL2)
    index = sx.IndexSAAP.from_faiss(mixed)
    assert not index.partition.spherical
    index.add_with_ids(blobs(40, D, seed=9), np.arange(6000, 6040))
    mixed.add_with_ids(blobs(40, D, seed=9), np.arange(6000, 6040))
    assert index.list_sizes.tolist() == [mixed.invlists.list_size(j) for j in range(NLIST)]
    sx.IndexSAAP.from_faiss(faiss.deserialize_index(faiss.serialize_index(ivf)))
    sx.IndexSAAP.from_faiss(faiss.index_factory(D, "IVF4,Flat", metric)) if ivf.ntotal == 0 else None


def _pq(blobs):
    index = faiss.index_factory(D, "IVF4,PQ4x4np")
    index.train(blobs(600, D))
    return index


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda blobs: None, "index is a NoneType, expected an index of Faiss"),
        (lambda blobs: faiss.IndexFlatL2(D), "index is a IndexFlatL2"),
        (_pq, "index is a IndexIVFPQ"),
        (lambda blobs: theirs(blobs, 1, "QT_8bit"), "IndexIVFScalarQuantizer, expected"),
        (lambda blobs: faiss.index_factory(D, "IVF4,Flat"), "not trained"),
        (lambda blobs: theirs(blobs, 1, quantizer=faiss.IndexFlatIP), "assigns by inner product"),
    ],
)
def test_other_indexes_are_refused(blobs, make, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        sx.IndexSAAP.from_faiss(make(blobs))


def test_ids_that_we_cannot_hold_are_refused(blobs):
    index = theirs(blobs, sx.METRIC_L2)
    index.add_with_ids(blobs(2, D), np.array([-5, 7]))
    with pytest.raises(sx.InvalidInputError, match="ids holds -5"):
        sx.IndexSAAP.from_faiss(index)
    index = theirs(blobs, sx.METRIC_L2)
    index.add_with_ids(blobs(2, D), np.array([9999, 9999]))
    with pytest.raises(sx.InvalidInputError, match="9999 is given twice"):
        sx.IndexSAAP.from_faiss(index)
    with pytest.raises(sx.InvalidInputError, match="router is 'mlp'"):
        sx.IndexSAAP.from_faiss(theirs(blobs, sx.METRIC_L2), router="mlp")


def test_what_cannot_go_to_faiss(make_index):
    with pytest.raises(sx.NotTrainedError):
        sx.IndexSAAP(D, NLIST).to_faiss()
    with pytest.raises(sx.InvalidInputError, match="stores codes alone"):
        make_index(params=sx.IndexParameters(niter=1, bits=2)).to_faiss()


def test_without_faiss(make_index, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(sx.MissingDependencyError, match="to_faiss needs the package 'faiss'"):
        make_index().to_faiss()
    with pytest.raises(sx.MissingDependencyError, match="from_faiss needs the package 'faiss'"):
        sx.IndexSAAP.from_faiss(None)
