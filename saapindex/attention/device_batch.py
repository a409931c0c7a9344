"""Sequences on a CUDA device: keys are added, taken back, forked and reordered where they are."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.batch import Batch
from saapindex.attention.device_arrays import BY_PAGE, BY_SEQUENCE, POOLED, DeviceArrays
from saapindex.attention.device_cut import EMPTY, copy_open_pages, cut_lists, slots
from saapindex.attention.device_keeping import DeviceKeeping, allocating, capturing
from saapindex.attention.device_tensors import refuse
from saapindex.attention.sequence import Keeping
from saapindex.attention.streams import as_host, from_streams, to_streams
from saapindex.attention.table import ADAPT_FROM
from saapindex.attention.tensors import STORED
from saapindex.backends.base import Ints
from saapindex.backends.cuda.append import append_streams
from saapindex.backends.cuda.append_state import AppendSpace, most_pages, with_keys
from saapindex.backends.cuda.finite import Finiteness
from saapindex.backends.cuda.step import NewToken
from saapindex.backends.cuda.streams import Streams
from saapindex.errors import InvalidInputError

__all__ = ["DeviceBatch"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
_MANY = 4096  # entering keys of all streams from which on more blocks pay


class DeviceBatch(DeviceArrays):
    """The sequences of an index on a device; unlike `Batch` it changes in place: graphs go on with it.

    See `DeviceArrays` for how it is made.
    """

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
                **dict(zip(BY_PAGE, pages, strict=True)),
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
        host = [None if c is None else as_host(c).copy() for c in self.centroids]
        return from_streams(self.streams, keeping, host)

    def __del__(self) -> None:
        if getattr(self, "_own", None):
            self.keeping.pool.abandon(self._own["pages"], self._own["counts"])

    def added(
        self,
        keys: Array,
        values: Array,
        wanted: NDArray[np.bool_] | None = None,
        looks: Finiteness | None = None,
    ) -> Self:
        """Add keys and values, (B, H, m, d) on the device, to the end of each sequence.

        Parameters
        ----------
        wanted
            (B, m): which of them belong to each sequence; None for all.
        looks
            Finds out whether they are finite, for which the host waits when it has launched what it can.

        Raises
        ------
        InvalidInputError
            If they are not; then the sequences are as they were.
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
                if self.keeping.adapt and looks is not None:
                    refuse(looks, self.keeping.dtype)
                self._adapt(keys, count, entering)
                if space is not None:
                    labels = self._labels(keys, count, entering, most)
        if looks is not None:
            refuse(looks, self.keeping.dtype)
        self._launch(keys, values, fresh, labels, space, many=many)
        self._set_known((lengths, start))
        if most:
            self._begun += most_pages(most, self.keeping.book.codebook.nlist)
            self.keeping.pool.bound -= self._need(entering)
        return self

    def taken(self, keys: Array, values: Array) -> NewToken | None:
        """Prepare a token of every sequence, (B, H, 1, d) on the device, for a step that adds it itself.

        Returns None, and does nothing, where the host knows that keys are due to enter the lists. In a graph
        the device decides about that in a launch of its own, before the step.
        """
        keys, values = (_rows_contiguous(x, self.keeping.xp) for x in (keys, values))
        pool = self.keeping.pool
        if capturing(self.keeping.xp):
            if self._flushed:
                self._flushed = False
            else:
                self._captured(keys, values, None, later=True)
        else:
            lengths, first = self.lengths + 1, self.first
            if (self.keeping.window_start(lengths, first) > first).any():
                return None
            self._set_known((lengths, first))
        return NewToken(keys, values, pool.moved, pool.version, self._tickets)

    def _captured(self, keys: Array, values: Array, wanted: Any, *, later: bool = False) -> Self:
        if wanted is not None:
            raise InvalidInputError(
                "lengths and masks cannot be captured in a graph, expected keys for all sequences"
            )
        self._begin_capture()
        self._launch(keys, values, None, None, None, many=False, later=later)
        return self

    def _begin_capture(self) -> None:
        if not self.reserved:
            raise InvalidInputError(
                "an addition is captured in a graph, but no room was reserved for it: call reserve(tokens) "
                "before, with as many tokens as all replays will add"
            )
        self._known, self._captured_once, self.keeping.pool.captured = None, True, True
        self._flushed = False

    def to_flush(self) -> Any:
        """Return the argument of a flush before the next token of a captured step: see `flush_streams`."""
        if capturing(self.keeping.xp):
            self._begin_capture()
            self._flushed = True
        return self._argument()

    def _launch(
        self,
        keys: Array,
        values: Array,
        fresh: Array | None,
        labels: Array | None,
        space: AppendSpace | None,
        *,
        many: bool,
        later: bool = False,
    ) -> None:
        made = self._argument() if space is None else self._arguments(space)
        append_streams(
            with_keys(made, keys, values, fresh, labels, later=later),
            keys.shape[3],
            self._own["near_keys"].dtype,
            many=many,
        )

    def _entering(self, b: int, keys: Array, count: int, m: int) -> list[Array]:
        """Return the `m` keys of a sequence that enter the lists, (H, n, d): of the ring, and new ones."""
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
            found = parts[1] if not parts[0].shape[1] else keeping.xp.concatenate(parts, axis=1)
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

    def truncated(self, wanted: Ints, sequence: int | None = None) -> Self:
        """Keep the first `wanted` keys of each sequence, or of one."""
        keeping, (lengths, first) = self.keeping, self._learn()
        lengths, start = lengths.copy(), first.copy()
        for b, length in enumerate(wanted.tolist()):
            if sequence in (None, b) and length < lengths[b]:
                lengths[b], start[b] = length, keeping.truncated_start(length, int(first[b]))
        base, xp = keeping.book.forms.base, keeping.xp
        if keeping.pool.shared:
            with allocating("copies of pages that are cut"):
                keeping.pool.ensure(int((start < first).sum()) * keeping.heads * keeping.book.codebook.nlist)
        for b in np.flatnonzero(start < first).tolist():
            of = range(b * keeping.heads, (b + 1) * keeping.heads)
            cut_lists(self.streams, keeping.pool, of, int(start[b]), int(first[b]), int(lengths[b]), base, xp)
            if start[b] == keeping.sinks:  # no key is in lists
                self.centroids[b] = None
        if (start < first).any():
            keeping.pool.settle()
            self._set_forms()
        self._own["lengths"][...] = xp.asarray(lengths.astype(np.int32))
        self._own["first"][...] = xp.asarray(start.astype(np.int32))
        self._learn()
        return self

    def cleared(self) -> Self:
        """Forget every key, and keep the memory for others."""
        self.keeping.pool.abandon(self._own["pages"].copy(), self._own["counts"].copy())
        for name in ("lengths", "counts", "sizes", "coded", *EMPTY):
            self._own[name].fill(0)
        self._own["first"].fill(self.keeping.sinks)
        self._own["last"].fill(-1)
        self.centroids = [None] * len(self.centroids)
        self._set_forms()
        self._learn()
        self.keeping.pool.settle()
        return self

    def forked(self, numbers: Ints | None = None) -> Self:
        """Return these sequences, by default all, with full pages shared and all else copied."""
        xp, heads, lengths = self.keeping.xp, self.keeping.heads, self.lengths
        numbers = np.arange(len(lengths)) if numbers is None else numbers
        rows = xp.asarray((numbers[:, None] * heads + np.arange(heads)).reshape(-1))
        with allocating(f"the copies that {len(numbers)} sequences need"):
            own = {
                name: array
                if name == "sinks"
                else array[xp.asarray(numbers) if name in BY_SEQUENCE else rows]
                for name, array in self._own.items()
            }
            streams = Streams(**own, **self.keeping.pool.arrays)
            copy_open_pages(streams, self.keeping.pool, xp)
        self.keeping.pool.shared = True
        own = {name: array for name, array in streams._asdict().items() if name not in POOLED}
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
        self.centroids = other.centroids
        self._set_known(other._known or other._learn())
        self._begun = other._begun
        self._set_forms()
        return self


def _rows_contiguous(x: Array, xp: Any) -> Array:
    """Return `x` with rows that kernels can read 16 bytes at a time."""
    item = x.dtype.itemsize
    place = 0 if isinstance(x, np.ndarray) else x.data.ptr
    fits = x.strides[-1] == item and all(at % 16 == 0 for at in (place, *x.strides[:-1]))
    return x if fits else xp.array(x, order="C")


def _packed(
    keys: Array, values: Array, wanted: NDArray[np.bool_], xp: Any
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return keys and values with the wanted ones of each sequence at the end, and how many they are."""
    count, m = wanted.sum(axis=1), wanted.shape[1]
    if not (wanted == (np.arange(m) >= m - count[:, None])).all():
        order = xp.asarray(np.argsort(wanted, axis=1, kind="stable"))[:, None, :, None]
        keys, values = (xp.take_along_axis(x, order, axis=2) for x in (keys, values))
    return keys, values, count
