"""Bad arrays are refused by name, with what was expected, and leave the index as it was."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx

X = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
NAN = np.where(X[2, 3] == X, np.nan, X)
ARRAYS = [
    (X[:, :15], r"has shape \(5, 15\), expected \(n, 16\)"),
    (X[0], r"has shape \(16,\), expected \(n, 16\)"),
    (X[None], r"has shape \(1, 5, 16\), expected \(n, 16\)"),
    (NAN, "holds NaN or infinity, expected finite values"),
    (NAN.astype(np.float16), "holds NaN or infinity"),
    (np.where(np.isnan(NAN), -np.inf, X), "holds NaN or infinity"),
    (X.astype(np.float64) * 1e300, "holds NaN or infinity"),
    (
        X.astype(np.int32),
        r"has dtype int32, expected a floating one: convert it with \w+.astype\('float32'\)",
    ),
    (X.astype(complex), "has dtype complex128, expected a floating one"),
    (X > 0, "has dtype bool, expected a floating one"),
    (X.astype(object), "has dtype object, expected a floating one"),
    (X.astype(str), "has dtype <U"),
    ([[1.0, 2.0], [1.0]], "is a list that is no array"),
    ({"a": 1}, "has dtype object"),
    (None, "has dtype object"),
]
VERBS = {
    "x:add": lambda index, x: index.add(x),
    "x:add_with_ids": lambda index, x: index.add_with_ids(x, np.arange(900, 905)),
    "x:search": lambda index, x: index.search(x, 3),
    "x:assign": lambda index, x: index.assign(x),
    "x:range_search": lambda index, x: index.range_search(x, 1.0),
    "x:route": lambda index, x: index.route(x),
    "x:search_preassigned": lambda index, x: index.search_preassigned(x, 3, np.zeros((5, 1), int)),
}


@pytest.mark.parametrize(("x", "message"), ARRAYS)
@pytest.mark.parametrize("verb", VERBS)
def test_vectors(unchanged, verb, x, message):
    with pytest.raises(sx.InvalidInputError, match=f"^{verb.partition(':')[0]} {message}"):
        VERBS[verb](unchanged, x)


@pytest.mark.parametrize(("x", "message"), ARRAYS[:-1])
@pytest.mark.parametrize("name", ["x", "xq_train"])
def test_training_vectors(make_index, name, x, message):
    index = make_index(n=0)
    before = index.partition
    with pytest.raises(sx.InvalidInputError, match=f"^{name} {message}"):
        index.train(**{"x": np.tile(X, (4, 1)), name: x})
    assert index.partition is before


@pytest.mark.torch
@pytest.mark.parametrize("verb", VERBS)
def test_tensors_elsewhere(torch, unchanged, verb):
    with pytest.raises(sx.InvalidInputError, match=r"^x is on meta, expected a CPU tensor: x\.cpu\(\)"):
        VERBS[verb](unchanged, torch.ones(5, 16, device="meta"))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.arange(4), r"has shape \(4,\), expected \(5,\)"),
        (np.arange(5)[:, None], r"has shape \(5, 1\), expected \(5,\)"),
        (7, r"has shape \(\), expected \(5,\)"),
        (np.arange(5) - 1, "holds -1, expected at least 0"),
        (np.arange(5.0), "has dtype float64, expected integers"),
        (np.arange(5) > 2, "has dtype bool, expected integers"),
        (np.arange(5).astype(str), "has dtype <U"),
        (np.arange(5).astype(object), "has dtype object"),
        ([[1], [1, 2]], "is a list that is no array"),
        (np.full(5, 2**63, np.uint64), "holds 9223372036854775808, expected at most"),
    ],
)
def test_positions(unchanged, make_index, positions, message):
    calls = {
        "positions": [
            lambda at: unchanged.add(X, positions=at),
            lambda at: unchanged.add_with_ids(X, np.arange(900, 905), positions=at),
            lambda at: unchanged.search(X, 1, positions=at),
            lambda at: unchanged.range_search(X, 1.0, positions=at),
            lambda at: unchanged.route(X, positions=at),
            lambda at: sx.IndexSAAP(16, 2).train(X, xq_train=X, positions=at),
        ],
        "positions_xq": [lambda at: sx.IndexSAAP(16, 2).train(X, xq_train=X, positions_xq=at)],
    }
    for name, group in calls.items():
        for call in group:
            with pytest.raises(sx.InvalidInputError, match=f"^{name} {message}"):
                call(positions)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([900, 901, 900, 902, 903], "id 900 is given twice, expected distinct ids"),
        ([900, 901, 902, 7, 903], "id 7 is in the index already, expected new ids"),
        ([900, 901, 902, -3, 903], "ids holds -3, expected at least 0"),
        ([900, 901], r"ids has shape \(2,\), expected \(5,\)"),
        ([0.5] * 5, "ids has dtype float64, expected integers"),
        ([2**62, 1000, 1001, 1002, 1003], "ids reach 4611686018427387904, expected less than"),
    ],
)
def test_ids(unchanged, ids, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        unchanged.add_with_ids(X, ids)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (np.zeros((4, 2), int), r"Iq has shape \(4, 2\), expected \(5, 2\)"),
        (np.zeros(5, int), r"Iq has shape \(5,\), expected \(5, 5\)"),
        (3, r"Iq has shape \(\)"),
        (np.zeros((5, 2)), "Iq has dtype float64, expected integers"),
        (np.full((5, 2), 8), "Iq holds lists from 8 to 8, expected -1 to 7"),
        (np.full((5, 2), -2), "Iq holds lists from -2 to -2, expected -1 to 7"),
    ],
)
def test_preassigned_lists(unchanged, lists, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        unchanged.search_preassigned(X, 3, lists)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"D": np.empty((5, 4), np.float32)}, r"D has shape \(5, 4\), expected \(5, 3\)"),
        ({"D": np.empty((5, 3))}, "D is float64, expected a buffer of float32"),
        ({"I": np.empty((5, 3), np.int32)}, "I is int32, expected a buffer of int64"),
        ({"I": np.empty((3, 5), np.int64).T}, "I is read-only or not C-contiguous"),
        ({"I": [[0] * 3] * 5}, "I is a list"),
    ],
)
def test_buffers(unchanged, buffers, message):
    for call in (
        lambda: unchanged.search(X, 3, **buffers),
        lambda: unchanged.search_preassigned(X, 3, np.zeros((5, 1), int), **buffers),
    ):
        with pytest.raises(sx.InvalidInputError, match=message):
            call()


def test_keys_too_large_for_half_precision(make_index):
    index = make_index(n=0, dtype="float16")
    with pytest.raises(sx.InvalidInputError, match=r"x holds .*, expected at most .* float16"):
        index.add(1e6 * X)
    assert index.ntotal == 0
