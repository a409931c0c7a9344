"""The keys of an index: what can be added, removed and given back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.backends.base import Ints
from saapindex.errors import InvalidInputError
from saapindex.index.base import METRIC_INNER_PRODUCT, METRIC_L2, IndexBase
from saapindex.index.device import keeping_keys, on_any_device
from saapindex.index.state import difference, keys_at
from saapindex.params import Selector, check_integer

__all__ = ["METRIC_INNER_PRODUCT", "METRIC_L2", "KeyStore"]

# Ids stay below this, so that the next one is an int64 too.
_IDS_END = 1 << 62

_LARGEST_HALF = float(np.finfo(np.float16).max)


class KeyStore(IndexBase):
    """The keys of an index in the lists of its partition; base of `IndexSAAP`."""

    @on_any_device
    def add(self, x: ArrayLike, *, positions: ArrayLike | None = None) -> None:
        """Add keys `x`, (n, d), with ids from `ntotal` up.

        After keys were removed, ids go on from the largest that is left, so none is given twice.

        Parameters
        ----------
        x
            (n, d); rotated at `positions` where the index has a `Rope`.
        positions
            int, (n,), by default the ids.

        Raises
        ------
        InvalidInputError, NotTrainedError
            The index is unchanged.
        """
        self._add(x, None, positions)

    @on_any_device
    def add_with_ids(self, x: ArrayLike, ids: ArrayLike, *, positions: ArrayLike | None = None) -> None:
        """Add keys `x`, (n, d), under `ids`, int (n,), not negative and not yet in the index.

        `positions` are by default the ids, as for `add`.

        Raises
        ------
        InvalidInputError, NotTrainedError
            The index is unchanged.
        """
        self._add(x, ids, positions)

    @on_any_device
    def add_preassigned(
        self,
        x: ArrayLike,
        a: ArrayLike,
        ids: ArrayLike | None = None,
        *,
        positions: ArrayLike | None = None,
    ) -> None:
        """Add keys `x`, (n, d), to the lists `a`, int (n,), rather than to those of the partition.

        See `add` and `add_with_ids` for the rest.
        """
        self._add(x, ids, positions, a)

    def _add(
        self, x: ArrayLike, ids: ArrayLike | None, positions: ArrayLike | None, lists: ArrayLike | None = None
    ) -> None:
        self.router  # noqa: B018  raises if the index is not trained
        keys = arrays.vectors(x, "x", self.d)
        with self._lock:
            held = self._held
            state, partition = held.state, self.partition
            if ids is None:
                fresh = np.arange(state.next_id, state.next_id + len(keys), dtype=np.int64)
            else:
                fresh = arrays.integers(ids, "ids", (len(keys),), minimum=0)
                _refuse_duplicates(fresh, state.lists.contains(fresh))
            if fresh.size and int(fresh.max()) >= _IDS_END:
                raise InvalidInputError(f"ids reach {fresh.max()}, expected less than {_IDS_END}")
            places = self._positions(positions, "positions", len(keys), fresh)
            labels = None
            if lists is not None:
                labels = arrays.integers(lists, "a", (len(keys),), minimum=0)
                if labels.max(initial=0) >= self.nlist:
                    raise InvalidInputError(f"a holds list {labels.max()}, expected less than {self.nlist}")
            if self.dtype == np.float16 and np.abs(keys).max(initial=0) > _LARGEST_HALF:
                raise InvalidInputError(
                    f"x holds {np.abs(keys).max():g}, expected at most {_LARGEST_HALF:g} in an index of "
                    "float16"
                )
            if not len(keys):
                return
            partition.check_position(int(places.max()))
            if labels is None:
                with keeping_keys(self.ops):
                    labels = partition.assign(partition.view.apply(keys, places, self.ops), self.ops)
            self._publish(state.append(keys, fresh, places, labels, partition, held.coder, self.ops))

    def remove_ids(self, ids: ArrayLike | Selector) -> int:
        """Remove the keys with these ids, an array or a selector; return how many there were.

        Unknown ids are passed over.
        """
        with self._lock:
            held = self._held
            lists = held.state.lists
            present = lists.ids[lists.rows()]
            if isinstance(ids, Selector):
                keep = ~ids.members(present)
            else:
                wanted = arrays.as_numpy(ids, "ids")
                keep = ~np.isin(present, arrays.integers(wanted, "ids", (wanted.size,)))
            removed = int(len(keep) - keep.sum())
            if removed:
                self._publish(held.state.keep(keep, self.partition, held.coder, self.ops))
            return removed

    def merge_from(self, other: KeyStore, add_id: int = 0) -> None:
        """Take over the keys of `other`, which becomes empty.

        Parameters
        ----------
        other
            An index of the same partition and storage, made by `clone_index` or `read_index`, or trained
            alike. Its router does not matter.
        add_id
            Added to its ids; positions stay as they are.

        Raises
        ------
        InvalidInputError, NotTrainedError
            If the two do not fit each other or an id would be there twice; both are unchanged.
        """
        check_integer("add_id", add_id, -_IDS_END)
        if not isinstance(other, KeyStore) or other is self:
            raise InvalidInputError("other is no second index of this kind")
        self.router, other.router  # noqa: B018  raise if one is not trained
        first, second = sorted((self, other), key=id)  # so that two merges do not wait for each other
        with first._lock, second._lock:
            mine, theirs = self._held, other._held
            why = "metric_type" if self.metric_type != other.metric_type else difference(mine, theirs)
            if why is not None:
                raise InvalidInputError(f"other cannot be merged: the two indexes differ in their {why}")
            lists = theirs.state.lists
            ids = lists.ids[lists.rows()] + add_id
            if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < _IDS_END):
                raise InvalidInputError(
                    f"ids would reach from {ids.min()} to {ids.max()}, expected 0 to {_IDS_END - 1}"
                )
            _refuse_duplicates(ids, mine.state.lists.contains(ids))
            self._publish(mine.state.joined(theirs.state, ids))
            other._publish(other._nothing())

    def reset(self) -> None:
        """Remove every key; the index stays trained."""
        with self._lock:
            self._publish(self._nothing())

    def reconstruct(self, key: int) -> NDArray[np.float32]:
        """Return the key with id `key`, float32 (d,)."""
        found: NDArray[np.float32] = self.reconstruct_batch([key])[0]
        return found

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> NDArray[np.float32]:
        """Return the keys with ids `n0` to ``n0 + ni - 1``, float32 (ni, d); -1 for all from `n0` on."""
        check_integer("n0", n0, 0)
        check_integer("ni", ni, -1)
        ni = max(self._state.next_id - n0, 0) if ni == -1 else ni
        if ni > self.ntotal:
            raise InvalidInputError(
                f"{ni} ids from {n0} up are asked for, but the index holds {self.ntotal} keys"
            )
        return self.reconstruct_batch(np.arange(n0, n0 + ni, dtype=np.int64))

    def reconstruct_batch(self, keys: ArrayLike) -> NDArray[np.float32]:
        """Return the keys with these ids, float32 (n, d); what codes hold of them, if there is no more.

        Raises
        ------
        InvalidInputError
            If an id is not in the index.
        """
        ids = arrays.as_numpy(keys, "keys")
        ids = arrays.integers(ids, "keys", (ids.size,))
        held = self._held
        lists = held.state.lists
        known = lists.contains(ids)
        if not known.all():
            raise InvalidInputError(f"id {ids[~known][0]} is not in the index")
        rows = lists.find(ids)
        return keys_at(lists, rows, lists.labels_at(rows), held.coder)


def _refuse_duplicates(ids: Ints, present: NDArray[np.bool_]) -> None:
    if present.any():
        raise InvalidInputError(f"id {ids[present][0]} is in the index already, expected new ids")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InvalidInputError(f"id {values[counts > 1][0]} is given twice, expected distinct ids")
