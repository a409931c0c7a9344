"""An index on numba is the index on NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.attention import AttendParameters

WAYS = [
    {"budget": 0.3},
    {"budget": 0.3, "policy": "max"},
    {"budget": 0.6, "policy": "union"},
    {"budget": 0.4, "refine": False},
    {"budget": 0.4, "remainder": False},
    {"budget": 1.0},
    {"nprobe": 2},
    {"top_p": 0.7},
]


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def pair(request, make, data):
    """The same keys on both, in three sequences of different lengths, prefilled and then decoded."""
    keys, values = data(np.random.default_rng(0), 3, 500)
    found = []
    for backend in ("cpu", "reference"):
        index = make(3, dtype=request.param, backend=backend, softcap=30.0)
        index.add(keys[:, :, :420], values[:, :, :420], lengths=[420, 30, 200])
        for i in range(420, 500):
            index.add(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        found.append(index)
    return found


def test_keys_are_kept_alike(pair):
    one, other = pair
    np.testing.assert_array_equal(one.list_sizes, other.list_sizes)
    for b in range(3):
        for ours, theirs in zip(one.reconstruct(b), other.reconstruct(b), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("t", [None, 1, 4])
@pytest.mark.parametrize("near", [True, False])
def test_they_attend_alike(pair, way, t, near):
    rng = np.random.default_rng(1)
    params = AttendParameters(**way)
    errors = []
    for _ in range(5):
        q = rng.standard_normal((3, 6, 16) if t is None else (3, 6, t, 16), dtype=np.float32)
        (out, lse), (known, known_lse) = (index.attend(q, params=params, near=near) for index in pair)
        np.testing.assert_allclose(lse, known_lse, atol=0.02)
        np.testing.assert_allclose(out, known, atol=0.05)
        errors.append(np.abs(out - known))
    # Where two keys are nearly as good, either may be kept.
    assert np.median(errors) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_they_select_alike(pair, way):
    rng, params, chosen, different = np.random.default_rng(2), AttendParameters(**way), 0, 0
    for _ in range(10):
        q = rng.standard_normal((3, 6, 16), dtype=np.float32)
        one, other = (index.select(q, params=params).bool_mask(500) for index in pair)
        chosen, different = chosen + other.sum(), different + (one != other).sum()
    assert different <= 0.01 * chosen
