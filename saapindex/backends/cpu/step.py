"""A step of attention in numba: stages of small tasks, which the threads take one after the other.

All that the stages read and write is described by one record of addresses and sizes, as a kernel of a GPU has
its arguments; see `record` and `stages`. What of it stays the same from step to step is kept with the lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, njit
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints
from saapindex.backends.cpu.attend import CHUNK, kind_of
from saapindex.backends.cpu.codes import addressed, code_arrays, page_total
from saapindex.backends.cpu.helpers import run_job
from saapindex.backends.cpu.memory import padded, plain
from saapindex.backends.cpu.record import SCANNED, STEP, longs_at, record_at
from saapindex.backends.cpu.select import POLICIES
from saapindex.backends.cpu.stages import (
    CHOOSE,
    FETCH,
    MERGE,
    PLAN,
    REST,
    SCAN,
    early_near,
    task_address,
)
from saapindex.backends.cpu.tasks import STAGES
from saapindex.backends.paged import Code, Near, PagedLists, Pages, Reading, Scaling, Slots

ROUND_BYTES = 1 << 26
"""What the working memory of the queries that are attended to in one go may take."""
SERIAL = 4096
"""Below this many keys to read in all, helpers are not called."""
KEPT_BYTES = 1 << 24
"""Working memory up to this size is kept for the next step, since new memory costs time."""

_spare: list[NDArray[np.uint8]] = []


def take_memory() -> NDArray[np.uint8]:
    """Return memory to work in, that of an earlier step if there is any."""
    return _spare.pop() if _spare else np.empty(1 << 16, np.uint8)


@njit(cache=True, nogil=True)
def _count_parts(step):  # type: ignore[no-untyped-def]
    """Note down how many pages, kept keys and parts there may be for each row."""
    near, pages, kept, streams = 0, 0, 0, step.rows // max(step.tokens, 1)
    sizes = longs_at(step.sizes, (streams, step.nlist))
    scan, left = longs_at(step.scan, (streams,)), longs_at(step.left, (streams,))
    sinks, recent = longs_at(step.sinks, (streams,)), longs_at(step.recent, (streams,))
    for s in range(streams):
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
    step.scales, at = at, at + _room(4 * rows * slots)
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
    record, queries, positions, near_table, sink_pages, sinks, first, recent, out, lse, memory, counts
):
    """Complete the record, and count the tasks of each stage.

    Returns
    -------
    room : bytes of working memory; if that is more than there is, nothing else is good
    little : whether it is so little that waking helpers costs more than they save
    """
    step = record_at(record.ctypes.data)
    step.rows, step.g, step.width = queries.shape
    step.sink_pages = sink_pages
    step.near_pages, step.d = near_table.shape[1], out.shape[2]
    step.tokens = step.rows // max(sinks.shape[0], 1)
    step.queries, step.positions = queries.ctypes.data, positions.ctypes.data
    step.near_table, step.sinks = near_table.ctypes.data, sinks.ctypes.data
    step.first, step.recent = first.ctypes.data, recent.ctypes.data
    step.out, step.lse = out.ctypes.data, lse.ctypes.data
    _count_parts(step)
    start = memory.ctypes.data
    aligned = _room(start)
    end = _lay_out(step, aligned)
    rows = step.rows
    early = early_near(step)
    counts[PLAN], counts[SCAN] = rows + early, rows * step.scan_parts
    counts[CHOOSE], counts[FETCH] = rows + rows * step.near_parts - early, rows * step.kept_parts
    counts[REST], counts[MERGE] = rows * (step.scan_parts + 1) if step.remainder else 0, rows
    little = rows * (step.near_parts * CHUNK + step.kept + step.slots) < SERIAL
    return end - start, little


class Frame(NamedTuple):
    """What of a step stays the same while the lists do.

    Attributes
    ----------
    of
        What it was made of, besides the lists.
    record
        The record as bytes, without what differs from step to step.
    held
        Arrays that the record has addresses of.
    table_length
        Pages of all lists.
    """

    of: tuple[Any, ...]
    record: NDArray[np.uint8]
    held: list[NDArray[Any]]
    table_length: int


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
_OF_CODE = "inverse", "steps", "widths", "base", "spread", "distortion"
_OF_LISTS = (
    "anchors",
    "anchor_scales",
    "means",
    "mean_scales",
    "spreads",
    "slopes",
    "sizes",
    "starts",
    "table",
)


def _frame(
    lists: PagedLists,
    pages: Pages,
    code: Code | None,
    scaling: Scaling,
    reading: Reading | None,
    slots: Slots | None,
) -> Frame:
    """Return the frame of steps over lists, the last one if it was made of the same."""
    of = pages, code, scaling, reading, slots
    place = "frame of some" if reading else "frame of all"
    last: Frame | None = lists.derived.get(place)
    if last is not None and all(map(_same, last.of, of)):
        return last
    none = np.zeros(len(lists.sizes), np.int64)
    codes, scan, left = _NO_CODE, none, none
    if code is not None and reading is not None:
        codes = code_arrays(code, "inverse", "step", "widths", "base", "spread", "distortion")
        scan, left = plain(reading.scan, np.int64), plain(reading.left, np.int64)
    addresses, span, shift = addressed(pages)
    cache, cache_span, cache_shift = addressed(pages if slots is None else slots.pages)
    arrays: dict[str, NDArray[Any]] = {
        **{name: _as_read(getattr(lists, name)) for name in _OF_LISTS},
        **dict(zip(_OF_CODE, codes, strict=True)),
        "scan": scan,
        "left": left,
        "addresses": addresses,
        "cache_addresses": cache,
    }
    how = _how(reading) | {
        "span": span,
        "shift": shift,
        "chunks": addresses.shape[1],
        "kind": kind_of(pages if slots is None else slots.pages),
        "cache_span": cache_span,
        "cache_shift": cache_shift,
        "cache_chunks": cache.shape[1],
        "scale": scaling.scale,
        "softcap": scaling.softcap,
        "streams_each": 1,
        "page_size": 1,
        "nlist": lists.sizes.shape[1],
        "heads": codes[0].shape[0],
        "coded": codes[0].shape[2],
        "words": codes[2].shape[1],
    }
    if slots is not None:
        arrays["slot_tables"] = np.array([table.ctypes.data for table in slots.tables])
        how |= {"streams_each": slots.heads, "page_size": slots.page_size}
        how |= {"by_page": slots.by_page, "by_head": slots.by_head, "by_lane": slots.by_lane}
    record = np.zeros(1, STEP)
    for name, value in how.items():
        record[name] = value
    for name, array in arrays.items():
        record[name] = array.ctypes.data
    found = Frame(of, record.view(np.uint8), list(arrays.values()), len(lists.table))
    lists.derived[place] = found
    return found


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Scaling) and one == other)


def _as_read(array: NDArray[Any]) -> NDArray[Any]:
    return plain(array, np.float32 if array.dtype.kind == "f" else array.dtype)


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
    return _in_rounds(queries, positions, near, _frame(lists, pages, code, scaling, reading, None))


def attend_all(
    queries: Floats, positions: Ints, near: Near, lists: PagedLists, pages: Pages, scaling: Scaling
) -> tuple[Floats, Floats]:
    """See `Ops.attend_all`."""
    return _in_rounds(queries, positions, near, _frame(lists, pages, None, scaling, None, None))


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
    return _in_rounds(queries, positions, near, _frame(lists, pages, code, scaling, reading, slots))


def _in_rounds(queries: Floats, positions: Ints, near: Near, frame: Frame) -> tuple[Floats, Floats]:
    """Attend for as many tokens at a time as the working memory allows."""
    streams, t, g, d = queries.shape
    x, last = padded(queries), plain(positions, np.int64)
    out, lse = np.empty((streams, t, g, d), np.float32), np.empty((streams, t, g), np.float32)
    pages_a_stream = frame.table_length // max(streams, 1) + near.pages.shape[1]
    once = max(1, ROUND_BYTES // (max(streams, 1) * (pages_a_stream + 1) * LANES * (4 * g + 16)))
    if once >= t:
        attend_once(x, last, near, frame, out, lse)
        return out, lse
    for start in range(0, t, once):
        part = slice(start, start + once)
        found = np.empty_like(out[:, part]), np.empty_like(lse[:, part])
        some = np.ascontiguousarray(x[:, part]), np.ascontiguousarray(last[:, part])
        attend_once(*some, near, frame, *found)
        out[:, part], lse[:, part] = found
    return out, lse


def attend_once(x: Floats, last: Ints, near: Near, frame: Frame, out: Floats, lse: Floats) -> None:
    """Attend in one go, and write to `out` and `lse`."""
    step, counts = frame.record.copy(), np.empty(STAGES, np.int64)
    rows = x.shape[0] * x.shape[1]
    # The record knows only where these lie: they live until the stages are done.
    arrays = (
        x.reshape(rows, *x.shape[2:]),
        last.reshape(rows),
        near.pages,
        near.sink_pages,
        near.sinks,
        near.first,
        near.recent,
        out.reshape(rows, *out.shape[2:]),
        lse.reshape(rows, *lse.shape[2:]),
    )
    memory = take_memory()
    room, little = set_up(step, *arrays, memory, counts)
    if room > memory.size:
        memory = np.empty(room + 64, np.uint8)
        room, little = set_up(step, *arrays, memory, counts)
    run_job(task_address(), step, counts, 0 if little else get_num_threads() - 1)
    if memory.size <= KEPT_BYTES:
        _spare.append(memory)
