"""Between sequences on the host and streams as the kernels of a device read them."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.batch import Batch
from saapindex.attention.near import Run
from saapindex.attention.sequence import Keeping, Sequence
from saapindex.attention.table import Table
from saapindex.backends.base import LANES, Ints
from saapindex.backends.cuda.streams import Streams
from saapindex.lists.paged import PagePool, PageSet
from saapindex.lists.ragged import ranges

__all__ = ["as_host", "from_streams", "kept_near", "ring_places", "to_streams"]


def kept_near(window: int) -> int:
    """Return how many recent keys stay out of the lists when others enter them.

    Examples
    --------
    >>> kept_near(2047)
    2063
    """
    return window + LANES


def ring_places(window: int, flush: int, dense_below: int) -> int:
    """Return how many recent keys a ring must have places for.

    Examples
    --------
    >>> ring_places(window=2047, flush=256, dense_below=4096)
    4096
    """
    most = max(kept_near(window) + max(flush, LANES) + LANES, dense_below)
    return -(-most // LANES) * LANES


def to_streams(batch: Batch, xp: Any = np, *, pages: int = 0, pool: int = 0, fill: int = 0) -> Streams:
    """Return the sequences of `batch` as streams; full pages that sequences share stay shared.

    Parameters
    ----------
    batch
        Of an index on the host.
    xp
        ``numpy``, or ``cupy`` for arrays on its current device.
    pages, pool
        Room for at least so many pages of each stream, and pages in the pool.
    fill
        Byte that memory without content is filled with; 255 makes its floats NaN.

    Examples
    --------
    >>> from saapindex.attention import AttentionIndex, fit_layer
    >>> k = np.random.default_rng(0).standard_normal((1, 2, 300, 8)).astype(np.float32)
    >>> index = AttentionIndex(fit_layer(k[0], k[0], 4, words=1), window=31, flush=16, dense_below=64)
    >>> index.add(k, k)
    >>> streams = to_streams(index._batch)
    >>> streams.sizes.sum(axis=1).tolist(), streams.first.tolist()
    ([240, 240], [241])
    """
    keeping = batch.keeping
    heads, nlist, d = keeping.codebook.heads, keeping.codebook.nlist, keeping.codebook.d
    streams = len(batch.sequences) * heads
    lists, tables = batch.lists, [sequence.lists for sequence in batch.sequences]
    counts = (-(-lists.sizes // LANES)).sum(axis=1)
    room = -(-max(pages, int(counts.max(initial=0))) // LANES) * LANES  # rows of tables are read in vectors
    found = {
        name: _filled((streams, room), np.int32, fill) for name in ("pages", "labels", "orders", "before")
    }
    last = np.full((streams, nlist), -1, np.int32)
    source, target, lanes = [], [], []
    places: dict[int, int] = {}  # of full pages
    used = 0
    for s in range(streams):
        count = int(counts[s])
        owner, order = _list_pages(lists.sizes[s])
        held = lists.table[lists.starts[s][owner] + order].astype(np.int64)
        begun = np.argsort(keeping.pool.pages.take("ids", held * LANES), kind="stable")
        owner, order, held = owner[begun], order[begun], held[begun]
        filled = np.minimum(lists.sizes[s][owner] - order * LANES, LANES)
        for slot in range(count):
            place = places.get(int(held[slot])) if filled[slot] == LANES else None
            if place is None:
                place, used = used, used + 1
                source.append(held[slot])
                target.append(place)
                lanes.append(filled[slot])
            if filled[slot] == LANES:
                places[int(held[slot])] = place
            found["pages"][s, slot] = place
            found["before"][s, slot] = last[s, owner[slot]]
            last[s, owner[slot]] = slot
        found["labels"][s, :count] = owner << 5 | filled
        found["orders"][s, :count] = order
    near = _near(batch, fill)
    content = _content(keeping.pool, np.array([source, target, lanes], np.int64).reshape(3, -1), pool, fill)
    by_stream = streams, nlist
    arrays: dict[str, NDArray[Any]] = {
        "lengths": batch.lengths.astype(np.int32),
        "first": batch.first.astype(np.int32),
        **near,
        **content,
        **found,
        "counts": counts.astype(np.int32),
        "sizes": lists.sizes.astype(np.int32),
        "coded": np.stack([table.coded for table in tables]).reshape(by_stream).astype(np.int32),
        "last": last,
        "anchors": lists.anchors,
        "anchor_scales": lists.anchor_scales,
        "sums": np.stack([table.sums for table in tables]).reshape(*by_stream, d),
        "means": lists.means,
        "mean_scales": lists.mean_scales,
        "squares": np.stack([table.squares for table in tables]).reshape(by_stream),
    }
    return Streams(**{name: xp.asarray(array) for name, array in arrays.items()}, sinks=keeping.sinks)


def _filled(shape: tuple[int, ...], dtype: Any, fill: int) -> NDArray[Any]:
    raw = np.full((*shape, np.dtype(dtype).itemsize), fill, np.uint8)
    array: NDArray[Any] = raw.view(dtype).reshape(shape)
    return array


def _list_pages(sizes: Ints) -> tuple[Ints, Ints]:
    """Return list and number in its list of each page, list by list."""
    each = -(-sizes // LANES)
    return np.repeat(np.arange(len(sizes)), each), ranges(np.zeros_like(each), each)


def _near(batch: Batch, fill: int) -> dict[str, NDArray[Any]]:
    keeping, near = batch.keeping, batch.near
    pool, sinks = keeping.pool, keeping.sinks
    ring = ring_places(keeping.window, keeping.flush, keeping.dense_below)
    arrays = {
        name: _filled((len(near.sinks), sinks + ring, pool.d), pool.dtype, fill)
        for name in ("near_keys", "near_values")
    }
    for s in range(len(near.sinks)):
        rows, positions = near.rows(s)
        places = np.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
        arrays["near_keys"][s, places] = pool.pages.take("keys", rows)
        arrays["near_values"][s, places] = pool.pages.take("values", rows)
    return arrays


def _content(pool: PagePool, copied: Ints, room: int, fill: int) -> dict[str, NDArray[Any]]:
    """Return pages with copies of the pool's: `copied` holds number there, number here and lanes of each."""
    source, target, lanes = copied
    count = max(room, len(target), 1)
    shapes: dict[str, tuple[int, ...]] = {
        "keys": (count, LANES, pool.d),
        "values": (count, LANES, pool.d),
        "codes": (count, LANES, pool.words),
        "exponents": (count, LANES),
        "ids": (count, LANES),
    }
    page = np.repeat(np.arange(len(target)), lanes)
    lane = ranges(np.zeros_like(lanes), lanes)
    arrays = {}
    for name, shape in shapes.items():
        array = _filled(shape, getattr(pool.pages, name)[0].dtype, fill)
        array[target[page], lane] = pool.pages.take(name, source[page] * LANES + lane)
        arrays[name] = array
    arrays["codes"] = np.ascontiguousarray(arrays["codes"].transpose(0, 2, 1))
    return arrays


def from_streams(
    streams: Streams, keeping: Keeping, centroids: Several[NDArray[np.float32] | None] | None = None
) -> Batch:
    """Return the sequences of `streams`, in pages of ``keeping.pool``; full pages that they share stay so.

    Parameters
    ----------
    streams
        Arrays of NumPy or CuPy.
    keeping
        How an index on the host keeps sequences, with the codebook that `streams` was made with.
    centroids
        (H, nlist, d) of each sequence whose centroids were fitted to it, None for the others.
    """
    host = Streams._make(as_host(array) for array in streams)
    pool, heads, total = keeping.pool, keeping.codebook.heads, keeping.codebook.heads * keeping.codebook.nlist
    pages, held = _taken_over(host, pool)
    sequences = []
    for b, (length, first) in enumerate(zip(host.lengths.tolist(), host.first.tolist(), strict=True)):
        of = slice(b * heads, (b + 1) * heads)
        sinks, recent = (
            _run(host, pool, of, start, end)
            for start, end in ((0, min(length, keeping.sinks)), (first, max(first, length)))
        )
        by_list = [pages[s, _by_list(host, s)] for s in range(of.start, of.stop)]
        statistics = {
            name: getattr(host, name)[of].reshape(total, *getattr(host, name).shape[2:]).copy()
            for name in ("anchors", "anchor_scales", "sums", "means", "mean_scales", "squares")
        }
        table = Table(
            held=PageSet(pool, np.concatenate(by_list)),
            sizes=host.sizes[of].reshape(-1).astype(np.int64),
            coded=host.coded[of].reshape(-1).astype(np.int64),
            **statistics,
            slopes=np.zeros((heads, keeping.codebook.code.step.shape[1], keeping.codebook.d), np.float32),
            fitted=0,
            centroids=None if centroids is None else centroids[b],
        ).with_slopes(keeping.codebook, pool)
        sequences.append(Sequence(length, sinks, recent, table))
    del held  # by now the tables hold its pages
    return Batch(keeping, sequences)


def as_host(array: Any) -> Any:
    """Return an array of CuPy as NumPy's; anything else as it is."""
    return array.get() if hasattr(array, "get") else array


def _taken_over(host: Streams, pool: PagePool) -> tuple[NDArray[np.int32], PageSet]:
    """Put the pages of streams into a pool; return the page there of each page of a stream, and what holds
    them.
    """
    valid = np.arange(host.pages.shape[1]) < host.counts[:, None]
    places, where = np.unique(host.pages[valid], return_inverse=True)
    lanes = np.zeros(len(places), np.int64)
    np.maximum.at(lanes, where, host.labels[valid] & 31)
    held = pool.allocate((len(places),))
    page, lane = np.repeat(np.arange(len(places)), lanes), ranges(np.zeros_like(lanes), lanes)
    at = places[page], lane
    rows = held.pages[page].astype(np.int64) * LANES + lane
    words = host.codes[places[page], :, lane]
    pool.write(rows, host.keys[at], host.values[at], host.ids[at], words, host.exponents[at])
    pages = np.full(host.pages.shape, -1, np.int32)
    pages[valid] = held.pages[where]
    return pages, held


def _by_list(host: Streams, stream: int) -> Ints:
    """Return the pages of a stream list by list."""
    count = int(host.counts[stream])
    slots: Ints = np.lexsort((host.orders[stream, :count], host.labels[stream, :count] >> 5))
    return slots


def _run(host: Streams, pool: PagePool, of: slice, start: int, end: int) -> Run:
    """Put near keys at positions ``start : end`` of the streams `of` into a pool."""
    ring, positions = host.near_keys.shape[1] - host.sinks, np.arange(start, end)
    places = np.where(positions < host.sinks, positions, host.sinks + (positions - host.sinks) % ring)
    run = Run.empty(pool, of.stop - of.start, start)
    return run.appended(pool, host.near_keys[of, places], host.near_values[of, places])
