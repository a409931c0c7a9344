"""Adding keys to streams on a device, in one launch: see ``cuda/append.cu``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from saapindex.backends.cuda.append_state import (
    STATES_MOST,
    THREADS,
    flush_argument,
    shared_bytes,
)
from saapindex.backends.cuda.launch import address, by_value
from saapindex.backends.cuda.module import ELEMENTS, get_cupy, kernel

__all__ = ["append_streams", "flush_streams", "load", "load_flush"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device


def append_streams(
    made: np.ndarray[Any, Any], d: int, dtype: np.dtype[Any], *, many: bool, stamps: Array | None = None
) -> None:
    """Append: `made` is what `argument` and `with_keys` return.

    Allocates nothing and waits for nothing, so that it can be captured in a graph.

    Parameters
    ----------
    made
        The argument of the kernel.
    d, dtype
        Dimension of a key, and what it is stored in.
    many
        Whether thousands of keys enter the lists, so that more blocks pay where their lists are known.
    stamps
        (6,) int64, written: nanoseconds at the beginning of each phase. Slower.
    """
    made["stamps"] = address(stamps)
    run, blocks, shared = load(made, d, dtype, many=many, stamps=stamps is not None)
    run((blocks,), (THREADS,), (by_value(made),), shared_mem=shared)


def flush_streams(made: list[np.ndarray[Any, Any]], d: int, dtype: np.dtype[Any]) -> None:
    """Do the flushes that are due in several states before the next token: what `argument` returns for each.

    Allocates nothing and waits for nothing, so that it can be captured in a graph.
    """
    for first in range(0, len(made), STATES_MOST):
        some = made[first : first + STATES_MOST]
        run, blocks, shared = load_flush(some, d, dtype)
        run((blocks,), (THREADS,), (by_value(flush_argument(some)),), shared_mem=shared)


def load_flush(made: list[np.ndarray[Any, Any]], d: int, dtype: np.dtype[Any]) -> tuple[Any, int, int]:
    """Return the kernel of `flush_streams`, compiled on the first call, its blocks and shared memory."""
    shared = max(_shared_of(one, d) for one in made)
    run = kernel(
        "append", "append", shared=shared, D=d, ELEMENT=_element(dtype), BLOCKS=1, STATES=STATES_MOST
    )
    return run, _limits(get_cupy().cuda.runtime.getDevice())[0], shared


def load(
    made: np.ndarray[Any, Any], d: int, dtype: np.dtype[Any], *, many: bool = False, stamps: bool = False
) -> tuple[Any, int, int]:
    """Return the kernel for an argument, compiled on the first call, its blocks, and their shared memory.

    Nothing can be loaded while a graph is captured, so this comes before.
    """
    shared = _shared_of(made, d)
    multiprocessors, most = _limits(get_cupy().cuda.runtime.getDevice())
    # Two blocks on a multiprocessor leave too few registers for an assignment.
    each = 2 if many and made["labels_in"][0] and 2 * (shared + 1024) <= most else 1
    macros = {"STAMPS": 1} if stamps else {}
    run = kernel("append", "append", shared=shared, D=d, ELEMENT=_element(dtype), BLOCKS=each, **macros)
    return run, multiprocessors * each, shared


def _element(dtype: np.dtype[Any]) -> int:
    names = {
        np.dtype(np.float16): "float16",
        np.dtype(np.uint16): "bfloat16",
        np.dtype(np.float32): "float32",
    }
    return ELEMENTS[names[np.dtype(dtype)]]


def _shared_of(made: np.ndarray[Any, Any], d: int) -> int:
    return shared_bytes(d, int(made["lists"][0]), int(made["coded_dimensions"][0]), int(made["batch"][0]))


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    found = get_cupy().cuda.runtime.getDeviceProperties(device)
    return found["multiProcessorCount"], found["sharedMemPerMultiprocessor"]
