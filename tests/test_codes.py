"""Transform codes: what fitting gives, that bits help, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.codes import TransformCode, fit_codes, quantise_rows, unpack
from saapindex.codes.fit import allocate
from saapindex.codes.slopes import fit_slopes
from saapindex.errors import InvalidInputError

OPS = get_ops("reference")


@functools.cache
def trained(d, heads=1, n=2000):
    """Residuals and metric with directions of very different weight, in no particular axes."""
    rng = np.random.default_rng(d)
    residuals, metrics = [], []
    for _ in range(heads):
        turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
        residuals.append(rng.standard_normal((n, d)) * 0.9 ** np.arange(d) @ turn)
        queries = rng.standard_normal((3 * d, d)) * rng.uniform(0.1, 2, d)
        metrics.append(queries.T @ queries / len(queries))
    return np.stack(residuals), np.stack(metrics)


@functools.cache
def fitted(d, words, heads=1):
    return fit_codes(*trained(d, heads), words)


def distortion(code, residuals, metric):
    """Expected squared error of a logit, relative to that of the residual itself."""
    decoded = code.decode(*code.encode(residuals.astype(np.float32), OPS))
    back = np.einsum("hnr,hrd->hnd", decoded, np.linalg.pinv(code.forward))
    error, whole = (np.einsum("hni,hij,hnj->", x, metric, x) for x in (residuals - back, residuals))
    return error / whole


@pytest.mark.parametrize("d", [3, 16, 64, 100])
def test_distortion_falls_with_words(d):
    residuals, metric = trained(d)
    errors = [distortion(fitted(d, words), residuals, metric) for words in range(1, 9)]
    assert all(second <= first * 1.02 for first, second in itertools.pairwise(errors))
    assert errors[0] < 0.9
    assert errors[7] < 0.04


@pytest.mark.parametrize("d", [16, 64])
def test_the_transform_keeps_inner_products_and_evens_out_queries(d):
    residuals, metric = trained(d, 2)
    code = fit_codes(residuals, metric, 8)
    queries = np.random.default_rng(0).standard_normal((2, 7, d))
    u, y = queries @ code.inverse, residuals @ code.forward
    # To the 8 bits of the matrix of the queries.
    np.testing.assert_allclose(u @ y.swapaxes(1, 2), queries @ residuals.swapaxes(1, 2), rtol=0, atol=0.1)
    evened = code.inverse.swapaxes(1, 2) @ metric @ code.inverse
    np.testing.assert_allclose(evened, np.stack([np.eye(d)] * 2), atol=0.1)


def test_spread_and_distortion_are_those_of_training():
    residuals, _ = trained(64, 2)
    code = fitted(64, 3, 2)
    words, exponents = code.encode(residuals.astype(np.float32), OPS)
    scales = code.base[:, None] * 2.0 ** ((exponents.astype(float) - 128) / 16)
    y = residuals @ code.forward
    error = y - code.decode(words, exponents)
    for found, known in ((y, code.spread), (error, code.distortion)):
        measured = ((found / scales[..., None]) ** 2).mean(axis=1)
        np.testing.assert_allclose(measured, known, rtol=0.1, atol=1e-3)
    assert 0.9 < np.median(scales / code.base[:, None]) < 1.1


@given(d=st.sampled_from([3, 16, 64]), words=st.integers(1, 8), g=st.integers(1, 4), seed=st.integers(0, 99))
def test_estimates_are_dot_products_with_decoded_keys(d, words, g, seed):
    code, residuals = fitted(d, words, 2), trained(d, 2)[0][:, :50].astype(np.float32)
    queries = np.random.default_rng(seed).standard_normal((2, g, d)).astype(np.float32)
    coded = code.encode(residuals, OPS)
    estimates = code.estimate(queries, *coded, scale=0.2)
    u, decoded = queries @ code.inverse, code.decode(*coded)
    scales = code.base[:, None] * 2.0 ** ((coded[1].astype(float) - 128) / 16)
    second = 0.02 * np.einsum("hgr,hr->hg", u**2, code.distortion)[..., None] * scales[:, None] ** 2
    exact = 0.2 * u @ decoded.swapaxes(1, 2) + np.minimum(second, 3)
    unit = np.abs(0.2 * u * code.step[:, None]).max(axis=2, keepdims=True) / 127
    steps = np.abs(decoded) / np.where(code.step > 0, code.step, 1)[:, None]
    assert (np.abs(estimates - exact) <= 1.001 * unit / 2 * steps.sum(axis=2)[:, None] + 1e-5).all()
    assert estimates.dtype == np.float32


def test_the_mean_of_exp_is_estimated_to_second_order():
    """Queries whose logits have errors of known size: exp of the estimates must not be biased by them."""
    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((1, 20_000, 32))
    code = fit_codes(residuals, np.eye(32)[None], 1)
    queries = rng.standard_normal((1, 20, 32))
    truth = np.exp(0.2 * queries @ residuals.swapaxes(1, 2)).mean(axis=2)
    coded = code.encode(residuals.astype(np.float32), OPS)
    found = np.exp(code.estimate(queries, *coded, scale=0.2)).mean(axis=2)
    np.testing.assert_allclose(found, truth, rtol=0.1)


def test_bits_are_given_by_reverse_water_filling():
    assert allocate(np.ones(128), 4).tolist() == [1, 1, 1, 1]
    assert allocate(np.ones(64), 4).tolist() == [2, 2, 2, 2]
    assert allocate(np.ones(32), 4).tolist() == [4, 4, 4, 4]
    assert allocate(0.6 ** np.arange(64), 2).tolist() == [4, 4]
    assert allocate(0.95 ** np.arange(64), 3).tolist() == [2, 2, 1]
    for heads in range(1, 4):
        code = fit_codes(*(np.concatenate(part) for part in zip(*[trained(64)] * heads, strict=True)), 3)
        assert (np.diff(code.widths) <= 0).all()
        assert code.coded.tolist() == [min(64, (32 // code.widths[0]).sum())] * heads
        assert code.nbytes_per_key == 13


def test_heads_are_padded_to_the_widest():
    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((2, 5000, 64))
    residuals[0] *= 0.5 ** np.arange(64)
    code = fit_codes(residuals, np.stack([np.eye(64)] * 2), 2)
    assert code.widths.tolist() == [[4, 4], [1, 1]]
    assert code.coded.tolist() == [16, 64]
    for array in (code.forward, code.inverse, code.step, code.spread, code.distortion):
        assert not array[0, ..., 16:].any()
    alone = fit_codes(residuals[:1], np.eye(64)[None], 2)
    for one, other in zip(
        code.encode(residuals.astype(np.float32), OPS),
        alone.encode(residuals[:1].astype(np.float32), OPS),
        strict=True,
    ):
        np.testing.assert_array_equal(one[:1], other)


@pytest.mark.parametrize("residuals", [np.zeros((1, 10, 8)), np.ones((1, 1, 8)), np.eye(8)[None, :2]])
def test_degenerate_training_gives_codes_that_work(residuals):
    code = fit_codes(residuals, np.eye(8)[None], 2)
    decoded = code.decode(*code.encode(residuals.astype(np.float32), OPS))
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded, residuals @ code.forward, atol=0.3 * np.abs(residuals).max() + 1e-6)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"residuals": np.ones((4, 8))}, 2, r"residuals have shape \(4, 8\), expected \(heads, n, d\)"),
        ({"residuals": np.ones((1, 0, 8))}, 2, "with n > 0"),
        ({"residuals": np.full((1, 4, 8), np.nan)}, 2, "NaN or infinity"),
        ({"metric": np.eye(8)}, 2, r"metric has shape \(8, 8\), expected \(1, 8, 8\)"),
        ({"metric": -np.eye(8)[None]}, 2, "expected a positive definite matrix"),
        ({}, 0, "words is 0, expected at least 1"),
        ({}, 257, "words is 257, expected at most 256"),
    ],
)
def test_bad_training_is_refused(change, words, message):
    arguments = {"residuals": np.ones((1, 4, 8)), "metric": np.eye(8)[None], **change}
    with pytest.raises(InvalidInputError, match=message):
        fit_codes(**arguments, words=words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": np.ones((1, 3), np.float32)}, r"step has shape \(1, 3\), expected \(1, 16\)"),
        ({"base": np.zeros(1, np.float32)}, "expected scales above 0"),
        ({"base": np.ones(1)}, "base is float64, expected float32"),
        ({"widths": np.array([[3, 1]])}, "expected 1 to 256 words of fields of 1, 2 or 4 bits"),
        ({"spread": np.full((1, 16), np.inf, np.float32)}, "spread holds NaN or infinity"),
        ({"forward": np.ones((8, 16), np.float32)}, r"forward and widths have shapes \(8, 16\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message):
    with pytest.raises(InvalidInputError, match=message):
        TransformCode(**{**fitted(16, 2).tensors(), **change})


def test_fields_are_those_of_one_head():
    code = fitted(16, 2)
    fields = code.fields
    words, exponents = code.encode(trained(16, 1)[0][:, :20].astype(np.float32), OPS)
    levels = unpack(words[0], fields.widths)[:, : len(fields.step)] - fields.half
    decoded = fields.scales[exponents[0]][:, None] * levels * fields.step
    np.testing.assert_allclose(decoded, code.decode(words, exponents)[0], rtol=1e-5)
    with pytest.raises(InvalidInputError, match="codes are of 2 heads, expected 1"):
        fitted(16, 2, 2).fields  # noqa: B018


def test_slopes_regress_values_on_codes():
    rng = np.random.default_rng(0)
    y, slopes = rng.standard_normal((4000, 5)), rng.standard_normal((5, 3))
    found = fit_slopes(y, y @ slopes + rng.standard_normal((4000, 3)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slopes, atol=0.1)
    assert np.isfinite(fit_slopes(np.repeat(y[:, :1], 5, axis=1), y[:, :3])).all()
    for few in (y[:79], np.zeros((100, 5)), y[:0]):
        assert fit_slopes(few, np.ones((len(few), 3))).tolist() == [[0] * 3] * 5


def test_codes_are_values():
    code = fitted(16, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        code.base = None
    assert TransformCode(**code.tensors()).view.step is code.step


@given(
    n=st.sampled_from([0, 1, 5]),
    d=st.sampled_from([1, 7]),
    power=st.integers(-30, 30),
    seed=st.integers(0, 9),
)
def test_rows_in_int8_are_off_by_half_a_step(n, d, power, seed):
    x = np.random.default_rng(seed).standard_normal((2, n, d)) * 2.0**power
    rows, scales = quantise_rows(x)
    assert (rows.dtype, scales.dtype) == (np.int8, np.float32)
    assert (np.abs(rows * scales[..., None] - x) <= 0.5001 * scales[..., None]).all()
    assert (np.abs(rows).max(axis=-1, initial=0) == 127).all()
    assert quantise_rows(np.zeros((1, 3)))[1].tolist() == [0]
