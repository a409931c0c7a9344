"""Stages of small tasks on a board, from which several threads take one after the other.

A board is of int64 words, those that threads write to a cache line or more apart. A job is opened by a
ticket, which holds which job and stage it is in its upper half, and the next task of the stage in its lower
one; whoever does the last task of a stage opens the next. Nobody waits for a thread that is not in the middle
of a task.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from saapindex.backends.base import Ints
from saapindex.backends.cpu.memory import (
    atomic_add,
    atomic_read,
    atomic_replace,
    atomic_write,
    call_at,
    wait_at,
)

STAGES = 6
"""Of a job; a ticket at this stage says that the job is done."""
TICKET, DONE, ANNOUNCED, SERVED, JOB, HELPERS, APART = 0, 16, 32, 48, 64, 96, 16
"""Words of a board: the ticket, tasks of the stage that are done, jobs that were announced, how many of them
had been when the last job was opened, the job itself, and what each helper does, `APART` words from each
other."""
ASLEEP, CALLED, AWAKE = 0, 1, 2
"""What a helper does."""
FOREVER = 1 << 62

_DO, _STEP, _COUNTS = JOB, JOB + 1, JOB + 2
_STAGE_BITS = 3


def new_board(helpers: int) -> Ints:
    """Return a board without a job, for so many helpers."""
    board = np.zeros(HELPERS + APART * helpers, np.int64)
    board[TICKET] = STAGES << 32
    return board


@njit(cache=True, nogil=True)
def open_job(board, do, step, counts):  # type: ignore[no-untyped-def]
    """Put a job on a board that has none: call `do`, the address of a function, for each of ``counts[stage]``
    tasks of every stage, with the address of `step`.
    """
    job = (board[TICKET] >> (32 + _STAGE_BITS)) + 1
    board[_DO], board[_STEP] = do, step.ctypes.data
    for stage in range(STAGES):
        board[_COUNTS + stage] = counts[stage]
    atomic_write(board, TICKET, _ticket(job, _stage_from(board, 0)))
    # Only now: a helper that waits for the job and finds that it has been served goes.
    atomic_write(board, SERVED, atomic_read(board, ANNOUNCED))


@njit(cache=True, nogil=True, inline="always")
def _ticket(job, stage):  # type: ignore[no-untyped-def]
    return ((job << _STAGE_BITS) | stage) << 32


@njit(cache=True, nogil=True)
def _stage_from(board, stage):  # type: ignore[no-untyped-def]
    """Return the next stage that has tasks."""
    while stage < STAGES and board[_COUNTS + stage] == 0:
        stage += 1
    return stage


@njit(cache=True, nogil=True)
def take_part(board, patience, helps):  # type: ignore[no-untyped-def]
    """Take tasks until the job is done.

    Who `helps` goes after `patience` looks at the board without finding a task, and otherwise waits for a job
    that has been announced. Who opened the job stays to its end.
    """
    left = patience
    while left > 0:
        ticket = atomic_read(board, TICKET)
        stage, task = (ticket >> 32) & ((1 << _STAGE_BITS) - 1), ticket & 0xFFFFFFFF
        # Read before the task is taken: once it is done, others may finish the job and open the next one.
        tasks = board[_COUNTS + stage] if stage < STAGES else 0
        if stage == STAGES:
            served = not helps or atomic_read(board, ANNOUNCED) == atomic_read(board, SERVED)
            if served and atomic_read(board, TICKET) == ticket:
                return
            left -= 1
        elif task >= tasks:
            left -= 1
        elif atomic_replace(board, TICKET, ticket, ticket + 1):
            # The ticket was what it had been, so all that was read is of this job.
            call_at(board[_DO], board[_STEP], stage, task)
            if atomic_add(board, DONE, 1) + 1 == tasks:
                atomic_write(board, DONE, 0)
                atomic_write(
                    board, TICKET, _ticket(ticket >> (32 + _STAGE_BITS), _stage_from(board, stage + 1))
                )
            left = patience


@njit(cache=True, nogil=True)
def do_job(board, do, step, counts):  # type: ignore[no-untyped-def]
    """Open a job, and take part until it is done."""
    open_job(board, do, step, counts)
    take_part(board, FOREVER, False)


@njit(cache=True, nogil=True)
def help_out(board, me, lock, acquire, patience):  # type: ignore[no-untyped-def]
    """Take part in jobs, and sleep in between, until the process ends: word `me` of the board says which."""
    while True:
        wait_at(acquire, lock)
        atomic_write(board, me, AWAKE)
        take_part(board, patience, True)
        atomic_write(board, me, ASLEEP)
