"""The keys and values of an attention index: what is added, taken back, shared and counted."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, integers
from saapindex.attention.batch import Batch
from saapindex.attention.layer import LayerCodebook
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.sequence import Keeping, Sequence
from saapindex.attention.tensors import STORED, element_type, members, of_heads, stored
from saapindex.backends import get_ops
from saapindex.devices import check_device, current, device_of, get_cupy
from saapindex.errors import InvalidInputError, PositionWarning
from saapindex.lists.paged import PagePool
from saapindex.params import AttendParameters, check_choice, check_integer

if TYPE_CHECKING:
    from saapindex.attention.device_batch import DeviceBatch
    from saapindex.attention.device_keeping import DeviceKeeping

__all__ = ["DENSE_BELOW", "AttentionStore"]

DENSE_BELOW = 4096
"""Contexts shorter than this are attended to densely by default: about where sparse steps begin to be faster,
by the crossovers in `bench/results/attend.json` and ``attend-epyc.json``, which `bench/attend.py` writes."""

_POSITIONS_END = 1 << 31
# Pages that the pool grows by, for each KV head: of 16 keys each.
_SPAN = 32


class AttentionStore:
    """The keys of several sequences in the lists of a codebook; base of `AttentionIndex`.

    Every change makes new values and puts them in place at the end, so a change that fails leaves the index
    as it was. Sequences share pages where they have the same past.
    """

    def __init__(
        self,
        codebook: LayerCodebook,
        *,
        batch: int = 1,
        window: int = 2047,
        sinks: int = 1,
        dtype: str | None = None,
        flush: int = 256,
        adapt: int = 3,
        dense_below: int = DENSE_BELOW,
        params: AttendParameters | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: ArrayLike | None = None,
        backend: str = "cpu",
        device: str = "cpu",
    ) -> None:
        if not isinstance(codebook, LayerCodebook):
            raise InvalidInputError(f"codebook is a {type(codebook).__name__}, expected a LayerCodebook")
        for name, value, minimum in (
            ("batch", batch, 1),
            ("window", window, 0),
            ("sinks", sinks, 0),
            ("flush", flush, 1),
            ("adapt", adapt, 0),
            ("dense_below", dense_below, 0),
        ):
            check_integer(name, value, minimum)
        if dtype is not None:
            check_choice("dtype", dtype, tuple(STORED))
        if params is not None and not isinstance(params, AttendParameters):
            raise InvalidInputError(f"params is a {type(params).__name__}, expected AttendParameters")
        for name, number in (("scale", scale), ("softcap", softcap)):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise InvalidInputError(f"{name} is {number!r}, expected a number above 0")
        self.codebook = codebook
        self.ops = get_ops(backend)
        self.params = AttendParameters() if params is None else params
        self.scale = codebook.scale if scale is None else float(scale)
        self.softcap = codebook.softcap if softcap is None else float(softcap)
        self.sink_logits = (
            None if sink_logits is None else of_heads(sink_logits, "sink_logits", codebook.heads)
        )
        self.window, self.sinks, self.flush = int(window), int(sinks), int(flush)
        self.adapt, self.dense_below = int(adapt), int(dense_below)
        self._device = check_device(device)
        self._model: ArrayLike = None  # an empty tensor on the device, if the caller's keys are torch's
        self._count = int(batch)
        self._dtype = dtype
        self._batch: Batch | DeviceBatch | None = None
        self._warned = False
        self._asked: tuple[tuple[Any, ...], AttendParameters] | None = None  # how to attend, and what that is

    def __repr__(self) -> str:
        book = self.codebook
        return (
            f"AttentionIndex(kv_heads={book.heads}, nlist={book.nlist}, d={book.d}, batch={self.batch}, "
            f"window={self.window}, sinks={self.sinks}, lengths={self.lengths.tolist()})"
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._count

    @property
    def device(self) -> str:
        """Where keys are: ``"cpu"``, or ``"cuda:0"`` and so on."""
        return "cpu" if self._device is None else f"cuda:{self._device}"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Keys of each sequence, int64 (batch,). After a captured step has run, this waits for the device."""
        with self._current():
            return np.zeros(self._count, np.int64) if self._batch is None else self._batch.lengths.copy()

    @property
    def dtype(self) -> str | None:
        """What keys are stored in; None before the first, whose type it will be."""
        return self._dtype

    @property
    def list_sizes(self) -> NDArray[np.int64]:
        """Keys in each list, int64 (batch, kv_heads, nlist)."""
        if self._batch is None:
            return np.zeros((self.batch, self.codebook.heads, self.codebook.nlist), np.int64)
        with self._current():
            return self._batch.list_sizes.copy()

    def _current(self, array: ArrayLike = None) -> AbstractContextManager[None]:
        """Work on the device of the index, and on the stream of the caller."""
        if self._device is None:
            return nullcontext()
        if array is not None and device_of(array) == self._device:
            return current(array)
        return current(self._device if self._model is None else self._model)

    def _start(self, dtype: str) -> Batch | DeviceBatch:
        """Return the batch as it is, or empty sequences that store `dtype`."""
        if self._batch is not None:
            return self._batch
        if self._device is None:
            return self._empty(dtype)
        from saapindex.attention.device_batch import DeviceBatch

        return DeviceBatch.empty(self._device_keeping(dtype), self._count)

    @property
    def host_batch(self) -> Batch:
        """The sequences of an index on the host that has keys."""
        if not isinstance(self._batch, Batch):
            raise InvalidInputError(f"the index is on {self.device}, expected one with keys on the host")
        return self._batch

    def _empty(self, dtype: str) -> Batch:
        """Return empty sequences on the host."""
        book = self.codebook
        span = 1 << (_SPAN * book.heads - 1).bit_length()
        pool = PagePool(book.d, STORED[dtype], book.code.words, span)
        keeping = Keeping(
            book, pool, self.ops, self.window, self.sinks, self.flush, self.adapt, self.dense_below
        )
        return Batch(keeping, [Sequence.empty(keeping)] * self._count)

    def _device_keeping(self, dtype: str) -> DeviceKeeping:
        from saapindex.attention.device_book import DeviceBook
        from saapindex.attention.device_keeping import DeviceKeeping, allocating
        from saapindex.lists.device_pool import DevicePool

        xp, book = get_cupy(), self.codebook
        with allocating("the codebook"):
            found = DeviceBook(book, xp)
        pool = DevicePool(xp, book.d, STORED[dtype], book.code.words)
        rules = self.window, self.sinks, self.flush, self.adapt, self.dense_below
        return DeviceKeeping(found, pool, dtype, *rules, xp)

    def to(self, device: str) -> Self:
        """Return a copy of the index on a device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

        Raises
        ------
        InvalidInputError, MissingDependencyError, DeviceMemoryError
            If there is no such device, no CuPy, or too little memory; the index is as it was.
        """
        from saapindex.attention.device_batch import DeviceBatch

        number, moved = check_device(device), self.fork()
        if number == self._device or self._batch is None:
            moved._device = number
            return moved
        batch = moved._batch
        if isinstance(batch, DeviceBatch):
            with self._current():
                moved._batch = batch.to_host(self._empty(str(self._dtype)).keeping)
        moved._device, moved._model = number, None
        if number is not None:
            with moved._current():
                moved._batch = DeviceBatch.of(moved._device_keeping(str(self._dtype)), moved.host_batch)
        return moved

    def reserve(self, tokens: int) -> None:
        """Make room on the device for so many more keys of every sequence.

        Adding tokens one by one then never waits for the device nor takes memory, and can be captured in a
        graph; a graph is good until the next call of `reserve`, of `reorder` to another number of
        sequences, or an addition outside of it that needs more room. On the host this does nothing.

        Parameters
        ----------
        tokens
            As many as all replays will add.

        Raises
        ------
        InvalidInputError
            If the type of the keys is not known yet: give `dtype`, or add keys before.
        DeviceMemoryError
            If there is too little memory; the index is as it was.
        """
        check_integer("tokens", tokens, 1)
        if self._device is None:
            return
        if self._dtype is None:
            raise InvalidInputError(
                "the type of the keys is not known yet, expected dtype= or keys before reserve"
            )
        with self._current():
            self._batch = self._start(self._dtype)
            self._batch.reserve(int(tokens))  # type: ignore[union-attr]

    def add(
        self, k: ArrayLike, v: ArrayLike, *, lengths: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> None:
        """Add keys and values at the end of every sequence: a whole prompt, a part of it, or a token.

        Parameters
        ----------
        k, v
            (batch, kv_heads, n, d), float16, bfloat16 or float32; keys as the model caches them, rotated.
        lengths
            int, (batch,): only the last so many of the `n` belong to each sequence (padding on the left).
        mask
            bool, (batch, n): which belong to it, instead of `lengths`.

        Raises
        ------
        InvalidInputError
            On wrong shapes, values that are not finite, or keys that the type of the index cannot hold. The
            index is as it was.
        """
        dtype = self._dtype or element_type(k, "k")
        with self._current(k):
            keys, values, looks = self._new(k, v, dtype)
            wanted = members((self.batch, keys.shape[2]), lengths, mask)
            batch = self._start(dtype)
            if batch.known:
                self._check_end(batch.lengths + (keys.shape[2] if wanted is None else wanted.sum(axis=1)))
            later = () if looks is None else (looks,)
            self._batch, self._dtype = batch.added(keys, values, wanted, *later), dtype
            if self._model is None and type(k).__module__.partition(".")[0] == "torch":
                self._model = k.new_empty(0) if device_of(k) == self._device is not None else None

    def _new(self, k: ArrayLike, v: ArrayLike, dtype: str) -> tuple[Any, Any, Any]:
        """Return new keys and values as the index stores them, and what finds out whether they are finite."""
        looks = self._looks(k)
        keys = self._stored(k, "k", None, dtype, looks)
        return keys, self._stored(v, "v", keys.shape[2], dtype, looks), looks

    def _looks(self, k: ArrayLike) -> Any:
        """Return what finds out whether new keys and values are finite; None where they are not looked at."""
        if self._device is None:
            return None
        from saapindex.attention.device_keeping import capturing
        from saapindex.backends.cuda.finite import Finiteness

        # The host would wait for the answer, which a single step must not.
        several = len(getattr(k, "shape", ())) == 4 and k.shape[2] > 1
        return Finiteness() if several and not capturing(get_cupy()) else None

    def _stored(self, value: ArrayLike, name: str, n: int | None, dtype: str, looks: Any) -> Any:
        """Return new keys or values as the index stores them, where it stores them."""
        shape = self.batch, self.codebook.heads, n, self.codebook.d
        if self._device is None:
            return stored(value, name, shape, dtype)
        from saapindex.attention.device_tensors import placed

        return placed(value, name, shape, dtype, self._device, looks)

    def _check_end(self, ends: NDArray[np.int64]) -> None:
        if int(ends.max()) >= _POSITIONS_END:
            raise InvalidInputError(
                f"a sequence would have {ends.max()} keys, expected less than {_POSITIONS_END}"
            )
        self._warn_of_positions(int(ends.max()))

    def _warn_of_positions(self, end: int) -> None:
        known = self.codebook.max_position
        if known is None or end <= known or self._warned:
            return
        warnings.warn(
            f"position {end - 1} lies past the range that this codebook was trained for (below {known}); "
            f"train with max_position={end} or more",
            PositionWarning,
            stacklevel=4,
        )
        self._warned = True

    def reconstruct(self, sequence: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the keys and values of a sequence in order of position, copied.

        Returns
        -------
        k, v : (kv_heads, length, d), as stored: float16, float32, or uint16 that holds the bits of bfloat16;
            on the device of the index
        """
        self._check_sequences(np.array([sequence]))
        if self._batch is None:
            empty = np.zeros((self.codebook.heads, 0, self.codebook.d), STORED[self._dtype or "float32"])
            return empty, empty.copy()
        with self._current():
            return self._batch.content(sequence)

    def list_order(self, page_size: int, *, near: bool = True) -> NDArray[np.int64]:
        """Return the positions of all keys list by list: an order in which keys that are visited together
        stand together.

        An index on a device is copied to the host for it.

        Parameters
        ----------
        page_size
            Every list begins at a multiple of this, and so do the sinks and the window behind all lists.
        near
            Whether the sinks and the window belong to it.

        Returns
        -------
        int64, (batch, kv_heads, most), -1 for padding
        """
        check_integer("page_size", page_size, 1)
        if self._batch is None:
            return np.empty((self.batch, self.codebook.heads, 0), np.int64)
        batch = self.host_batch if self._device is None else self.to("cpu").host_batch
        return batch.list_order(page_size, near)

    def truncate(self, n: ArrayLike, sequence: int | None = None) -> None:
        """Keep the first `n` keys of every sequence, or of one; a shorter sequence stays as it is.

        Parameters
        ----------
        n
            int, or int (batch,): keys to keep of each sequence.
        sequence
            Number of the only sequence to cut.

        Raises
        ------
        InvalidInputError
            The index is as it was.
        """
        shape: tuple[int, ...] = (
            () if np.ndim(as_numpy(n, "n")) == 0 or sequence is not None else (self.batch,)
        )
        wanted = np.broadcast_to(integers(n, "n", shape, minimum=0), (self.batch,))
        if sequence is not None:
            self._check_sequences(np.array([sequence]))
        if self._batch is None:
            return
        with self._current():
            self._batch = self._batch.truncated(wanted, sequence)

    def reorder(self, order: ArrayLike) -> None:
        """Let sequence `i` be what sequence ``order[i]`` was: beams that go on, or a part of the batch.

        Nothing is copied: sequences share what they have in common until one of them writes to it.

        Parameters
        ----------
        order
            int, (any number above 0,); one may occur several times, or not at all.
        """
        numbers = self._numbers(order, "order")
        with self._current():
            self._batch = None if self._batch is None else self._batch.reordered(numbers)
        self._count = len(numbers)

    def fork(self, sequences: ArrayLike | None = None) -> Self:
        """Return an index of its own that begins with these sequences, by default all, and shares their
        pages.

        Parameters
        ----------
        sequences
            int, (any number above 0,); one may occur several times.
        """
        numbers = None if sequences is None else self._numbers(sequences, "sequences")
        forked = copy.copy(self)
        forked._count = self.batch if numbers is None else len(numbers)
        with self._current():
            forked._batch = None if self._batch is None else self._batch.forked(numbers)
        return forked

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def _numbers(self, given: ArrayLike, name: str) -> NDArray[np.int64]:
        array = as_numpy(given, name)
        numbers = integers(array, name, (array.size,), minimum=0)
        if not len(numbers):
            raise InvalidInputError(f"{name} is empty, expected at least one sequence")
        self._check_sequences(numbers)
        return numbers

    def _check_sequences(self, numbers: NDArray[np.int64]) -> None:
        strange = numbers[(numbers < 0) | (numbers >= self.batch)]
        if len(strange):
            raise InvalidInputError(f"there is no sequence {strange[0]}, expected 0 to {self.batch - 1}")

    def reset(self) -> None:
        """Forget every key. On a device the memory is kept for the next ones, and a graph stays good."""
        with self._current():
            self._batch = None if self._batch is None else self._batch.cleared()

    def memory(self) -> MemoryStatement:
        """Return what is held, in bytes, and how much more it is than plain keys and values."""
        if self._batch is None:
            return MemoryStatement(plain=0, pages=0, used=0, statistics=0)
        with self._current():
            return self._batch.memory()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory().total
