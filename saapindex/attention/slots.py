"""`SlotIndex`: an index beside the paged cache of another runtime, which keeps the keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Several
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, give_back, integers
from saapindex.attention.batch import Batch
from saapindex.attention.borrowed import CodePool, Span, borrowing
from saapindex.attention.cache import PagedCache
from saapindex.attention.index import AttentionIndex
from saapindex.attention.layer import LayerCodebook
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.selection import Selection
from saapindex.attention.sequence import Keeping, Sequence
from saapindex.attention.slot_table import SlotTable
from saapindex.attention.tensors import STORED, all_finite
from saapindex.backends.base import Floats, Ints
from saapindex.backends.paged import Near
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

__all__ = ["SlotIndex"]

# Pages that the pool grows by, for each KV head.
_SPAN = 32


class SlotIndex:
    """Sparse attention over keys and values that stay in the pages of a runtime.

    The index holds what `AttentionIndex` holds but keys and values: statistics of lists, codes, positions,
    and in which slot of the cache each token is. Sequences have names, and come and go.

    Parameters
    ----------
    codebook
        What was learned for the layer.
    cache
        The runtime's pages. The runtime writes a token there before it is appended here.
    settings
        As for `AttentionIndex`, without ``batch``, ``dtype`` and ``device``.

    Raises
    ------
    InvalidInputError
        On settings out of their range, or a cache of other heads than the codebook's.

    Notes
    -----
    One thread at a time may use an index.

    Examples
    --------
    >>> from saapindex.attention import fit_layer
    >>> rng = np.random.default_rng(0)
    >>> pool = rng.standard_normal((2, 200, 2, 16, 32), dtype=np.float32)  # 3200 slots of two heads
    >>> keys = pool[0].swapaxes(0, 1).reshape(2, 3200, 32)
    >>> codebook = fit_layer(keys, rng.standard_normal((6, 50, 32)), nlist=16)
    >>> index = SlotIndex(codebook, PagedCache(*pool), window=127, dense_below=1000)
    >>> index.append("a", np.arange(3000))
    >>> q = rng.standard_normal((1, 6, 32), dtype=np.float32)
    >>> out, lse = index.attend(q, ["a"], budget=0.2)
    >>> selection, slots = index.select(q, ["a"], nprobe=4)
    >>> bool((slots == selection.ids).all())  # since the token at position i is in slot i
    True
    """

    def __init__(self, codebook: LayerCodebook, cache: PagedCache, **settings: Any) -> None:
        for name in ("batch", "dtype", "device"):
            if name in settings:
                raise InvalidInputError(f"{name} is given, which comes from the sequences and the cache")
        self._view = _View(codebook, dtype=cache.dtype, **settings)
        if (cache.heads, cache.d) != (codebook.heads, codebook.d):
            raise InvalidInputError(
                f"the cache has {cache.heads} KV heads of {cache.d} dimensions, the codebook "
                f"{codebook.heads} of {codebook.d}"
            )
        self.cache, self.codebook = cache, codebook
        view = self._view
        pool = CodePool(STORED[cache.dtype], codebook.code.words, _SPAN * codebook.heads)
        self._keeping = Keeping(
            codebook, pool, view.ops, view.window, view.sinks, view.flush, view.adapt, view.dense_below
        )
        self._sequences: dict[Hashable, tuple[Sequence, SlotTable]] = {}

    def __repr__(self) -> str:
        lengths = {name: sequence.length for name, (sequence, _) in self._sequences.items()}
        return f"SlotIndex(kv_heads={self.codebook.heads}, d={self.codebook.d}, lengths={lengths})"

    def __contains__(self, name: Hashable) -> bool:
        return name in self._sequences

    @property
    def names(self) -> list[Hashable]:
        """Names of the sequences."""
        return list(self._sequences)

    def length(self, name: Hashable) -> int:
        """Return how many tokens a sequence has."""
        return self._get(name)[0].length

    def slots(self, name: Hashable) -> NDArray[np.int64]:
        """Return the slot of each token of a sequence."""
        return self._get(name)[1].slots.copy()

    def append(self, name: Hashable, slots: ArrayLike) -> None:
        """Add the tokens in `slots` at the end of a sequence, which begins here if it is new.

        Parameters
        ----------
        name
            Of the sequence.
        slots
            int, (n,), in order of position; their keys and values are in the cache.

        Raises
        ------
        InvalidInputError
            On slots that the cache does not have, or that hold what is not finite. The index is as it was.
        """
        self.extend({name: slots})

    def extend(self, slots: Mapping[Any, ArrayLike]) -> None:
        """Add tokens at the end of several sequences at once: a step of a runtime; see `append`.

        Parameters
        ----------
        slots
            Of each sequence, by its name.

        Examples
        --------
        >>> from saapindex.attention import fit_layer
        >>> pool = np.random.default_rng(0).standard_normal((2, 20, 2, 16, 8))
        >>> codebook = fit_layer(pool[0, :, :, 0].swapaxes(0, 1), np.ones((2, 9, 8)), nlist=2, words=1)
        >>> index = SlotIndex(codebook, PagedCache(*pool.astype(np.float32)))
        >>> index.extend({"a": [0, 1], "b": [16]})
        >>> index.length("a"), index.slots("b").tolist()
        (2, [16])
        """
        new = {name: self._checked(given) for name, given in slots.items()}
        if not new:
            return
        every = np.concatenate(list(new.values()))
        heads = np.arange(self.cache.heads)[:, None]
        keys, values = (self.cache.take(field, every, heads) for field in ("keys", "values"))
        changed, start = {}, 0
        for name, added in new.items():
            part, start = slice(start, start + len(added)), start + len(added)
            for field, x in (("keys", keys), ("values", values)):
                if not all_finite(x[:, part]):
                    raise InvalidInputError(f"the {field} of {name!r} are not finite in the cache")
            sequence, table = self._sequences.get(name) or (Sequence.empty(self._keeping, Span), SlotTable())
            if len(added):
                table = table.appended(added)
                self._view._warn_of_positions(len(table))
                if not sequence.flushes(self._keeping, len(added)):
                    sequence = sequence.added(self._keeping, keys[:, part], values[:, part])
                else:
                    with borrowing(self._keeping, self.cache, table.slots) as keeping:
                        sequence = sequence.added(keeping, keys[:, part], values[:, part])
            changed[name] = sequence, table
        self._sequences |= changed

    def truncate(self, name: Hashable, n: int) -> None:
        """Keep the first `n` tokens of a sequence."""
        sequence, table = self._get(name)
        (count,) = integers([n], "n", (1,), minimum=0)
        with borrowing(self._keeping, self.cache, table.slots) as keeping:
            sequence = sequence.truncated(keeping, int(count))
        self._sequences[name] = sequence, table.first(int(count))

    def fork(self, name: Hashable, new: Hashable) -> None:
        """Let a new sequence begin with all tokens of another; what they share is held once.

        Where the runtime then copies a page before it writes to it, tell by `remap`.
        """
        if new in self._sequences:
            raise InvalidInputError(f"there is a sequence {new!r} already")
        self._sequences[new] = self._get(name)

    def remap(self, name: Hashable, slots: ArrayLike) -> None:
        """Take note that the runtime has moved or copied the tokens of a sequence.

        Parameters
        ----------
        name
            Of the sequence.
        slots
            int, (length,): where they are now; their keys and values are the same.

        Raises
        ------
        InvalidInputError
            On other slots than the sequence needs. The index is as it was.
        """
        sequence, old = self._get(name)
        new = self._checked(slots)
        if len(new) != len(old):
            raise InvalidInputError(f"{len(new)} slots for {len(old)} tokens, expected one for each")
        self._sequences[name] = sequence, SlotTable.of(new)

    def free(self, name: Hashable) -> None:
        """Forget a sequence."""
        self._get(name)
        del self._sequences[name]

    def _get(self, name: Hashable) -> tuple[Sequence, SlotTable]:
        if name not in self._sequences:
            raise InvalidInputError(f"there is no sequence {name!r}")
        return self._sequences[name]

    def _checked(self, slots: ArrayLike) -> Ints:
        given = as_numpy(slots, "slots")
        found = integers(given, "slots", (given.size,), minimum=0)
        if (found >= self.cache.slots).any():
            raise InvalidInputError(f"slots hold {found.max()}, expected less than {self.cache.slots}")
        return found.copy()

    def attend(
        self,
        q: ArrayLike,
        names: Several[Hashable],
        *,
        budget: float | None = None,
        nprobe: int | None = None,
        top_p: float | None = None,
        params: AttendParameters | None = None,
        positions: ArrayLike | None = None,
        near: bool = True,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Attend to the tokens of some sequences; see `AttentionIndex.attend`.

        Parameters
        ----------
        q
            (sequences, q_heads, d) or (sequences, q_heads, t, d).
        names
            Of the sequences, in the order of the queries.
        """
        view = self._of(names)
        how: dict[str, Any] = {"budget": budget, "nprobe": nprobe, "top_p": top_p, "params": params}
        return view.attend(q, positions=positions, near=near, **how)

    def select(
        self,
        q: ArrayLike,
        names: Several[Hashable],
        *,
        budget: float | None = None,
        nprobe: int | None = None,
        top_p: float | None = None,
        params: AttendParameters | None = None,
    ) -> tuple[Selection, ArrayLike]:
        """Choose the tokens to attend to; see `AttentionIndex.select`.

        Returns
        -------
        selection : Selection
        slots : int64, the shape of ``selection.ids``: the slot of each, -1 beyond
        """
        view = self._of(names)
        selection = view.select(q, budget=budget, nprobe=nprobe, top_p=top_p, params=params)
        ids = as_numpy(selection.ids, "ids")
        return selection, give_back(view.slots_at(ids), q)

    def _of(self, names: Several[Hashable]) -> _View:
        if isinstance(names, str) or not len(names):
            raise InvalidInputError(f"names are {names!r}, expected a list of some")
        found = [self._get(name) for name in names]
        self._view.show(self._keeping, self.cache, found)
        return self._view

    def memory(self) -> MemoryStatement:
        """Return what is held beside the cache, in bytes.

        ``plain`` is what the slots of the sequences take in the cache of the runtime, shared ones counted
        once; ``total`` over it is what the index adds.
        """
        sequences, tables = zip(*self._sequences.values(), strict=True) if self._sequences else ((), ())
        slots = [table.slots for table in tables]
        row = 2 * self.cache.heads * self.cache.d * STORED[self.cache.dtype].itemsize
        held = {id(table.places): table.places.nbytes for table in tables}
        lists = {id(sequence.lists): sequence.lists.nbytes for sequence in sequences}
        pool = self._keeping.pool
        return MemoryStatement(
            plain=len(np.unique(np.concatenate([*slots, np.empty(0, np.int64)]))) * row,
            pages=pool.nbytes,
            used=pool.used * pool.page_nbytes,
            statistics=sum(lists.values()) + sum(held.values()) + self._view.stacked_nbytes,
        )


class _View(AttentionIndex):
    """Some sequences of a `SlotIndex` side by side, as an `AttentionIndex` has them."""

    _cache: PagedCache
    _slots: tuple[Ints, ...]

    def show(self, keeping: Keeping, cache: PagedCache, found: list[tuple[Sequence, SlotTable]]) -> None:
        """Turn to these sequences."""
        before = self._batch if isinstance(self._batch, Batch) else None
        self._batch = Batch(keeping, [sequence for sequence, _ in found], before)
        self._cache, self._count = cache, len(found)
        self._slots = tuple(table.slots for _, table in found)

    @property
    def stacked_nbytes(self) -> int:
        """Bytes of what is kept of these sequences side by side."""
        lists = self._batch.__dict__.get("lists", ()) if isinstance(self._batch, Batch) else ()
        return sum(array.nbytes for array in lists)

    def slots_at(self, ids: Ints) -> Ints:
        """Return the slots of positions of each sequence, (batch, ...); -1 stays."""
        found = np.full(ids.shape, -1, np.int64)
        for b, slots in enumerate(self._slots):
            there = ids[b] >= 0
            found[b][there] = slots[ids[b][there]]
        return found

    def _attend(
        self, batch: Batch, x: Floats, last: Ints, wanted: AttendParameters | None, near: bool
    ) -> tuple[Floats, Floats]:
        recent = np.repeat(batch.lengths, self.codebook.heads) - batch.first_of_streams
        near_keys = batch.nothing_near
        if near:
            nowhere = np.empty((len(recent), 0), np.int32)
            near_keys = Near(nowhere, 0, batch._sinks, batch.first_of_streams, np.maximum(recent, 0))
        return self.ops.attend_slots(
            x,
            last,
            near_keys,
            batch.lists if wanted is None else batch.lists_for(wanted),
            batch.keeping.pool.pages,
            self._cache.of_sequences(self._slots),
            self.codebook.code.view,
            self._scaling,
            None if wanted is None else batch.reading(wanted),
        )
