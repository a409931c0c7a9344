"""The only array boundary: what callers pass in becomes NumPy, and goes back as they passed it.

Inside the library every array is NumPy, or for an index on a CUDA device CuPy: everything here takes the
number of that device, and then NumPy arrays are copied there. Vectors are float32, C-contiguous; float16 and
bfloat16 inputs are widened once, float64 is narrowed as Faiss does. Arrays that already fit are taken as
they are, without a copy. Work on a device goes to the current stream: see `saapindex.devices.current`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.devices import device_of, get_cupy
from saapindex.errors import InvalidInputError

__all__ = ["ArrayLike", "as_array", "as_numpy", "check_out", "fill", "give_back", "integers", "vectors"]

ArrayLike: TypeAlias = Any
"""A NumPy or CuPy array, a torch tensor, or anything that speaks DLPack or the buffer protocol."""

_LARGEST = int(np.iinfo(np.int64).max)
_WIDTHS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


@functools.cache
def _is_bfloat16(dtype: Hashable) -> bool:
    return str(dtype) == "torch.bfloat16"


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
    torchs = _is_torch(value)
    if torchs and not value.is_cpu:
        raise InvalidInputError(f"{name} is on {value.device}, expected a CPU tensor: {name}.cpu()")
    if not torchs and device_of(value) is not None:
        raise InvalidInputError(f"{name} is on cuda:{device_of(value)}, expected an array in host memory")
    try:
        if torchs:
            value = value.detach() if value.requires_grad else value
            return (value.float() if _is_bfloat16(value.dtype) else value).numpy()  # type: ignore[no-any-return]
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InvalidInputError(f"{name} is a {type(value).__name__} that is no array: {error}") from error


def as_array(value: ArrayLike, name: str, device: int | None = None) -> Any:
    """View `value` as a NumPy array, or as a CuPy array on `device`, where arrays of the host are copied.

    Raises
    ------
    InvalidInputError
        If `value` is no array, or is on another device.

    Examples
    --------
    >>> as_array([[1.0, 2.0]], "x").shape
    (1, 2)
    """
    if device is None:
        return as_numpy(value, name)
    cupy, place = get_cupy(), device_of(value)
    if place is None:
        array = as_numpy(value, name)
        if array.dtype.kind not in "biufc":
            raise InvalidInputError(f"{name} has dtype {array.dtype}, expected numbers")
        return cupy.asarray(array)
    if place != device:
        raise InvalidInputError(f"{name} is on cuda:{place}, expected cuda:{device}")
    if isinstance(value, cupy.ndarray):
        return value
    if _is_torch(value):
        value = value.detach()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return cupy.from_dlpack(value)


def vectors(
    value: ArrayLike, name: str, d: int, *, finite: bool = True, device: int | None = None
) -> NDArray[np.float32]:
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
    device
        Number of the CUDA device that the vectors must be on; then they are a CuPy array.

    Raises
    ------
    InvalidInputError
        On a wrong dtype, rank or dimension, and on values that are not finite.

    Examples
    --------
    >>> vectors(np.ones((2, 3), np.float16), "x", 3).dtype
    dtype('float32')
    """
    array: NDArray[np.float32] = as_array(value, name, device)
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
    array = _contiguous(array, np.float32)
    if device is None and not array.flags.writeable:  # numba would compile everything a second time for it
        array = array.copy()
    # The squared norm tells in one pass without a temporary; huge finite values overflow it, so ask again.
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):
        suspicious = finite and not math.isfinite(flat.dot(flat))
    if suspicious and not np.isfinite(array).all():
        raise InvalidInputError(f"{name} holds NaN or infinity, expected finite values")
    return array


def _contiguous(array: Any, dtype: DTypeLike) -> Any:
    module = np if isinstance(array, np.ndarray) else get_cupy()
    return module.ascontiguousarray(array, dtype=dtype)


def integers(
    value: ArrayLike,
    name: str,
    shape: tuple[int, ...],
    *,
    minimum: int | None = None,
    device: int | None = None,
) -> NDArray[np.int64]:
    """Return `value` as int64, C-contiguous, of exactly `shape`; a CuPy array if it must be on a `device`.

    Raises
    ------
    InvalidInputError
        On another shape, a dtype that is not integer, or values below `minimum`.

    Examples
    --------
    >>> integers([3, 1], "ids", (2,), minimum=0)
    array([3, 1])
    """
    array: NDArray[np.int64] = as_array(value, name, device)
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidInputError(f"{name} has dtype {array.dtype}, expected integers")
    if array.shape != shape:
        raise InvalidInputError(f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > _LARGEST:
        raise InvalidInputError(f"{name} holds {int(array.max())}, expected at most {_LARGEST}")
    array = _contiguous(array, np.int64)
    if minimum is not None and (array < minimum).any():
        raise InvalidInputError(f"{name} holds {int(array.min())}, expected at least {minimum}")
    return array


def check_out(
    out: ArrayLike, name: str, shape: tuple[int, ...], dtype: DTypeLike, *, device: int | None = None
) -> NDArray[Any]:
    """Return a view of the caller's buffer, which must fit and be on `device`.

    Raises
    ------
    InvalidInputError
        If the caller's buffer has another shape or dtype, or cannot be written.
    """
    kind = str(getattr(out, "dtype", f"a {type(out).__name__}")).removeprefix("torch.")
    if kind != np.dtype(dtype).name:  # before as_numpy, which would copy lists and bfloat16
        raise InvalidInputError(f"{name} is {kind}, expected a buffer of {np.dtype(dtype)}")
    if device is not None and device_of(out) is None:
        raise InvalidInputError(f"{name} is in host memory, expected a buffer on cuda:{device}")
    array: NDArray[Any] = as_array(out, name, device)
    if array.shape != shape:
        raise InvalidInputError(f"{name} has shape {array.shape}, expected {shape}")
    if not (getattr(array.flags, "writeable", True) and array.flags.c_contiguous):
        raise InvalidInputError(f"{name} is read-only or not C-contiguous, expected a writable buffer")
    return array


def fill(buffer: Any, result: Any) -> None:
    """Copy `result` to a buffer, wherever either is."""
    if isinstance(buffer, np.ndarray):
        buffer[...] = result if isinstance(result, np.ndarray) else result.get()
    else:
        buffer[...] = get_cupy().asarray(result)


def give_back(result: NDArray[Any], model: ArrayLike) -> ArrayLike:
    """Return `result` where `model` is and in its framework, without a copy if it is there already.

    A torch tensor for a torch tensor, a CuPy array for anything else on a device, otherwise NumPy.
    """
    if not isinstance(result, np.ndarray) and device_of(model) is None:
        result = result.get()
    if isinstance(model, np.ndarray) or not _is_torch(model):
        return result
    import torch

    return torch.from_numpy(result) if isinstance(result, np.ndarray) else torch.from_dlpack(result)
