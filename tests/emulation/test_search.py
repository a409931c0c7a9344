"""The kernel that does a whole search, on the host, finds what the reference does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists, to_blocks
from saapindex.backends.cuda.quick import few_shape
from saapindex.backends.cuda.route import THREADS

SPEC = importlib.util.spec_from_file_location("emulation", Path(__file__).parent / "emulation.py")
emulation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulation)
REFERENCE = get_ops("reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def drawn(rng, q, d, nlist, dtype, longest):
    """Queries, a table, and lists, some empty: small integers, so that sums are exact and many equal."""
    queries, table = (rng.integers(-2, 3, (n, d)).astype(np.float32) for n in (q, nlist))
    sizes = rng.integers(longest, size=nlist) * rng.integers(2, size=nlist)
    bias = np.where(sizes, rng.integers(-2, 3, nlist), -np.inf).astype(np.float32)
    room = -(-sizes // LANES) * LANES
    keys = rng.integers(-2, 3, (room.sum() + LANES, d)).astype(dtype)
    return (
        queries,
        to_blocks(table),
        bias,
        Lists(to_blocks(keys), rng.permutation(len(keys)), np.cumsum(room) - room, sizes),
    )


@pytest.mark.parametrize(("cluster", "l2"), [(8, False), (2, True)], ids=["products", "distances"])
@pytest.mark.parametrize(
    ("q", "d", "nlist", "p", "k", "dtype", "longest"),
    [
        (3, 17, 40, 9, 5, "float16", 60),
        (1, 8, 300, 70, 30, "float32", 40),
        (2, 64, 1, 1, 1, "float16", 900),
        (1, 16, 12, 12, 100, "float16", 900),
        (1, 5, 700, 3, 250, "float32", 20),
    ],
)
def test_a_search_in_one_launch(folder, cluster, l2, q, d, nlist, p, k, dtype, longest):
    queries, table, bias, lists = drawn(np.random.default_rng(q + d), q, d, nlist, dtype, longest)
    macros = {"D": d, "ELEMENT": 0 if dtype == "float16" else 2, "DISTANCES": int(l2), "CLUSTER": cluster}
    run = emulation.build(folder, "search", "Search", **macros)
    best, found = np.full((q, k), np.nan, np.float32), np.full((q, k), -7, np.int64)
    few = few_shape(q, p, k, nlist, d, 0)
    arrays = queries, best, found, table, bias, lists.vectors, lists.ids, lists.offsets, lists.sizes
    numbers = nlist, p, k, few.chosen_room, few.room, few.capacity
    argument = np.array([*(array.ctypes.data for array in arrays), *numbers], np.uint64)
    for _ in range(2):
        run(q * cluster, THREADS, few.shared, argument)
        known = REFERENCE.search(queries, queries, table, bias, p, lists, k, l2)
        np.testing.assert_array_equal(found, known[1])
        np.testing.assert_array_equal(best, known[0])
