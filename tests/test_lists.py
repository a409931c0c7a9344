"""Inverted lists: the right rows whatever the order of changes, and old lists left as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.backends.base import LANES
from saapindex.lists import InvertedLists
from saapindex.lists.ragged import ranges

NLIST, D = 5, 3


def keys(ids):
    """Vectors and positions that tell their ids."""
    ids = np.asarray(ids, np.int64)
    return np.repeat(ids[:, None], D, axis=1).astype(np.float32), ids, ids + 1000


def grown(batches, nlist=NLIST):
    """Lists after adding batches of (id, label), and what each list should hold."""
    lists, expected = InvertedLists.empty(nlist, D), [[] for _ in range(nlist)]
    for batch in batches:
        ids, labels = np.array(batch, np.int64).reshape(-1, 2).T
        lists = lists.append(*keys(ids), labels)
        for id, label in batch:
            expected[label].append(id)
    return lists, expected


def contents(lists):
    rows = [slice(start, start + size) for start, size in zip(lists.offsets, lists.sizes, strict=True)]
    return [lists.ids[row].tolist() for row in rows]


def check(lists, expected):
    assert contents(lists) == expected
    assert lists.ntotal == sum(map(len, expected))
    rows = lists.rows()
    assert lists.ids[rows].tolist() == [id for part in expected for id in part]
    assert lists.labels().tolist() == [j for j, part in enumerate(expected) for _ in part]
    np.testing.assert_array_equal(lists.keys(rows), keys(lists.ids[rows])[0])
    np.testing.assert_array_equal(lists.positions[rows], lists.ids[rows] + 1000)
    assert (lists.sizes <= lists.room).all()
    assert not (lists.offsets % LANES).any()
    assert not (lists.room % LANES).any()
    taken = ranges(lists.offsets, lists.room)
    assert len(np.unique(taken)) == len(taken)
    assert taken.size == 0 or taken.max() < lists.used <= len(lists.ids)


batches = st.lists(st.lists(st.integers(0, NLIST - 1), max_size=12), max_size=8).map(
    lambda parts: [
        [(100 * number + place, label) for place, label in enumerate(part)]
        for number, part in enumerate(parts)
    ]
)


@given(batches)
def test_append_keeps_order_and_room(batches):
    check(*grown(batches))


@given(batches, st.data())
def test_old_lists_stay_as_they_were(batches, data):
    lists, expected = grown(batches)
    labels = np.array(data.draw(st.lists(st.integers(0, NLIST - 1), max_size=20)), np.int64)
    lists.append(*keys(np.arange(500, 500 + len(labels))), labels)
    check(lists, expected)


@given(batches, st.randoms(use_true_random=False))
def test_keep_compacts_and_goes_on(batches, random):
    lists, expected = grown(batches)
    mask = np.array([random.random() < 0.5 for _ in range(lists.ntotal)], bool)
    kept = set(lists.ids[lists.rows()][mask].tolist())
    left = lists.keep(mask)
    check(left, [[id for id in part if id in kept] for part in expected])
    assert left.used == len(left.ids) == (-(-left.sizes // LANES) * LANES).sum()
    check(
        left.append(*keys([999]), np.array([2])),
        [[id for id in part if id in kept] + [999] * (j == 2) for j, part in enumerate(expected)],
    )
    check(lists, expected)


@given(batches, st.lists(st.integers(-5, 100), max_size=20))
def test_contains_and_find(batches, wanted):
    lists, expected = grown(batches)
    held = {id for part in expected for id in part}
    wanted = np.array(wanted, np.int64)
    known = lists.contains(wanted)
    assert known.tolist() == [id in held for id in wanted]
    np.testing.assert_array_equal(lists.ids[lists.find(wanted[known])], wanted[known])


@pytest.mark.parametrize("nlist", [1, 1 << 16, (1 << 16) + 1])
def test_any_number_of_lists(nlist):
    lists, _ = grown([[(1, 0), (2, nlist - 1), (3, 0)]], nlist)
    assert lists.ids[lists.rows()].tolist() == ([1, 2, 3] if nlist == 1 else [1, 3, 2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_filled_at_once_takes_whole_blocks_and_no_more(dtype):
    labels = np.arange(100) % NLIST
    lists = InvertedLists.empty(NLIST, D, dtype).append(*keys(range(100)), labels)
    rows = NLIST * 2 * LANES
    assert len(lists.ids) == rows
    assert lists.vectors.dtype == dtype
    assert lists.keys(lists.rows()).dtype == np.float32
    assert lists.nbytes == rows * (D * np.dtype(dtype).itemsize + 2 * 8) + 3 * 8 * NLIST


def test_adding_bit_by_bit_seldom_copies_the_pool():
    lists, moves = InvertedLists.empty(NLIST, D), 0
    for id in range(2000):
        grown = lists.append(*keys([id]), np.array([id % NLIST]))
        moves += grown.vectors is not lists.vectors
        lists = grown
    assert lists.ntotal == 2000
    assert moves < 40
    assert len(lists.ids) < 6 * 2000
