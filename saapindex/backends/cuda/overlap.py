"""Launches that begin before the one before them has ended: programmatic dependent launch.

CuPy has no call for it. A kernel that is launched so waits itself (``wait_for_previous`` in cuda/common.cuh)
before it touches anything that others write.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from numpy.typing import NDArray

from saapindex.backends.cuda.module import get_cupy

__all__ = ["launch_overlapping"]

# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h.
_PROGRAMMATIC = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def launch_overlapping(run: Any, grid: int, threads: int, argument: NDArray[Any], shared: int) -> None:
    """Launch a kernel with one struct as its argument on CuPy's current stream.

    Parameters
    ----------
    run
        ``cupy.RawKernel``.
    grid, threads
        Blocks, and threads of each.
    argument
        The struct: one element.
    shared
        Dynamic shared memory of a block, in bytes.
    """
    attribute = _Attribute(_PROGRAMMATIC, 0, (ctypes.c_int * 16)(1))
    config = _Config(
        (ctypes.c_uint * 3)(grid, 1, 1),
        (ctypes.c_uint * 3)(threads, 1, 1),
        shared,
        get_cupy().cuda.get_current_stream().ptr,
        ctypes.pointer(attribute),
        1,
    )
    arguments = (ctypes.c_void_p * 1)(argument.ctypes.data)
    code = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(run.kernel.ptr), arguments, None)
    if code:
        raise get_cupy().cuda.driver.CUDADriverError(code)
