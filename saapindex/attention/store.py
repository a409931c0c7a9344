"""The keys and values of an attention index: what is added, taken back, shared and counted."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, integers
from saapindex.attention.batch import Batch
from saapindex.attention.layer import LayerCodebook
from saapindex.attention.memory import MemoryStatement, statement
from saapindex.attention.sequence import Keeping, Sequence
from saapindex.attention.tensors import STORED, element_type, stored
from saapindex.backends import get_ops
from saapindex.errors import InvalidInputError, PositionWarning
from saapindex.lists.paged import PagePool
from saapindex.params import AttendParameters, check_choice, check_integer

__all__ = ["DENSE_BELOW", "AttentionStore"]

DENSE_BELOW = 4096
"""Contexts shorter than this are attended to densely by default: the first length at which a sparse step is
the faster one, by the crossover in `bench/results/attend.json`, which `bench/attend.py` writes."""

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
        self.sink_logits = None if sink_logits is None else _sink_logits(sink_logits, codebook.heads)
        self.window, self.sinks, self.flush = int(window), int(sinks), int(flush)
        self.adapt, self.dense_below = int(adapt), int(dense_below)
        self._count = int(batch)
        self._dtype = dtype
        self._batch: Batch | None = None
        self._warned = False

    def __repr__(self) -> str:
        book = self.codebook
        return (
            f"AttentionIndex(kv_heads={book.heads}, nlist={book.nlist}, d={book.d}, batch={self.batch}, "
            f"window={self.window}, sinks={self.sinks}, lengths={self.lengths.tolist()})"
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._count if self._batch is None else len(self._batch.sequences)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Keys of each sequence, int64 (batch,)."""
        return np.zeros(self._count, np.int64) if self._batch is None else self._batch.lengths.copy()

    @property
    def dtype(self) -> str | None:
        """What keys are stored in; None before the first, whose type it will be."""
        return self._dtype

    @property
    def list_sizes(self) -> NDArray[np.int64]:
        """Keys in each list, int64 (batch, kv_heads, nlist)."""
        shape = self.batch, self.codebook.heads, self.codebook.nlist
        if self._batch is None:
            return np.zeros(shape, np.int64)
        return self._batch.lists.sizes.reshape(shape).copy()

    def _start(self, dtype: str) -> Batch:
        """Return the batch as it is, or empty sequences that store `dtype`."""
        if self._batch is not None:
            return self._batch
        book = self.codebook
        span = 1 << (_SPAN * book.heads - 1).bit_length()
        pool = PagePool(book.d, STORED[dtype], book.code.words, span)
        keeping = Keeping(
            book, pool, self.ops, self.window, self.sinks, self.flush, self.adapt, self.dense_below
        )
        return Batch(keeping, [Sequence.empty(keeping)] * self._count)

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
        book = self.codebook
        keys = stored(k, "k", (self.batch, book.heads, None, book.d), dtype)
        n = keys.shape[2]
        values = stored(v, "v", (self.batch, book.heads, n, book.d), dtype)
        wanted = self._wanted(n, lengths, mask)
        batch = self._start(dtype)
        ends = batch.lengths + (n if wanted is None else wanted.sum(axis=1))
        if int(ends.max()) >= _POSITIONS_END:
            raise InvalidInputError(
                f"a sequence would have {ends.max()} keys, expected less than {_POSITIONS_END}"
            )
        self._warn_of_positions(int(ends.max()))
        grown = []
        for b, sequence in enumerate(batch.sequences):
            new_keys, new_values = keys[b], values[b]
            if wanted is not None and not wanted[b].all():
                new_keys, new_values = new_keys[:, wanted[b]], new_values[:, wanted[b]]
            if new_keys.shape[1]:
                sequence = sequence.added(batch.keeping, new_keys, new_values)
            grown.append(sequence)
        self._batch, self._dtype = Batch(batch.keeping, grown, batch), dtype

    def _wanted(self, n: int, lengths: ArrayLike | None, mask: ArrayLike | None) -> NDArray[np.bool_] | None:
        """Which of `n` new keys belong to each sequence, (batch, n); None for all."""
        if mask is not None:
            if lengths is not None:
                raise InvalidInputError("lengths and mask are given together, expected one of them")
            given = as_numpy(mask, "mask")
            if (
                given.shape != (self.batch, n)
                or given.dtype.kind not in "biu"
                or ((given != 0) & (given != 1)).any()
            ):
                raise InvalidInputError(
                    f"mask is {given.dtype} of shape {given.shape}, expected 0 and 1 of {(self.batch, n)}"
                )
            return given.astype(np.bool_)
        if lengths is None:
            return None
        counts = integers(lengths, "lengths", (self.batch,), minimum=0)
        if (counts > n).any():
            raise InvalidInputError(f"lengths reach {counts.max()}, expected at most the {n} keys given")
        return np.arange(n) >= n - counts[:, None]

    def _warn_of_positions(self, end: int) -> None:
        known = self.codebook.max_position
        if known is None or end <= known or self._warned:
            return
        warnings.warn(
            f"position {end - 1} lies past the range that this codebook was trained for (below {known}); "
            f"train with max_position={end} or more",
            PositionWarning,
            stacklevel=3,
        )
        self._warned = True

    def reconstruct(self, sequence: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the keys and values of a sequence in order of position, copied.

        Returns
        -------
        k, v : (kv_heads, length, d), as stored: float16, float32, or uint16 that holds the bits of bfloat16
        """
        self._check_sequences(np.array([sequence]))
        if self._batch is None:
            empty = np.zeros((self.codebook.heads, 0, self.codebook.d), STORED[self._dtype or "float32"])
            return empty, empty.copy()
        return self._batch.sequences[sequence].content(self._batch.keeping)

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
        kept = [
            old.truncated(self._batch.keeping, int(length)) if sequence in (None, b) else old
            for b, (old, length) in enumerate(zip(self._batch.sequences, wanted, strict=True))
        ]
        self._batch = Batch(self._batch.keeping, kept, self._batch)

    def reorder(self, order: ArrayLike) -> None:
        """Let sequence `i` be what sequence ``order[i]`` was: beams that go on, or a part of the batch.

        Nothing is copied: sequences share what they have in common until one of them writes to it.

        Parameters
        ----------
        order
            int, (any number above 0,); one may occur several times, or not at all.
        """
        numbers = self._numbers(order, "order")
        if self._batch is None:
            self._count = len(numbers)
        else:
            chosen = [self._batch.sequences[i] for i in numbers]
            self._batch = Batch(self._batch.keeping, chosen, self._batch)

    def fork(self, sequences: ArrayLike | None = None) -> Self:
        """Return an index of its own that begins with these sequences, by default all, and shares their
        pages.

        Parameters
        ----------
        sequences
            int, (any number above 0,); one may occur several times.
        """
        forked = copy.copy(self)
        if sequences is not None:
            forked.reorder(sequences)
        return forked

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()  # values never change, so a fork is as good

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
        """Forget every key."""
        self._count, self._batch = self.batch, None

    def memory(self) -> MemoryStatement:
        """Return what is held, in bytes, and how much more it is than plain keys and values."""
        if self._batch is None:
            return MemoryStatement(plain=0, pages=0, used=0, statistics=0)
        return statement(self._batch)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory().total


def _sink_logits(value: ArrayLike, heads: int) -> NDArray[np.float32]:
    array = np.ascontiguousarray(as_numpy(value, "sink_logits"), np.float32)
    if array.ndim != 1 or not array.size or array.size % heads or np.isnan(array).any():
        raise InvalidInputError(
            f"sink_logits have shape {array.shape}, expected one for each of a multiple of {heads} heads"
        )
    return array
