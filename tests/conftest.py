"""Settings and data that the tests share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings

import saapindex as sx
from saapindex.devices import get_cupy
from saapindex.errors import SaapIndexError

settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def cupy():
    """CuPy, where there is a device."""
    try:
        return get_cupy()
    except SaapIndexError as error:
        pytest.skip(f"no CUDA here: {error}")


@pytest.fixture(scope="session", params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    if request.param == "cuda":
        request.getfixturevalue("cupy")
    return request.param


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def blobs():
    """Clustered vectors: `blobs(n, d, seed)`."""

    def make(n, d, seed=0, parts=8):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((parts, d))
        x = centres[rng.integers(parts, size=n)] + 0.5 * rng.standard_normal((n, d))
        return x.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def make_index(blobs):
    """A trained index of clustered vectors: `make_index(nlist=8, d=16, n=400, ...)`."""

    def make(nlist=8, d=16, n=400, metric_type=sx.METRIC_INNER_PRODUCT, **settings):
        settings.setdefault("params", sx.IndexParameters(niter=3))
        index = sx.IndexSAAP(d, nlist, metric_type, **settings)
        index.train(blobs(400, d), xq_train=blobs(200, d, seed=1))
        if n:
            index.add(blobs(n, d))
        return index

    return make


@pytest.fixture(scope="session")
def exact():
    """Exact search in float64: `exact(queries, keys, k, l2)`; equal scores by rising row."""

    def search(queries, keys, k, l2=False):
        queries, keys = queries.astype(np.float64), keys.astype(np.float64)
        scores = ((queries[:, None] - keys) ** 2).sum(axis=2) if l2 else queries @ keys.T
        order = np.argsort(scores if l2 else -scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), order

    return search


@pytest.fixture(scope="module")
def index(make_index):
    """Filled once; tests that change an index make their own."""
    return make_index(nprobe=3)


@pytest.fixture(scope="session")
def queries(blobs):
    return blobs(7, 16, seed=2)


@pytest.fixture(scope="session")
def same():
    """Whether two answers agree to the bit: `same(ours, theirs)`."""

    def check(ours, theirs):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)

    return check


@pytest.fixture
def unchanged(make_index, blobs):
    """A filled index with a rope, which must be the same afterwards."""
    params = sx.IndexParameters(max_position=10_000, niter=1)
    index = make_index(rope=sx.Rope(dim=16), params=params)
    queries = blobs(5, 16)

    def snapshot():
        answer = index.search(queries, 9, params=sx.SearchParameters(nprobe=8))
        state = index.ntotal, index.params, index.nprobe, index.list_sizes.tolist()
        return *state, *(part.tolist() for part in answer)

    before = snapshot()
    yield index
    assert snapshot() == before
