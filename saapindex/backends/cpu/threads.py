"""The threads of kernels: how many, and what happens when several threads of the caller start kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["get_threads", "launch", "most_threads", "set_threads"]

_turn = threading.Lock()


def launch(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Run a parallel kernel, alone where numba's threads serve one caller at a time.

    Of numba's threading layers only the plainest, ``workqueue``, cannot be shared: it ends the process when
    two threads start kernels at once.
    """
    if _shared():
        return kernel(*arguments)
    with _turn:
        return kernel(*arguments)


def _shared() -> bool:
    try:
        return bool(numba.threading_layer() != "workqueue")
    except ValueError:  # none before the first kernel has run
        return False


def most_threads() -> int:
    """Return how many threads there can be."""
    return int(numba.config.NUMBA_NUM_THREADS)


def get_threads() -> int:
    """Return how many threads a kernel started from this thread runs on."""
    return int(numba.get_num_threads())


def set_threads(n: int) -> None:
    """Set how many threads a kernel started from this thread runs on."""
    numba.set_num_threads(n)
