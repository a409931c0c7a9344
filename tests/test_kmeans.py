"""k-means in the metric of the queries, and the partition that it trains."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx
from saapindex.backends import get_ops
from saapindex.partition.kmeans import assignment_form, kmeans, query_metric


def fit(x, nlist, backend="cpu", seed=0, **options):
    rng = np.random.default_rng(seed)
    return kmeans(x, nlist, ops=get_ops(backend), rng=rng, **options)


def labels_of(x, centroids, metric=None, spherical=False):
    return get_ops("cpu").assign(x, *assignment_form(centroids, metric, spherical))[0]


def logit_error(queries, x, centroids, labels):
    """Mean squared error of the logits if every key were its centroid."""
    return float(((queries @ (x - centroids[labels]).T) ** 2).mean())


@pytest.fixture(scope="module")
def anisotropic():
    """Keys spread evenly, queries that look along few directions."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    spread = 2.0 ** -np.arange(16)
    keys, train, test = (rng.standard_normal((n, 16)) for n in (2000, 1000, 500))
    return tuple(array.astype(np.float32) for array in (keys, train * spread @ turn, test * spread @ turn))


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_the_metric_of_the_queries_lowers_the_error_of_the_logit(anisotropic, init):
    keys, train, test = anisotropic
    metric = query_metric(train)
    aware = fit(keys, 32, metric=metric, init=init)
    plain = fit(keys, 32, init=init)
    aware_error = logit_error(test, keys, aware, labels_of(keys, aware, metric))
    plain_error = logit_error(test, keys, plain, labels_of(keys, plain))
    assert aware_error < 0.5 * plain_error


def test_metric_is_the_scaled_second_moment():
    queries = np.random.default_rng(0).standard_normal((50, 4)) * [1, 2, 3, 4]
    metric = query_metric(queries, shrinkage=0.0)
    np.testing.assert_allclose(metric / metric[0, 0], queries.T @ queries / (queries[:, 0] ** 2).sum())
    assert metric.trace() == pytest.approx(4)
    assert np.linalg.eigvalsh(query_metric(queries[:1])).min() > 0
    np.testing.assert_array_equal(query_metric(np.zeros((3, 2))), np.eye(2))


@given(seed=st.integers(0, 1000), aware=st.booleans())
def test_assignment_form_finds_the_nearest_centroid(seed, aware):
    rng = np.random.default_rng(seed)
    x, centroids, queries = (rng.standard_normal((n, 6)).astype(np.float32) for n in (20, 5, 30))
    metric = query_metric(queries) if aware else None
    differences = (x[:, None] - centroids).astype(np.float64)
    distances = np.einsum("nki,ij,nkj->nk", differences, np.eye(6) if metric is None else metric, differences)
    np.testing.assert_array_equal(labels_of(x, centroids, metric), distances.argmin(axis=1))


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize("spherical", [False, True])
def test_no_part_stays_empty_and_the_error_falls(backend, blobs, init, spherical):
    x = blobs(500, 8)

    def loss(niter):
        centroids = fit(x, 20, backend, init=init, spherical=spherical, niter=niter)
        labels = labels_of(x, centroids, spherical=spherical)
        assert np.bincount(labels, minlength=20).all()
        aim = centroids[labels]
        return -float((x * aim).sum()) if spherical else float(((x - aim) ** 2).sum())

    assert loss(10) < loss(1) < loss(0)


def test_plus_plus_starts_better_than_chance():
    rng = np.random.default_rng(0)
    x = (100 * rng.standard_normal((30, 4))[np.arange(600) % 30] + rng.standard_normal((600, 4))).astype(
        np.float32
    )

    def loss(init):
        centroids = fit(x, 30, init=init, niter=0)
        return ((x - centroids[labels_of(x, centroids)]) ** 2).sum()

    assert loss("kmeans++") < 0.2 * loss("random")


def test_spherical_centroids_are_unit(blobs):
    norms = np.linalg.norm(fit(blobs(300, 8), 16, spherical=True, niter=5), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_backends_find_the_same_centroids(blobs):
    x = blobs(300, 8)
    np.testing.assert_allclose(fit(x, 10, "cpu"), fit(x, 10, "reference"), atol=1e-5)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_a_seed_decides_everything(blobs, init):
    x = blobs(300, 8)
    np.testing.assert_array_equal(fit(x, 10, init=init), fit(x, 10, init=init))
    assert (fit(x, 10, init=init) != fit(x, 10, init=init, seed=1)).any()


@pytest.mark.parametrize("options", [{}, {"init": "kmeans++"}, {"spherical": True}, {"metric": np.eye(4)}])
def test_fewer_distinct_rows_than_parts(options):
    x = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    centroids = fit(x, 10, **options)
    assert np.isfinite(centroids).all()
    assert len(np.unique(labels_of(x, centroids))) == 4


@pytest.mark.parametrize("spherical", [False, True])
def test_zero_rows_do_no_harm(spherical):
    x = np.zeros((20, 4), np.float32)
    x[:3] = np.eye(4)[:3]
    assert np.isfinite(fit(x, 5, spherical=spherical)).all()


def test_one_part_is_the_mean(blobs):
    x = blobs(200, 8)
    np.testing.assert_allclose(fit(x, 1)[0], x.mean(axis=0), atol=1e-5)


def test_as_many_parts_as_rows(blobs):
    x = blobs(20, 8)
    assert sorted(labels_of(x, fit(x, 20))) == list(range(20))


def test_the_start_is_kept_as_it_was(blobs):
    x = blobs(200, 8)
    start = x[:10].copy()
    moved = fit(x, 10, start=start, niter=2)
    np.testing.assert_array_equal(start, x[:10])
    assert (moved != start).any()
    np.testing.assert_array_equal(fit(x, 10, start=start, niter=0), start)


def test_training_samples_many_keys_down(blobs):
    index = sx.IndexSAAP(8, 4, params=sx.IndexParameters(query_aware=False, max_points_per_centroid=5))
    index.train(blobs(1000, 8))
    few = sx.IndexSAAP(8, 4, params=sx.IndexParameters(query_aware=False))
    few.train(blobs(1000, 8))
    assert (index.partition.centroids != few.partition.centroids).any()


@pytest.mark.parametrize("module", ["rich.console", "none"])
def test_progress_goes_to_stderr_with_rich_or_without(blobs, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    fit(blobs(100, 8), 4, show=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    if module == "rich.console":
        assert captured.err.splitlines()[-1] == "k-means: 10/10"
