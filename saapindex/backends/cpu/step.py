"""A step of attention in numba: stages of small tasks, which the threads take one after the other.

The tasks of a stage are independent, and what a stage writes, the next one reads. Nothing of the length of
the context is held but the estimates of the keys that are visited.

All that the stages read and write is described by one record of addresses and sizes, as a kernel of a GPU has
its arguments. So a task is called through its address with three numbers, and compiled once: handed on as
arrays, it would take numba minutes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, get_num_threads, njit, types
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.attend import (
    CHUNK,
    add_mean,
    attend_chunk,
    bounded_weights,
    kind_of,
    merge_parts,
    rest_of_lists,
)
from saapindex.backends.cpu.codes import (
    addressed,
    code_arrays,
    page_total,
    place_of,
    prepare,
    rotated,
    scan_pages,
    visited_pages,
)
from saapindex.backends.cpu.expected import expect_keys
from saapindex.backends.cpu.heap import worse
from saapindex.backends.cpu.helpers import call_helpers
from saapindex.backends.cpu.select import BINS, POLICIES, UNION, cut, largest, pool, rank, visit, worst_kept
from saapindex.backends.cpu.vector import (
    atomic_add,
    atomic_read,
    atomic_write,
    call_at,
    integer_at,
    padded,
    plain,
    pointer,
)
from saapindex.backends.paged import Code, Near, PagedLists, Pages, Reading, Scaling, Slots

SCANNED = 32
"""Pages whose codes a task scans."""
ROUND_BYTES = 1 << 26
"""What the working memory of the queries that are attended to in one go may take."""
SERIAL = 4096
"""Below this many keys to read in all, helpers are not called."""

STAGES = 6
PLAN, SCAN, CHOOSE, FETCH, REST, MERGE = range(STAGES)
TICKET, DONE = 0, 8  # far enough apart for a cache line each
PATIENCE, FOREVER = 20_000, 1 << 62
"""Looks at the ticket before a helper without tasks goes (some tens of microseconds), or who calls."""

_NUMBERS = (
    # Sizes, as `AttentionOps` and `paged` name them; `rows` queries in a row, in `width` padded dimensions.
    "rows tokens g d width heads nlist coded words near_pages sink_pages span shift chunks kind "
    # Where keys and values are: in the same pages, or in those of another runtime.
    "cache_span cache_shift cache_chunks streams_each page_size by_page by_head by_lane "
    # What to read.
    "code_bytes row_bytes nprobe policy by_mass refine remainder everything "
    # Room that the working memory has, for each row.
    "pages slots kept near_parts kept_parts scan_parts parts "
)
_READ = (
    "queries positions near_table sinks first recent anchors anchor_scales means mean_scales spreads slopes "
    "sizes starts table addresses inverse steps widths base spread distortion scan left "
    "cache_addresses slot_tables "
)
_WRITTEN = (
    "rotations logits norms centers bytes factors taken page_counts page_numbers labels counts estimates "
    "scores kept_counts kept_rows outs sums peaks out lse"
)
STEP = np.dtype(
    [(name, np.int64) for name in (_NUMBERS + _READ + _WRITTEN).split()]
    + [("scale", np.float32), ("softcap", np.float32), ("top_p", np.float64)]
)
"""The record: sizes, addresses of what is read and written, and how to scale."""


@njit(cache=True, nogil=True, inline="always")
def _floats(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.float32)


@njit(cache=True, nogil=True, inline="always")
def _longs(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int64)


@njit(cache=True, nogil=True, inline="always")
def _ints(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int32)


@njit(cache=True, nogil=True, inline="always")
def _small(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int8)


@njit(cache=True, nogil=True, inline="always")
def _query(step, r):  # type: ignore[no-untyped-def]
    return _floats(step.queries + 4 * r * step.g * step.width, (step.g, step.width))


@njit(cache=True, nogil=True, inline="always")
def _pool(step):  # type: ignore[no-untyped-def]
    return _longs(step.addresses, (5, step.chunks))


@njit(cache=True, nogil=True, inline="always")
def _cache(step):  # type: ignore[no-untyped-def]
    return _longs(step.cache_addresses, (5, step.cache_chunks))


@njit(cache=True, nogil=True, inline="always")
def _slot_row(step, r, position):  # type: ignore[no-untyped-def]
    """Row of a key in the pages of another runtime; see `Slots`."""
    s = r // step.tokens
    b = s // step.streams_each
    slot = _longs(_longs(step.slot_tables, (b + 1,))[b], (position + 1,))[position]
    page, lane = slot // step.page_size, slot % step.page_size
    return page * step.by_page + s % step.streams_each * step.by_head + lane * step.by_lane


@njit(cache=True, nogil=True, inline="always")
def _list_floats(step, address, r):  # type: ignore[no-untyped-def]
    """One number for each head and list of a row."""
    return _floats(address + 4 * r * step.g * step.nlist, (step.g, step.nlist))


@njit(cache=True, nogil=True, inline="always")
def _of_stream(step, address, r):  # type: ignore[no-untyped-def]
    """One whole number of the stream of a row."""
    return _longs(address, (r // step.tokens + 1,))[r // step.tokens]


@njit(cache=True, nogil=True, inline="always")
def _rotation(step, r):  # type: ignore[no-untyped-def]
    """A row's queries in the space of the codes."""
    return _floats(step.rotations + 4 * r * step.g * step.coded, (step.g, step.coded))


@njit(cache=True, nogil=True, inline="always")
def _factors(step, r):  # type: ignore[no-untyped-def]
    return _floats(step.factors + 12 * r * step.g, (3, step.g))


@njit(cache=True, nogil=True, inline="always")
def _bytes(step, r):  # type: ignore[no-untyped-def]
    groups = 8 * step.words
    return _ints(step.bytes + 4 * r * step.g * groups, (step.g, groups))


@njit(cache=True, nogil=True, inline="always")
def _visited(step, r):  # type: ignore[no-untyped-def]
    """Numbers, lists and keys of the pages that a row visits."""
    n, at = _longs(step.page_counts, (r + 1,))[r], 4 * r * step.pages
    return _ints(step.page_numbers + at, (n,)), _ints(step.labels + at, (n,)), _ints(step.counts + at, (n,))


@njit(cache=True, nogil=True, inline="always")
def _estimates(step, r, part):  # type: ignore[no-untyped-def]
    """Of the pages of one task: (g, its slots), side by side so that loops over them are SIMD."""
    slots = SCANNED * LANES
    return _floats(step.estimates + 4 * (r * step.slots + part * slots) * step.g, (step.g, slots))


@njit(cache=True, nogil=True, inline="always")
def _scores(step, r):  # type: ignore[no-untyped-def]
    return _floats(step.scores + 4 * r * step.slots, (step.slots,))


@njit(cache=True, nogil=True, inline="always")
def _parts(step, r):  # type: ignore[no-untyped-def]
    """Outputs, sums and peaks of the parts of a row."""
    n, g, first = step.parts, step.g, 4 * r * step.parts * step.g
    outs = _floats(step.outs + first * step.width, (n, g, step.width))
    return outs, _floats(step.sums + first, (n, g)), _floats(step.peaks + first, (n, g))


@njit(cache=True, nogil=True)
def _plan(step, r):  # type: ignore[no-untyped-def]
    """Choose the lists that a query visits, and note down their pages."""
    s, g, nlist, d = r // step.tokens, step.g, step.nlist, step.d
    head = s % step.heads
    sizes = _longs(step.sizes + 8 * s * nlist, (nlist,))
    taken = _longs(step.taken + 8 * r * nlist, (nlist,))
    if step.everything:
        taken[:] = sizes
    else:
        coded, norms = step.coded, _floats(step.norms + 4 * r * g, (g,))
        u, query, logits = _rotation(step, r), _query(step, r), _list_floats(step, step.logits, r)
        rotated(query, _floats(step.inverse + 4 * head * d * coded, (d, coded)), u)
        rank(
            query,
            u,
            _small(step.anchors + s * nlist * d, (nlist, d)),
            _floats(step.anchor_scales + 4 * s * nlist, (nlist,)),
            _floats(step.spreads + 4 * s * nlist, (nlist,)),
            sizes,
            _floats(step.spread + 4 * head * coded, (coded,)),
            step.scale,
            step.softcap,
            _list_floats(step, step.centers, r),
            logits,
            norms,
        )
        limit = _of_stream(step, step.scan, r)
        visit(
            logits, norms, sizes, limit, step.nprobe, step.top_p, step.policy, step.by_mass != 0,
            step.refine != 0, taken,
        )  # fmt: skip
        if step.refine:
            factors = _factors(step, r)
            prepare(
                u,
                _floats(step.steps + 4 * head * coded, (coded,)),
                _longs(step.widths + 8 * head * step.words, (step.words,)),
                _floats(step.distortion + 4 * head * coded, (coded,)),
                step.scale,
                _bytes(step, r),
                factors[0],
                factors[1],
                factors[2],
            )
    at = 4 * r * step.pages
    _longs(step.page_counts, (r + 1,))[r] = visited_pages(
        taken,
        _longs(step.starts + 8 * s * nlist, (nlist,)),
        _ints(step.table, (1,)),
        _ints(step.page_numbers + at, (step.pages,)),
        _ints(step.labels + at, (step.pages,)),
        _ints(step.counts + at, (step.pages,)),
    )


@njit(cache=True, nogil=True)
def _attend(step, r, part, rows):  # type: ignore[no-untyped-def]
    outs, sums, peaks = _parts(step, r)
    if rows.shape[0] == 0:
        peaks[part] = -np.inf
        return
    attend_chunk(
        _query(step, r), rows, _cache(step), step.cache_span, step.cache_shift, step.kind, step.d,
        step.scale, step.softcap, outs[part], sums[part], peaks[part],
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _near_rows(step, r, part, rows):  # type: ignore[no-untyped-def]
    """Write the rows of a chunk of the sinks and the recent keys that the query sees; return how many."""
    s, n = r // step.tokens, 0
    sinks, first = _of_stream(step, step.sinks, r), _of_stream(step, step.first, r)
    last = _longs(step.positions, (r + 1,))[r]
    pages = _ints(step.near_table + 4 * s * step.near_pages, (step.near_pages,))
    for i in range(part * CHUNK, min((part + 1) * CHUNK, sinks + _of_stream(step, step.recent, r))):
        at = i if i < sinks else i - sinks
        position = at if i < sinks else first + at
        if position > last:
            continue
        if step.slot_tables:
            rows[n] = _slot_row(step, r, position)
        else:
            page = pages[at // LANES + (0 if i < sinks else step.sink_pages)]
            rows[n] = np.int64(page) * LANES + at % LANES
        n += 1
    return n


@njit(cache=True, nogil=True)
def _scan(step, r, part):  # type: ignore[no-untyped-def]
    """Estimate the logits of the keys in some of the pages, and score them."""
    pages, labels, counts = _visited(step, r)
    start, stop = part * SCANNED, min((part + 1) * SCANNED, pages.shape[0])
    if start >= stop:
        return
    head, factors, g = r // step.tokens % step.heads, _factors(step, r), step.g
    estimates = _estimates(step, r, part)
    scan_pages(
        pages[start:stop],
        labels[start:stop],
        counts[start:stop],
        _pool(step),
        step.span,
        step.shift,
        _longs(step.widths + 8 * head * step.words, (step.words,)),
        _bytes(step, r),
        factors[0],
        factors[1],
        factors[2],
        _floats(step.base, (step.heads,))[head],
        _list_floats(step, step.centers, r),
        step.softcap,
        estimates,
    )
    if step.policy != UNION:
        scores = _scores(step, r)[start * LANES : stop * LANES]
        pool(estimates, _floats(step.norms + 4 * r * g, (g,)), step.policy, scores)


@njit(cache=True, nogil=True)
def _id(step, page, lane):  # type: ignore[no-untyped-def]
    """Position of the key in a lane of a page."""
    chunk, at = place_of(page, step.span, step.shift)
    return np.int64(integer_at(_pool(step)[4, chunk] + 4 * (at * LANES + lane)))


@njit(cache=True, nogil=True)
def _keep(step, pages, scores, limit, kept):  # type: ignore[no-untyped-def]
    """Mark the slots of the `limit` best scores."""
    bins = np.empty(scores.shape[0], np.int32)
    last, need = cut(scores, limit, bins)
    crowd = 0
    for i in range(scores.shape[0]):
        kept[i] |= bins[i] < last
        crowd += bins[i] == last
    if last == BINS or need == 0:
        return
    slots, ids, close = np.empty(crowd, np.int64), np.empty(crowd, np.int64), np.empty(crowd, np.float32)
    n = 0
    for i in range(scores.shape[0]):
        if bins[i] == last:
            slots[n], ids[n], close[n] = i, _id(step, pages[i // LANES], i % LANES), scores[i]
            n += 1
    score, id_ = worst_kept(close, ids, need)
    for i in range(crowd):
        if not worse(close[i], ids[i], score, id_):
            kept[slots[i]] = True


@njit(cache=True, nogil=True)
def _choose(step, r):  # type: ignore[no-untyped-def]
    """Note down the rows of the keys to fetch; the estimates of these are of no more use."""
    pages, _, counts = _visited(step, r)
    n, s, slots = 0, r // step.tokens, pages.shape[0] * LANES
    rows = _longs(step.kept_rows + 8 * r * step.kept, (step.kept,))
    if step.everything or not step.refine:
        last = _longs(step.positions, (r + 1,))[r]
        for p in range(pages.shape[0]):
            for lane in range(counts[p]):
                if not step.everything or _id(step, pages[p], lane) <= last:
                    rows[n] = np.int64(pages[p]) * LANES + lane
                    n += 1
        _longs(step.kept_counts, (r + 1,))[r] = n
        return
    scanned = 0
    for keys in _longs(step.taken + 8 * r * step.nlist, (step.nlist,)):
        scanned += keys
    limit = max(_longs(step.left, (s + 1,))[s] - scanned * step.code_bytes, 0) // step.row_bytes
    kept, scores, block = np.zeros(slots, np.bool_), _scores(step, r)[:slots], SCANNED * LANES
    for h in range(step.g if step.policy == UNION else 1):
        if step.policy == UNION:  # each head by its own estimates
            limit = limit // step.g if h == 0 else limit
            for part in range((slots + block - 1) // block):
                end = min(block, slots - part * block)
                scores[part * block : part * block + end] = _estimates(step, r, part)[h, :end]
        _keep(step, pages, scores, limit, kept)
    for part in range((slots + block - 1) // block):
        estimates = _estimates(step, r, part)
        for i in range(min(block, slots - part * block)):
            if kept[part * block + i]:
                rows[n] = np.int64(pages[part * SCANNED + i // LANES]) * LANES + i % LANES
                n += 1
                for h in range(step.g):
                    estimates[h, i] = -np.inf
    _longs(step.kept_counts, (r + 1,))[r] = n


@njit(cache=True, nogil=True)
def _rest(step, r, part):  # type: ignore[no-untyped-def]
    """Let what was not fetched count: the lists by their logits, or the keys of some pages by theirs."""
    s, g, nlist = r // step.tokens, step.g, step.nlist
    at, exact = step.near_parts + step.kept_parts + part, step.near_parts + step.kept_parts
    all_outs, all_sums, all_peaks = _parts(step, r)
    out, sums, peaks = all_outs[at], all_sums[at], all_peaks[at]
    bounds = np.empty(g, np.float32)  # the largest exact logits; infinity where there are none
    for h in range(g):
        bounds[h] = largest(all_peaks[:exact, h])
        if bounds[h] == -np.inf:
            bounds[h] = np.inf
    means = _small(step.means + s * nlist * step.d, (nlist, step.d))
    mean_scales = _floats(step.mean_scales + 4 * s * nlist, (nlist,))
    head, coded, u = s % step.heads, step.coded, _rotation(step, r)
    slopes = _floats(step.slopes + 4 * s * coded * step.d, (coded, step.d))
    if part == step.scan_parts:
        sizes = _longs(step.sizes + 8 * s * nlist, (nlist,))
        rest = sizes - _longs(step.taken + 8 * r * nlist, (nlist,))
        rest_of_lists(
            _list_floats(step, step.logits, r), rest, bounds, means, mean_scales,
            _floats(step.spreads + 4 * s * nlist, (nlist,)), u,
            _floats(step.spread + 4 * head * coded, (coded,)), step.scale, slopes, out, sums, peaks,
        )  # fmt: skip
        return
    pages, labels, _ = _visited(step, r)
    first, last = part * SCANNED, min((part + 1) * SCANNED, pages.shape[0])
    peaks[:] = -np.inf
    if first >= last:
        return
    out[:] = 0
    sums[:] = 0
    weights = np.zeros((g, (last - first) * LANES), np.float32)
    for h in range(g):
        row = _estimates(step, r, part)[h, : (last - first) * LANES]
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
        _pool(step),
        step.span,
        step.shift,
        _longs(step.widths + 8 * head * step.words, (step.words,)),
        _floats(step.base, (step.heads,))[head],
        _floats(step.steps + 4 * head * coded, (coded,)),
        u,
        _floats(step.distortion + 4 * head * coded, (coded,)),
        step.scale,
        slopes,
        weights,
        out,
    )


def _do(address: int, stage: int, task: int) -> None:
    """Do one task of a stage of the step whose record is at `address`."""
    step = carray(pointer(address), 1, STEP)[0]
    if stage == PLAN and task % (step.near_parts + 1) == 0:
        _plan(step, task // (step.near_parts + 1))
    elif stage in (PLAN, FETCH):
        # One call for both, since all that it calls is compiled at every place that calls it.
        rows = np.empty(CHUNK, np.int64)
        if stage == PLAN:
            r, part = task // (step.near_parts + 1), task % (step.near_parts + 1) - 1
            n = _near_rows(step, r, part, rows)
        else:
            r, part = task // step.kept_parts, task % step.kept_parts
            n = min(CHUNK, _longs(step.kept_counts, (r + 1,))[r] - part * CHUNK)
            kept = _longs(step.kept_rows + 8 * (r * step.kept + part * CHUNK), (CHUNK,))
            for i in range(n):
                if step.slot_tables:
                    rows[i] = _slot_row(step, r, _id(step, kept[i] // LANES, kept[i] % LANES))
                else:
                    rows[i] = kept[i]
            part += step.near_parts
        _attend(step, r, part, rows[: max(n, 0)])
    elif stage == SCAN:
        _scan(step, task // step.scan_parts, task % step.scan_parts)
    elif stage == CHOOSE:
        _choose(step, task)
    elif stage == REST:
        _rest(step, task // (step.scan_parts + 1), task % (step.scan_parts + 1))
    else:
        outs, sums, peaks = _parts(step, task)
        g, d = step.g, step.d
        out, lse = _floats(step.out + 4 * task * g * d, (g, d)), _floats(step.lse + 4 * task * g, (g,))
        merge_parts(outs, sums, peaks, d, out, lse)


@functools.cache
def task_address() -> int:
    """Address of `_do`, compiled when it is first needed."""
    return int(cfunc(types.void(types.int64, types.int64, types.int64), cache=True)(_do).address)


@njit(cache=True, nogil=True)
def take_part(do, step, counts, state, patience):  # type: ignore[no-untyped-def]
    """Take tasks, stage after stage, until there are none.

    ``state[TICKET]`` holds the stage in its upper and the next task in its lower half; ``state[DONE]`` counts
    tasks of the stage that are done, and who does the last opens the next stage. Nobody waits for a thread
    that is not in the middle of a task. A thread without a task looks `patience` times whether the next stage
    has come, and then goes; the one that needs the result has no end of it.
    """
    while True:
        ticket = atomic_add(state, TICKET, 1)
        stage, task = ticket >> 32, ticket & 0xFFFFFFFF
        if stage >= STAGES:
            return
        if task < counts[stage]:
            call_at(do, step, stage, task)
            if atomic_add(state, DONE, 1) + 1 == counts[stage]:
                atomic_write(state, DONE, 0)
                atomic_write(state, TICKET, stage_from(counts, stage + 1) << 32)
            continue
        left = patience
        while atomic_read(state, TICKET) >> 32 == stage:
            left -= 1
            if left == 0:
                return


@njit(cache=True, nogil=True)
def stage_from(counts, stage):  # type: ignore[no-untyped-def]
    """Return the next stage that has tasks."""
    while stage < STAGES and counts[stage] == 0:
        stage += 1
    return stage


@njit(cache=True, nogil=True)
def _first_ticket(counts):  # type: ignore[no-untyped-def]
    state = np.zeros(2 * DONE, np.int64)
    state[TICKET] = stage_from(counts, 0) << 32
    return state


def run_stages(step: NDArray[Any], counts: Ints, threads: int) -> None:
    """Do all tasks, `counts` of each stage, of the step of a record."""
    state, do, address = _first_ticket(counts), task_address(), step.ctypes.data
    if threads > 1:
        call_helpers(threads - 1, take_part, do, address, counts, state, PATIENCE)
    take_part(do, address, counts, state, FOREVER)


@njit(cache=True, nogil=True)
def _count_parts(step, scan, left, sizes, sinks, recent):  # type: ignore[no-untyped-def]
    """Note down how many pages, kept keys and parts there may be for each row."""
    near, pages, kept = 0, 0, 0
    for s in range(sizes.shape[0]):
        here = page_total(sizes[s])
        if not step.everything and step.nprobe == 0 and step.top_p == 0:
            here = min(here, scan[s] // LANES + step.nlist)
        most = here * LANES
        if step.refine and not step.everything:
            most = min(most, left[s] // step.row_bytes)
        near, pages, kept = max(near, sinks[s] + recent[s]), max(pages, here), max(kept, most)
    step.pages, step.kept = pages, (kept + CHUNK - 1) // CHUNK * CHUNK
    step.near_parts, step.kept_parts = (near + CHUNK - 1) // CHUNK, step.kept // CHUNK
    scans = step.refine and not step.everything
    step.scan_parts = (pages + SCANNED - 1) // SCANNED if scans else 0
    step.parts = step.near_parts + step.kept_parts + (step.scan_parts + 1 if step.remainder else 0)
    step.slots = step.scan_parts * SCANNED * LANES


@njit(cache=True, nogil=True)
def _lay_out(step, start):  # type: ignore[no-untyped-def]
    """Note down where in memory from `start` on the stages write; return where it ends."""
    at, rows, g, pages, slots = start, step.rows, step.g, step.pages, step.slots
    step.rotations, at = at, at + _room(4 * rows * g * step.coded)
    step.logits, at = at, at + _room(4 * rows * g * step.nlist)
    step.centers, at = at, at + _room(4 * rows * g * step.nlist)
    step.norms, at = at, at + _room(4 * rows * g)
    step.bytes, at = at, at + _room(4 * rows * g * 8 * step.words)
    step.factors, at = at, at + _room(4 * rows * 3 * g)
    step.taken, at = at, at + _room(8 * rows * step.nlist)
    step.page_counts, at = at, at + _room(8 * rows)
    step.page_numbers, at = at, at + _room(4 * rows * pages)
    step.labels, at = at, at + _room(4 * rows * pages)
    step.counts, at = at, at + _room(4 * rows * pages)
    step.estimates, at = at, at + _room(4 * rows * g * slots)
    step.scores, at = at, at + _room(4 * rows * slots)
    step.kept_counts, at = at, at + _room(8 * rows)
    step.kept_rows, at = at, at + _room(8 * rows * step.kept)
    step.outs, at = at, at + _room(4 * rows * step.parts * g * step.width)
    step.sums, at = at, at + _room(4 * rows * step.parts * g)
    step.peaks, at = at, at + _room(4 * rows * step.parts * g)
    return at


@njit(cache=True, nogil=True, inline="always")
def _room(size):  # type: ignore[no-untyped-def]
    return (size + 63) // 64 * 64


@njit(cache=True, nogil=True)
def set_up(  # type: ignore[no-untyped-def]
    steps, queries, positions, near_table, sinks, first, recent, anchors, anchor_scales,
    means, mean_scales, spreads, slopes, sizes, starts, table, addresses, inverse, quanta, widths, base,
    spread, distortion, scan, left, out, lse,
):  # fmt: skip
    """Complete the record; return the tasks of each stage, the working memory, and whether it is so little
    that waking helpers costs more than they save.
    """
    step = steps[0]
    step.rows, step.g, step.width = queries.shape
    step.nlist, step.near_pages, step.chunks = sizes.shape[1], near_table.shape[1], addresses.shape[1]
    step.heads, step.coded, step.words = inverse.shape[0], inverse.shape[2], widths.shape[1]
    step.tokens, step.d = step.rows // max(sizes.shape[0], 1), out.shape[2]
    step.queries, step.positions = queries.ctypes.data, positions.ctypes.data
    step.near_table, step.sinks = near_table.ctypes.data, sinks.ctypes.data
    step.first, step.recent = first.ctypes.data, recent.ctypes.data
    step.anchors, step.anchor_scales = anchors.ctypes.data, anchor_scales.ctypes.data
    step.means, step.mean_scales = means.ctypes.data, mean_scales.ctypes.data
    step.spreads, step.slopes, step.sizes = spreads.ctypes.data, slopes.ctypes.data, sizes.ctypes.data
    step.starts, step.table = starts.ctypes.data, table.ctypes.data
    step.addresses, step.inverse = addresses.ctypes.data, inverse.ctypes.data
    step.steps, step.widths, step.base = quanta.ctypes.data, widths.ctypes.data, base.ctypes.data
    step.spread, step.distortion = spread.ctypes.data, distortion.ctypes.data
    step.scan, step.left = scan.ctypes.data, left.ctypes.data
    step.out, step.lse = out.ctypes.data, lse.ctypes.data
    _count_parts(step, scan, left, sizes, sinks, recent)
    memory = np.empty(_lay_out(step, 0) + 64, np.uint8)
    _lay_out(step, _room(memory.ctypes.data))
    counts, rows = np.empty(STAGES, np.int64), step.rows
    counts[PLAN], counts[SCAN] = rows * (step.near_parts + 1), rows * step.scan_parts
    counts[CHOOSE], counts[FETCH] = rows, rows * step.kept_parts
    counts[REST], counts[MERGE] = rows * (step.scan_parts + 1) if step.remainder else 0, rows
    little = rows * (step.near_parts * CHUNK + step.kept + step.slots) < SERIAL
    return counts, memory, little


def _how(reading: Reading | None) -> dict[str, Any]:
    if reading is None:
        return {"everything": True}
    return {
        "code_bytes": reading.code_bytes,
        "row_bytes": reading.row_bytes,
        "nprobe": reading.nprobe,
        "top_p": reading.top_p,
        "policy": POLICIES[reading.policy],
        "by_mass": reading.by_mass,
        "refine": reading.refine,
        "remainder": reading.remainder,
    }


# Dense attention reads no codes.
_NO_CODE = [
    np.zeros(shape, np.int64 if i == 2 else np.float32)
    for i, shape in enumerate([(1, 1, 1), (1, 1), (1, 1), (1,), (1, 1), (1, 1)])
]


def _attend_step(
    queries: Floats,
    positions: Ints,
    near: Near,
    lists: PagedLists,
    pages: Pages,
    code: Code | None,
    scaling: Scaling,
    reading: Reading | None,
    slots: Slots | None = None,
) -> tuple[Floats, Floats]:
    arrays, none = _NO_CODE, np.zeros(len(lists.sizes), np.int64)
    limits = none, none
    if code is not None and reading is not None:
        arrays = code_arrays(code, "inverse", "step", "widths", "base", "spread", "distortion")
        limits = plain(reading.scan, np.int64), plain(reading.left, np.int64)
    return _in_rounds(queries, positions, near, lists, pages, slots, arrays, scaling, limits, _how(reading))


def attend_lists(
    queries: Floats,
    positions: Ints,
    near: Near,
    lists: PagedLists,
    pages: Pages,
    code: Code,
    scaling: Scaling,
    reading: Reading,
) -> tuple[Floats, Floats]:
    """See `Ops.attend_lists`."""
    return _attend_step(queries, positions, near, lists, pages, code, scaling, reading)


def attend_all(
    queries: Floats, positions: Ints, near: Near, lists: PagedLists, pages: Pages, scaling: Scaling
) -> tuple[Floats, Floats]:
    """See `Ops.attend_all`."""
    return _attend_step(queries, positions, near, lists, pages, None, scaling, None)


def attend_slots(
    queries: Floats,
    positions: Ints,
    near: Near,
    lists: PagedLists,
    pages: Pages,
    slots: Slots,
    code: Code,
    scaling: Scaling,
    reading: Reading | None,
) -> tuple[Floats, Floats]:
    """See `Ops.attend_slots`."""
    return _attend_step(queries, positions, near, lists, pages, code, scaling, reading, slots)


def _in_rounds(
    queries: Floats,
    positions: Ints,
    near: Near,
    lists: PagedLists,
    pages: Pages,
    slots: Slots | None,
    code: list[NDArray[Any]],
    scaling: Scaling,
    limits: tuple[Ints, Ints],
    how: dict[str, Any],
) -> tuple[Floats, Floats]:
    """Attend for as many tokens at a time as the working memory allows."""
    streams, t, g, d = queries.shape
    x, last = padded(queries), plain(positions, np.int64)
    out, lse = np.empty((streams, t, g, d), np.float32), np.empty((streams, t, g), np.float32)
    spans = addressed(pages)
    step = np.zeros(1, STEP)
    how |= {"sink_pages": near.sink_pages, "span": spans[1], "shift": spans[2]}
    how |= {"scale": scaling.scale, "softcap": scaling.softcap, "streams_each": 1, "page_size": 1}
    held, tables = pages, np.zeros(0, np.int64)
    if slots is not None:
        held, tables = slots.pages, np.array([table.ctypes.data for table in slots.tables])
        how |= {"slot_tables": tables.ctypes.data, "streams_each": slots.heads, "page_size": slots.page_size}
        how |= {"by_page": slots.by_page, "by_head": slots.by_head, "by_lane": slots.by_lane}
    cache, cache_span, cache_shift = addressed(held)
    how |= {"kind": kind_of(held), "cache_addresses": cache.ctypes.data, "cache_chunks": cache.shape[1]}
    how |= {"cache_span": cache_span, "cache_shift": cache_shift}
    for name, value in how.items():
        step[name] = value
    pages_a_stream = len(lists.table) // max(streams, 1) + near.pages.shape[1]
    once = max(1, ROUND_BYTES // (max(streams, 1) * (pages_a_stream + 1) * LANES * (4 * g + 16)))
    for start in range(0, t, once):
        part = slice(start, start + once)
        found = (out, lse) if once >= t else (np.empty_like(out[:, part]), np.empty_like(lse[:, part]))
        tokens = found[1].shape[1]
        # The record knows only where these lie: they must live until the stages are done.
        arrays = (
            np.ascontiguousarray(x[:, part]).reshape(streams * tokens, g, -1),
            np.ascontiguousarray(last[:, part]).reshape(streams * tokens),
            near.pages,
            near.sinks,
            near.first,
            near.recent,
            lists.anchors,
            plain(lists.anchor_scales, np.float32),
            lists.means,
            plain(lists.mean_scales, np.float32),
            plain(lists.spreads, np.float32),
            plain(lists.slopes, np.float32),
            lists.sizes,
            lists.starts,
            lists.table,
            spans[0],
            *code,
            *limits,
            found[0].reshape(streams * tokens, g, d),
            found[1].reshape(streams * tokens, g),
        )
        counts, memory, little = set_up(step, *arrays)
        run_stages(step, counts, 1 if little else get_num_threads())
        del arrays, memory
        if once < t:
            out[:, part], lse[:, part] = found
    return out, lse
