"""The array boundary of the attention index: keys in their own precision, bfloat16 as its bits."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, give_back, integers
from saapindex.backends.attention_ops import AttentionOps
from saapindex.errors import InvalidInputError

__all__ = [
    "STORED",
    "all_finite",
    "element_type",
    "members",
    "of_heads",
    "queries",
    "returned",
    "stored",
    "type_name",
]

STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}
"""NumPy's type for what an index stores; NumPy has no bfloat16, so its bits are kept in uint16."""


_NAMES = {np.dtype(np.float16): "float16", np.dtype(np.float32): "float32"}


@functools.cache
def _name(dtype: Hashable) -> str:
    """Name of a type of torch: kept, since forming it takes microseconds."""
    return str(dtype).removeprefix("torch.")


def type_name(value: ArrayLike) -> str:
    """Name of the type of the elements; none for those of NumPy that are not stored as they are."""
    if isinstance(value, np.ndarray):
        return _NAMES.get(value.dtype, "")
    return _name(getattr(value, "dtype", ""))


def element_type(value: ArrayLike, name: str) -> str:
    """Return ``"float16"``, ``"bfloat16"`` or ``"float32"``: what to store `value` in.

    Raises
    ------
    InvalidInputError
        If `value` is no array of floats.
    """
    kind = type_name(value)
    if kind in STORED:
        return kind
    dtype = as_numpy(value, name).dtype
    if dtype.kind != "f":
        raise InvalidInputError(f"{name} has dtype {dtype}, expected a floating one")
    return "float32"


def to_bfloat16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to bfloat16, ties to even, as bits; NaN becomes infinity.

    Examples
    --------
    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875]))]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(x)] = 0x7F80  # the carry would make some of them finite
    return rounded


def stored(value: ArrayLike, name: str, shape: tuple[int | None, ...], kind: str) -> NDArray[Any]:
    """Return `value` as an index of type `kind` stores it; a copy only if it must be converted.

    Parameters
    ----------
    value
        Floats of any width.
    name
        What the caller calls it, for the error.
    shape
        Expected; None stands for any size.
    kind
        A key of `STORED`.

    Raises
    ------
    InvalidInputError
        On another shape, a dtype that is not floating, and values that are not finite as stored.
    """
    given = element_type(value, name)
    _check_shape(value, name, shape)
    if given == kind == "bfloat16":
        array = _bits(value, name)
    else:
        array = as_numpy(value, name)
        if array.dtype != STORED[kind]:
            with np.errstate(over="ignore"):
                array = to_bfloat16(array) if kind == "bfloat16" else array.astype(STORED[kind])
    if not all_finite(array):
        raise InvalidInputError(
            f"{name} holds NaN, infinity or what {kind} cannot hold, expected finite values"
        )
    return array


def members(
    shape: tuple[int, int], lengths: ArrayLike | None, mask: ArrayLike | None
) -> NDArray[np.bool_] | None:
    """Return which of new keys belong to each sequence, of `shape`, (batch, n); None for all.

    Parameters
    ----------
    lengths
        int, (batch,): only the last so many.
    mask
        bool, (batch, n), instead.

    Raises
    ------
    InvalidInputError
        On another shape or values, and on both.

    Examples
    --------
    >>> members((2, 3), [3, 1], None).astype(int)
    array([[1, 1, 1],
           [0, 0, 1]])
    """
    batch, n = shape
    if mask is not None:
        if lengths is not None:
            raise InvalidInputError("lengths and mask are given together, expected one of them")
        given = as_numpy(mask, "mask")
        if given.shape != shape or given.dtype.kind not in "biu" or ((given != 0) & (given != 1)).any():
            raise InvalidInputError(
                f"mask is {given.dtype} of shape {given.shape}, expected 0 and 1 of {shape}"
            )
        return given.astype(np.bool_)
    if lengths is None:
        return None
    counts = integers(lengths, "lengths", (batch,), minimum=0)
    if (counts > n).any():
        raise InvalidInputError(f"lengths reach {counts.max()}, expected at most the {n} keys given")
    return np.arange(n) >= n - counts[:, None]


def of_heads(value: ArrayLike, name: str, heads: int) -> NDArray[np.float32]:
    """Return a number for each query head, of which there is a multiple of `heads`, as float32.

    Raises
    ------
    InvalidInputError
        On another shape, and on NaN.
    """
    array = np.ascontiguousarray(as_numpy(value, name), np.float32)
    if array.ndim != 1 or not array.size or array.size % heads or np.isnan(array).any():
        raise InvalidInputError(
            f"{name} have shape {array.shape}, expected one for each of a multiple of {heads} heads"
        )
    return array


def all_finite(x: NDArray[Any]) -> bool:
    """Return whether stored elements are finite; uint16 holds the bits of bfloat16."""
    return bool(((x & 0x7F80) != 0x7F80).all() if x.dtype == np.uint16 else np.isfinite(x).all())


def queries(
    value: ArrayLike, name: str, shape: tuple[int | None, ...], ops: AttentionOps
) -> NDArray[np.float32]:
    """Return `value` as float32 of `shape`, contiguous.

    Raises
    ------
    InvalidInputError
        On another shape, a dtype that is not floating, and values that are not finite.
    """
    kind = type_name(value)
    if kind not in STORED:
        return np.ascontiguousarray(stored(value, name, shape, "float32"))
    _check_shape(value, name, shape)
    found, finite = ops.as_floats(_bits(value, name) if kind == "bfloat16" else as_numpy(value, name))
    if not finite:
        raise InvalidInputError(f"{name} holds NaN or infinity, expected finite values")
    return found


def _bits(value: ArrayLike, name: str) -> NDArray[np.uint16]:
    """Return bfloat16 of torch as its bits."""
    import torch

    return as_numpy(value.detach().view(torch.int16), name).view(np.uint16)


def _check_shape(value: ArrayLike, name: str, shape: tuple[int | None, ...]) -> None:
    found = tuple(getattr(value, "shape", ())) or as_numpy(value, name).shape
    if len(found) == len(shape):
        for size, expected in zip(found, shape, strict=True):
            if expected is not None and size != expected:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise InvalidInputError(f"{name} has shape {found}, expected ({wanted})")


def returned(result: NDArray[Any], model: ArrayLike, *, own_precision: bool = False) -> ArrayLike:
    """Return `result` in the framework of `model`, and in its precision where `own_precision`."""
    kind = type_name(model)
    if own_precision and kind == "float16":
        result = result.astype(np.float16)
    back = give_back(result, model)
    if own_precision and kind == "bfloat16":
        back = back.to(model.dtype)
    return back
