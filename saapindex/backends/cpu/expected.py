"""What codes say of the values of keys that were not fetched, in numba; see `AttentionOps.estimate_rest`."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu.codes import key_scales, place_of
from saapindex.backends.cpu.vector import pointer
from saapindex.backends.reference.codes import CORRECTION

_TINY = np.float32(1e-30)
_CORRECTION = np.float32(CORRECTION)
_HALF = np.float32(0.5)


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_slopes(y, slopes, out):  # type: ignore[no-untyped-def]
    """Add ``y @ slopes`` to the output of one head."""
    for r in range(slopes.shape[0]):
        factor, row = y[r], slopes[r]
        for i in range(row.shape[0]):
            out[i] += factor * row[i]


@njit(cache=True, nogil=True)
def cap_of(u, share, scale):  # type: ignore[no-untyped-def]
    """Return up to which square of a scale the second-order term of one head is not capped."""
    total = np.float32(0)
    for r in range(u.shape[0]):
        total += u[r] * u[r] * share[r]
    return _CORRECTION / max(scale * scale * _HALF * total, _TINY)


@njit(cache=True, nogil=True)
def expect_lists(weights, spreads, u, spread, scale, slopes, out):  # type: ignore[no-untyped-def]
    """Add what is expected beyond the mean values of lists, of weights (L,), to the output of one head."""
    cap, total = cap_of(u, spread, scale), np.float32(0)
    for j in range(weights.shape[0]):
        total += weights[j] * min(spreads[j], cap)
    y = np.empty(u.shape[0], np.float32)
    for r in range(u.shape[0]):
        y[r] = scale * spread[r] * u[r] * total
    add_slopes(y, slopes, out)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _weigh(weights, f, cap):  # type: ignore[no-untyped-def]
    """Multiply weights by the scales of keys; return their sum then, and that of ``w min(f^2, cap)``."""
    total, second = np.float32(0), np.float32(0)
    for i in range(weights.shape[0]):
        second += weights[i] * min(f[i] * f[i], cap)
        weights[i] *= f[i]
        total += weights[i]
    return total, second


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_fields(word, weights, shift, mask, fields, lanes):  # type: ignore[no-untyped-def]
    """Add the fields at one shift of the four bytes of words, times weights, (g, LANES), to (g, 4, LANES)."""
    for lane in range(LANES):
        x = word[lane] >> shift
        fields[0, lane] = np.float32(np.int32(x & mask))
        fields[1, lane] = np.float32(np.int32((x >> np.uint32(8)) & mask))
        fields[2, lane] = np.float32(np.int32((x >> np.uint32(16)) & mask))
        fields[3, lane] = np.float32(np.int32((x >> np.uint32(24)) & mask))
    for h in range(weights.shape[0]):
        for c in range(4):
            for lane in range(LANES):
                lanes[h, c, lane] += weights[h, lane] * fields[c, lane]


@njit(cache=True, nogil=True)
def _field_sums(pages, addresses, span, shift, widths, weights, sums):  # type: ignore[no-untyped-def]
    """Write the sum of ``weight * field`` over keys of pages, (g, n * LANES), for each dimension, (g, R)."""
    g, n, words = weights.shape[0], pages.shape[0], widths.shape[0]
    lanes, fields = np.empty((g, 4, LANES), np.float32), np.empty((4, LANES), np.float32)
    sums[:] = 0
    r = 0
    for w in range(words):
        mask = np.uint32((1 << widths[w]) - 1)
        for step in range(0, 8, widths[w]):
            if r >= sums.shape[1]:
                return
            lanes[:] = 0
            for p in range(n):
                chunk, at = place_of(pages[p], span, shift)
                word = carray(pointer(addresses[2, chunk] + 4 * LANES * (at * words + w)), LANES, np.uint32)
                keys = weights[:, p * LANES : (p + 1) * LANES]
                _add_fields(word, keys, np.uint32(step), mask, fields, lanes)
            for h in range(g):
                for c in range(min(4, sums.shape[1] - r)):
                    sums[h, r + c] = lanes[h, c].sum()
            r += 4


@njit(cache=True, nogil=True)
def expect_keys(  # type: ignore[no-untyped-def]
    pages, addresses, span, shift, widths, base, steps, u, distortion, scale, slopes, weights, out
):
    """Add what is expected beyond the mean values of their lists of the keys in pages to the output.

    `weights`, (g, n * LANES), are of no more use after that; `out` is (g, padded d).
    """
    g, coded = u.shape
    f = np.empty(weights.shape[1], np.float32)
    key_scales(pages, addresses, span, shift, base, f)
    totals, seconds = np.empty(g, np.float32), np.empty(g, np.float32)
    for h in range(g):
        totals[h], seconds[h] = _weigh(weights[h], f, cap_of(u[h], distortion, scale))
    y = np.empty((g, coded), np.float32)
    _field_sums(pages, addresses, span, shift, widths, weights, y)
    for h in range(g):
        r = 0
        for width in widths:
            high = np.float32((1 << width) - 1) * _HALF
            for _ in range(min(32 // width, coded - r)):
                y[h, r] = steps[r] * (y[h, r] - high * totals[h])
                r += 1
        for r in range(coded):
            y[h, r] += scale * distortion[r] * u[h, r] * seconds[h]
        add_slopes(y[h], slopes, out[h])
