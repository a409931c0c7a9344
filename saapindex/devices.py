"""CUDA devices: CuPy, and the device and stream that the caller's arrays are on."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from saapindex.errors import InvalidInputError, MissingDependencyError

__all__ = ["check_device", "current", "device_of", "get_cupy"]


@functools.cache
def get_cupy() -> Any:
    """Return CuPy.

    Raises
    ------
    MissingDependencyError
        If it is not installed; the message says what to do.
    InvalidInputError
        If there is no device.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError("cupy", "CUDA", "cuda") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InvalidInputError(f"CUDA finds no device ({error}): use the backend 'cpu'") from error
    if not count:
        raise InvalidInputError("CUDA finds no device: use the backend 'cpu'")
    return cupy


def check_device(name: str) -> int | None:
    """Return the number of the CUDA device called `name`, ``"cuda"`` or ``"cuda:1"``; None for ``"cpu"``.

    Raises
    ------
    InvalidInputError
        If there is no such device.
    MissingDependencyError
        If CuPy is not installed.

    Examples
    --------
    >>> check_device("cpu") is None
    True
    """
    kind, _, number = str(name).partition(":")
    if name == "cpu":
        return None
    if kind != "cuda" or (number and not number.isdecimal()):
        raise InvalidInputError(f"device is {name!r}, expected 'cpu', 'cuda' or 'cuda:0' and so on")
    cupy = get_cupy()
    device = int(number) if number else int(cupy.cuda.runtime.getDevice())
    count = cupy.cuda.runtime.getDeviceCount()
    if device >= count:
        raise InvalidInputError(f"device is {name!r}, but CUDA finds {count}: expected cuda:0 to {count - 1}")
    return device


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def device_of(value: object) -> int | None:
    """Return the number of the CUDA device that an array is on; None if it is in the memory of the host.

    Examples
    --------
    >>> import numpy as np
    >>> device_of(np.zeros(3)) is None
    True
    """
    if _is_torch(value):
        place = value.device  # type: ignore[attr-defined]
        return int(place.index) if place.type == "cuda" else None
    if type(value).__module__.partition(".")[0] == "cupy":
        return int(value.device.id)  # type: ignore[attr-defined]
    if hasattr(value, "__cuda_array_interface__") and hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return None


class _Foreign:
    """A stream of another framework, as the CUDA stream protocol wants it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=64)
def _stream(device: int, pointer: int) -> Any:
    cupy = get_cupy()
    return cupy.cuda.Stream.from_external(_Foreign(pointer)) if pointer else cupy.cuda.Stream.null


@contextlib.contextmanager
def current(array: object) -> Iterator[None]:
    """Make CuPy use the device of `array`, and of a torch tensor also torch's current stream there.

    What is launched inside is ordered after what the caller launched before, and is captured by
    ``torch.cuda.graph``. Of a CuPy array CuPy's own current stream is the caller's. An array in the memory of
    the host changes nothing.

    Parameters
    ----------
    array
        Array of the caller, or the number of a device.

    Examples
    --------
    >>> import numpy as np
    >>> with current(np.zeros(3)):
    ...     pass
    """
    device = array if isinstance(array, int) else device_of(array)
    if device is None:
        yield
        return
    cupy = get_cupy()
    if not _is_torch(array):
        with cupy.cuda.Device(device):
            yield
        return
    pointer = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device), _stream(device, pointer):
        yield
