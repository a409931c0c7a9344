"""Bad input and failures on the way: refused by name, and nothing has changed."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

from saapindex.attention import AttentionIndex
from saapindex.errors import InvalidInputError, PositionWarning
from saapindex.lists.paged import PagePool


def answers(index, seed=0):
    q = np.random.default_rng(seed).standard_normal((index.batch, 6, 16)).astype(np.float32)
    return [*index.attend(q, budget=1.0), *index.attend(q, budget=0.4), index.select(q, budget=0.4).ids]


def same(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def unchanged(filled):
    index, _, _ = filled
    before, pages, tables = answers(index), index._batch.keeping.pool.used, index._batch.sequences
    yield index
    assert index._batch.keeping.pool.used == pages
    assert index._batch.sequences == tables
    same(answers(index), before)


K, Q = np.ones((2, 2, 3, 16), np.float32), np.ones((2, 6, 16))
BAD = np.where(np.arange(16) == 3, np.nan, K).astype(np.float32)


@pytest.mark.parametrize(
    ("k", "v", "settings", "message"),
    [
        (K[0], K, {}, r"k has shape \(2, 3, 16\), expected \(2, 2, any, 16\)"),
        (K[:1], K, {}, r"k has shape \(1, 2, 3, 16\), expected \(2, 2, any, 16\)"),
        (K, K[:, :, :2], {}, r"v has shape \(2, 2, 2, 16\), expected \(2, 2, 3, 16\)"),
        (K.astype(int), K, {}, "k has dtype int64, expected a floating one"),
        (K, "values", {}, "v has dtype <U6, expected a floating one"),
        (BAD, K, {}, "k holds NaN, infinity or what float32 cannot hold"),
        (K, np.float64(1e300) * K, {}, "v holds NaN, infinity or what float32 cannot hold"),
        (K, K, {"lengths": [1]}, r"lengths has shape \(1,\), expected \(2,\)"),
        (K, K, {"lengths": [1, 4]}, "lengths reach 4, expected at most the 3 keys given"),
        (K, K, {"lengths": [1, -1]}, "lengths holds -1, expected at least 0"),
        (
            K,
            K,
            {"mask": np.ones((2, 2), bool)},
            r"mask is bool of shape \(2, 2\), expected 0 and 1 of \(2, 3\)",
        ),
        (K, K, {"mask": np.full((2, 3), 2)}, "expected 0 and 1"),
        (K, K, {"mask": np.ones((2, 3)), "lengths": [1, 1]}, "lengths and mask are given together"),
    ],
)
def test_bad_keys_change_nothing(unchanged, k, v, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        unchanged.add(k, v, **settings)


@pytest.mark.parametrize("after", range(8))
def test_a_failure_on_the_way_changes_nothing(unchanged, data, monkeypatch, after):
    """Memory that gives out at any allocation, write or code."""
    keys, values = data(np.random.default_rng(3), 2, 200)
    left = after

    def fail(function):
        def run(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return function(*arguments, **named)

        return run

    with monkeypatch.context() as patch:
        for name in ("allocate", "write", "_grow"):
            patch.setattr(PagePool, name, fail(getattr(PagePool, name)))
        with pytest.raises(MemoryError):
            unchanged.add(keys, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.truncate(-1), "n holds -1, expected at least 0"),
        (lambda index: index.truncate([1, 2, 3]), r"n has shape \(3,\), expected \(2,\)"),
        (lambda index: index.truncate(3, sequence=2), "there is no sequence 2, expected 0 to 1"),
        (lambda index: index.truncate(1.5), "n has dtype float64, expected integers"),
        (lambda index: index.reconstruct(2), "there is no sequence 2, expected 0 to 1"),
        (lambda index: index.reorder([0, 2]), "there is no sequence 2, expected 0 to 1"),
        (lambda index: index.reorder([]), "order is empty, expected at least one sequence"),
        (lambda index: index.fork([-1]), "sequences holds -1, expected at least 0"),
        (lambda index: index.attend(Q[:, :5]), "q has 5 query heads, expected a multiple of the 2"),
        (lambda index: index.attend(Q[:1]), r"q has shape \(1, 6, 16\), expected \(2, any, 16\)"),
        (lambda index: index.attend(Q[:, :, 0]), r"expected \(2, any, any, 16\)"),
        (lambda index: index.attend(np.inf * Q), "q holds NaN, infinity"),
        (lambda index: index.attend(Q, budget=2), "budget is 2, expected a share"),
        (lambda index: index.attend(Q, nprobe=0), "nprobe is 0, expected at least 1"),
        (lambda index: index.attend(Q, budget=0.1, top_p=0.1), "budget and top_p are given"),
        (lambda index: index.attend(Q, params=3), "params is a int, expected AttendParam"),
        (lambda index: index.attend(Q, positions=[1]), "positions has shape"),
        (lambda index: index.select(Q[:, :, None]), r"expected \(batch, q_heads, d\)"),
    ],
)  # fmt: skip
def test_bad_calls_change_nothing(unchanged, change, message):
    with pytest.raises(InvalidInputError, match=message):
        change(unchanged)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"window": -1}, "window is -1"),
        ({"flush": 0}, "flush is 0"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of 'float16'"),
        ({"params": {}}, "params is a dict"),
        ({"scale": 0.0}, "scale is 0.0, expected a number above 0"),
        ({"softcap": np.nan}, "softcap is nan"),
        ({"sink_logits": np.ones(3)}, "expected one for each of a multiple of 2 heads"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_bad_settings_are_refused(codebook, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        AttentionIndex(codebook, **settings)
    with pytest.raises(InvalidInputError, match="codebook is a str, expected a LayerCodebook"):
        AttentionIndex("codebook")


def test_positions_past_those_of_training_are_warned_of_once(codebook, data):
    index = AttentionIndex(dataclasses.replace(codebook, max_position=50), backend="reference")
    keys, values = data(np.random.default_rng(0), 1, 60)
    index.add(keys[:, :, :50], values[:, :, :50])
    with pytest.warns(PositionWarning, match=r"position 50 lies past .* \(below 50\)"):
        index.add(keys[:, :, 50:51], values[:, :, 50:51])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(keys[:, :, 51:], values[:, :, 51:])
