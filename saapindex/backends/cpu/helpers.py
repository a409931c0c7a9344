"""Threads that help with tasks, and that nobody waits for.

A parallel region of numba ends when all threads have come to its end, also those that had nothing to do: on a
machine that is busy with other things, a step of a tenth of a millisecond then takes tens of them, until the
last thread has had its turn. Here whoever calls does the tasks, and helpers that wake up in time take some of
them. In between they sleep, so that they are not in the way of the threads of torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["call_helpers", "start_helpers"]

_jobs: SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]]] = SimpleQueue()
_started: list[int] = []
"""Process of each thread that was started: after a fork, threads are gone."""


def call_helpers(count: int, work: Callable[..., object], *arguments: Any) -> None:
    """Ask `count` threads to call ``work(*arguments)``, which must not matter if it comes too late.

    `work` must let other threads run (``nogil``) and return at once where nothing is left to do.
    """
    start_helpers(count)
    for _ in range(count - _jobs.qsize()):
        _jobs.put((work, arguments))


def start_helpers(count: int) -> None:
    """See to it that there are `count` threads; new ones run on the cores that the caller may run on."""
    here = os.getpid()
    if _started[:1] != [here]:
        _started.clear()
    while len(_started) < count:
        threading.Thread(target=_help, name=f"saapindex-{len(_started)}", daemon=True).start()
        _started.append(here)


def _help() -> None:
    while True:
        work, arguments = _jobs.get()
        work(*arguments)
        del work, arguments
