"""Threads that help: late, not at all, or after a fork, the result is the same."""

from __future__ import annotations

import threading
import time

import numpy as np

from saapindex.backends import get_ops
from saapindex.backends.cpu import helpers, step
from saapindex.backends.paged import Reading, Scaling


def arguments(made, t=9):
    queries = made.rng.standard_normal((4, t, 3, 16)).astype(np.float32)
    long = made.lists.sizes.sum(axis=1)
    reading = Reading(long // 2, long * 20, 9, 128)
    positions = np.full((4, t), made.total)
    return queries, positions, made.near, made.lists, made.pages, made.code, Scaling(0.25), reading


def test_helpers_are_called_and_started_once():
    done = threading.Semaphore(0)
    threads = set()

    def work():
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        done.release()

    for _ in range(3):
        helpers.call_helpers(2, work)
        assert all(done.acquire(timeout=10) for _ in range(2))
    assert {name.rpartition("-")[0] for name in threads} == {"saapindex"}
    assert len(helpers._started) >= 2
    assert sum(thread.name.startswith("saapindex-") for thread in threading.enumerate()) == len(
        helpers._started
    )


def test_jobs_do_not_pile_up_behind_helpers_that_are_busy():
    going, blocked = threading.Event(), threading.Semaphore(0)

    def block():
        blocked.release()
        going.wait(10)

    count = max(2, len(helpers._started))
    helpers.call_helpers(count, block)
    assert all(blocked.acquire(timeout=10) for _ in range(count))
    for _ in range(50):
        helpers.call_helpers(count, int)
    assert helpers._jobs.qsize() <= count
    going.set()


def test_helpers_that_never_come_are_not_waited_for(monkeypatch, paged):
    made, ops = paged(n=2000, nlist=16), get_ops("cpu")
    case = arguments(made)
    known = ops.attend_lists(*case)
    monkeypatch.setattr(step, "call_helpers", lambda *_: None)
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
