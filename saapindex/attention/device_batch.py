"""Sequences on a CUDA device: in arrays that stay where they are, so that steps can be captured in a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.batch import Batch
from saapindex.attention.device_book import DeviceBook
from saapindex.attention.device_cut import copy_open_pages, cut_lists, in_lists, near_places, slots, wide
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.sequence import Keeping
from saapindex.attention.streams import from_streams, kept_near, ring_places, to_streams
from saapindex.attention.table import ADAPT_FROM
from saapindex.attention.tensors import STORED
from saapindex.backends.base import LANES, Ints
from saapindex.backends.cuda.append import (
    STATUS,
    AppendRules,
    AppendSpace,
    PagesInPool,
    append_streams,
    argument,
    most_pages,
    with_keys,
)
from saapindex.backends.cuda.streams import Streams
from saapindex.errors import DeviceMemoryError, InvalidInputError
from saapindex.lists.device_pool import DevicePool

__all__ = ["DeviceBatch", "DeviceKeeping"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
_POOLED = ("keys", "values", "codes", "exponents", "ids")
_BY_PAGE = ("pages", "labels", "orders", "before")
_BY_SEQUENCE = ("lengths", "first")
_MANY = 4096  # entering keys of all streams from which on more blocks pay


@dataclass(frozen=True, eq=False)
class DeviceKeeping:
    """How sequences are kept on a device: what `AttentionIndex` was made with, and the pool of pages.

    Attributes
    ----------
    xp
        ``cupy``, with the right device current; or ``numpy``.
    """

    book: DeviceBook
    pool: DevicePool
    dtype: str
    window: int
    sinks: int
    flush: int
    adapt: int
    dense_below: int
    xp: Any

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.book.codebook.heads

    @property
    def ring(self) -> int:
        """Places of the ring."""
        return ring_places(self.window, self.flush, self.dense_below)

    def window_start(self, length: Ints, first: Ints) -> Ints:
        """Return the first position that stays out of the lists, see `Sequence`."""
        kept = kept_near(self.window)
        end = np.maximum(length, self.sinks)
        stays = ((end < self.dense_below) & (first == self.sinks)) | (end - first < kept + self.flush)
        moved = self.sinks + (end - kept - self.sinks) // LANES * LANES
        return np.where(stays, first, moved)


class DeviceBatch:
    """The sequences of an index on a device; unlike `Batch` it changes in place.

    What the host knows of it without waiting for the device: lengths, as long as no step was captured in a
    graph, and how many pages are free at least.

    Parameters
    ----------
    keeping
        How they are kept.
    streams
        Arrays on the device, of which those of the pool are the pool's.
    centroids
        (H, L, d) on the device of each sequence whose centroids were fitted to it.
    """

    def __init__(self, keeping: DeviceKeeping, streams: Streams, centroids: list[Array | None]) -> None:
        xp = keeping.xp
        self.keeping, self.centroids = keeping, centroids
        self._own = {name: array for name, array in streams._asdict().items() if name not in _POOLED}
        self._counters = xp.zeros(6, np.int32)
        self._known: tuple[Ints, Ints] | None = None
        self._begun = 0  # pages of a stream, at most
        self._forms: tuple[Array, Array] | None = None
        self._made: tuple[Any, int] | None = None
        self._space: AppendSpace | None = None
        self.spaces: dict[Any, Any] = {}  # what `attend` works in
        self._sink_logits: Array | None = None
        self.reserved = 0
        self._set_forms()
        self._learn()

    @classmethod
    def empty(cls, keeping: DeviceKeeping, count: int) -> Self:
        """Return `count` sequences without keys."""
        xp, book = keeping.xp, keeping.book.codebook
        streams, lists, d = count * book.heads, book.nlist, book.d
        near = xp.zeros((2, streams, keeping.sinks + keeping.ring, d), STORED[keeping.dtype])
        pages = xp.zeros((4, streams, 0), np.int32)
        return cls(
            keeping,
            Streams(
                lengths=xp.zeros(count, np.int32),
                first=xp.full(count, keeping.sinks, np.int32),
                near_keys=near[0],
                near_values=near[1],
                **keeping.pool.arrays,
                **dict(zip(_BY_PAGE, pages, strict=True)),
                counts=xp.zeros(streams, np.int32),
                sizes=xp.zeros((streams, lists), np.int32),
                coded=xp.zeros((streams, lists), np.int32),
                last=xp.full((streams, lists), -1, np.int32),
                anchors=xp.zeros((streams, lists, d), np.int8),
                anchor_scales=xp.zeros((streams, lists), np.float32),
                sums=xp.zeros((streams, lists, d), np.float32),
                means=xp.zeros((streams, lists, d), np.int8),
                mean_scales=xp.zeros((streams, lists), np.float32),
                squares=xp.zeros((streams, lists), np.float32),
                sinks=keeping.sinks,
            ),
            [None] * count,
        )

    @classmethod
    def of(cls, keeping: DeviceKeeping, batch: Batch) -> Self:
        """Return the sequences of an index on the host, with an empty pool to hold them."""
        xp, pool = keeping.xp, keeping.pool
        host = to_streams(batch)
        with allocating(f"{len(host.keys)} pages of {pool.page_nbytes} bytes"):
            pool.ensure(len(host.keys))
            for name, array in pool.arrays.items():
                array[: len(host.keys)] = xp.asarray(getattr(host, name))
            made = cls(
                keeping,
                Streams._make(
                    pool.arrays.get(name, array if name == "sinks" else xp.asarray(array))
                    for name, array in host._asdict().items()
                ),
                [
                    None if s.lists.centroids is None else xp.asarray(s.lists.centroids)
                    for s in batch.sequences
                ],
            )
            pool.hold(made.streams.pages[slots(made.streams, xp)])
        pool.settle()
        return made

    def to_host(self, keeping: Keeping) -> Batch:
        """Return the sequences as an index on the host keeps them."""
        host = [None if c is None else (c.get() if hasattr(c, "get") else c.copy()) for c in self.centroids]
        return from_streams(self.streams, keeping, host)

    def __del__(self) -> None:
        if getattr(self, "_own", None):
            self.keeping.pool.abandon(self._own["pages"], self._own["counts"])

    @property
    def streams(self) -> Streams:
        """What kernels read."""
        return Streams(**self._own, **self.keeping.pool.arrays)

    def _learn(self) -> tuple[Ints, Ints]:
        """Read from the device how long the sequences are; it may have gone on by replays of a graph."""
        lengths, first = (_host(self._own[name]).astype(np.int64) for name in _BY_SEQUENCE)
        self._begun = int(_host(self._own["counts"]).max(initial=0))
        self._known = lengths, first
        status = int(self._counters[0])
        if status:
            self._counters[0] = 0
            what = "; ".join(text for bit, text in STATUS.items() if status & bit)
            raise DeviceMemoryError(
                f"steps of a graph went past what was reserved, so {what}: reserve() more before the capture"
            )
        return self._known

    @property
    def lengths(self) -> Ints:
        """Keys of each sequence."""
        return (self._known or self._learn())[0]

    @property
    def first(self) -> Ints:
        """Position of the first recent key of each sequence."""
        return (self._known or self._learn())[1]

    @property
    def known(self) -> bool:
        """Whether the host knows the lengths without waiting for the device."""
        return self._known is not None

    @property
    def list_sizes(self) -> Ints:
        """Keys in each list, (B, H, L)."""
        sizes = _host(self._own["sizes"]).astype(np.int64)
        return sizes.reshape(len(self.centroids), -1, sizes.shape[1])

    def added(self, keys: Array, values: Array, wanted: NDArray[np.bool_] | None = None) -> Self:
        """Add keys and values, (B, H, m, d) on the device, to the end of each sequence.

        Parameters
        ----------
        wanted
            (B, m): which of them belong to each sequence; None for all.
        """
        keys, values = (_rows_contiguous(x, self.keeping.xp) for x in (keys, values))
        if capturing(self.keeping.xp):
            return self._captured(keys, values, wanted)
        count = np.full(len(self.centroids), keys.shape[2])
        fresh = None
        if wanted is not None:
            keys, values, count = _packed(keys, values, wanted, self.keeping.xp)
            fresh = self.keeping.xp.asarray(count.astype(np.int32))
        lengths, first = self.lengths + count, self.first
        start = self.keeping.window_start(lengths, first)
        entering = start - first
        space = labels = None
        most, many = int(entering.max(initial=0)), int(entering.sum()) * self.keeping.heads >= _MANY
        if most:
            self._make_room(entering)
            with allocating(f"what the entering of {most} keys needs"):
                if most > self._step_space().order.shape[1]:
                    space = AppendSpace.empty(self.streams, most, self.keeping.xp, self._counters)
                self._adapt(keys, count, entering)
                if space is not None:
                    labels = self._labels(keys, count, entering, most)
        self._launch(keys, values, fresh, labels, space, many=many)
        self._known = lengths, start
        if most:
            self._begun += most_pages(most, self.keeping.book.codebook.nlist)
            self.keeping.pool.bound -= self._need(entering)
        return self

    def _captured(self, keys: Array, values: Array, wanted: Any) -> Self:
        if wanted is not None:
            raise InvalidInputError(
                "lengths and masks cannot be captured in a graph, expected keys for all sequences"
            )
        if not self.reserved:
            raise InvalidInputError(
                "an addition is captured in a graph, but no room was reserved for it: call reserve(tokens) before, "
                "with as many tokens as all replays will add"
            )
        self._launch(keys, values, None, None, None, many=False)
        self._known = None
        return self

    def _launch(
        self,
        keys: Array,
        values: Array,
        fresh: Array | None,
        labels: Array | None,
        space: AppendSpace | None,
        *,
        many: bool,
    ) -> None:
        made = self._argument() if space is None else self._arguments(space)
        append_streams(
            with_keys(made, keys, values, fresh, labels),
            keys.shape[3],
            self._own["near_keys"].dtype,
            many=many,
        )

    def _argument(self) -> Any:
        version = self.keeping.pool.version
        if self._made is None or self._made[1] != version:
            self._made = self._arguments(self._step_space()), version
        return self._made[0]

    def _arguments(self, space: AppendSpace) -> Any:
        keeping, pool = self.keeping, self.keeping.pool
        forms = keeping.book.forms
        if self._forms is not None:
            forms = forms._replace(forms=self._forms[0], bias=self._forms[1])
        rules = AppendRules(kept_near(keeping.window), keeping.flush, keeping.dense_below)
        pages = PagesInPool(pool.holders, pool.free, pool.available)
        return argument(self.streams, pages, forms, rules, space)

    def _step_space(self) -> AppendSpace:
        if self._space is None:
            self._space = AppendSpace.empty(self.streams, self.keeping.ring, self.keeping.xp, self._counters)
        return self._space

    def _need(self, entering: Ints) -> int:
        """Pages that the entering keys may take."""
        lists = self.keeping.book.codebook.nlist
        return self.keeping.heads * sum(most_pages(int(m), lists) for m in entering)

    def _make_room(self, entering: Ints) -> None:
        """See to pages, and to places in the tables, for entering keys, (B,)."""
        each = most_pages(int(entering.max()), self.keeping.book.codebook.nlist)
        self._provide(self._need(entering), each)

    def _provide(self, pages: int, each: int) -> None:
        """See to it that so many pages are free, and that each stream's table has places for `each` more."""
        pool, xp = self.keeping.pool, self.keeping.xp
        need = f"{pages} pages of {pool.page_nbytes} bytes and {self._begun + each} places for pages of each KV head"
        with allocating(need):
            if pool.shared:
                held = pool.holders[self._own["pages"][slots(self.streams, xp)]]
                pages += int((held > 1).sum())  # a list that is coded anew takes copies of them
            if pool.bound < pages:
                pool.ensure(pages)
            room = self._own["pages"].shape[1]
            if self._begun + each > room:
                self._learn()
            if self._begun + each > room:
                self._widen(max(self._begun + each, room + room // 2))

    def _widen(self, room: int) -> None:
        xp, old = self.keeping.xp, self._own["pages"].shape[1]
        grown = {name: xp.zeros((len(self._own["counts"]), room), np.int32) for name in _BY_PAGE}
        for name, array in grown.items():
            array[:, :old] = self._own[name]
        self._own |= grown
        self._made = self._space = None
        self.spaces.clear()

    def reserve(self, tokens: int) -> None:
        """Make room for so many more keys of every sequence, so that adding them never needs the host."""
        lists, (lengths, first) = self.keeping.book.codebook.nlist, self._learn()
        entering = int((lengths - first).max(initial=0)) + tokens
        each = entering // LANES + min(entering, lists) + most_pages(self.keeping.ring, lists)
        self._provide(each * len(self._own["counts"]), each)
        with allocating("what the entering of keys needs"):
            self._argument()
        self.reserved = tokens

    def _entering(self, b: int, keys: Array, count: int, m: int) -> list[Array]:
        """Return the `m` keys of a sequence that enter the lists, (H, n, d) each: from the ring, then new ones."""
        start, length = int(self.first[b]), int(self.lengths[b])
        split, skip = min(max(length, start), start + m), keys.shape[2] - count - length
        near = self._near(b, start, split)[0]
        return [near, keys[b, :, split + skip : start + m + skip]]

    def _adapt(self, keys: Array, count: Ints, entering: Ints) -> None:
        """Fit the centroids of sequences whose lists are empty to their entering keys."""
        keeping, book = self.keeping, self.keeping.book
        wanted = (self.first == keeping.sinks) & (entering >= ADAPT_FROM * book.codebook.nlist)
        if not keeping.adapt or not wanted.any():
            return
        for b in np.flatnonzero(wanted).tolist():
            parts = self._entering(b, keys, int(count[b]), int(entering[b]))
            found = wide(keeping.xp.concatenate(parts, axis=1), keeping.xp)
            self.centroids[b] = book.adapt(found, int(self.first[b]), keeping.adapt)
        self._set_forms()

    def _labels(self, keys: Array, count: Ints, entering: Ints, most: int) -> Array | None:
        """Return the lists of many entering keys, (S, most), if tensor cores can tell them."""
        book, heads, xp = self.keeping.book, self.keeping.heads, self.keeping.xp
        if not book.by_tensor_cores:
            return None
        labels = xp.empty((len(self._own["counts"]), most), np.int32)
        for b in np.flatnonzero(entering).tolist():
            of = slice(b * heads, (b + 1) * heads)
            own = None if self._forms is None else (self._forms[0][of], self._forms[1][of])
            at = 0
            for part in self._entering(b, keys, int(count[b]), int(entering[b])):
                n = part.shape[1]
                if n:
                    labels[of, at : at + n] = book.assign(part, own)
                at += n
        return labels

    def _set_forms(self) -> None:
        """Lay out the forms of all sequences, if some have their own."""
        book, xp = self.keeping.book, self.keeping.xp
        self._forms = self._made = None
        if any(centroids is not None for centroids in self.centroids):
            offline = book.forms.forms, book.forms.bias
            found = [offline if c is None else book.own_forms(c) for c in self.centroids]
            self._forms = tuple(xp.concatenate(part) for part in zip(*found, strict=True))  # type: ignore[assignment]

    def _near(self, b: int, start: int, end: int) -> tuple[Array, Array]:
        """Return near keys and values of a sequence at positions ``start : end``, (H, n, d)."""
        of = slice(b * self.keeping.heads, (b + 1) * self.keeping.heads)
        places = near_places(self.streams, self.keeping.xp.arange(start, max(start, end)))
        return self._own["near_keys"][of][:, places], self._own["near_values"][of][:, places]

    def truncated(self, wanted: Ints, sequence: int | None = None) -> Self:
        """Keep the first `wanted` keys of each sequence, or of one."""
        keeping, (lengths, first) = self.keeping, self._learn()
        lengths, start = lengths.copy(), first.copy()
        for b, length in enumerate(wanted.tolist()):
            if sequence in (None, b) and length < lengths[b]:
                lengths[b], start[b] = length, self._truncated_start(length, int(first[b]))
        base, xp = keeping.book.forms.base, keeping.xp
        if keeping.pool.shared:
            with allocating("copies of pages that are cut"):
                keeping.pool.ensure(int((start < first).sum()) * keeping.heads * keeping.book.codebook.nlist)
        for b in np.flatnonzero(start < first):
            of = range(int(b) * keeping.heads, (int(b) + 1) * keeping.heads)
            cut_lists(self.streams, keeping.pool, of, int(start[b]), int(first[b]), int(lengths[b]), base, xp)
            if start[b] == keeping.sinks:
                self.centroids[b] = None
        if (start < first).any():
            keeping.pool.settle()
            self._set_forms()
        self._own["lengths"][...] = xp.asarray(lengths.astype(np.int32))
        self._own["first"][...] = xp.asarray(start.astype(np.int32))
        self._learn()
        return self

    def _truncated_start(self, length: int, first: int) -> int:
        """Return the first position out of the lists after a cut, see `Sequence.truncated`."""
        sinks, window = self.keeping.sinks, self.keeping.window
        if length <= sinks or length < self.keeping.dense_below - self.keeping.flush:
            return sinks
        if length - first < window:
            return min(first, sinks + max(0, length - kept_near(window) - sinks) // LANES * LANES)
        return first

    def forked(self, numbers: Ints | None = None) -> Self:
        """Return these sequences, by default all, with full pages shared and all else copied."""
        xp, heads, lengths = self.keeping.xp, self.keeping.heads, self.lengths
        numbers = np.arange(len(lengths)) if numbers is None else numbers
        rows = xp.asarray((numbers[:, None] * heads + np.arange(heads)).reshape(-1))
        with allocating(f"the copies that {len(numbers)} sequences need"):
            own = {
                name: array
                if name == "sinks"
                else array[xp.asarray(numbers) if name in _BY_SEQUENCE else rows]
                for name, array in self._own.items()
            }
            streams = Streams(**own, **self.keeping.pool.arrays)
            copy_open_pages(streams, self.keeping.pool, xp)
        self.keeping.pool.shared = True
        own = {name: array for name, array in streams._asdict().items() if name not in _POOLED}
        other = type(self)(
            self.keeping,
            Streams(**own, **self.keeping.pool.arrays),
            [self.centroids[b] for b in numbers],
        )
        return other

    def reordered(self, numbers: Ints) -> Self:
        """Let sequence `i` be what ``numbers[i]`` was; in place if there are as many as before."""
        other = self.forked(numbers)
        if len(numbers) != len(self.centroids):
            return other
        for name, array in self._own.items():
            if name != "sinks":
                mine = array.copy()
                array[...] = other._own[name]
                other._own[name] = mine  # goes back to the pool with it
        self.centroids, self._known = other.centroids, other._known
        self._begun = other._begun
        self._set_forms()
        return self

    def content(self, sequence: int) -> tuple[Array, Array]:
        """Return the keys and values of a sequence in order of position, (H, length, d)."""
        xp, streams, heads = self.keeping.xp, self.streams, self.keeping.heads
        length, first = int(self.lengths[sequence]), int(self.first[sequence])
        shape = heads, length, streams.keys.shape[2]
        keys, values = xp.empty(shape, streams.keys.dtype), xp.empty(shape, streams.keys.dtype)
        for start, end in ((0, min(length, streams.sinks)), (first, length)):
            if start < end:
                keys[:, start:end], values[:, start:end] = self._near(sequence, start, end)
        for h in range(heads):
            page, lane, position = in_lists(streams, sequence * heads + h, 0, length, xp)
            keys[h, position], values[h, position] = streams.keys[page, lane], streams.values[page, lane]
        return keys, values

    def memory(self) -> MemoryStatement:
        """Return what is held."""
        pool, streams = self.keeping.pool, self.streams
        row = 2 * self.keeping.heads * pool.d * streams.keys.dtype.itemsize
        held = [array for name, array in self._own.items() if name != "sinks"]
        scratch = [*(self._space or ()), *(self._forms or ()), *self._buffers]
        return MemoryStatement(
            plain=int(self.lengths.sum()) * row,
            pages=pool.nbytes,
            used=pool.used * pool.page_nbytes,
            statistics=sum(array.nbytes for array in (*held, *scratch)) + self.keeping.book.nbytes,
        )

    def sinks_on_device(self, logits: NDArray[np.float32]) -> Array:
        """Return learned logits on the device, the same array each time."""
        if self._sink_logits is None:
            self._sink_logits = self.keeping.xp.asarray(logits)
        return self._sink_logits

    @property
    def _buffers(self) -> list[Array]:
        return [array for space in self.spaces.values() for array in space if hasattr(array, "nbytes")]


def _host(array: Array) -> NDArray[Any]:
    host: NDArray[Any] = array.get() if hasattr(array, "get") else array
    return host


def _rows_contiguous(x: Array, xp: Any) -> Array:
    """Return `x` with rows that kernels can read word by word."""
    item = x.dtype.itemsize
    fits = x.strides[-1] == item and all(stride % 4 == 0 for stride in x.strides[:-1])
    return x if fits else xp.ascontiguousarray(x)


def _packed(
    keys: Array, values: Array, wanted: NDArray[np.bool_], xp: Any
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return keys and values with the wanted ones of each sequence at the end, and how many they are."""
    count, m = wanted.sum(axis=1), wanted.shape[1]
    if not (wanted == (np.arange(m) >= m - count[:, None])).all():
        order = xp.asarray(np.argsort(wanted, axis=1, kind="stable"))[:, None, :, None]
        keys, values = (xp.take_along_axis(x, order, axis=2) for x in (keys, values))
    return keys, values, count


def capturing(xp: Any) -> bool:
    """Whether the current stream is being captured in a graph."""
    return xp is not np and xp.cuda.get_current_stream().is_capturing()


@contextlib.contextmanager
def allocating(what: str) -> Iterator[None]:
    """Say what was needed where the memory of the device is too small for it."""
    try:
        yield
    except MemoryError as error:  # CuPy's OutOfMemoryError is one
        raise DeviceMemoryError(f"the device has no memory for {what}: {error}") from error
