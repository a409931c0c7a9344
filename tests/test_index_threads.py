"""Many threads search while others change the index: every answer is that of one whole state."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import saapindex as sx

FULL = sx.SearchParameters(nprobe=8)
STORAGE = [{}, {"bits": 4}, {"bits": 2, "refine": True}]


def run_all(readers, writer):
    """Run `readers` again and again, each in a thread, until `writer` is done; raise what any raised."""
    done = threading.Event()

    def loop(reader):
        count = 0
        while not done.is_set() or not count:
            reader()
            count += 1
        return count

    with ThreadPoolExecutor(len(readers) + 1) as pool:
        running = [pool.submit(loop, reader) for reader in readers]
        try:
            pool.submit(writer).result()
        finally:
            done.set()
        return [future.result() for future in running]


@pytest.mark.parametrize("storage", STORAGE)
def test_readers_see_whole_batches(make_index, blobs, storage):
    """Keys come in batches of 10: a reader finds all of a batch or nothing of it."""
    index = make_index(n=0, params=sx.IndexParameters(niter=2, **storage))
    batches = 60
    keys = np.repeat(blobs(batches, 16, seed=5), 10, axis=0)
    queries = blobs(6, 16, seed=2)

    def look():
        before = index.ntotal
        scores, ids = index.search(queries, 10 * batches, params=FULL)
        after = index.ntotal
        found = (ids >= 0).sum(axis=1)
        assert (found == found[0]).all()
        assert found[0] % 10 == 0
        assert before <= found[0] <= after
        assert (np.sort(ids, axis=1)[:, 10 * batches - found[0] :] == np.arange(found[0])).all()
        assert np.isfinite(scores[ids >= 0]).all()
        if not storage:
            np.testing.assert_allclose(
                scores[0, : found[0]], keys[ids[0, : found[0]]] @ queries[0], rtol=1e-4, atol=1e-4
            )

    def one():
        ids = index.search(queries[:1], 10 * batches, params=FULL)[1]
        assert (ids >= 0).sum() % 10 == 0

    def add():
        for i in range(batches):
            index.add(keys[10 * i : 10 * i + 10])

    assert min(run_all([look, look, one], add)) > 0
    assert index.ntotal == 10 * batches


def test_readers_while_keys_go_and_all_is_cleared(make_index, blobs):
    """Ids are removed by tens, the index is reset and filled anew: no answer mixes two states."""
    index, keys, queries = make_index(n=0), blobs(200, 16), blobs(6, 16, seed=2)
    odd = sx.SearchParameters(nprobe=8, sel=_Odd())

    def look():
        for params in (FULL, odd, sx.SearchParameters(budget=0.5)):
            _, ids = index.search(queries, 200, params=params)
            found = (ids >= 0).sum(axis=1)
            assert (found == found[0]).all()
            if params is FULL:
                assert found[0] % 10 == 0
                assert {*np.unique(ids[ids >= 0] // 10)} == {*range(20 - found[0] // 10, 20)}
            if params is odd:
                assert found[0] % 5 == 0
                assert (ids[ids >= 0] % 2 == 1).all()

    def change():
        for _ in range(4):
            index.add_with_ids(keys, np.arange(200))
            for start in range(0, 200, 20):
                index.remove_ids(np.arange(start, start + 20))
            index.reset()

    assert min(run_all([look, look, look], change)) > 0


class _Odd:
    def members(self, ids):
        return ids % 2 == 1


def test_writers_wait_for_each_other(make_index, blobs):
    """Several threads add at once: every key is there once, under an id of its own."""
    index, keys = make_index(n=0), blobs(400, 16)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: index.add(keys[10 * i : 10 * i + 10]), range(40)))
    assert index.ntotal == 400
    held = index.reconstruct_n()
    np.testing.assert_array_equal(held[np.lexsort(held.T)], keys[np.lexsort(keys.T)])


def test_merging_both_ways_does_not_hang(make_index, blobs):
    one, other = make_index(n=50), make_index(n=0)
    other.add_with_ids(blobs(50, 16, seed=4), np.arange(1000, 1050))

    def merge(pair):
        for _ in range(20):
            pair[0].merge_from(pair[1])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(merge, [(one, other), (other, one)]))
    assert one.ntotal + other.ntotal == 100
    assert 0 in (one.ntotal, other.ntotal)


def test_writing_while_another_adds_writes_a_whole_state(make_index, blobs, tmp_path):
    index, keys = make_index(n=0), blobs(300, 16)
    index.add(keys[:10])

    def write():
        sx.write_index(index, tmp_path / "index")
        again = sx.read_index(tmp_path / "index")
        assert again.ntotal % 10 == 0
        np.testing.assert_array_equal(again.reconstruct_n(), keys[: again.ntotal])
        assert sx.clone_index(index).ntotal % 10 == 0

    def add():
        for i in range(1, 30):
            index.add(keys[10 * i : 10 * i + 10])

    assert run_all([write], add)[0] > 0


def test_the_plainest_threading_layer_is_taken_in_turns():
    """Numba's own thread pool ends the process if two threads start kernels at once."""
    code = """
import numpy as np, saapindex as sx
from concurrent.futures import ThreadPoolExecutor
import numba
x = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
index = sx.IndexSAAP(8, 16, params=sx.IndexParameters(niter=1))
index.train(x, xq_train=x)
with ThreadPoolExecutor(6) as pool:
    adding = pool.submit(lambda: [index.add(x[i : i + 100]) for i in range(0, 2000, 100)])
    list(pool.map(lambda _: index.search(x[:300], 5), range(60)))
    adding.result()
print(numba.threading_layer(), index.ntotal)
"""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.stdout.split() == ["workqueue", "2000"], done.stderr
