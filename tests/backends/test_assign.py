"""Assignment and accumulation of every backend against the definition."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.backends import get_ops

REFERENCE = get_ops("reference")
SIZES = {
    "n": st.sampled_from([0, 1, 2, 63, 100]),
    "d": st.sampled_from([1, 3, 64, 65]),
    "nlist": st.sampled_from([1, 2, 17, 64]),
    "seed": st.integers(0, 1000),
}


def whole_numbers(rng, *shape):
    """Small integers as floats: every sum of products is exact, and ties are many."""
    return rng.integers(-2, 3, size=shape).astype(np.float32)


@given(**SIZES)
def test_ties_go_to_the_lowest_centroid(backend, n, d, nlist, seed):
    rng = np.random.default_rng(seed)
    x, centroids, bias = (whole_numbers(rng, *shape) for shape in ((n, d), (nlist, d), (nlist,)))
    labels, scores = get_ops(backend).assign(x, centroids, bias)
    table = x.astype(int) @ centroids.astype(int).T + bias.astype(int)
    np.testing.assert_array_equal(labels, table.argmax(axis=1))
    np.testing.assert_array_equal(scores, table.max(axis=1))


@given(**SIZES)
def test_chooses_right_up_to_rounding(backend, n, d, nlist, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d), dtype=np.float32)
    centroids = rng.standard_normal((nlist, d), dtype=np.float32)
    bias = -(centroids**2).sum(axis=1) / 2
    labels, scores = get_ops(backend).assign(x, centroids, bias)
    table = x.astype(np.float64) @ centroids.T.astype(np.float64) + bias
    rounding = 1e-6 * (d + 10)
    assert (labels.dtype, scores.dtype) == (np.int64, np.float32)
    assert (np.abs(scores - table.max(axis=1)) <= rounding).all()
    assert (table[np.arange(n), labels] >= table.max(axis=1) - rounding).all()


@pytest.mark.parametrize("d", [3, 64, 65, 128])
def test_error_is_at_most_twice_that_of_numpy_in_float32(backend, d):
    rng = np.random.default_rng(0)
    x, centroids = (rng.standard_normal(shape, dtype=np.float32) for shape in ((1000, d), (50, d)))
    bias = rng.standard_normal(50, dtype=np.float32)
    labels, scores = get_ops(backend).assign(x, centroids, bias)
    truth = (x.astype(np.float64) * centroids[labels]).sum(axis=1) + bias[labels]
    numpy = (x @ centroids.T + bias)[np.arange(1000), labels]
    assert np.abs(scores - truth).max() <= 2 * np.abs(numpy - truth).max()


@given(**SIZES)
def test_sums_are_those_of_the_reference(backend, n, d, nlist, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d), dtype=np.float32)
    labels = rng.integers(nlist, size=n)
    sums, counts = get_ops(backend).accumulate(x, labels, nlist)
    member = labels == np.arange(nlist)[:, None]
    assert (sums.dtype, counts.dtype) == (np.float64, np.int64)
    np.testing.assert_allclose(sums, member @ x.astype(np.float64), atol=1e-12)
    np.testing.assert_array_equal(counts, member.sum(axis=1))


@pytest.mark.parametrize("bias", [1e30, -1e30])
def test_a_bias_can_decide_alone(backend, bias):
    x, centroids = np.ones((3, 2), np.float32), np.ones((4, 2), np.float32)
    labels, _ = get_ops(backend).assign(x, centroids, np.array([0, bias, 0, 0], np.float32))
    assert labels.tolist() == [1 if bias > 0 else 0] * 3


def test_blocks_of_rows_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    x, centroids, bias = (whole_numbers(rng, *shape) for shape in ((100, 3), (7, 3), (7,)))
    monkeypatch.setattr(importlib.import_module("saapindex.backends.cpu.assign"), "BLOCK", 7 * 9)
    for found, known in zip(
        get_ops("cpu").assign(x, centroids, bias), REFERENCE.assign(x, centroids, bias), strict=True
    ):
        np.testing.assert_array_equal(found, known)
