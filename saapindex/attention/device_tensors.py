"""The array boundary of an attention index on a device: what is there already is taken without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from saapindex.arrays import ArrayLike
from saapindex.attention.tensors import STORED, element_type, stored, type_name
from saapindex.backends.cuda.finite import Finiteness
from saapindex.devices import device_of, get_cupy
from saapindex.errors import InvalidInputError

__all__ = ["buffer", "placed", "raw", "refuse"]

_EXPONENT = 0x7F80  # of bfloat16


def placed(
    value: ArrayLike,
    name: str,
    shape: tuple[int | None, ...],
    kind: str,
    device: int,
    looks: Finiteness | None = None,
) -> Any:
    """Return `value` as a CuPy array of what an index of type `kind` stores, on `device`.

    Parameters
    ----------
    value
        Of torch or CuPy on `device`, or in the memory of the host, from where it is copied.
    name
        What the caller calls it, for the error.
    shape
        Expected; None stands for any size.
    kind
        A key of `saapindex.attention.tensors.STORED`.
    looks
        Is to find out whether all values are finite; None not to.

    Raises
    ------
    InvalidInputError
        On another shape, device or type.
    """
    cupy, place = get_cupy(), device_of(value)
    if place is None:
        return cupy.asarray(stored(value, name, shape, kind))
    if place != device:
        raise InvalidInputError(f"{name} is on cuda:{place}, expected cuda:{device}")
    found = tuple(value.shape)
    if len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidInputError(f"{name} has shape {found}, expected ({wanted})")
    given, array = element_type(value, name), raw(value)
    if given != kind:
        array = _converted(array, given, kind, cupy)
    if looks is not None:
        looks.look(name, array)
    return array


def refuse(looks: Finiteness, kind: str) -> None:
    """Wait for what `placed` looked at.

    Raises
    ------
    InvalidInputError
        If it is not finite.
    """
    for name in looks.bad():
        raise InvalidInputError(
            f"{name} holds NaN, infinity or what {kind} cannot hold, expected finite values"
        )


def raw(value: ArrayLike) -> Any:
    """View an array on a device as CuPy's, bfloat16 as its bits in uint16."""
    cupy = get_cupy()
    if isinstance(value, cupy.ndarray):
        return value.view(np.uint16) if str(value.dtype) == "bfloat16" else value
    kind = STORED.get(type_name(value))
    if kind is None:
        return cupy.asarray(value.detach())
    # A step does this for all that it is given and returns, so not by torch's slower description of an array.
    shape, item = tuple(value.shape), value.element_size()
    strides = tuple(item * step for step in value.stride())
    extent = (
        item + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if value.numel() else 0
    )
    memory = cupy.cuda.UnownedMemory(value.data_ptr(), extent, value, value.device.index)
    return cupy.ndarray(shape, kind, cupy.cuda.MemoryPointer(memory, 0), strides)


def _converted(array: Any, given: str, kind: str, xp: Any) -> Any:
    if given == "bfloat16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind != "bfloat16":
        return array.astype(STORED[kind])
    bits = xp.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return xp.where(xp.isnan(array), np.uint16(_EXPONENT), rounded)


def buffer(model: ArrayLike, shape: tuple[int, ...], dtype: str, device: int) -> tuple[ArrayLike, Any]:
    """Return an empty array in the framework of `model`, and CuPy's view of it.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"int64"``, or ``"same"`` as `model`.
    """
    cupy = get_cupy()
    if type(model).__module__.partition(".")[0] == "torch":
        import torch

        kind = model.dtype if dtype == "same" else getattr(torch, dtype)
        made = torch.empty(shape, dtype=kind, device=f"cuda:{device}")
        return made, raw(made)
    kind = model.dtype if dtype == "same" else np.dtype(dtype)
    made = cupy.empty(shape, kind)
    return made, raw(made)
