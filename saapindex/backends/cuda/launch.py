"""What launchers share: operations on arrays of the device or of the host, and rows as kernels want them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np

from saapindex.backends.cuda.module import ELEMENTS
from saapindex.devices import current, device_of, get_cupy
from saapindex.errors import InvalidInputError

__all__ = [
    "SHARED_MOST",
    "address",
    "by_value",
    "element",
    "has_clusters",
    "host",
    "mapped",
    "multiprocessors",
    "on_device",
    "packed",
    "power_of_two",
    "rows",
]

SHARED_MOST = 227 * 1024
"""The shared memory that a block of an H100 may have, in bytes."""
P = ParamSpec("P")
R = TypeVar("R")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    elif hasattr(value, "dtype") and value.ndim:
        yield value


def host(value: Any) -> Any:
    """Return a CuPy array as NumPy, and anything else as it is."""
    return value.get() if device_of(value) is not None else value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with `change` made to everything in its (nested, named) tuples."""
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)._make(parts) if hasattr(value, "_make") else tuple(parts)
    return change(value)


def on_device(run: Callable[P, R]) -> Callable[P, R]:
    """Let an operation on CuPy arrays take NumPy arrays too.

    With an array on a device among the arguments, everything happens there, on the stream that is current,
    and the results are CuPy arrays. Without one, arguments are copied to the current device and results back.
    """

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        cupy = get_cupy()
        places = {device_of(leaf) for leaf in _leaves((*args, *kwargs.values()))} - {None}
        if len(places) > 1:
            raise InvalidInputError(f"arrays are on the devices {sorted(map(str, places))}, expected one")
        at_home = not places
        device = places.pop() if places else cupy.cuda.runtime.getDevice()

        def upload(value: Any) -> Any:
            return cupy.asarray(value) if isinstance(value, np.ndarray) and value.ndim else value

        with current(device):
            moved = [mapped(value, upload) for value in args]
            named = {name: mapped(value, upload) for name, value in kwargs.items()}
            found: R = run(*moved, **named)
            return mapped(found, host) if at_home else found

    return call


def element(array: Any) -> int:
    """Return what the macro ELEMENT must be for an array; uint16 holds the bits of bfloat16."""
    name = "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
    if name not in ELEMENTS:
        raise InvalidInputError(
            f"array has dtype {array.dtype}, expected float16, float32 or uint16 (bfloat16)"
        )
    return ELEMENTS[name]


def rows(x: Any) -> Any:
    """Return `x`, (..., d), with the elements of each row side by side; a copy only where they are not."""
    if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        return get_cupy().ascontiguousarray(x)
    return x


def address(array: Any) -> int:
    """Return where an array of CuPy or NumPy begins, 0 for None.

    Examples
    --------
    >>> address(None)
    0
    """
    if array is None:
        return 0
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def packed(struct: np.dtype[Any], values: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return a struct, (1,), with these members, and zero where there is none.

    At once: to set one member after another takes three times as long.

    Examples
    --------
    >>> packed(np.dtype([("count", np.int32), ("scale", np.float32)]), {"count": 3})["count"]
    array([3], dtype=int32)
    """
    return np.array([tuple(values.get(name, 0) for name in struct.names or ())], struct)


def by_value(struct: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a struct as an argument of a kernel: its bytes, without fields that CuPy would go through.

    Examples
    --------
    >>> by_value(np.zeros(1, [("count", np.int32), ("scale", np.float32)])).dtype
    dtype('V8')
    """
    return struct.view(f"V{struct.nbytes}")


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors a device has."""
    count: int = get_cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]
    return count


@functools.cache
def has_clusters(device: int) -> bool:
    """Return whether blocks of a device can form clusters and have the shared memory of an H100."""
    found = get_cupy().cuda.Device(device)
    shared: int = found.attributes["MaxSharedMemoryPerBlockOptin"]
    return int(found.compute_capability) >= 90 and shared >= SHARED_MOST


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least `n`, and at least 2."""
    return 1 << max(1, (n - 1).bit_length())
