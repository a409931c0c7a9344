"""The `k` best of a stream, without a heap: what passes is put down as it comes, and now and then thinned.

The order is total, larger score first and lower id first among equals, so what is kept does not depend on
the order of the stream. Room for more than `k` is what makes it cheap: a score is compared with the `k`-th
best of the last thinning, and most of what passes costs a store.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu.block import WIDE, first_bit, pack_lanes

LOWEST = np.float32(np.finfo(np.float32).min)
"""What every score that counts reaches, and minus infinity does not."""
# More results than this are sorted by merging, fewer by counting.
_MANY = 256


@njit(cache=True, nogil=True)
def room(k):  # type: ignore[no-untyped-def]
    """Places that a stream of which the `k` best are wanted needs."""
    return 2 * k + 3 * LANES


@njit(cache=True, nogil=True)
def make_room(k):  # type: ignore[no-untyped-def]
    """Return room for scores and ids, spare room to thin them, and room for the scores of a block."""
    n = room(k)
    kept, names = np.empty(n, np.float32), np.empty(n, np.int64)
    return kept, names, np.empty(n, np.int32), np.empty(LANES, np.float32)


@njit(cache=True, nogil=True, inline="always")
def ordered(bits):  # type: ignore[no-untyped-def]
    """Map the bits of a float to an integer of the same order, and back: integer comparisons become SIMD."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(cache=True, nogil=True, inline="always")
def to_float(value, spare):  # type: ignore[no-untyped-def]
    """Return the float that `ordered` maps to `value`; `spare`, int32, is written to."""
    spare[0] = ordered(value)
    return spare[:1].view(np.float32)[0]


@njit(cache=True, nogil=True)
def kth_largest(scores, k, spare):  # type: ignore[no-untyped-def]
    """Return what `ordered` maps the `k`-th largest of `scores` to, or less, but no more than `k` reach it.

    None may be NaN. By bisection of the bits, so without a branch to be foreseen wrongly; `spare`, int32
    of as many elements at least, holds what `ordered` maps all of them to.
    """
    n = scores.shape[0]
    bits = scores.view(np.int32)
    low, high = np.int32(2147483647), np.int32(-2147483648)
    for j in range(n):
        value = ordered(bits[j])
        spare[j] = value
        low, high = min(low, value), max(high, value)
    # At least k are `low` or more; fewer are more than `high`.
    least, most = np.int64(low), np.int64(high)
    while least < most:
        middle = (least + most + 1) >> 1
        pivot, count = np.int32(middle), np.int32(0)
        for j in range(n):
            count = np.int32(count + np.int32(spare[j] >= pivot))
        if count >= k:
            least = middle
            if count == k:
                break
        else:
            most = middle - 1
    return np.int32(least)


@njit(cache=True, nogil=True)
def keep_best(scores, ids, count, k, spare):  # type: ignore[no-untyped-def]
    """Move the `k` best of the first `count` to the front, in any order; return a score that they reach."""
    least = kth_largest(scores[:count], k, spare)
    front = 0
    for j in range(count):
        scores[front], ids[front] = scores[j], ids[j]
        front += spare[j] >= least
    worst = to_float(least, spare)
    if front == k:
        return worst
    # More are equal to the worst than there is room for: the lowest ids of these stay.
    above = 0
    for j in range(front):
        if scores[j] > worst:
            scores[j], scores[above] = scores[above], scores[j]
            ids[j], ids[above] = ids[above], ids[j]
            above += 1
    ids[above:front].sort()
    return worst


@njit(cache=True, nogil=True, inline="always")
def take_one_by_one(lanes, scores, ids, row, kept, names, count):  # type: ignore[no-untyped-def]
    """Put down the scores and ids of `lanes`, given as bits; return how many there are then."""
    while lanes:
        lane = first_bit(lanes)
        kept[count], names[count] = scores[lane], ids[row + lane]
        count += 1
        lanes &= lanes - 1
    return count


take = pack_lanes if WIDE else take_one_by_one


@njit(cache=True, nogil=True)
def deliver(kept, names, count, spare, best, found, l2):  # type: ignore[no-untyped-def]
    """Write the best of what was put down to `best` and `found`, in order; distances if `l2`."""
    k = best.shape[0]
    if count > k:
        keep_best(kept, names, count, k, spare)
        count = k
    sort_best(kept, names, count, best, found)
    if l2:
        for i in range(k):
            best[i] = -best[i]


@njit(cache=True, nogil=True)
def sort_best(scores, ids, count, best, found):  # type: ignore[no-untyped-def]
    """Write the first `count` to `best` and `found` in order, and fill what is left."""
    found[:] = -1
    if count > _MANY:
        order = np.argsort(-scores[:count], kind="mergesort")
        for place in range(count):
            best[place], found[place] = scores[order[place]], ids[order[place]]
    else:
        best[:count] = -np.inf
        for i in range(count):
            score, above = scores[i], np.int32(0)
            for j in range(count):
                above = np.int32(above + np.int32(scores[j] > score))
            while best[above] == score:  # taken by its equal
                above = np.int32(above + 1)
            best[above], found[above] = score, ids[i]
    for place in range(1, count):  # equal scores, by id
        hole, id = place, found[place]
        while hole > 0 and best[hole - 1] == best[place] and found[hole - 1] > id:
            found[hole] = found[hole - 1]
            hole -= 1
        found[hole] = id
    best[count:] = -np.inf
