"""The stages of a step of attention: tasks that are independent of each other, called by address.

What a stage writes, the next one reads. Nothing of the length of the context is held but the estimates of the
keys that are visited.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import cfunc, njit, types

from saapindex.backends.base import LANES
from saapindex.backends.cpu.attend import (
    CHUNK,
    add_mean,
    attend_chunk,
    bounded_weights,
    merge_parts,
    rest_of_lists,
)
from saapindex.backends.cpu.codes import ask_for_codes, place_of, prepare, rotated, scan_pages, visited_pages
from saapindex.backends.cpu.expected import expect_keys, room_of
from saapindex.backends.cpu.heap import worse
from saapindex.backends.cpu.machine import FETCHES_AHEAD
from saapindex.backends.cpu.memory import integer_at
from saapindex.backends.cpu.record import (
    SCANNED,
    bytes_of,
    cache_of,
    estimates_of,
    factors_of,
    floats_at,
    ints_at,
    list_floats_of,
    longs_at,
    parts_of,
    pool_of,
    query_of,
    record_at,
    rotation_of,
    row_of_stream,
    scales_of,
    scores_of,
    slot_row_of,
    small_at,
    visited_of,
)
from saapindex.backends.cpu.select import BINS, UNION, cut, largest, pool, rank, visit, worst_kept
from saapindex.backends.cpu.tasks import STAGES
from saapindex.backends.cpu.vector import lanes_equal, lowest_bit

EARLY = 3
"""One of so many chunks of near keys is attended to early."""
_NEAR_AHEAD = 0 if FETCHES_AHEAD else 1
PLAN, SCAN, CHOOSE, FETCH, REST, MERGE = range(STAGES)


@njit(cache=True, nogil=True)
def _plan(step, r):  # type: ignore[no-untyped-def]
    """Choose the lists that a query visits, and note down their pages."""
    s, g, nlist, d = r // step.tokens, step.g, step.nlist, step.d
    head = s % step.heads
    sizes = longs_at(step.sizes + 8 * s * nlist, (nlist,))
    taken = longs_at(step.taken + 8 * r * nlist, (nlist,))
    if step.everything:
        taken[:] = sizes
    else:
        coded, norms = step.coded, floats_at(step.norms + 4 * r * g, (g,))
        u, query, logits = rotation_of(step, r), query_of(step, r), list_floats_of(step, step.logits, r)
        rotated(query, floats_at(step.inverse + 4 * head * d * coded, (d, coded)), u)
        rank(
            query,
            u,
            small_at(step.anchors + s * nlist * d, (nlist, d)),
            floats_at(step.anchor_scales + 4 * s * nlist, (nlist,)),
            floats_at(step.spreads + 4 * s * nlist, (nlist,)),
            sizes,
            floats_at(step.spread + 4 * head * coded, (coded,)),
            step.scale,
            step.softcap,
            list_floats_of(step, step.centers, r),
            logits,
            norms,
        )
        limit = row_of_stream(step, step.scan, r)
        visit(
            logits, norms, sizes, limit, step.nprobe, step.top_p, step.policy, step.by_mass != 0,
            step.refine != 0, taken,
        )  # fmt: skip
        if step.refine:
            prepare(
                u,
                floats_at(step.steps + 4 * head * coded, (coded,)),
                longs_at(step.widths + 8 * head * step.words, (step.words,)),
                floats_at(step.distortion + 4 * head * coded, (coded,)),
                step.scale,
                bytes_of(step, r),
                factors_of(step, r),
            )
    at = 4 * r * step.pages
    longs_at(step.page_counts, (r + 1,))[r] = visited_pages(
        taken,
        longs_at(step.starts + 8 * s * nlist, (nlist,)),
        ints_at(step.table, (1,)),
        ints_at(step.page_numbers + at, (step.pages,)),
        ints_at(step.labels + at, (step.pages,)),
        ints_at(step.counts + at, (step.pages,)),
    )


@njit(cache=True, nogil=True)
def _attend(step, r, part, rows):  # type: ignore[no-untyped-def]
    outs, sums, peaks = parts_of(step, r)
    if rows.shape[0] == 0:
        peaks[part] = -np.inf
        return
    attend_chunk(
        query_of(step, r), rows, cache_of(step), step.cache_span, step.cache_shift, step.kind, step.d,
        step.scale, step.softcap, 1 if part >= step.near_parts else _NEAR_AHEAD, outs[part], sums[part],
        peaks[part],
    )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def early_near(step):  # type: ignore[no-untyped-def]
    """Return how many chunks of near keys are attended to while lists are chosen, and not while keys are."""
    return step.rows * step.near_parts // EARLY if step.scan_parts else step.rows * step.near_parts


@njit(cache=True, nogil=True)
def _near_rows(step, r, part, rows):  # type: ignore[no-untyped-def]
    """Write the rows of a chunk of the sinks and the recent keys that the query sees; return how many."""
    s, n = r // step.tokens, 0
    sinks, first = row_of_stream(step, step.sinks, r), row_of_stream(step, step.first, r)
    last = longs_at(step.positions, (r + 1,))[r]
    pages = ints_at(step.near_table + 4 * s * step.near_pages, (step.near_pages,))
    for i in range(part * CHUNK, min((part + 1) * CHUNK, sinks + row_of_stream(step, step.recent, r))):
        at = i if i < sinks else i - sinks
        position = at if i < sinks else first + at
        if position > last:
            continue
        if step.slot_tables:
            rows[n] = slot_row_of(step, r, position)
        else:
            page = pages[at // LANES + (0 if i < sinks else step.sink_pages)]
            rows[n] = np.int64(page) * LANES + at % LANES
        n += 1
    return n


@njit(cache=True, nogil=True)
def _scan(step, r, part):  # type: ignore[no-untyped-def]
    """Estimate the logits of the keys in some of the pages, and score them."""
    pages, labels, counts = visited_of(step, r)
    start, stop = part * SCANNED, min((part + 1) * SCANNED, pages.shape[0])
    if start >= stop:
        return
    head, g = r // step.tokens % step.heads, step.g
    estimates = estimates_of(step, r, part)
    scan_pages(
        pages[start:stop],
        labels[start:stop],
        counts[start:stop],
        pool_of(step),
        step.span,
        step.shift,
        longs_at(step.widths + 8 * head * step.words, (step.words,)),
        bytes_of(step, r),
        factors_of(step, r),
        floats_at(step.base, (step.heads,))[head],
        list_floats_of(step, step.centers, r),
        step.softcap,
        scales_of(step, r, part),
        estimates,
    )
    if step.policy != UNION:
        scores = scores_of(step, r)[start * LANES : stop * LANES]
        pool(estimates, floats_at(step.norms + 4 * r * g, (g,)), step.policy, scores)


@njit(cache=True, nogil=True)
def _id(step, page, lane):  # type: ignore[no-untyped-def]
    """Position of the key in a lane of a page."""
    chunk, at = place_of(page, step.span, step.shift)
    return np.int64(integer_at(pool_of(step)[4, chunk] + 4 * (at * LANES + lane)))


@njit(cache=True, nogil=True)
def _keep(step, pages, scores, limit, kept):  # type: ignore[no-untyped-def]
    """Set the bits of the `limit` best scores, those of a page in each of `kept`."""
    bins = np.empty(scores.shape[0], np.int32)
    last, need = cut(scores, limit, bins)
    crowd = 0
    for p in range(pages.shape[0]):
        equal, better = lanes_equal(bins, p * LANES, np.int32(last))
        kept[p] |= better
        while equal:
            crowd, equal = crowd + 1, equal & (equal - 1)
    if last == BINS or need == 0:
        return
    slots, ids, close = np.empty(crowd, np.int64), np.empty(crowd, np.int64), np.empty(crowd, np.float32)
    n = 0
    for p in range(pages.shape[0]):
        equal, _ = lanes_equal(bins, p * LANES, np.int32(last))
        while equal:
            lane = lowest_bit(equal)
            slots[n], ids[n], close[n] = p * LANES + lane, _id(step, pages[p], lane), scores[p * LANES + lane]
            n, equal = n + 1, equal & (equal - 1)
    score, id_ = worst_kept(close, ids, need)
    for i in range(crowd):
        if not worse(close[i], ids[i], score, id_):
            kept[slots[i] // LANES] |= 1 << (slots[i] % LANES)


@njit(cache=True, nogil=True)
def _choose(step, r):  # type: ignore[no-untyped-def]
    """Note down the rows of the keys to fetch; the estimates of these are of no more use."""
    pages, _, counts = visited_of(step, r)
    n, s, slots = 0, r // step.tokens, pages.shape[0] * LANES
    rows = longs_at(step.kept_rows + 8 * r * step.kept, (step.kept,))
    if step.everything or not step.refine:
        last = longs_at(step.positions, (r + 1,))[r]
        for p in range(pages.shape[0]):
            for lane in range(counts[p]):
                if not step.everything or _id(step, pages[p], lane) <= last:
                    rows[n] = np.int64(pages[p]) * LANES + lane
                    n += 1
        longs_at(step.kept_counts, (r + 1,))[r] = n
        return
    scanned = 0
    for keys in longs_at(step.taken + 8 * r * step.nlist, (step.nlist,)):
        scanned += keys
    limit = max(longs_at(step.left, (s + 1,))[s] - scanned * step.code_bytes, 0) // step.row_bytes
    kept, scores, block = np.zeros(pages.shape[0], np.int64), scores_of(step, r)[:slots], SCANNED * LANES
    for h in range(step.g if step.policy == UNION else 1):
        if step.policy == UNION:  # each head by its own estimates
            limit = limit // step.g if h == 0 else limit
            for part in range((slots + block - 1) // block):
                end = min(block, slots - part * block)
                scores[part * block : part * block + end] = estimates_of(step, r, part)[h, :end]
        _keep(step, pages, scores, limit, kept)
    for p in range(pages.shape[0]):
        bits, estimates, first = kept[p], estimates_of(step, r, p // SCANNED), p % SCANNED * LANES
        while bits:
            lane = lowest_bit(bits)
            rows[n], bits = np.int64(pages[p]) * LANES + lane, bits & (bits - 1)
            n += 1
            for h in range(step.g):
                estimates[h, first + lane] = -np.inf
    longs_at(step.kept_counts, (r + 1,))[r] = n


@njit(cache=True, nogil=True)
def _rest(step, r, part):  # type: ignore[no-untyped-def]
    """Let what was not fetched count: the lists by their logits, or the keys of some pages by theirs."""
    s, g, nlist = r // step.tokens, step.g, step.nlist
    at, exact = step.near_parts + step.kept_parts + part, step.near_parts + step.kept_parts
    all_outs, all_sums, all_peaks = parts_of(step, r)
    out, sums, peaks = all_outs[at], all_sums[at], all_peaks[at]
    bounds = np.empty(g, np.float32)  # the largest exact logits; infinity where there are none
    bounds[:] = -np.inf
    for p in range(exact):
        for h in range(g):
            bounds[h] = max(bounds[h], all_peaks[p, h])
    for h in range(g):
        if bounds[h] == -np.inf:
            bounds[h] = np.inf
    means = small_at(step.means + s * nlist * step.d, (nlist, step.d))
    mean_scales = floats_at(step.mean_scales + 4 * s * nlist, (nlist,))
    head, coded, u = s % step.heads, step.coded, rotation_of(step, r)
    slopes = floats_at(step.slopes + 4 * s * coded * step.d, (coded, step.d))
    if part == step.scan_parts:
        sizes = longs_at(step.sizes + 8 * s * nlist, (nlist,))
        rest = sizes - longs_at(step.taken + 8 * r * nlist, (nlist,))
        rest_of_lists(
            list_floats_of(step, step.logits, r), rest, bounds, means, mean_scales,
            floats_at(step.spreads + 4 * s * nlist, (nlist,)), u,
            floats_at(step.spread + 4 * head * coded, (coded,)), step.scale, slopes, out, sums, peaks,
        )  # fmt: skip
        return
    pages, labels, _ = visited_of(step, r)
    first, last = part * SCANNED, min((part + 1) * SCANNED, pages.shape[0])
    peaks[:] = -np.inf
    if first >= last:
        return
    for p in range(first, last):
        ask_for_codes(pages[p], pool_of(step), step.span, step.shift, step.words)
    out[:] = 0
    sums[:] = 0
    weights = np.zeros((g, room_of(last - first)), np.float32)
    for h in range(g):
        row = estimates_of(step, r, part)[h, : (last - first) * LANES]
        peaks[h] = min(bounds[h], largest(row))
        if peaks[h] == -np.inf:
            continue
        start = 0
        for p in range(last - first):
            label = labels[first + p]
            if p + 1 == last - first or labels[first + p + 1] != label:
                run = slice(start * LANES, (p + 1) * LANES)
                weight = bounded_weights(row[run], bounds[h], peaks[h], weights[h, run])
                sums[h] += weight
                add_mean(weight, means[label], mean_scales[label], out[h])
                start = p + 1
    expect_keys(
        pages[first:last],
        pool_of(step),
        step.span,
        step.shift,
        longs_at(step.widths + 8 * head * step.words, (step.words,)),
        scales_of(step, r, part)[: (last - first) * LANES],
        floats_at(step.steps + 4 * head * coded, (coded,)),
        u,
        floats_at(step.distortion + 4 * head * coded, (coded,)),
        step.scale,
        slopes,
        weights,
        out,
    )


def _do(address: int, stage: int, task: int) -> None:
    """Do one task of a stage of the step whose record is at `address`."""
    step = record_at(address)
    alone = step.rows if stage in (PLAN, CHOOSE) else 0  # these wait for others, which near keys fill
    if stage == PLAN and task < alone:
        _plan(step, task)
    elif stage == CHOOSE and task < alone:
        _choose(step, task)
    elif stage in (PLAN, CHOOSE, FETCH):
        # One call for both, since all that it calls is compiled at every place that calls it.
        rows = np.empty(CHUNK, np.int64)
        if stage != FETCH:
            number = task - alone + (early_near(step) if stage == CHOOSE else 0)
            r, part = number // step.near_parts, number % step.near_parts
            n = _near_rows(step, r, part, rows)
        else:
            r, part = task // step.kept_parts, task % step.kept_parts
            n = min(CHUNK, longs_at(step.kept_counts, (r + 1,))[r] - part * CHUNK)
            kept = longs_at(step.kept_rows + 8 * (r * step.kept + part * CHUNK), (CHUNK,))
            for i in range(n):
                if step.slot_tables:
                    rows[i] = slot_row_of(step, r, _id(step, kept[i] // LANES, kept[i] % LANES))
                else:
                    rows[i] = kept[i]
            part += step.near_parts
        _attend(step, r, part, rows[: max(n, 0)])
    elif stage == SCAN:
        _scan(step, task // step.scan_parts, task % step.scan_parts)
    elif stage == REST:
        _rest(step, task // (step.scan_parts + 1), task % (step.scan_parts + 1))
    else:
        outs, sums, peaks = parts_of(step, task)
        g, d = step.g, step.d
        out, lse = floats_at(step.out + 4 * task * g * d, (g, d)), floats_at(step.lse + 4 * task * g, (g,))
        merge_parts(outs, sums, peaks, d, out, lse)


@functools.cache
def task_address() -> int:
    """Address of `_do`, compiled when it is first needed."""
    return int(cfunc(types.void(types.int64, types.int64, types.int64), cache=True)(_do).address)
