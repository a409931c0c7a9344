"""What the kernels of sparse attention read: pages of keys, the lists they make up, and their codes.

A *stream* is one KV head of one sequence; stream `s` of `H` KV heads is head ``s % H`` of sequence ``s //
H``. A *row* is the place of a key: row `r` is lane ``r % LANES`` of page ``r // LANES``; -1 stands for
none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.common import LANES, Floats, Ints

__all__ = [
    "Chosen",
    "Code",
    "Near",
    "PagedLists",
    "Pages",
    "Reading",
    "Scaling",
    "Slots",
    "by_number",
    "widened",
]


def widened(x: NDArray[Any], dtype: DTypeLike = np.float32) -> Floats:
    """Return stored elements as `dtype`; uint16 holds the bits of bfloat16.

    Examples
    --------
    >>> widened(np.array([0x3FC0], np.uint16))
    array([1.5], dtype=float32)
    """
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats: Floats = x.astype(dtype, copy=False)
    return floats


def by_number(numbers: Ints) -> Iterator[tuple[int, Ints | slice]]:
    """Yield each different number, and where it occurs.

    Examples
    --------
    >>> [(number, where.tolist()) for number, where in by_number(np.array([4, 1, 4]))]
    [(1, [1]), (4, [0, 2])]
    """
    if not len(numbers):
        return
    if (numbers == numbers[0]).all():
        yield int(numbers[0]), slice(None)
        return
    order = np.argsort(numbers, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        yield int(numbers[part[0]]), part


class Code(NamedTuple):
    """Transform codes of `H` KV heads: `W` words of 32 bits a key, at most `R` coded dimensions.

    Attributes
    ----------
    forward, inverse
        (H, d, R): ``y = r @ forward`` of a residual, ``u = q @ inverse`` of a query; ``q . r`` is about ``u
        . y``. Columns of padding are zero.
    step
        (H, R), step of the uniform quantiser of ``y / |y|``; zero for padding.
    widths
        (H, W) int64, bits of the fields of each word: 1, 2 or 4.
    base
        (H,), the scale of a key whose exponent byte is 128.
    spread, distortion
        (H, R), mean square of ``y / f`` and of its quantisation error, `f` being the scale of the key.
    """

    forward: Floats
    inverse: Floats
    step: Floats
    widths: Ints
    base: Floats
    spread: Floats
    distortion: Floats

    def head(self, h: int) -> Code:
        """Return the code of one head alone."""
        return Code._make(array[h : h + 1] for array in self)


class Scaling(NamedTuple):
    """How an inner product becomes a logit.

    Attributes
    ----------
    scale
        Factor.
    softcap
        Logits are ``softcap * tanh(scaled / softcap)``; zero for no cap.
    """

    scale: float
    softcap: float = 0.0


class Pages(NamedTuple):
    """A pool of pages of `LANES` keys, in chunks of `span` pages.

    Page `p` is entry ``p % span`` of chunk ``p // span``. Lanes that no list uses are undefined.

    Attributes
    ----------
    keys, values
        Of each chunk (span, LANES, d) in float16, float32, or uint16 that holds bfloat16.
    codes
        Of each chunk (span, W, LANES) uint32.
    exponents
        Of each chunk (span, LANES) uint8.
    ids
        Of each chunk (span, LANES) int32: the position of the key in its sequence.
    addresses
        (5, chunks) int64: where each of the above begins in memory, in this order.
    span
        Pages of a chunk.
    """

    keys: tuple[NDArray[Any], ...]
    values: tuple[NDArray[Any], ...]
    codes: tuple[NDArray[np.uint32], ...]
    exponents: tuple[NDArray[np.uint8], ...]
    ids: tuple[NDArray[np.int32], ...]
    addresses: Ints
    span: int

    def take(self, field: str, rows: Ints) -> NDArray[Any]:
        """Return what `field` holds at `rows`, (n, ...); all rows are valid."""
        chunks = getattr(self, field)
        across = field == "codes"  # words lie side by side: (W, LANES)
        tail = chunks[0].shape[1:2] if across else chunks[0].shape[2:]
        found = np.empty((len(rows), *tail), chunks[0].dtype)
        number, row = np.divmod(rows, self.span * LANES)
        for chunk, here in by_number(number):
            if across:
                page, lane = np.divmod(row[here], LANES)
                found[here] = chunks[chunk][page, :, lane]
            else:
                found[here] = chunks[chunk].reshape(-1, *tail)[row[here]]
        return found


class _PagedLists(NamedTuple):
    """What `PagedLists` are made of."""

    anchors: NDArray[np.int8]
    anchor_scales: Floats
    means: NDArray[np.int8]
    mean_scales: Floats
    spreads: Floats
    slopes: Floats
    sizes: Ints
    starts: Ints
    table: NDArray[np.int32]


class PagedLists(_PagedLists):
    """The inverted lists of `S` streams, `L` lists each, with their statistics.

    Attributes
    ----------
    anchors, anchor_scales
        (S, L, d) int8 and (S, L) float32: keys are coded relative to their product.
    means, mean_scales
        (S, L, d) int8 and (S, L) float32: their product is the mean value of the list.
    spreads
        (S, L) float32, mean square of the scales of the keys' codes.
    slopes
        (S, R, d) float32: the value of a key is about the mean of its list plus ``y @ slopes``, `y` being its
        coded residual (see `Code`).
    sizes
        (S, L) int64, keys in each list; ids rise along a list.
    starts
        (S, L) int64: the pages of a list are ``table[start : start + ceil(size / LANES)]``, full but the
        last.
    table
        int32, page numbers.
    """

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What a backend has made of the lists, and keeps as long as them; they never change."""
        return {}

    def rows(self, stream: int, taken: Ints) -> tuple[Ints, Ints]:
        """Return the rows of the first ``taken[j]`` keys of each list of a stream, and their lists."""
        labels = np.repeat(np.arange(len(taken)), taken)
        place = np.arange(len(labels)) - np.repeat(np.cumsum(taken) - taken, taken)
        pages = self.table[self.starts[stream][labels] + place // LANES].astype(np.int64)
        return pages * LANES + place % LANES, labels

    def all_rows(self, taken: Ints) -> Ints:
        """Return the rows of the first ``taken[s, i, j]`` keys of each list, (S, t, N), -1 beyond."""
        rows = np.full((*taken.shape[:2], int(taken.sum(axis=-1).max(initial=0))), -1, np.int64)
        for s, i in np.ndindex(*taken.shape[:2]):
            found, _ = self.rows(s, taken[s, i])
            rows[s, i, : len(found)] = found
        return rows


class Near(NamedTuple):
    """The sinks and the recent keys of `S` streams, which every query attends to.

    Attributes
    ----------
    pages
        (S, P) int32, -1 where there is none: first `sink_pages` pages of sinks, then those of recent keys, in
        order of position; all are full but the last of either kind.
    sink_pages
        How many of the `P` are kept for sinks.
    sinks
        (S,) int64, sinks present, at positions from 0 up.
    first, recent
        (S,) int64: the recent keys stand at positions ``first : first + recent``.
    """

    pages: NDArray[np.int32]
    sink_pages: int
    sinks: Ints
    first: Ints
    recent: Ints

    def rows(self, stream: int) -> tuple[Ints, Ints]:
        """Return the rows of a stream's near keys, and their positions."""
        split = self.sink_pages
        parts = []
        for pages, start, count in (
            (self.pages[stream, :split], 0, int(self.sinks[stream])),
            (self.pages[stream, split:], int(self.first[stream]), int(self.recent[stream])),
        ):
            place = np.arange(count)
            rows = pages[place // LANES].astype(np.int64) * LANES + place % LANES
            parts.append((rows, start + place))
        rows, positions = (np.concatenate(part) for part in zip(*parts, strict=True))
        return rows, positions

    def all_ids(self, positions: Ints) -> Ints:
        """Return the positions that queries at `positions`, (S, t), see: (S, t, N), -1 for the others."""
        most = int((self.sinks + self.recent).max(initial=0))
        seen = np.full((*positions.shape, most), -1, np.int64)
        for s, last in enumerate(positions):
            sinks, first, recent = int(self.sinks[s]), int(self.first[s]), int(self.recent[s])
            stands = np.concatenate([np.arange(sinks), np.arange(first, first + recent)])
            seen[s, :, : len(stands)] = np.where(stands <= last[:, None], stands, -1)
        return seen

    def all_rows(self, positions: Ints) -> Ints:
        """Return the rows that queries at `positions`, (S, t), see: (S, t, N), -1 for the others."""
        most = int((self.sinks + self.recent).max(initial=0))
        seen = np.full((*positions.shape, most), -1, np.int64)
        for s, last in enumerate(positions):
            rows, stands = self.rows(s)
            seen[s, :, : len(rows)] = np.where(stands <= last[:, None], rows, -1)
        return seen


class Slots(NamedTuple):
    """Where the keys of `S` streams are, if another runtime keeps them: in its own pages.

    Attributes
    ----------
    tables
        Of each sequence int64, the slot of each of its positions.
    pages
        The memory of the runtime as rows of keys and values.
    heads
        KV heads: streams of a sequence.
    page_size
        Slots of a page of the runtime.
    by_page, by_head, by_lane
        Rows from a page, a head and a slot to the next.
    """

    tables: tuple[Ints, ...]
    pages: Pages
    heads: int
    page_size: int
    by_page: int
    by_head: int
    by_lane: int

    def rows(self, ids: Ints) -> Ints:
        """Return the rows in `pages` of positions of each stream, (S, ...); -1 stays."""
        found = np.full(ids.shape, -1, np.int64)
        for s, of_stream in enumerate(ids):
            there = of_stream >= 0
            sequence, head = divmod(s, self.heads)
            page, lane = np.divmod(self.tables[sequence][of_stream[there]], self.page_size)
            found[s][there] = page * self.by_page + head * self.by_head + lane * self.by_lane
        return found


class Reading(NamedTuple):
    """What a query may read of the lists, and how it chooses.

    Attributes
    ----------
    scan
        (S,) int64, keys that may be visited, perhaps more than there are: their codes are read, or without
        `refine` they themselves.
    left
        (S,) int64, bytes for codes and for the keys that are kept.
    code_bytes, row_bytes
        Bytes of the code of a key, and of a key with its value.
    nprobe
        Visit this many lists instead; 0 for not.
    top_p
        Visit lists until this share of the predicted mass is covered instead; 0 for not.
    policy
        How a group of query heads agrees: ``"sum"`` of their weights, ``"max"``, or the ``"union"`` of what
        each picks alone with its part of the budget.
    by_mass
        Rank lists by predicted mass instead of by predicted mass per key.
    refine
        Visit codes, and keep the best keys; otherwise every visited key is kept.
    remainder
        Let keys that were not kept count by their estimates.
    """

    scan: Ints
    left: Ints
    code_bytes: int
    row_bytes: int
    nprobe: int = 0
    top_p: float = 0.0
    policy: str = "sum"
    by_mass: bool = False
    refine: bool = True
    remainder: bool = True

    def keep(self, scanned: Ints) -> Ints:
        """Return how many keys may be kept where so many were scanned, (S, t)."""
        rest: Ints = np.maximum(self.left[:, None] - scanned * self.code_bytes, 0)
        return rest // self.row_bytes


class Chosen(NamedTuple):
    """What queries fetch from the lists, and what is known of the keys that they do not fetch.

    Attributes
    ----------
    rows
        (S, t, K) int64, the keys to fetch; -1 for none.
    logits
        (S, t, g, L), for each key of a list that is not visited.
    taken
        (S, t, L) int64, keys that are visited in each list.
    estimates, visited, labels
        (S, t, g, N), of keys that are visited and not fetched, minus infinity for the others; the row and the
        list of each, (S, t, N).
    """

    rows: Ints
    logits: Floats
    taken: Ints
    estimates: Floats
    visited: Ints
    labels: Ints
