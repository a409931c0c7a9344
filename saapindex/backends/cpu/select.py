"""Selection in numba: ranks of lists, and a histogram that finds the best keys without sorting them."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints
from saapindex.backends.cpu.codes import centers, code_arrays, rotated
from saapindex.backends.cpu.functions import capped, exp, log
from saapindex.backends.cpu.heap import replace_root, sort_heap, worse
from saapindex.backends.cpu.memory import padded, plain
from saapindex.backends.cpu.vector import extremes
from saapindex.backends.paged import Code, PagedLists, Reading, Scaling
from saapindex.backends.reference.codes import CORRECTION

SUM, MAX, UNION = 0, 1, 2
POLICIES = {"sum": SUM, "max": MAX, "union": UNION}

BINS = 1024
"""Of the histogram of scores."""
_CORRECTION = np.float32(CORRECTION)
_ONE = np.float32(1)
_LOWEST, _NOBODY = np.float32(-3.4e38), np.int64(1) << 62
# Scores further than this from the best share the last bin: they weigh nothing.
_REACH = np.float32(64)
_APART = 4


@njit(cache=True, nogil=True)
def log_sum(x, sizes):  # type: ignore[no-untyped-def]
    """Return ``log(sum(sizes * exp(x)))``."""
    peak = np.float32(-np.inf)
    for j in range(x.shape[0]):
        peak = max(peak, x[j])
    if peak == -np.inf:
        return peak
    total = 0.0
    for j in range(x.shape[0]):
        total += exp(x[j] - peak) * sizes[j]
    return np.float32(math.log(total) + peak)


@njit(cache=True, nogil=True)
def rank(  # type: ignore[no-untyped-def]
    query, u, anchors, anchor_scales, spreads, sizes, spread, scale, softcap, list_centers, logits, norms
):
    """Write the logits of the lists of a stream, (g, L), what of them is the anchor's, and norms, (g,)."""
    centers(query, anchors, anchor_scales, scale, list_centers)
    for h in range(query.shape[0]):
        variance = np.float32(0)
        for r in range(u.shape[1]):
            variance += u[h, r] * u[h, r] * spread[r]
        variance *= np.float32(0.5) * scale * scale
        for j in range(sizes.shape[0]):
            logit = capped(list_centers[h, j] + min(variance * spreads[j], _CORRECTION), softcap)
            logits[h, j] = logit if sizes[j] > 0 else -np.inf
        norms[h] = log_sum(logits[h], sizes)


@njit(cache=True, nogil=True)
def _rank_lists(  # type: ignore[no-untyped-def]
    queries, anchors, anchor_scales, spreads, sizes, inverse, spread, scale, softcap, logits, norms
):
    streams, t, g, _ = queries.shape
    u = np.empty((g, inverse.shape[2]), np.float32)
    list_centers = np.empty((g, sizes.shape[1]), np.float32)
    for s in range(streams):
        head = s % inverse.shape[0]
        for i in range(t):
            rotated(queries[s, i], inverse[head], u)
            rank(
                queries[s, i], u, anchors[s], anchor_scales[s], spreads[s], sizes[s], spread[head], scale,
                softcap, list_centers, logits[s, i], norms[s, i],
            )  # fmt: skip


def rank_lists(queries: Floats, lists: PagedLists, code: Code, scaling: Scaling) -> tuple[Floats, Floats]:
    """See `Ops.rank_lists`."""
    logits = np.empty((*queries.shape[:3], lists.sizes.shape[1]), np.float32)
    norms = np.empty(queries.shape[:3], np.float32)
    _rank_lists(
        padded(queries),
        lists.anchors,
        plain(lists.anchor_scales, np.float32),
        plain(lists.spreads, np.float32),
        lists.sizes,
        *code_arrays(code, "inverse", "spread"),
        np.float32(scaling.scale),
        np.float32(scaling.softcap),
        logits,
        norms,
    )
    return logits, norms


@njit(cache=True, nogil=True, fastmath={"contract"})
def pool(logits, norms, policy, scores):  # type: ignore[no-untyped-def]
    """Write the score of each of the first `n` columns of `logits`, (g, at least n), for a group: by the sum
    or the maximum of weights.
    """
    g, n = logits.shape[0], scores.shape[0]
    for i in range(n):
        scores[i] = logits[0, i] - norms[0]
    if policy != SUM:
        for h in range(1, g):
            row, norm = logits[h], norms[h]
            for i in range(n):
                scores[i] = max(scores[i], row[i] - norm)
        return
    if g == 1:
        return
    totals = np.ones(n, np.float32)  # of weights, relative to the largest so far
    for h in range(1, g):
        row, norm = logits[h], norms[h]
        for i in range(n):
            score, known = row[i] - norm, scores[i]
            larger = max(max(score, known), _LOWEST)
            weight = exp(min(score, known) - larger)
            total = totals[i]
            totals[i] = total * weight + _ONE if score > known else total + weight
            scores[i] = max(score, known)
    for i in range(n):
        scores[i] = scores[i] + log(totals[i])


@njit(cache=True, nogil=True)
def _visit_in_order(ranks, scores, sizes, limit, nprobe, top_p, refine, heap, order, taken):  # type: ignore[no-untyped-def]
    """Visit lists by rank for one ranker, by whose `scores` a list's mass is predicted."""
    nlist = sizes.shape[0]
    heap[:] = -np.inf
    order[:] = _NOBODY
    for j in range(nlist):
        replace_root(heap, order, nlist, ranks[j], j)
    sort_heap(heap, order)
    total, covered, end = 0.0, 0.0, 0
    if top_p > 0:
        for j in range(nlist):
            total += _mass(scores[j], sizes[j])
    for place in range(nlist):
        j = order[place]
        count = sizes[j]
        end += count
        if nprobe > 0:
            visit = count if place < nprobe else 0
        elif top_p > 0:
            visit = count if covered < top_p else 0
            covered += _mass(scores[j], count) / total
        elif refine:
            visit = count if end <= limit else 0
        else:
            visit = min(max(limit - (end - count), 0), count)
        taken[j] = max(taken[j], visit)


@njit(cache=True, nogil=True)
def _mass(score, size):  # type: ignore[no-untyped-def]
    return math.exp(score) * size if size > 0 else 0.0


@njit(cache=True, nogil=True)
def visit(logits, norms, sizes, limit, nprobe, top_p, policy, by_mass, refine, taken):  # type: ignore[no-untyped-def]
    """Write how many keys of each list are visited, (L,)."""
    g, nlist = logits.shape
    taken[:] = 0
    if nlist == 0 or sizes.max() == 0:
        return
    rankers = g if policy == UNION else 1
    scores, heap, order = np.empty(nlist, np.float32), np.empty(nlist, np.float32), np.empty(nlist, np.int64)
    for ranker in range(rankers):
        heads = slice(ranker, ranker + 1) if policy == UNION else slice(0, g)
        pool(logits[heads], norms[heads], policy, scores)
        ranks = scores.copy()
        if by_mass:
            for j in range(nlist):
                ranks[j] = scores[j] + log(np.float32(sizes[j])) if sizes[j] > 0 else -np.inf
        _visit_in_order(ranks, scores, sizes, limit // rankers, nprobe, top_p, refine, heap, order, taken)


@njit(cache=True, nogil=True)
def _select_lists(logits, norms, sizes, scan, nprobe, top_p, policy, by_mass, refine, taken):  # type: ignore[no-untyped-def]
    for s in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            visit(
                logits[s, i], norms[s, i], sizes[s], scan[s], nprobe, top_p, policy, by_mass, refine,
                taken[s, i],
            )  # fmt: skip


def select_lists(logits: Floats, norms: Floats, sizes: Ints, reading: Reading) -> Ints:
    """See `Ops.select_lists`."""
    taken = np.empty((*logits.shape[:2], logits.shape[3]), np.int64)
    _select_lists(
        plain(logits, np.float32),
        plain(norms, np.float32),
        plain(sizes, np.int64),
        plain(reading.scan, np.int64),
        reading.nprobe,
        float(reading.top_p),
        POLICIES[reading.policy],
        reading.by_mass,
        reading.refine,
        taken,
    )
    return taken


@njit(cache=True, nogil=True, inline="always")
def largest(row):  # type: ignore[no-untyped-def]
    """Return the maximum of what lies side by side, minus infinity of nothing."""
    return extremes(row)[0]


@njit(cache=True, nogil=True, fastmath={"nsz"})
def cut(scores, limit, bins):  # type: ignore[no-untyped-def]
    """Sort scores into bins, best first, `BINS` for minus infinity; return the bin where `limit` falls, and
    how many of it belong to the best.
    """
    high, lowest = extremes(scores)
    if high == -np.inf:
        bins[:] = BINS
        return 0, 0
    low = max(lowest, high - _REACH)
    factor = np.float32(BINS - 1) / max(high - low, np.float32(1e-30))
    for i in range(scores.shape[0]):
        place = np.int32(min((high - scores[i]) * factor, np.float32(BINS - 1)))
        bins[i] = place if scores[i] > -np.inf else np.int32(BINS)
    # Neighbours often fall into the same bin: counted apart, they do not wait for each other.
    counts, n = np.zeros((_APART, BINS + 1), np.int32), scores.shape[0]
    for i in range(0, n - _APART + 1, _APART):
        for j in range(_APART):
            counts[j, bins[i + j]] += np.int32(1)
    for i in range(n - n % _APART, n):
        counts[0, bins[i]] += np.int32(1)
    taken = 0
    for bin_ in range(BINS):
        here = 0
        for j in range(_APART):
            here += counts[j, bin_]
        if taken + here > limit:
            return bin_, limit - taken
        taken += here
    return BINS, 0


@njit(cache=True, nogil=True)
def worst_kept(scores, ids, need):  # type: ignore[no-untyped-def]
    """Return the score and id of the last of the `need` best; of equal scores the lower id is better."""
    if need == 0:
        return np.float32(np.inf), np.int64(-1)
    best, found = np.full(need, -np.inf, np.float32), np.full(need, _NOBODY, np.int64)
    for i in range(scores.shape[0]):
        if worse(best[0], found[0], scores[i], ids[i]):
            replace_root(best, found, need, scores[i], ids[i])
    return best[0], found[0]


@njit(cache=True, nogil=True)
def _keep(scores, ids, limit, kept):  # type: ignore[no-untyped-def]
    """Mark the `limit` best."""
    bins = np.empty(scores.shape[0], np.int32)
    last, need = cut(scores, limit, bins)
    crowd = np.flatnonzero(bins == last) if last < BINS else np.empty(0, np.int64)
    score, id_ = worst_kept(scores[crowd], ids[crowd], need)
    for i in range(scores.shape[0]):
        if bins[i] < last or (bins[i] == last and last < BINS and not worse(scores[i], ids[i], score, id_)):
            kept[i] = True


@njit(cache=True, nogil=True)
def _select_keys(estimates, norms, ids, limits, policy, kept):  # type: ignore[no-untyped-def]
    streams, t, g, n = estimates.shape
    scores = np.empty(n, np.float32)
    for s in range(streams):
        for i in range(t):
            if n == 0 or estimates[s, i].max() == -np.inf:
                continue
            if policy != UNION:
                pool(estimates[s, i], norms[s, i], policy, scores)
                _keep(scores, ids[s, i], limits[s, i], kept[s, i])
                continue
            for h in range(g):
                for k in range(n):  # what another head could see is there for this one too
                    found = estimates[s, i, :, k].max() > -np.inf
                    scores[k] = max(estimates[s, i, h, k], _LOWEST) if found else -np.inf
                _keep(scores, ids[s, i], limits[s, i] // g, kept[s, i])


def select_keys(estimates: Floats, norms: Floats, ids: Ints, limits: Ints, policy: str) -> NDArray[np.bool_]:
    """See `Ops.select_keys`."""
    kept = np.zeros(ids.shape, np.bool_)
    _select_keys(
        plain(estimates, np.float32),
        plain(norms, np.float32),
        plain(ids, np.int64),
        plain(limits, np.int64),
        POLICIES[policy],
        kept,
    )
    return kept
