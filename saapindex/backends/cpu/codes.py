"""Codes of keys in numba: encoding, and logits estimated page by page with exact sums of whole numbers."""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.emitter import HEADS
from saapindex.backends.cpu.functions import capped, exp
from saapindex.backends.cpu.memory import padded, plain, pointer
from saapindex.backends.cpu.vector import prefetch
from saapindex.backends.cpu.vector_codes import estimate_page
from saapindex.backends.paged import Code, PagedLists, Pages, Scaling
from saapindex.backends.reference.codes import CORRECTION, coded, fields

_TINY = np.float32(1e-30)
_CORRECTION = np.float32(CORRECTION)
_ROUND = np.float32(1.5 * 2**23)
_BYTE = np.float32(127)
_HALF = np.float32(0.5)
# The scale of a code is base * 2^((exponent - 128) / 16).
_MIDDLE, _EXPONENT_STEP = np.float32(128), np.float32(math.log(2) / 16)


@njit(cache=True, nogil=True)
def _pack(y, step, bits, word, shift, base, words, exponents):  # type: ignore[no-untyped-def]
    """Quantise the rows of `y`, (n, R), into words, (n, W), and exponents, (n,)."""
    levels = np.empty(y.shape[1], np.float32)
    words[:] = 0
    for i in range(y.shape[0]):
        square = 0.0
        for r in range(y.shape[1]):
            square += float(y[i, r]) * float(y[i, r])
        norm = max(np.float32(math.sqrt(square)), _TINY)
        along, level_square = 0.0, 0.0
        for r in range(y.shape[1]):
            high = np.float32((1 << bits[r]) - 1)
            place = np.float32(0)
            if step[r] > 0:
                place = y[i, r] / norm / step[r] + high * _HALF
            place = min(max(place, np.float32(0)), high)
            field = (place + _ROUND) - _ROUND
            levels[r] = (field - high * _HALF) * step[r]
            words[i, word[r]] |= np.uint32(field) << np.uint32(shift[r])
            along += float(y[i, r]) * float(levels[r])
            level_square += float(levels[r]) * float(levels[r])
        scale = max(along / max(level_square, 1e-30), 1e-30)
        exponent = round(16 * math.log2(scale / base)) + 128
        exponents[i] = min(max(exponent, 0), 255)


def encode(residuals: Floats, code: Code) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """See `Ops.encode`."""
    heads, n, _ = residuals.shape
    words = np.empty((heads, n, code.widths.shape[1]), np.uint32)
    exponents = np.empty((heads, n), np.uint8)
    for h, residual in enumerate(residuals):
        count, bits = coded(code, h)
        word, shift, _ = (part[:count] for part in fields(code.widths[h]))
        y = residual.astype(np.float32, copy=False) @ code.forward[h, :, :count].astype(np.float32)
        step = plain(code.step[h, :count], np.float32)
        _pack(plain(y, np.float32), step, *(plain(part, np.int64) for part in (bits, word, shift)),
              float(code.base[h]), words[h], exponents[h])  # fmt: skip
    return words, exponents


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def centers(query, anchors, anchor_scales, scale, out):  # type: ignore[no-untyped-def]
    """Write ``scale * query . anchor`` of each head and list to `out`, (g, L)."""
    d = anchors.shape[1]
    for j in range(anchors.shape[0]):
        anchor, factor = anchors[j], anchor_scales[j] * scale
        for h in range(query.shape[0]):
            q, total = query[h], np.float32(0)
            for i in range(d):
                total += q[i] * np.float32(anchor[i])
            out[h, j] = total * factor


@njit(cache=True, nogil=True, fastmath={"contract"})
def rotated(query, inverse, u):  # type: ignore[no-untyped-def]
    """Write a query in the space of the codes, ``query @ inverse``, to `u`, (g, R)."""
    for h in range(query.shape[0]):
        row = u[h]
        row[:] = 0
        for i in range(inverse.shape[0]):
            q, column = query[h, i], inverse[i]
            for r in range(row.shape[0]):
                row[r] += q * column[r]


@njit(cache=True, nogil=True)
def prepare(u, step, widths, distortion, scale, bytes_, factors):  # type: ignore[no-untyped-def]
    """Round queries to the bytes that `estimate_page` takes, (g, groups), with what makes sums logits, (3,
    g).

    An estimate is ``factor * f * (sum - offset) + min(kappa * f^2, CORRECTION)``.
    """
    bytes_[:] = 0
    for h in range(u.shape[0]):
        largest, kappa = _TINY, np.float32(0)
        for r in range(u.shape[1]):
            largest = max(largest, abs(u[h, r] * step[r] * scale))
            kappa += u[h, r] * u[h, r] * distortion[r]
        factor, offset, r = largest / _BYTE, np.float32(0), 0
        for width in widths:
            high = np.float32((1 << width) - 1) * _HALF
            for _ in range(32 // width):
                if r == u.shape[1]:
                    break
                rounded = (u[h, r] * step[r] * scale / factor + _ROUND) - _ROUND
                bytes_[h, r // 4] |= np.int32((np.int32(rounded) & 255) << (8 * (r % 4)))
                offset += rounded * high
                r += 1
        factors[0, h], factors[1, h], factors[2, h] = factor, offset, scale * scale * _HALF * kappa


@njit(cache=True, nogil=True, inline="always")
def place_of(page, span, shift):  # type: ignore[no-untyped-def]
    """Return the chunk of a page, and its number there; `span` is ``1 << shift`` unless that is negative."""
    if shift >= 0:
        return page >> shift, page & (span - 1)
    return page // span, page % span


@njit(cache=True, nogil=True, fastmath={"contract"})
def key_scales(pages, addresses, span, shift, base, f):  # type: ignore[no-untyped-def]
    """Write the scales of the codes of all keys in some pages, (n pages of `LANES`)."""
    for p in range(pages.shape[0]):
        chunk, at = place_of(pages[p], span, shift)
        exponents = carray(pointer(addresses[3, chunk] + at * LANES), (LANES,), np.uint8)
        for lane in range(LANES):
            f[p * LANES + lane] = np.float32(exponents[lane])
    for i in range(f.shape[0]):
        f[i] = base * exp((f[i] - _MIDDLE) * _EXPONENT_STEP)


@njit(cache=True, nogil=True, inline="always")
def ask_for_codes(page, addresses, span, shift, words):  # type: ignore[no-untyped-def]
    """Let the codes of a page come from memory."""
    chunk, at = place_of(page, span, shift)
    prefetch(addresses[2, chunk] + 4 * LANES * at * words, 4 * LANES * words)
    prefetch(addresses[3, chunk] + at * LANES, LANES)


@njit(cache=True, nogil=True)
def scan_pages(  # type: ignore[no-untyped-def]
    pages, labels, counts, addresses, span, shift, widths, bytes_, factors, base, list_centers, softcap, f,
    estimates,
):  # fmt: skip
    """Write the estimates of all keys in some pages, (g, n pages of `LANES`), minus infinity where there is
    none, and the scales of their codes, (n pages of `LANES`).
    """
    g, n, words = factors.shape[1], pages.shape[0], widths.shape[0]
    for p in range(n):
        ask_for_codes(pages[p], addresses, span, shift, words)
    key_scales(pages, addresses, span, shift, base, f)
    for p in range(n):
        chunk, at = place_of(pages[p], span, shift)
        code = addresses[2, chunk] + at * words * LANES * 4
        for h in range(0, g, HEADS):
            estimate_page(
                code, widths, bytes_[h : h + HEADS], f, factors[:, h : h + HEADS],
                list_centers[h : h + HEADS, labels[p]], counts[p], _CORRECTION, estimates[h : h + HEADS],
                p * LANES,
            )  # fmt: skip
    if softcap > 0:
        for h in range(g):
            row = estimates[h, : n * LANES]
            for i in range(n * LANES):
                row[i] = capped(row[i], softcap) if row[i] > -np.inf else row[i]


@njit(cache=True, nogil=True)
def visited_pages(taken, starts, table, pages, labels, counts):  # type: ignore[no-untyped-def]
    """Write the pages of the first `taken` keys of each list, with their list and their keys; return how
    many.
    """
    n = 0
    for j in range(taken.shape[0]):
        for first in range(0, taken[j], LANES):
            pages[n] = table[starts[j] + first // LANES]
            labels[n] = j
            counts[n] = min(LANES, taken[j] - first)
            n += 1
    return n


@njit(cache=True, nogil=True)
def page_total(taken):  # type: ignore[no-untyped-def]
    """Return how many pages hold the first `taken` keys of each list."""
    total = 0
    for keys in taken:
        total += (keys + LANES - 1) // LANES
    return total


@njit(cache=True, nogil=True)
def _scan_codes(  # type: ignore[no-untyped-def]
    queries, taken, anchors, anchor_scales, starts, table, addresses, span, shift, inverse, step, widths,
    base, distortion, scale, softcap, estimates, rows, labels,
):  # fmt: skip
    streams, t, g, _ = queries.shape
    heads, nlist = inverse.shape[0], taken.shape[2]
    list_centers = np.empty((g, nlist), np.float32)
    u = np.empty((g, inverse.shape[2]), np.float32)
    bytes_ = np.empty((g, 8 * widths.shape[1]), np.int32)
    factors = np.empty((3, g), np.float32)
    for s in range(streams):
        head = s % heads
        for i in range(t):
            query = queries[s, i]
            most = page_total(taken[s, i])
            pages, of, counts = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
            visited_pages(taken[s, i], starts[s], table, pages, of, counts)
            centers(query, anchors[s], anchor_scales[s], scale, list_centers)
            rotated(query, inverse[head], u)
            prepare(u, step[head], widths[head], distortion[head], scale, bytes_, factors)
            found, f = np.empty((g, most * LANES), np.float32), np.empty(most * LANES, np.float32)
            scan_pages(
                pages, of, counts, addresses, span, shift, widths[head], bytes_, factors, base[head],
                list_centers, softcap, f, found,
            )  # fmt: skip
            n = 0
            for p in range(most):
                for lane in range(counts[p]):
                    estimates[s, i, :, n] = found[:, p * LANES + lane]
                    rows[s, i, n] = np.int64(pages[p]) * LANES + lane
                    labels[s, i, n] = of[p]
                    n += 1
            estimates[s, i, :, n:] = -np.inf
            rows[s, i, n:] = -1
            labels[s, i, n:] = -1


def scan_codes(
    queries: Floats, taken: Ints, lists: PagedLists, pages: Pages, code: Code, scaling: Scaling
) -> tuple[Floats, Ints, Ints]:
    """See `Ops.scan_codes`."""
    most = int(taken.sum(axis=-1).max(initial=0))
    estimates = np.empty((*queries.shape[:3], most), np.float32)
    rows, labels = (np.empty((*queries.shape[:2], most), np.int64) for _ in range(2))
    _scan_codes(
        padded(queries),
        plain(taken, np.int64),
        lists.anchors,
        plain(lists.anchor_scales, np.float32),
        lists.starts,
        lists.table,
        *addressed(pages),
        *code_arrays(code, "inverse", "step", "widths", "base", "distortion"),
        np.float32(scaling.scale),
        np.float32(scaling.softcap),
        estimates,
        rows,
        labels,
    )
    return estimates, rows, labels


def addressed(pages: Pages) -> tuple[Ints, int, int]:
    """Return the addresses of the chunks of a pool, and what `place_of` takes."""
    span = pages.span
    return pages.addresses, span, span.bit_length() - 1 if span & (span - 1) == 0 else -1


def code_arrays(code: Code, *names: str) -> list[NDArray[np.generic]]:
    """Return arrays of a code as the kernels know them."""
    return [plain(getattr(code, name), np.int64 if name == "widths" else np.float32) for name in names]
