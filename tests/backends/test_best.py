"""The `k` best of a stream: whatever is thinned, and whatever is equal, the order is that of a sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu import best as parts
from saapindex.backends.cpu.block import WIDE

finite = st.floats(width=32, allow_nan=False, allow_infinity=True)


@njit
def _stream(scores, ids, k, best, found):
    kept, names, spare, _ = parts.make_room(k)
    count, worst = 0, parts.LOWEST
    for start in range(0, len(scores), LANES):
        lanes = 0
        for lane in range(LANES):
            lanes |= int(scores[start + lane] >= worst) << lane
        if count + LANES > kept.shape[0]:
            worst = parts.keep_best(kept, names, count, k, spare)
            count = k
        count = parts.take(lanes, scores[start : start + LANES], ids, start, kept, names, count)
    parts.deliver(kept, names, count, spare, best, found, False)


@given(
    scores=st.lists(st.one_of(st.sampled_from([-np.inf, 0.0, 1.0, np.inf]), finite), max_size=600),
    k=st.sampled_from([1, 3, 10, 40, 300]),
    seed=st.integers(0, 1000),
)
def test_the_best_of_a_stream_are_those_of_a_sort(scores, k, seed):
    n = -(-len(scores) // LANES) * LANES
    padded = np.full(n, -np.inf, np.float32)
    padded[: len(scores)] = scores
    padded += np.float32(0)  # no negative zero: it equals zero, but its bits are lower
    ids = np.random.default_rng(seed).permutation(n)
    best, found = np.empty(k, np.float32), np.empty(k, np.int64)
    _stream(padded, ids, k, best, found)
    order = np.lexsort((ids, -padded))
    order = order[padded[order] > -np.inf][:k]
    rest = k - len(order)
    np.testing.assert_array_equal(best, np.append(padded[order], np.full(rest, -np.inf, np.float32)))
    np.testing.assert_array_equal(found, np.append(ids[order], np.full(rest, -1)))


@given(
    values=st.lists(finite, min_size=1, max_size=80),
    share=st.floats(0, 1),
)
def test_kth_largest_is_reached_by_k_or_fewer_could_not_be(values, share):
    scores = np.array(values, np.float32) + np.float32(0)
    k = max(1, round(share * len(scores)))
    spare = np.empty(len(scores), np.int32)
    least = parts.kth_largest(scores, k, spare)
    value = parts.to_float(least, spare)
    wanted = np.sort(scores)[::-1][k - 1]
    assert value <= wanted
    assert (scores >= value).sum() == (scores >= wanted).sum() or (scores >= value).sum() == k


@pytest.mark.skipif(not WIDE, reason="no AVX-512 here")
@given(bits=st.integers(0, (1 << LANES) - 1), row=st.sampled_from([0, LANES]), count=st.integers(0, 5))
def test_packing_lanes_is_taking_them_one_by_one(bits, row, count):
    from saapindex.backends.cpu.block import pack_lanes

    @njit
    def both(bits, scores, ids, row, kept, names, count, wide):
        if wide:
            return pack_lanes(bits, scores, ids, row, kept, names, count)
        return parts.take_one_by_one(bits, scores, ids, row, kept, names, count)

    rng = np.random.default_rng(bits)
    scores, ids = rng.standard_normal(LANES, dtype=np.float32), rng.permutation(2 * LANES)
    results = []
    for wide in (False, True):
        kept, names = np.zeros(2 * LANES, np.float32), np.zeros(2 * LANES, np.int64)
        end = both(bits, scores, ids, row, kept, names, count, wide)
        results.append((end, kept[:end].tolist(), names[:end].tolist()))
    assert results[0] == results[1]
    assert results[0][0] == count + bits.bit_count()
