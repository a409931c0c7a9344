"""Cores for the kernels of an index inside vLLM, which binds its threads to cores one by one."""

from __future__ import annotations

import os

import torch

from saapindex.backends.cpu.helpers import start_helpers
from saapindex.backends.cpu.threads import most_threads, set_threads

__all__ = ["share_cores"]


def share_cores() -> int:
    """Let kernels that this thread starts run on all cores of torch's threads; return how many may.

    A new thread is bound as the one that starts it is, which here would be to a single core.
    """
    count = max(1, min(torch.get_num_threads(), most_threads()))
    set_threads(count)
    if not hasattr(os, "sched_setaffinity"):
        start_helpers(count - 1)
        return count
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _cores() | own)
    try:
        start_helpers(count - 1)
    finally:
        os.sched_setaffinity(0, own)
    return count


def _cores() -> set[int]:
    """Cores that any thread of this process may run on."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found |= os.sched_getaffinity(int(task))
        except ProcessLookupError:  # it has ended
            continue
    return found
