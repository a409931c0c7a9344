"""The pool of pages: held, given back, and grown in place."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import LANES
from saapindex.lists.paged import PagePool, PageSet


def test_the_pool_keeps_pages_as_long_as_they_are_held():
    pool = PagePool(4, np.float32, 1, span=4)
    first, second = pool.allocate((3,)), pool.allocate((2, 2))
    assert first.pages.tolist() == [0, 1, 2]
    assert sorted(second.pages.reshape(-1)) == [3, 4, 5, 6]
    assert pool.used == 7
    pool.write(second.pages[0].astype(int) * LANES, *(np.ones((2, 4)),) * 2, np.array([5, 6]))
    chunk = pool.pages.keys[0]
    shared = PageSet(pool, np.concatenate([first.pages[:1], second.pages[0]]))
    del first, second
    assert pool.used == 3
    pool.allocate((40,))
    assert pool.pages.keys[0] is chunk  # it grows without moving what is there
    np.testing.assert_array_equal(pool.pages.take("ids", shared.pages[1:].astype(int) * LANES), [5, 6])
    assert pool.filled[shared.pages].tolist() == [0, 1, 1]
    del shared
    assert pool.used == 0
    assert [column[0] for column in pool.pages.addresses] == [part[0].ctypes.data for part in pool.pages[:5]]
