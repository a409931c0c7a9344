"""A step of attention in numba: stages of small tasks, which the threads take one after the other.

All that the stages read and write is described by one record of addresses and sizes, as a kernel of a GPU has
its arguments; see `record` and `stages`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, njit
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.attend import CHUNK, kind_of
from saapindex.backends.cpu.codes import addressed, code_arrays, page_total
from saapindex.backends.cpu.helpers import call_helpers
from saapindex.backends.cpu.memory import atomic_add, atomic_read, atomic_write, call_at, padded, plain
from saapindex.backends.cpu.record import SCANNED, STEP
from saapindex.backends.cpu.select import POLICIES
from saapindex.backends.cpu.stages import (
    CHOOSE,
    FETCH,
    MERGE,
    PLAN,
    REST,
    SCAN,
    STAGES,
    task_address,
)
from saapindex.backends.paged import Code, Near, PagedLists, Pages, Reading, Scaling, Slots

ROUND_BYTES = 1 << 26
"""What the working memory of the queries that are attended to in one go may take."""
SERIAL = 4096
"""Below this many keys to read in all, helpers are not called."""
TICKET, DONE = 0, 8  # far enough apart for a cache line each
PATIENCE, FOREVER = 20_000, 1 << 62
"""Looks at the ticket before a helper without tasks goes (some tens of microseconds), or who calls."""


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
