"""Kernels by name: one `.cu` file for each operation, compiled once for each device and setting."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

from saapindex.devices import get_cupy
from saapindex.errors import InvalidInputError

__all__ = ["ELEMENTS", "get_cupy", "kernel", "options", "source"]

# The blocks of a cluster that every device with clusters allows; and what allows more, as cuda.h calls it:
# CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED.
_PORTABLE, _NON_PORTABLE_ALLOWED = 8, 14

ELEMENTS = {"float16": 0, "bfloat16": 1, "float32": 2}
"""What the macro ELEMENT stands for."""


def source(file: str) -> str:
    """Return the CUDA source of an operation with `common.cuh` before it, and what it includes in it.

    Compilers' caches see no includes, and NVRTC needs a path for them.

    Examples
    --------
    >>> "warp_sum" in source("attend")
    True
    """
    folder = resources.files("saapindex") / "cuda"
    path = folder / f"{file}.cu"
    if not path.is_file():
        raise InvalidInputError(f"there is no CUDA source {file}.cu")
    include = re.compile(r'^#include "(.+)"$', re.MULTILINE)
    text = include.sub(lambda found: (folder / found[1]).read_text(), path.read_text())
    return (folder / "common.cuh").read_text() + "\n" + text


def options(macros: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return the compiler's options for macros.

    Examples
    --------
    >>> options({"D": 128}.items())
    ('--std=c++17', '-DD=128')
    """
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in macros))


@functools.cache
def _module(file: str, device: int, macros: tuple[tuple[str, Any], ...]) -> Any:
    return get_cupy().RawModule(code=source(file), options=options(macros), backend="nvrtc")


@functools.cache
def _kernel(file: str, name: str, device: int, large: bool, macros: tuple[tuple[str, Any], ...]) -> Any:
    cupy = get_cupy()
    found = _module(file, device, macros).get_function(name)
    if large:  # all that there is: whoever asks for less later must not take it away
        most = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
        found.max_dynamic_shared_size_bytes = most - found.shared_size_bytes
    if dict(macros).get("CLUSTER", 0) > _PORTABLE:
        driver = importlib.import_module("cupy_backends.cuda.api.driver")
        driver.funcSetAttribute(found.kernel.ptr, _NON_PORTABLE_ALLOWED, 1)
    return found


def kernel(file: str, name: str, *, shared: int = 0, **macros: Any) -> Any:
    """Return a kernel of ``cuda/<file>.cu`` for the current device, compiled on the first call.

    Parameters
    ----------
    file, name
        Where it is, and its name there.
    shared
        The dynamic shared memory it will be launched with, in bytes.
    **macros
        What is defined when it is compiled.
    """
    device = get_cupy().cuda.runtime.getDevice()
    return _kernel(file, name, device, shared > 16 * 1024, tuple(sorted(macros.items())))
