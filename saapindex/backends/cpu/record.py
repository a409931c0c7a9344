"""The record of a step of attention: sizes, and the addresses of all that its stages read and write.

A task is called through its address with that of the record, and compiled once: handed on as arrays, all this
would take numba minutes.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from saapindex.backends.base import LANES
from saapindex.backends.cpu.memory import pointer

SCANNED = 64
"""Pages whose codes a task scans."""

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
    "scales scores kept_counts kept_rows outs sums peaks out lse"
)
STEP = np.dtype(
    [(name, np.int64) for name in (_NUMBERS + _READ + _WRITTEN).split()]
    + [("scale", np.float32), ("softcap", np.float32), ("top_p", np.float64)]
)
"""The record: sizes, addresses of what is read and written, and how to scale."""


@njit(cache=True, nogil=True, inline="always")
def record_at(address):  # type: ignore[no-untyped-def]
    """Return the record at an address."""
    return carray(pointer(address), 1, STEP)[0]


@njit(cache=True, nogil=True, inline="always")
def floats_at(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.float32)


@njit(cache=True, nogil=True, inline="always")
def longs_at(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int64)


@njit(cache=True, nogil=True, inline="always")
def ints_at(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int32)


@njit(cache=True, nogil=True, inline="always")
def small_at(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int8)


@njit(cache=True, nogil=True, inline="always")
def query_of(step, r):  # type: ignore[no-untyped-def]
    return floats_at(step.queries + 4 * r * step.g * step.width, (step.g, step.width))


@njit(cache=True, nogil=True, inline="always")
def pool_of(step):  # type: ignore[no-untyped-def]
    return longs_at(step.addresses, (5, step.chunks))


@njit(cache=True, nogil=True, inline="always")
def cache_of(step):  # type: ignore[no-untyped-def]
    return longs_at(step.cache_addresses, (5, step.cache_chunks))


@njit(cache=True, nogil=True, inline="always")
def slot_row_of(step, r, position):  # type: ignore[no-untyped-def]
    """Row of a key in the pages of another runtime; see `Slots`."""
    s = r // step.tokens
    b = s // step.streams_each
    slot = longs_at(longs_at(step.slot_tables, (b + 1,))[b], (position + 1,))[position]
    page, lane = slot // step.page_size, slot % step.page_size
    return page * step.by_page + s % step.streams_each * step.by_head + lane * step.by_lane


@njit(cache=True, nogil=True, inline="always")
def list_floats_of(step, address, r):  # type: ignore[no-untyped-def]
    """One number for each head and list of a row."""
    return floats_at(address + 4 * r * step.g * step.nlist, (step.g, step.nlist))


@njit(cache=True, nogil=True, inline="always")
def row_of_stream(step, address, r):  # type: ignore[no-untyped-def]
    """One whole number of the stream of a row."""
    return longs_at(address, (r // step.tokens + 1,))[r // step.tokens]


@njit(cache=True, nogil=True, inline="always")
def rotation_of(step, r):  # type: ignore[no-untyped-def]
    """A row's queries in the space of the codes."""
    return floats_at(step.rotations + 4 * r * step.g * step.coded, (step.g, step.coded))


@njit(cache=True, nogil=True, inline="always")
def factors_of(step, r):  # type: ignore[no-untyped-def]
    return floats_at(step.factors + 12 * r * step.g, (3, step.g))


@njit(cache=True, nogil=True, inline="always")
def bytes_of(step, r):  # type: ignore[no-untyped-def]
    groups = 8 * step.words
    return ints_at(step.bytes + 4 * r * step.g * groups, (step.g, groups))


@njit(cache=True, nogil=True, inline="always")
def visited_of(step, r):  # type: ignore[no-untyped-def]
    """Numbers, lists and keys of the pages that a row visits."""
    n, at = longs_at(step.page_counts, (r + 1,))[r], 4 * r * step.pages
    return (
        ints_at(step.page_numbers + at, (n,)),
        ints_at(step.labels + at, (n,)),
        ints_at(step.counts + at, (n,)),
    )


@njit(cache=True, nogil=True, inline="always")
def estimates_of(step, r, part):  # type: ignore[no-untyped-def]
    """Of the pages of one task: (g, its slots), side by side so that loops over them are SIMD."""
    slots = SCANNED * LANES
    return floats_at(step.estimates + 4 * (r * step.slots + part * slots) * step.g, (step.g, slots))


@njit(cache=True, nogil=True, inline="always")
def scales_of(step, r, part):  # type: ignore[no-untyped-def]
    """Scales of the codes of the keys of one task."""
    slots = SCANNED * LANES
    return floats_at(step.scales + 4 * (r * step.slots + part * slots), (slots,))


@njit(cache=True, nogil=True, inline="always")
def scores_of(step, r):  # type: ignore[no-untyped-def]
    return floats_at(step.scores + 4 * r * step.slots, (step.slots,))


@njit(cache=True, nogil=True, inline="always")
def parts_of(step, r):  # type: ignore[no-untyped-def]
    """Outputs, sums and peaks of the parts of a row."""
    n, g, first = step.parts, step.g, 4 * r * step.parts * step.g
    outs = floats_at(step.outs + first * step.width, (n, g, step.width))
    return outs, floats_at(step.sums + first, (n, g)), floats_at(step.peaks + first, (n, g))
