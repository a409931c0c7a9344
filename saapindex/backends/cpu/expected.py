"""What codes say of the values of keys that were not fetched, in numba; see `AttentionOps.estimate_rest`."""

from __future__ import annotations

import numpy as np
from numba import njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu.codes import place_of
from saapindex.backends.cpu.emitter import FLOAT32, HEADS
from saapindex.backends.cpu.select import largest
from saapindex.backends.cpu.vector import mix
from saapindex.backends.cpu.vector_bytes import HAS_BYTE_SUMS, TURNED, byte_sums, pack_weights, turn_words
from saapindex.backends.cpu.vector_bytes import HEADS as BYTE_HEADS
from saapindex.backends.cpu.vector_codes import field_sums
from saapindex.backends.reference.codes import CORRECTION

_TINY = np.float32(1e-30)
_CORRECTION = np.float32(CORRECTION)
_HALF = np.float32(0.5)
_MOST = np.float32(0xFFFF)  # of a weight in two bytes
_AT_ONCE = 64  # pages whose weights have a unit in common


@njit(cache=True, nogil=True)
def add_slopes(y, slopes, out):  # type: ignore[no-untyped-def]
    """Add ``y @ slopes``, (g, R) and (R, d), to the outputs, (g, at least d)."""
    coded, d = slopes.shape
    width = (d + LANES - 1) // LANES * LANES
    places, found = np.empty(coded, np.int64), np.empty((HEADS, width), np.float32)
    for r in range(coded):
        places[r] = slopes.ctypes.data + 4 * d * r
    for h in range(0, y.shape[0], HEADS):
        heads = y[h : h + HEADS]
        mix(FLOAT32, heads, places, coded, d, found[: heads.shape[0]])
        for i in range(heads.shape[0]):
            row, more = out[h + i], found[i]
            for j in range(d):
                row[j] += more[j]


@njit(cache=True, nogil=True)
def cap_of(u, share, scale):  # type: ignore[no-untyped-def]
    """Return up to which square of a scale the second-order term of one head is not capped."""
    total = np.float32(0)
    for r in range(u.shape[0]):
        total += u[r] * u[r] * share[r]
    return _CORRECTION / max(scale * scale * _HALF * total, _TINY)


@njit(cache=True, nogil=True)
def expect_lists(weights, spreads, u, spread, scale, y):  # type: ignore[no-untyped-def]
    """Write what is expected of lists beyond their mean values, of weights (L,): `y`, (R,), which slopes take
    to values, for one head.
    """
    cap, total = cap_of(u, spread, scale), np.float32(0)
    for j in range(weights.shape[0]):
        total += weights[j] * min(spreads[j], cap)
    for r in range(u.shape[0]):
        y[r] = scale * spread[r] * u[r] * total


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _weigh(weights, f, cap):  # type: ignore[no-untyped-def]
    """Multiply weights by the scales of keys; return the sum of ``w min(f^2, cap)``."""
    second = np.float32(0)
    for i in range(weights.shape[0]):
        second += weights[i] * min(f[i] * f[i], cap)
        weights[i] *= f[i]
    return second


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _sum(row):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(row.shape[0]):
        total += row[i]
    return total


@njit(cache=True, nogil=True, inline="always")
def room_of(pages):  # type: ignore[no-untyped-def]
    """Return how many keys have a place in so many pages, in whole groups of `TURNED`."""
    return (pages + TURNED - 1) // TURNED * TURNED * LANES


@njit(cache=True, nogil=True)
def float_field_sums(pages, addresses, span, shift, widths, weights, sums):  # type: ignore[no-untyped-def]
    """Write the sum of ``weight * field`` over the keys of pages for each dimension, (g, R).

    `weights` are (g, `room_of` the pages), zero where there is no key. Dimensions beyond the fields of this
    head, which other heads have codes of, are zero.
    """
    g, n, words = weights.shape[0], pages.shape[0], widths.shape[0]
    sums[:] = 0
    places, four, r = np.empty(n, np.int64), np.empty((g, 4), np.float32), 0
    for w in range(words):
        _word_places(pages, addresses, span, shift, words, w, places)
        mask = (1 << widths[w]) - 1
        for step in range(0, 8, widths[w]):
            if r >= sums.shape[1]:
                return
            for h in range(0, g, HEADS):
                field_sums(places, step, mask, weights[h : h + HEADS], four[h : h + HEADS])
            for h in range(g):
                for c in range(min(4, sums.shape[1] - r)):
                    sums[h, r + c] = four[h, c]
            r += 4


@njit(cache=True, nogil=True)
def _word_places(pages, addresses, span, shift, words, w, places):  # type: ignore[no-untyped-def]
    """Write the addresses of word `w` of the keys of pages."""
    for p in range(pages.shape[0]):
        chunk, at = place_of(pages[p], span, shift)
        places[p] = addresses[2, chunk] + 4 * LANES * (at * words + w)


@njit(cache=True, nogil=True)
def _in_bytes(weights, packed):  # type: ignore[no-untyped-def]
    """Round weights of whole groups of pages to multiples of a unit, in place and as `byte_sums` takes them;
    return the unit.
    """
    unit = max(largest(weights), _TINY) / _MOST
    for first in range(0, weights.shape[0], TURNED * LANES):
        pack_weights(weights, first, unit, np.float32(1) / unit, packed[0], packed[1])
    return unit


@njit(cache=True, nogil=True)
def byte_field_sums(pages, addresses, span, shift, widths, weights, sums):  # type: ignore[no-untyped-def]
    """Do what `float_field_sums` does, of weights that are rounded to 16 bits of the largest."""
    g, words = weights.shape[0], widths.shape[0]
    sums[:] = 0
    places, turned = np.empty(_AT_ONCE, np.int64), np.empty((_AT_ONCE, LANES), np.int32)
    packed = np.empty((g, 2, _AT_ONCE // TURNED * LANES), np.int32)
    units, four = np.empty(g, np.float32), np.empty((BYTE_HEADS, 4), np.float32)
    for first in range(0, pages.shape[0], _AT_ONCE):
        some = pages[first : first + _AT_ONCE]
        n, r = (some.shape[0] + TURNED - 1) // TURNED * TURNED, 0
        for h in range(g):
            units[h] = _in_bytes(weights[h, first * LANES : (first + n) * LANES], packed[h])
        for w in range(words):
            _word_places(some, addresses, span, shift, words, w, places)
            places[some.shape[0] : n] = places[0]
            for p in range(0, n, TURNED):
                turn_words(places, p, turned)
            mask = (0x01010101 << widths[w]) - 0x01010101
            for step in range(0, 8, widths[w]):
                here = min(4, sums.shape[1] - r)
                if here <= 0:
                    break
                for h in range(0, g, BYTE_HEADS):
                    heads = packed[h : h + BYTE_HEADS]
                    byte_sums(turned, n, step, mask, heads, four[: heads.shape[0]])
                    for i in range(heads.shape[0]):
                        for c in range(here):
                            sums[h + i, r + c] += units[h + i] * four[i, c]
                r += 4


@njit(cache=True, nogil=True)
def expect_keys(  # type: ignore[no-untyped-def]
    pages, addresses, span, shift, widths, f, steps, u, distortion, scale, slopes, weights, out
):
    """Add what is expected beyond the mean values of their lists of the keys in pages to the output.

    `f` are the scales of their codes, (n * LANES,); `weights`, (g, `room_of` the pages), are of no more use
    after that; `out` is (g, padded d).
    """
    g, coded = u.shape
    seconds = np.empty(g, np.float32)
    for h in range(g):
        seconds[h] = _weigh(weights[h, : f.shape[0]], f, cap_of(u[h], distortion, scale))
    y = np.empty((g, coded), np.float32)
    if HAS_BYTE_SUMS:
        byte_field_sums(pages, addresses, span, shift, widths, weights, y)
    else:
        float_field_sums(pages, addresses, span, shift, widths, weights, y)
    for h in range(g):
        r, total = 0, _sum(weights[h])
        for width in widths:
            high = np.float32((1 << width) - 1) * _HALF
            for _ in range(min(32 // width, coded - r)):
                y[h, r] = steps[r] * (y[h, r] - high * total)
                r += 1
        for r in range(coded):
            y[h, r] += scale * distortion[r] * u[h, r] * seconds[h]
    add_slopes(y, slopes, out)
