"""Codes on every backend: bits where they belong, fields and scales as defined, estimates true to them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from saapindex.backends import get_ops
from saapindex.backends.cpu.expected import byte_field_sums, float_field_sums
from saapindex.backends.cpu.vector_bytes import HAS_BYTE_SUMS
from saapindex.backends.cpu.vector_codes import estimate_page, estimate_page_portable
from saapindex.backends.paged import Code, Scaling
from saapindex.backends.reference.codes import fields, pack, unpack
from saapindex.codes import fit_codes

WIDTHS = st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=8).map(lambda x: np.sort(x)[::-1])


@functools.cache
def fitted(d, words):
    """Codes of three heads."""
    residuals = np.random.default_rng(0).standard_normal((3, 300, d)) * 0.9 ** np.arange(d)
    return fit_codes(residuals, np.stack([np.eye(d)] * 3), words).view


def test_fields_lie_where_four_bytes_are_shifted_and_masked():
    """Dimensions 0 to 3 in the low bits of bytes 0 to 3, dimensions 4 to 7 above them."""
    assert pack(np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), np.array([4])).tolist() == [[0x84736251]]
    assert pack(np.array([[3, 0, 0, 0, 0, 1]]), np.array([2])).tolist() == [[0x00000403]]
    assert pack(np.eye(32, dtype=int), np.array([1]))[[0, 1, 3, 4, 31], 0].tolist() == [
        1,
        1 << 8,
        1 << 24,
        1 << 1,
        1 << 31,
    ]
    word = pack(np.arange(16)[None] % 4, np.array([2]))
    for shift in range(4):
        four = ((word >> np.uint32(2 * shift)) & np.uint32(0x03030303)).view(np.uint8)
        assert four.tolist() == [[0, 1, 2, 3]]


@given(widths=WIDTHS, n=st.sampled_from([0, 1, 5]), cut=st.integers(0, 7), seed=st.integers(0, 99))
def test_what_is_packed_is_unpacked(widths, n, cut, seed):
    _, _, bits = fields(widths)
    bits = bits[: len(bits) - cut]
    levels = np.random.default_rng(seed).integers(0, 1 << bits, (n, len(bits)))
    found = unpack(pack(levels, widths), widths)
    np.testing.assert_array_equal(found[:, : len(bits)], levels)
    assert not found[:, len(bits) :].any()


@pytest.mark.parametrize("words", [1, 3, 8])
@pytest.mark.parametrize("d", [3, 64, 100])
@given(n=st.sampled_from([0, 1, 63, 100]), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_encoding_is_that_of_the_definition_in_double_precision(backend, words, d, n, heads, seed):
    code = Code._make(array[:heads] for array in fitted(d, words))
    residuals = np.random.default_rng(seed).standard_normal((heads, n, d)) * 0.9 ** np.arange(d)
    residuals = residuals.astype(np.float32)
    found, exponents = get_ops(backend).encode(residuals, code)
    known, known_exponents = get_ops("reference").encode(residuals.astype(np.float64), code)
    assert (found.shape, found.dtype) == ((heads, n, words), np.uint32)
    assert (exponents.shape, exponents.dtype) == ((heads, n), np.uint8)
    # A value on the edge of two fields may fall to either: then by one step, and seldom.
    for h in range(heads):
        ours, theirs = (unpack(part[h], code.widths[h]) for part in (found, known))
        assert np.abs(ours - theirs).max(initial=0) <= 1
        assert (ours != theirs).sum() <= 1 + 1e-4 * ours.size
    assert np.abs(exponents.astype(int) - known_exponents).max(initial=0) <= 1
    assert (exponents != known_exponents).mean() <= 0.02 if n else True


def test_a_residual_of_zero_and_a_huge_one_are_coded(backend):
    code = fit_codes(np.random.default_rng(0).standard_normal((1, 300, 8)), np.eye(8)[None], 1).view
    residuals = np.zeros((1, 3, 8), np.float32)
    residuals[0, 1:] = [[1e-12], [1e12]]
    _, exponents = get_ops(backend).encode(residuals, code)
    assert exponents.tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@given(
    d=st.sampled_from([3, 16, 63]),
    words=st.integers(1, 4),
    t=st.integers(1, 2),
    g=st.sampled_from([1, 3, 5]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_estimates_are_what_the_decoded_keys_give(backend, paged, dtype, d, words, t, g, softcap, seed):
    """Within what the rounding of the query to 8 bits can do."""
    made = paged(seed, d=d, words=words, dtype=dtype, n=100, heads=2, batch=1)
    queries = made.rng.standard_normal((2, t, g, d)).astype(np.float32)
    taken = made.rng.integers(0, made.lists.sizes[:, None] + 1, (2, t, 5))
    scaling = Scaling(0.3, softcap)
    estimates, rows, labels = get_ops(backend).scan_codes(
        queries, taken, made.lists, made.pages, made.code, scaling
    )
    assert estimates.shape == (2, t, g, taken.sum(-1).max())
    assert (estimates.dtype, rows.dtype, labels.dtype) == (np.float32, np.int64, np.int64)
    for s, i in np.ndindex(2, t):
        known, label = made.lists.rows(s, taken[s, i])
        n = len(known)
        np.testing.assert_array_equal(rows[s, i], np.pad(known, (0, rows.shape[2] - n), constant_values=-1))
        np.testing.assert_array_equal(labels[s, i], np.pad(label, (0, rows.shape[2] - n), constant_values=-1))
        assert np.isneginf(estimates[s, i, :, n:]).all()
        words_, exponents = made.pages.take("codes", known), made.pages.take("exponents", known)
        both = [np.stack([part] * 2) for part in (words_, exponents)]
        decoded = made.transform.decode(*both)[s].astype(np.float64)
        u = queries[s, i].astype(np.float64) @ made.code.inverse[s]
        f = made.code.base[s] * 2.0 ** ((exponents.astype(float) - 128) / 16)
        anchors = made.lists.anchors[s] * made.lists.anchor_scales[s][:, None].astype(np.float64)
        second = np.minimum(0.045 * f**2 * (u**2 @ made.code.distortion[s])[:, None], 3)
        exact = 0.3 * (queries[s, i] @ anchors[label].T + u @ decoded.T) + second
        step = made.code.step[s].astype(np.float64)
        unit = np.abs(0.3 * u * step).max(axis=1, keepdims=True) / 127
        slack = unit / 2 * (np.abs(decoded) / np.where(step > 0, step, 1)).sum(axis=1)
        if softcap:
            exact = softcap * np.tanh(exact / softcap)
        assert (np.abs(estimates[s, i, :, :n] - exact) <= 1.001 * slack + 1e-5).all()


@given(
    seed=st.integers(0, 999),
    words=st.integers(1, 4),
    g=st.sampled_from([1, 3, 4, 9]),
    span=st.sampled_from([3, 4]),
)
def test_backends_agree_to_rounding(paged, seed, words, g, span):
    made = paged(seed, words=words, span=span)
    queries = made.rng.standard_normal((4, 1, g, 16)).astype(np.float32)
    arguments = (made.lists.sizes[:, None], made.lists, made.pages, made.code, Scaling(0.25))
    known = get_ops("reference").scan_codes(queries.astype(np.float64), *arguments)
    found = get_ops("cpu").scan_codes(queries, *arguments)
    np.testing.assert_array_equal(found[1], known[1])
    # An element of the query on the edge of two integers may fall to either.
    close = np.isclose(found[0], known[0], atol=2e-6, rtol=2e-6)
    assert close[np.isfinite(known[0])].mean() > 0.7
    np.testing.assert_allclose(found[0], known[0], atol=0.05)


@given(widths=WIDTHS, heads=st.integers(1, 4), count=st.integers(1, 16), seed=st.integers(0, 99))
def test_sums_of_codes_are_exact_with_and_without_the_instruction_for_it(widths, heads, count, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, (16, len(widths)), dtype=np.uint32)
    levels = unpack(words, widths)
    queries = rng.integers(-127, 128, (heads, levels.shape[1])).astype(np.int8)
    scales, factors = (
        rng.integers(1, 4, 40).astype(np.float32),
        rng.integers(1, 5, (3, heads)).astype(np.float32),
    )
    centers, f = rng.integers(-9, 9, heads).astype(np.float32), scales[8:24]
    page, bytes_ = np.ascontiguousarray(words.T), queries.view(np.int32)
    factor, offset, kappa = factors[:, :, None]
    known = (
        factor * f * (queries.astype(int) @ levels.T - offset)
        + np.minimum(kappa * f**2, 3)
        + centers[:, None]
    )
    known[:, count:] = -np.inf
    for estimate in (estimated, estimated_portably):
        found = np.full((heads, 40), -1, np.float32)
        arguments = np.ascontiguousarray(widths), bytes_, scales, factors, centers, count, np.float32(3)
        estimate(page.ctypes.data, *arguments, found, 8)
        np.testing.assert_array_equal(found[:, 8:24], known)
        assert (found[:, :8] == -1).all()
        assert (found[:, 24:] == -1).all()


@njit
def estimated(words, widths, queries, scales, factors, centers, count, cap, out, first):
    estimate_page(words, widths, queries, scales, factors, centers, count, cap, out, first)


@njit
def estimated_portably(words, widths, queries, scales, factors, centers, count, cap, out, first):
    estimate_page_portable(words, widths, queries, scales, factors, centers, count, cap, out, first)


BYTES = pytest.param(
    byte_field_sums,
    marks=pytest.mark.skipif(
        not HAS_BYTE_SUMS, reason="the machine has no instruction for products of bytes"
    ),
)


@pytest.mark.parametrize("field_sums", [float_field_sums, BYTES])
@given(
    widths=WIDTHS,
    heads=st.integers(1, 7),
    n=st.integers(1, 70),
    more=st.integers(-9, 9),
    seed=st.integers(0, 99),
)
def test_sums_over_keys(field_sums, widths, heads, n, more, seed):
    """Also where other heads have codes of more dimensions, or the last fields stand for none."""
    rng, widths = np.random.default_rng(seed), np.asarray(widths, np.int64)
    codes = rng.integers(0, 1 << 32, (n, len(widths), 16), dtype=np.uint32)
    addresses, pages = np.zeros((5, 1), np.int64), rng.permutation(n).astype(np.int32)
    addresses[2, 0] = codes.ctypes.data
    weights = np.zeros((heads, -(-n // 4) * 64), np.float32)
    weights[:, : n * 16] = rng.random((heads, n * 16), np.float32) ** 6
    fields = int((32 // widths).sum())
    wanted = max(fields + more, 1)
    sums = np.full((heads, wanted), np.nan, np.float32)
    rounded = weights.copy()
    field_sums(pages, addresses, 1 << 20, 20, widths, rounded, sums)
    np.testing.assert_allclose(rounded, weights, atol=weights.max() / 0xFFFF * 0.51)
    unpacked = unpack(codes[pages].transpose(0, 2, 1).reshape(n * 16, -1), widths)
    known = np.zeros((heads, max(fields, wanted)), np.float32)
    known[:, :fields] = rounded[:, : n * 16] @ unpacked.astype(np.float32)
    np.testing.assert_allclose(sums, known[:, :wanted], rtol=1e-5)


def test_nothing_is_visited(backend, paged):
    made = paged()
    none = np.zeros((4, 2, 5), np.int64)
    queries = np.ones((4, 2, 3, 16), np.float32)
    found = get_ops(backend).scan_codes(queries, none, made.lists, made.pages, made.code, Scaling(1.0))
    assert [part.shape for part in found] == [(4, 2, 3, 0), (4, 2, 0), (4, 2, 0)]
