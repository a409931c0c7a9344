"""Threads that help: late, not at all, or after a fork, the result is the same."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings

import numpy as np
import pytest
from numba import cfunc, types

from saapindex.backends import get_ops
from saapindex.backends.cpu import helpers, step
from saapindex.backends.cpu.memory import atomic_read, atomic_replace, atomic_write
from saapindex.backends.cpu.record import longs_at
from saapindex.backends.cpu.tasks import ASLEEP, AWAKE, STAGES
from saapindex.backends.paged import Reading, Scaling


def arguments(made, t=9):
    queries = made.rng.standard_normal((4, t, 3, 16)).astype(np.float32)
    long = made.lists.sizes.sum(axis=1)
    reading = Reading(long // 2, long * 20, 9, 128)
    positions = np.full((4, t), made.total)
    return queries, positions, made.near, made.lists, made.pages, made.code, Scaling(0.25), reading


@cfunc(types.void(types.int64, types.int64, types.int64))
def count(address, stage, task):
    """Note down that a task was done, and that none is of an earlier stage than one that was done before."""
    seen = longs_at(address, (STAGES + 1, 64))
    if seen[STAGES, 0] > stage:
        seen[STAGES, 1] = 1
    seen[STAGES, 0] = stage
    seen[stage, task] += 1


def test_every_task_is_done_once_and_stage_after_stage():
    rng, before = np.random.default_rng(0), {thread.name for thread in threading.enumerate()}
    for helping in (0, 1, 3, 3, 1):
        for _ in range(300):
            counts, seen = rng.integers(0, 40, STAGES), np.zeros((STAGES + 1, 64), np.int64)
            counts[rng.integers(STAGES)] = 0
            helpers.announce_job()
            helpers.run_job(count.address, seen, counts, helping)
            np.testing.assert_array_equal(seen[:STAGES], np.arange(64) < counts[:, None])
            assert not seen[STAGES, 1]
    started = {thread.name for thread in threading.enumerate()} - before
    assert {name.rpartition("-")[0] for name in started} <= {"saapindex"}
    assert len(helpers._team.helpers) >= 3


_who = types.ExternalFunction("pthread_self", types.int64())


@cfunc(types.void(types.int64, types.int64, types.int64))
def work(address, stage, task):
    """Wait a while for another thread to do a task, however busy the machine is; note down that one came."""
    seen, this = longs_at(address, (2,)), _who()
    if not atomic_replace(seen, 0, 0, this) and atomic_read(seen, 0) != this:
        atomic_write(seen, 1, 1)
    for _ in range(20_000_000):
        if atomic_read(seen, 1):
            break


def test_a_helper_that_waits_for_a_job_takes_part(monkeypatch):
    """It once went when it saw that the job had been served, just before it could see its first task."""
    if os.cpu_count() == 1:
        pytest.skip("needs two cores")
    monkeypatch.setattr(helpers, "PATIENCE", 1 << 40)
    monkeypatch.setattr(helpers, "_team", helpers._Team())
    counts, took_part = np.zeros(STAGES, np.int64), 0
    counts[0] = 64
    for _ in range(20):
        seen = np.zeros(2, np.int64)
        helpers.announce_job()
        deadline = time.monotonic() + 10
        while any(helpers._team.board[helper.word] != AWAKE for helper in helpers._team.helpers):
            assert time.monotonic() < deadline
        helpers.run_job(work.address, seen, counts, 1)
        took_part += seen[1]
    assert took_part == 20, took_part


def test_helpers_sleep_when_there_is_nothing_to_do():
    seen = np.zeros((STAGES + 1, 64), np.int64)
    helpers.run_job(count.address, seen, np.ones(STAGES, np.int64), 2)
    helpers.announce_job()  # and nothing comes
    words = [helper.word for helper in helpers._team.helpers]
    deadline = time.monotonic() + 10
    while any(helpers._team.board[word] != ASLEEP for word in words) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(helpers._team.board[word] == ASLEEP for word in words)


def test_a_forked_process_has_helpers_of_its_own():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    seen, counts = np.zeros((STAGES + 1, 64), np.int64), np.full(STAGES, 9)
    helpers.run_job(count.address, seen, counts, 2)
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = context.Process(target=in_child, args=(counts,))
        child.start()
    child.join(30)
    assert child.exitcode == 0


def in_child(counts):
    seen = np.zeros((STAGES + 1, 64), np.int64)
    helpers.run_job(count.address, seen, counts, 2)
    assert (seen[:STAGES] == (np.arange(64) < 9)).all()
    assert helpers._team.process == os.getpid()


def test_helpers_that_never_come_are_not_waited_for(monkeypatch, paged):
    made, ops = paged(n=2000, nlist=16), get_ops("cpu")
    case = arguments(made)
    known = ops.attend_lists(*case)
    monkeypatch.setattr(helpers._Team, "call", lambda *_: None)
    monkeypatch.setattr(step, "get_num_threads", lambda: 8)
    for found, truth in zip(ops.attend_lists(*case), known, strict=True):
        np.testing.assert_array_equal(found, truth)


def test_more_helpers_than_cores_and_several_callers(monkeypatch, paged):
    made, ops = paged(n=2000, nlist=16), get_ops("cpu")
    case = arguments(made)
    known = ops.attend_lists(*case)
    monkeypatch.setattr(step, "get_num_threads", lambda: 6)
    wrong = []

    def call():
        for _ in range(20):
            same = [np.array_equal(*pair) for pair in zip(ops.attend_lists(*case), known, strict=True)]
            wrong.extend(one for one in same if not one)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
