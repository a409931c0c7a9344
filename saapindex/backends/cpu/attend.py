"""Attention in numba: exact over given keys, estimated over the rest, both as parts that are merged.

A part is an output that is not divided by its sum of weights, the sum, and the logit that weights are
relative to; minus infinity for a part without keys.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.codes import addressed, code_arrays, key_scales, place_of, rotated
from saapindex.backends.cpu.emitter import HEADS, KEYS, KINDS
from saapindex.backends.cpu.expected import add_slopes, expect_keys, expect_lists, room_of
from saapindex.backends.cpu.functions import capped, exp
from saapindex.backends.cpu.memory import padded, plain
from saapindex.backends.cpu.select import largest
from saapindex.backends.cpu.vector import dots, mix
from saapindex.backends.paged import Code, PagedLists, Pages, Scaling

CHUNK = 256
"""Keys that are attended to at once; their logits stay in the first-level cache."""
_LANE_BITS = LANES.bit_length() - 1


@njit(cache=True, nogil=True)
def locate(rows, addresses, span, shift, row_bytes, keys, values):  # type: ignore[no-untyped-def]
    """Write where the keys and values of rows lie in memory, up to a multiple of `KEYS`."""
    n = rows.shape[0]
    for i in range(n):
        chunk, page = place_of(rows[i] >> _LANE_BITS, span, shift)
        offset = (page * LANES + (rows[i] & (LANES - 1))) * row_bytes
        keys[i], values[i] = addresses[0, chunk] + offset, addresses[1, chunk] + offset
    for i in range(n, (n + KEYS - 1) // KEYS * KEYS):
        keys[i], values[i] = keys[n - 1], values[n - 1]


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _exponentials(row, peak):  # type: ignore[no-untyped-def]
    """Put ``exp(x - peak)`` in the place of each `x`; return the sum."""
    total = np.float32(0)
    for i in range(row.shape[0]):
        weight = exp(row[i] - peak)
        row[i] = weight
        total += weight
    return total


@njit(cache=True, nogil=True)
def attend_chunk(  # type: ignore[no-untyped-def]
    query, rows, addresses, span, shift, kind, d, scale, softcap, ahead, out, sums, peaks
):
    """Attend exactly to at most `CHUNK` rows: a part of (g, padded d), (g,) and (g,).

    With `ahead`, 1 and not 0, keys are asked for before they are needed.
    """
    g, n = query.shape[0], rows.shape[0]
    keys, values = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    logits = np.empty((g, CHUNK), np.float32)
    locate(rows, addresses, span, shift, d * (4 if kind == 0 else 2), keys, values)
    for h in range(0, g, HEADS):
        dots(kind, query[h : h + HEADS], keys, values, n, d, ahead, logits[h : h + HEADS])
    for h in range(g):
        row = logits[h, :n]
        for i in range(n):
            row[i] *= scale
        if softcap > 0:
            for i in range(n):
                row[i] = capped(row[i], softcap)
        peaks[h] = largest(row)
        sums[h] = _exponentials(row, peaks[h])
    for h in range(0, g, HEADS):
        mix(kind, logits[h : h + HEADS], values, n, d, out[h : h + HEADS])


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_mean(weight, mean, mean_scale, out):  # type: ignore[no-untyped-def]
    """Add `weight` times the mean value of a list to the output of one head."""
    factor = weight * mean_scale
    for i in range(mean.shape[0]):
        out[i] += factor * np.float32(mean[i])


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def bounded_weights(row, bound, peak, weights):  # type: ignore[no-untyped-def]
    """Write ``exp(min(x, bound) - peak)``; return the sum."""
    total = np.float32(0)
    for i in range(row.shape[0]):
        weights[i] = exp(min(row[i], bound) - peak)
        total += weights[i]
    return total


@njit(cache=True, nogil=True)
def rest_of_lists(  # type: ignore[no-untyped-def]
    logits, rest, bounds, means, mean_scales, spreads, u, spread, scale, slopes, out, sums, peaks
):
    """Let the `rest` keys of each list count by the logit of the list, (g, L): a part."""
    out[:] = 0
    weights, y = np.empty(rest.shape[0], np.float32), np.zeros(u.shape, np.float32)
    for h in range(logits.shape[0]):
        peak = np.float32(-np.inf)
        for j in range(rest.shape[0]):
            if rest[j] > 0:
                peak = max(peak, min(logits[h, j], bounds[h]))
        peaks[h], sums[h] = peak, 0
        if peak == -np.inf:
            continue
        for j in range(rest.shape[0]):
            weights[j] = 0
            if rest[j] > 0:
                weights[j] = np.float32(rest[j]) * exp(min(logits[h, j], bounds[h]) - peak)
                sums[h] += weights[j]
                add_mean(weights[j], means[j], mean_scales[j], out[h])
        expect_lists(weights, spreads, u[h], spread, scale, y[h])
    add_slopes(y, slopes, out)


@njit(cache=True, nogil=True)
def merge_parts(outs, sums, peaks, d, out, lse):  # type: ignore[no-untyped-def]
    """Join parts, (P, g, padded d), (P, g) and (P, g), into an output, (g, d), and its log-sum-exp, (g,)."""
    parts, g, _ = outs.shape
    total = np.empty(outs.shape[2], np.float32)
    for h in range(g):
        peak = np.float32(-np.inf)
        for p in range(parts):
            peak = max(peak, peaks[p, h])
        if peak == -np.inf:
            out[h], lse[h] = 0, -np.inf
            continue
        total[:] = 0
        weights = np.float32(0)
        for p in range(parts):
            if peaks[p, h] == -np.inf:
                continue
            factor = exp(peaks[p, h] - peak)
            weights += factor * sums[p, h]
            row = outs[p, h]
            for i in range(total.shape[0]):
                total[i] += factor * row[i]
        inverse = np.float32(1) / weights
        for i in range(d):
            out[h, i] = total[i] * inverse
        lse[h] = peak + math.log(weights)


@njit(cache=True, nogil=True)
def _attend_rows(  # type: ignore[no-untyped-def]
    queries, rows, addresses, span, shift, kind, scale, softcap, out, lse, peaks
):
    streams, t, g, width = queries.shape
    d, most = out.shape[3], (rows.shape[2] + CHUNK - 1) // CHUNK
    outs, sums = np.empty((most, g, width), np.float32), np.empty((most, g), np.float32)
    part_peaks = np.empty((most, g), np.float32)
    for s in range(streams):
        for i in range(t):
            seen = rows[s, i][rows[s, i] >= 0]
            parts = (seen.shape[0] + CHUNK - 1) // CHUNK
            peaks[s, i] = -np.inf
            for p in range(parts):
                attend_chunk(
                    queries[s, i], seen[p * CHUNK : (p + 1) * CHUNK], addresses, span, shift, kind, d, scale,
                    softcap, 1, outs[p], sums[p], part_peaks[p],
                )  # fmt: skip
                for h in range(g):
                    peaks[s, i, h] = max(peaks[s, i, h], part_peaks[p, h])
            merge_parts(outs[:parts], sums[:parts], part_peaks[:parts], d, out[s, i], lse[s, i])


def attend_rows(queries: Floats, rows: Ints, pages: Pages, scaling: Scaling) -> tuple[Floats, Floats, Floats]:
    """See `Ops.attend_rows`."""
    out = np.empty(queries.shape, np.float32)
    lse, peaks = (np.empty(queries.shape[:3], np.float32) for _ in range(2))
    _attend_rows(
        padded(queries),
        plain(rows, np.int64),
        *addressed(pages),
        kind_of(pages),
        np.float32(scaling.scale),
        np.float32(scaling.softcap),
        out,
        lse,
        peaks,
    )
    return out, lse, peaks


def kind_of(pages: Pages) -> int:
    """Return the number of the type of what is stored."""
    return KINDS[pages.keys[0].dtype.name]


@njit(cache=True, nogil=True)
def _estimate_rest(  # type: ignore[no-untyped-def]
    queries, logits, rest, estimates, rows, labels, bounds, means, mean_scales, spreads, slopes, addresses,
    span, shift, inverse, step, widths, base, spread, distortion, scale, out, lse,
):  # fmt: skip
    streams, t, g, _ = logits.shape
    d, n = means.shape[2], labels.shape[2]
    outs, sums = np.empty((2, g, d), np.float32), np.empty((2, g), np.float32)
    peaks, u = np.empty((2, g), np.float32), np.empty((g, inverse.shape[2]), np.float32)
    for s in range(streams):
        head = s % inverse.shape[0]
        for i in range(t):
            bound = bounds[s, i]
            rotated(queries[s, i], inverse[head], u)
            rest_of_lists(
                logits[s, i], rest[s, i], bound, means[s], mean_scales[s], spreads[s], u, spread[head], scale,
                slopes[s], outs[0], sums[0], peaks[0],
            )  # fmt: skip
            outs[1] = 0
            # Each key as if it were alone in its page.
            weights, pages = np.zeros((g, room_of(n)), np.float32), np.zeros(n, np.int32)
            for k in range(n):
                pages[k] = max(rows[s, i, k], 0) // LANES
            for h in range(g):
                row, total, peak = estimates[s, i, h], np.float32(0), np.float32(-np.inf)
                for k in range(n):
                    if labels[s, i, k] >= 0:
                        peak = max(peak, min(row[k], bound[h]))
                for k in range(n):
                    label = labels[s, i, k]
                    if label >= 0 and peak > -np.inf:
                        weight = exp(min(row[k], bound[h]) - peak)
                        total += weight
                        add_mean(weight, means[s, label], mean_scales[s, label], outs[1, h])
                        weights[h, k * LANES + rows[s, i, k] % LANES] = weight
                sums[1, h], peaks[1, h] = total, peak
            f = np.empty(n * LANES, np.float32)
            key_scales(pages, addresses, span, shift, base[head], f)
            expect_keys(
                pages, addresses, span, shift, widths[head], f, step[head], u, distortion[head],
                scale, slopes[s], weights, outs[1],
            )  # fmt: skip
            merge_parts(outs, sums, peaks, d, out[s, i], lse[s, i])


def estimate_rest(
    queries: Floats,
    logits: Floats,
    rest: Ints,
    estimates: Floats,
    rows: Ints,
    labels: Ints,
    bounds: Floats,
    lists: PagedLists,
    pages: Pages,
    code: Code,
    scaling: Scaling,
) -> tuple[Floats, Floats]:
    """See `Ops.estimate_rest`."""
    out = np.empty((*logits.shape[:3], lists.means.shape[2]), np.float32)
    lse = np.empty(logits.shape[:3], np.float32)
    _estimate_rest(
        padded(queries),
        plain(logits, np.float32),
        plain(rest, np.int64),
        plain(estimates, np.float32),
        plain(rows, np.int64),
        plain(labels, np.int64),
        plain(bounds, np.float32),
        lists.means,
        plain(lists.mean_scales, np.float32),
        plain(lists.spreads, np.float32),
        plain(lists.slopes, np.float32),
        *addressed(pages),
        *code_arrays(code, "inverse", "step", "widths", "base", "spread", "distortion"),
        np.float32(scaling.scale),
        out,
        lse,
    )
    return out, lse


@njit(cache=True, nogil=True)
def _merge(outs, lses, out, lse):  # type: ignore[no-untyped-def]
    ones = np.ones((lses.shape[0], 1), np.float32)
    for i in range(lse.shape[0]):
        merge_parts(
            outs[:, i : i + 1], ones, lses[:, i : i + 1], out.shape[1], out[i : i + 1], lse[i : i + 1]
        )


def merge(outs: Floats, lses: Floats) -> tuple[Floats, Floats]:
    """See `Ops.merge`."""
    parts, d = len(outs), outs.shape[-1]
    flat = lses.size // parts
    out, lse = np.empty((flat, d), np.float32), np.empty(flat, np.float32)
    _merge(
        plain(outs.reshape(parts, flat, d), np.float32),
        plain(lses.reshape(parts, flat), np.float32),
        out,
        lse,
    )
    return out.reshape(outs.shape[1:]), lse.reshape(lses.shape[1:])
