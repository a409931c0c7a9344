"""The arrays of sequences on a CUDA device, what the host knows of them, and room for them to grow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.device_cut import in_lists, near_places, slots
from saapindex.attention.device_keeping import DeviceKeeping, allocating
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.streams import as_host, kept_near
from saapindex.backends.base import LANES, Ints
from saapindex.backends.cuda.append import load
from saapindex.backends.cuda.append_state import (
    COUNTERS,
    STATUS,
    AppendRules,
    AppendSpace,
    PagesInPool,
    argument,
    most_pages,
)
from saapindex.backends.cuda.halves import halves
from saapindex.backends.cuda.streams import Streams
from saapindex.errors import DeviceMemoryError

__all__ = ["BY_PAGE", "BY_SEQUENCE", "POOLED", "DeviceArrays"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
POOLED = ("keys", "values", "codes", "exponents", "ids")
BY_PAGE = ("pages", "labels", "orders", "before")
BY_SEQUENCE = ("lengths", "first")


class DeviceArrays:
    """The sequences of an index on a device, in arrays that stay where they are.

    What the host knows without waiting for the device: lengths, as long as no step was captured in a graph,
    and how many pages are free at least.

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
        self._own = {name: array for name, array in streams._asdict().items() if name not in POOLED}
        self._counters = xp.zeros(COUNTERS, np.int32)
        self._tickets = xp.zeros(len(centroids), np.uint32)
        self._known: tuple[Ints, Ints] | None = None
        self._captured_once = False
        self._flushed = False  # whether keys that are due have left before the next token of a captured step
        self._begun = 0  # pages of a stream, at most
        self._forms: tuple[Array, Array, Array, Array] | None = None
        self._made: tuple[Any, int] | None = None
        self._space: AppendSpace | None = None
        self.spaces: dict[Any, Any] = {}  # what `attend` works in
        self._sink_logits: Array | None = None
        self.reserved = 0
        self._set_forms()
        self._learn()

    @property
    def streams(self) -> Streams:
        """What kernels read."""
        return Streams(**self._own, **self.keeping.pool.arrays)

    def _learn(self) -> tuple[Ints, Ints]:
        """Read from the device how long the sequences are; it may have gone on by replays of a graph."""
        lengths, first = (as_host(self._own[name]).astype(np.int64) for name in BY_SEQUENCE)
        self._begun = int(as_host(self._own["counts"]).max(initial=0))
        found = lengths, first
        self._set_known(found)
        status = int(self._counters[0])
        if status:
            self._counters[0] = 0
            what = "; ".join(text for bit, text in STATUS.items() if status & bit)
            raise DeviceMemoryError(
                f"steps of a graph were not done: {what}; reserve() more before the capture"
            )
        return found

    def _set_known(self, found: tuple[Ints, Ints]) -> None:
        """Note lengths; not if a graph may change them at any time."""
        self._known = None if self._captured_once else found

    def forget_lengths(self) -> None:
        """Ask the device when lengths are wanted next."""
        self._known = None

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
        sizes: Ints = as_host(self._own["sizes"]).astype(np.int64)
        return sizes.reshape(len(self.centroids), -1, sizes.shape[1])

    def _argument(self) -> Any:
        version = self.keeping.pool.version
        if self._made is None or self._made[1] != version:
            self._made = self._arguments(self._step_space()), version
        return self._made[0]

    def _arguments(self, space: AppendSpace) -> Any:
        keeping, pool = self.keeping, self.keeping.pool
        forms = keeping.book.forms
        if self._forms is not None:
            own = dict(zip(("forms", "bias", "parts", "unit"), self._forms, strict=True))
            forms = forms._replace(**own)
        rules = AppendRules(kept_near(keeping.window), keeping.flush, keeping.dense_below)
        pages = PagesInPool(pool.holders, pool.free, pool.available, pool.moved, pool.version)
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
        need = f"{pages} pages of {pool.page_nbytes} bytes, and tables of {self._begun + each} pages"
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
        room = -(-room // LANES) * LANES
        grown = {name: xp.zeros((len(self._own["counts"]), room), np.int32) for name in BY_PAGE}
        for name, array in grown.items():
            array[:, :old] = self._own[name]
        buffers = [*(self._space or ()), *self._buffers]
        self.keeping.pool.move(*(self._own[name] for name in BY_PAGE), *buffers)
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
            made = self._argument()
        if self.keeping.xp is not np:
            load(made, self._own["near_keys"].shape[2], self._own["near_keys"].dtype)
        self.reserved = tokens

    def _set_forms(self) -> None:
        """Lay out the forms of all sequences, if some have their own."""
        book, xp = self.keeping.book, self.keeping.xp
        self._forms = self._made = None
        if any(centroids is not None for centroids in self.centroids):
            offline = book.forms.forms, book.forms.bias
            found = [offline if c is None else book.own_forms(c) for c in self.centroids]
            forms, bias = (xp.concatenate(part) for part in zip(*found, strict=True))
            self._forms = forms, bias, *halves(forms, xp)

    def _near(self, b: int, start: int, end: int) -> tuple[Array, Array]:
        """Return near keys and values of a sequence at positions ``start : end``, (H, n, d)."""
        of = slice(b * self.keeping.heads, (b + 1) * self.keeping.heads)
        places = near_places(self.streams, self.keeping.xp.arange(start, max(start, end)))
        return self._own["near_keys"][of][:, places], self._own["near_values"][of][:, places]

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
