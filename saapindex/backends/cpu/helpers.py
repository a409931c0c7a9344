"""Threads that help with tasks, and that nobody waits for.

A parallel region of numba ends when all threads have come to its end, also those that had nothing to do: on a
machine that is busy with other things, a step of a tenth of a millisecond then takes tens of them, until the
last thread has had its turn. Here whoever calls does the tasks, and helpers that wake up in time take some of
them. In between they sleep, so that they are not in the way of the threads of torch.

A helper never holds Python's lock: it sleeps on a lock of its own, and is woken from it while its caller
still prepares the job. It is kept off the core of its caller, where many kernels would wake it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from saapindex.backends.base import Ints
from saapindex.backends.cpu.tasks import (
    ANNOUNCED,
    APART,
    ASLEEP,
    CALLED,
    HELPERS,
    do_job,
    help_out,
    new_board,
)

__all__ = ["announce_job", "run_job", "start_helpers"]

PATIENCE = 300_000
"""Looks at the board before a helper without tasks goes: a good half of a millisecond."""
MOST = 256
"""Helpers that there can be."""

_threads = ctypes.pythonapi
_threads.PyThread_allocate_lock.restype = ctypes.c_void_p
_threads.PyThread_release_lock.argtypes = [ctypes.c_void_p]
_threads.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]
_release = _threads.PyThread_release_lock
_ACQUIRE = int(ctypes.cast(_threads.PyThread_acquire_lock, ctypes.c_void_p).value or 0)


def _current_core() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    function: Any = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    return function  # type: ignore[no-any-return]


_core = _current_core()


class _Helper:
    """A thread that sleeps until it is called."""

    def __init__(self, board: Ints, number: int) -> None:
        self.board, self.word = board, HELPERS + APART * number
        self.lock = _threads.PyThread_allocate_lock()
        _threads.PyThread_acquire_lock(self.lock, 1)
        arguments = board, self.word, self.lock, _ACQUIRE, PATIENCE
        self.thread = threading.Thread(
            target=help_out, args=arguments, name=f"saapindex-{number}", daemon=True
        )
        self.thread.start()
        self.cores = frozenset[int]() if _core is None else frozenset(os.sched_getaffinity(self._id))

    @property
    def _id(self) -> int:
        return self.thread.native_id or 0

    def keep_off(self, core: int) -> None:
        """Stay on other cores than that of the caller."""
        if others := self.cores - {core}:
            with contextlib.suppress(OSError):  # somebody has taken cores away
                os.sched_setaffinity(self._id, others)


class _Team:
    """The helpers of a process, and the board that they look at."""

    def __init__(self) -> None:
        self.board, self.helpers = new_board(MOST), list[_Helper]()
        self.words = memoryview(self.board.data)  # the same memory, quicker for one word
        self.process, self.turn = os.getpid(), threading.Lock()
        self.avoided, self.wanted = -1, 0

    def start(self, count: int) -> None:
        """See to it that there are `count` helpers."""
        while len(self.helpers) < min(count, MOST):
            self.helpers.append(_Helper(self.board, len(self.helpers)))
            self.avoided = -1

    def call(self, count: int) -> None:
        """Wake up to `count` helpers that sleep, for a job that comes now."""
        words = self.words
        words[ANNOUNCED] += 1
        asleep = [helper for helper in self.helpers[:count] if words[helper.word] == ASLEEP]
        if not asleep:
            return
        core = -1 if _core is None else _core()
        if core != self.avoided:
            self.avoided = core
            for helper in self.helpers:
                helper.keep_off(core)
        for helper in asleep:
            words[helper.word] = CALLED
            _release(helper.lock)


_team = _Team()


def _own() -> _Team:
    """The team of this process: after a fork, threads are gone."""
    global _team
    if _team.process != os.getpid():
        _team = _Team()
    return _team


def start_helpers(count: int) -> None:
    """See to it that there are `count` threads; new ones run on the cores that the caller may run on."""
    _own().start(count)


def announce_job() -> None:
    """Wake as many helpers as the last job had, for one that comes in a moment; if none does, they sleep
    again.
    """
    team = _own()
    if team.wanted:
        team.call(team.wanted)


def run_job(do: int, step: NDArray[Any], counts: Ints, count: int) -> None:
    """Do all tasks, ``counts[stage]`` of each stage, with up to `count` helpers.

    Parameters
    ----------
    do
        Address of a C function that takes the address of `step`, a stage and a task.
    """
    team = _own()
    team.wanted = count
    if count > 0 and team.turn.acquire(blocking=False):
        try:
            team.start(count)
            team.call(count)
            do_job(team.board, do, step, counts)
        finally:
            team.turn.release()
    else:  # too little to do, or helpers are busy with a job of another thread
        do_job(new_board(0), do, step, counts)
