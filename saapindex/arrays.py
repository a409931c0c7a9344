"""The only array boundary: what callers pass in becomes NumPy, and goes back as they passed it.

Inside the library every array is NumPy. Vectors are float32, C-contiguous; float16 and bfloat16
inputs are widened once, float64 is narrowed as Faiss does. Arrays that already fit are taken as
they are, without a copy.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.errors import InvalidInputError

__all__ = ["ArrayLike", "as_numpy", "check_out", "give_back", "integers", "vectors"]

ArrayLike: TypeAlias = Any
"""A NumPy array, a CPU torch tensor, or anything that speaks DLPack or the buffer protocol."""

_LARGEST = int(np.iinfo(np.int64).max)
_WIDTHS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def as_numpy(value: ArrayLike, name: str) -> NDArray[Any]:
    """View `value` as a NumPy array, copying only what NumPy cannot express (bfloat16).

    Raises
    ------
    InvalidInputError
        If `value` is no array, or lives on another device.

    Examples
    --------
    >>> as_numpy([[1.0, 2.0]], "x").shape
    (1, 2)
    """
    if isinstance(value, np.ndarray):
        return value
    if _is_torch(value) and value.device.type != "cpu":
        raise InvalidInputError(f"{name} is on {value.device}, expected a CPU tensor: {name}.cpu()")
    try:
        if _is_torch(value):
            value = value.detach()
            return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()  # type: ignore[no-any-return]
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InvalidInputError(f"{name} is a {type(value).__name__} that is no array: {error}") from error


def vectors(value: ArrayLike, name: str, d: int, *, finite: bool = True) -> NDArray[np.float32]:
    """Return `value` as float32 vectors, C-contiguous, of shape (n, d).

    Parameters
    ----------
    value
        float16, bfloat16, float32 or float64, shape (n, d), any strides.
    name
        What the caller calls it, for the error.
    d
        Dimension expected.
    finite
        Whether NaN and infinity are refused.

    Raises
    ------
    InvalidInputError
        On a wrong dtype, rank or dimension, and on values that are not finite.

    Examples
    --------
    >>> vectors(np.ones((2, 3), np.float16), "x", 3).dtype
    dtype('float32')
    """
    array = as_numpy(value, name)
    if array.dtype not in _WIDTHS:
        raise InvalidInputError(
            f"{name} has dtype {array.dtype}, expected a floating one: "
            f"convert it with {name}.astype('float32')"
        )
    if array.ndim != 2 or array.shape[1] != d:
        raise InvalidInputError(f"{name} has shape {array.shape}, expected (n, {d})")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not array.flags.writeable:  # numba would compile everything a second time for it
        array = array.copy()
    # The squared norm tells in one pass without a temporary; huge finite values overflow it, so ask again.
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):
        suspicious = finite and not math.isfinite(flat.dot(flat))
    if suspicious and not np.isfinite(array).all():
        raise InvalidInputError(f"{name} holds NaN or infinity, expected finite values")
    return array


def integers(
    value: ArrayLike, name: str, shape: tuple[int, ...], *, minimum: int | None = None
) -> NDArray[np.int64]:
    """Return `value` as int64, C-contiguous, of exactly `shape`.

    Raises
    ------
    InvalidInputError
        On another shape, a dtype that is not integer, or values below `minimum`.

    Examples
    --------
    >>> integers([3, 1], "ids", (2,), minimum=0)
    array([3, 1])
    """
    array = as_numpy(value, name)
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidInputError(f"{name} has dtype {array.dtype}, expected integers")
    if array.shape != shape:
        raise InvalidInputError(f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype.kind == "u" and int(array.max(initial=0)) > _LARGEST:
        raise InvalidInputError(f"{name} holds {int(array.max())}, expected at most {_LARGEST}")
    array = np.ascontiguousarray(array, dtype=np.int64)
    if minimum is not None and (array < minimum).any():
        raise InvalidInputError(f"{name} holds {int(array.min())}, expected at least {minimum}")
    return array


def check_out(out: ArrayLike, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return a view of the caller's buffer, which must fit.

    Raises
    ------
    InvalidInputError
        If the caller's buffer has another shape or dtype, or cannot be written.
    """
    kind = str(getattr(out, "dtype", f"a {type(out).__name__}")).removeprefix("torch.")
    if kind != np.dtype(dtype).name:  # before as_numpy, which would copy lists and bfloat16
        raise InvalidInputError(f"{name} is {kind}, expected a buffer of {np.dtype(dtype)}")
    array = as_numpy(out, name)
    if array.shape != shape:
        raise InvalidInputError(f"{name} has shape {array.shape}, expected {shape}")
    if not (array.flags.writeable and array.flags.c_contiguous):
        raise InvalidInputError(f"{name} is read-only or not C-contiguous, expected a writable buffer")
    return array


def give_back(result: NDArray[Any], model: ArrayLike) -> ArrayLike:
    """Return `result` in the framework of `model`: a torch tensor for a torch tensor, without a copy."""
    if isinstance(model, np.ndarray) or not _is_torch(model):
        return result
    import torch

    return torch.from_numpy(result)
