"""The rotation of every backend against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.cpu import rope as cpu_rope
from saapindex.backends.reference.rope import rotate as rotate_reference

LONGEST = 1_000_000
EPS = float(np.finfo(np.float32).eps)


def make(n, d, pairs, *, seed=0, longest=LONGEST):
    """Vectors, positions of both signs, the frequencies of RoPE and uneven scales."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    positions = rng.integers(-longest, longest + 1, size=n)
    frequencies = 10000.0 ** -(np.arange(pairs) / max(pairs, 1))
    return x, positions, frequencies, rng.uniform(0.5, 2.0, pairs)


def pair_norms(x, scale, interleaved):
    """Length after scaling of the pair that each dimension belongs to; zero beyond the pairs."""
    pairs = len(scale)
    head = np.abs(x[:, : 2 * pairs].astype(np.float64))
    shaped = head.reshape(len(x), pairs, 2) if interleaved else head.reshape(len(x), 2, pairs)
    norms = np.linalg.norm(shaped, axis=2 if interleaved else 1) * scale
    spread = np.repeat(norms, 2, axis=1) if interleaved else np.tile(norms, 2)
    return np.pad(spread, ((0, 0), (0, x.shape[1] - 2 * pairs)))


@given(
    n=st.sampled_from([0, 1, 2, 63, 100]),
    pairs=st.sampled_from([0, 1, 3, 4, 32, 37]),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    seed=st.integers(0, 100),
)
@example(n=600, pairs=32, rest=3, interleaved=False, seed=0)  # enough for threads
@example(n=600, pairs=32, rest=0, interleaved=True, seed=0)
@settings(deadline=None, max_examples=30)
def test_is_as_exact_as_float32_allows(backend, n, pairs, rest, interleaved, seed):
    x, positions, frequencies, scale = make(n, 2 * pairs + rest, pairs, seed=seed)
    before = x.copy()
    out = get_ops(backend).rotate(x, positions, frequencies, scale, interleaved)
    truth = rotate_reference(x.astype(np.float64), positions, frequencies, scale, interleaved)
    assert out.dtype == np.float32
    assert out.shape == x.shape
    assert out.flags.c_contiguous
    assert not np.shares_memory(out, x)
    np.testing.assert_array_equal(x, before)
    assert (np.abs(out - truth) <= 2 * EPS * pair_norms(x, scale, interleaved)).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_mean_error_is_that_of_numpy_in_float32(backend, interleaved):
    x, positions, frequencies, _ = make(800, 64, 32)
    one = np.ones(32)
    truth = rotate_reference(x.astype(np.float64), positions, frequencies, one, interleaved)
    error = np.abs(get_ops(backend).rotate(x, positions, frequencies, one, interleaved) - truth)
    best = np.abs(rotate_reference(x, positions, frequencies, one, interleaved) - truth)
    assert error.mean() <= 1.1 * best.mean()
    assert error.max() <= 2 * best.max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_round_trip(backend, interleaved, dtype):
    x, positions, frequencies, scale = make(63, 70, 32)
    x = x.astype(dtype)
    there = get_ops(backend).rotate(x, positions, frequencies, scale, interleaved)
    back = get_ops(backend).rotate(there, positions, -frequencies, 1 / scale, interleaved)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, x, rtol=0, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("interleaved", [False, True])
def test_zero_frequency_changes_nothing(backend, interleaved):
    x, positions, frequencies, _ = make(10, 16, 8)
    still = np.zeros_like(frequencies)
    np.testing.assert_array_equal(get_ops(backend).rotate(x, positions, still, np.ones(8), interleaved), x)


def test_layouts_hold_the_same_pairs(backend):
    x, positions, frequencies, scale = make(20, 16, 8)
    woven = x.reshape(20, 2, 8).swapaxes(1, 2).reshape(20, 16)
    half = get_ops(backend).rotate(x, positions, frequencies, scale, False)
    interleaved = get_ops(backend).rotate(woven, positions, frequencies, scale, True)
    np.testing.assert_allclose(half.reshape(20, 2, 8).swapaxes(1, 2).reshape(20, 16), interleaved, atol=1e-6)


def test_takes_strided_input(backend):
    x, positions, frequencies, scale = make(20, 16, 4)
    out = get_ops(backend).rotate(x[::2, ::2], positions[::2], frequencies[::2], scale[::2], False)
    expected = get_ops(backend).rotate(
        x[::2, ::2].copy(), positions[::2].copy(), frequencies[::2], scale[::2], False
    )
    np.testing.assert_array_equal(out, expected)
    assert out.flags.c_contiguous


@pytest.mark.parametrize("interleaved", [False, True])
def test_serial_and_parallel_agree(interleaved):
    x, positions, frequencies, scale = make(63, 18, 8)
    out = [np.full_like(x, np.nan), np.full_like(x, np.nan)]
    kernels = (cpu_rope._rotate_serial, cpu_rope._rotate_parallel)
    for kernel, result in zip(kernels, out, strict=True):
        kernel(x, positions, frequencies / np.pi, scale, interleaved, result)
    np.testing.assert_array_equal(out[0], out[1])
    assert np.isfinite(out[0]).all()
