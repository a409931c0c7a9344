"""Cores for the kernels of an index inside vLLM, which binds its threads to cores one by one."""

from __future__ import annotations

import os

import torch

__all__ = ["share_cores"]


def share_cores() -> int:
    """Let kernels that this thread starts run on all cores of torch's threads; return how many may.

    A new thread is bound as the one that starts it is, which here would be to a single core; and numba, which
    must not have been imported before, would count one. (It cannot be imported before vLLM's worker is made:
    that looks through all modules, and stumbles over one of numba's.)
    """
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if bound is not None:
        os.sched_setaffinity(0, _cores() | bound)
    try:
        from saapindex.backends.cpu.helpers import start_helpers
        from saapindex.backends.cpu.threads import most_threads, set_threads

        count = max(1, min(torch.get_num_threads(), most_threads()))
        set_threads(count)
        start_helpers(count - 1)
    finally:
        if bound is not None:
            os.sched_setaffinity(0, bound)
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
