"""The array boundary: what comes in, what is refused, and how results go back."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.arrays import as_numpy, check_out, give_back, integers, vectors
from saapindex.errors import InvalidInputError

X = np.arange(24, dtype=np.float32).reshape(4, 6)
HUGE = np.finfo(np.float32).max


class Exporter:
    """An array of another framework, as far as DLPack goes."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "layout",
    [
        np.ascontiguousarray,
        np.asfortranarray,
        read_only,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        lambda x: x.tolist(),
        lambda x: Exporter(x.copy()),
        lambda x: memoryview(x),
    ],
)
def test_vectors_of_any_width_and_layout(dtype, layout):
    out = vectors(layout(X.astype(dtype)), "x", 6)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, X)


def test_what_fits_is_not_copied():
    assert vectors(X, "x", 6) is X
    assert np.shares_memory(vectors(Exporter(X), "x", 6), X)
    ids = np.arange(3)
    assert integers(ids, "ids", (3,)) is ids


def test_no_rows():
    assert vectors(np.zeros((0, 6)), "x", 6).shape == (0, 6)
    assert integers([], "ids", (0,)).dtype == np.int64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.astype(np.int64), "x has dtype int64, expected a floating one"),
        (X.astype(np.complex64), "x has dtype complex64"),
        (X > 3, "x has dtype bool"),
        (X.astype(object), "x has dtype object"),
        (X.astype(str), "x has dtype <U"),
        (X.astype(">f4"), "x has dtype >f4"),
        ("text", "x has dtype <U4"),
        (None, "x has dtype object"),
        ([[1.0], [1.0, 2.0]], "x is a list that is no array"),
        (X[0], r"x has shape \(6,\), expected \(n, 6\)"),
        (X[None], r"x has shape \(1, 4, 6\), expected \(n, 6\)"),
        (X[:, :5], r"x has shape \(4, 5\), expected \(n, 6\)"),
        (np.float32(1), r"x has shape \(\), expected \(n, 6\)"),
        (np.where(X == 3, np.nan, X), "x holds NaN or infinity"),
        (np.where(X == 23, np.inf, X), "x holds NaN or infinity"),
        (np.where(X == 0, -np.inf, X), "x holds NaN or infinity"),
        (np.where(X == 0, 1e300, X.astype(np.float64)), "x holds NaN or infinity"),
    ],
)
def test_vectors_refused(value, message):
    with pytest.raises(InvalidInputError, match=message):
        vectors(value, "x", 6)


def test_sums_that_overflow_are_not_mistaken_for_infinity():
    huge = np.full((2, 6), HUGE)
    assert vectors(huge, "x", 6) is huge
    both_ways = np.array([[HUGE, HUGE, -HUGE, -HUGE, 0, 0]], np.float32)
    assert vectors(both_ways, "x", 6) is both_ways


def test_infinity_is_let_through_where_it_is_wanted():
    assert np.isinf(vectors(np.full((1, 6), np.inf), "x", 6, finite=False)).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16, np.uint64])
def test_integers_of_any_width(dtype):
    out = integers(np.arange(6, dtype=dtype)[::2], "ids", (3,), minimum=0)
    assert out.dtype == np.int64
    assert out.flags.c_contiguous
    assert out.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, 1.0, 2.0], "ids has dtype float64, expected integers"),
        ([True, False, True], "ids has dtype bool"),
        (["0", "1", "2"], "ids has dtype <U1"),
        ([0, 1, None], "ids has dtype object"),
        ([0j, 1j, 2j], "ids has dtype complex128"),
        ([0, 1], r"ids has shape \(2,\), expected \(3,\)"),
        ([[0, 1, 2]], r"ids has shape \(1, 3\), expected \(3,\)"),
        ([0, -1, 2], "ids holds -1, expected at least 0"),
        (np.array([0, 1, 2**63], np.uint64), "ids holds 9223372036854775808, expected at most"),
        ([0, 1, 2**70], "ids"),
        ([[0], [1, 2]], "ids is a list that is no array"),
    ],
)
def test_integers_refused(value, message):
    with pytest.raises(InvalidInputError, match=message):
        integers(value, "ids", (3,), minimum=0)


def test_a_buffer_that_fits_is_taken():
    buffer = np.zeros((2, 3), np.float32)
    assert check_out(buffer, "D", (2, 3), np.float32) is buffer


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 2), np.float32),
        np.zeros((2, 3)),
        np.zeros((2, 3), np.int32),
        np.zeros((2, 6), np.float32)[:, ::2],
        np.zeros((3, 2), np.float32).T,
        read_only(np.zeros((2, 3), np.float32)),
        [[0.0] * 3] * 2,
        np.float32,
    ],
)
def test_buffers_refused(out):
    with pytest.raises(InvalidInputError, match="D"):
        check_out(out, "D", (2, 3), np.float32)


def test_a_list_is_no_buffer():
    with pytest.raises(InvalidInputError, match="I is a list, expected"):
        check_out([[0, 0]], "I", (1, 2), np.int64)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_any_width(torch, dtype):
    tensor = torch.from_numpy(X).to(getattr(torch, dtype))
    np.testing.assert_array_equal(vectors(tensor, "x", 6), X)
    np.testing.assert_array_equal(vectors(tensor.T.contiguous().T, "x", 6), X)


@pytest.mark.torch
def test_a_tensor_that_fits_is_not_copied(torch):
    tensor = torch.ones(2, 6, requires_grad=True)
    assert vectors(tensor, "x", 6).ctypes.data == tensor.data_ptr()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, torch: x.to("meta"), r"x is on meta, expected a CPU tensor: x\.cpu\(\)"),
        (lambda x, torch: x.to_sparse(), "x is a Tensor that is no array"),
        (lambda x, torch: x.to(torch.complex64), "x has dtype complex64"),
        (lambda x, torch: x.int(), "x has dtype int32"),
        (lambda x, torch: x.to(torch.float8_e4m3fn), "x is a Tensor that is no array"),
        (lambda x, torch: x * torch.nan, "x holds NaN"),
    ],
)
def test_tensors_refused(torch, change, message):
    with pytest.raises(InvalidInputError, match=message):
        vectors(change(torch.ones(2, 6), torch), "x", 6)


@pytest.mark.torch
def test_a_tensor_as_buffer_shares_memory_or_is_refused(torch):
    buffer = torch.zeros(2, 3)
    check_out(buffer, "D", (2, 3), np.float32)[:] = 5
    assert (buffer == 5).all()
    with pytest.raises(InvalidInputError, match="D is bfloat16"):
        check_out(buffer.bfloat16(), "D", (2, 3), np.float32)


@pytest.mark.torch
def test_results_go_back_as_tensors(torch):
    back = give_back(X, torch.ones(1))
    assert isinstance(back, torch.Tensor)
    assert back.data_ptr() == X.ctypes.data


def test_results_go_back_as_arrays():
    assert give_back(X, [[1.0]]) is X


def test_as_numpy_names_what_it_was_given():
    with pytest.raises(InvalidInputError, match="queries is a list"):
        as_numpy([[1], [2, 3]], "queries")
