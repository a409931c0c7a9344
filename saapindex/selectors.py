"""Which ids a search may return, under Faiss's names: filters, windows and causal masks.

A selector is given as ``SearchParameters(sel=...)`` and honoured while keys are scanned, so a key that it
leaves out costs nothing of a budget. Use the same object again: what it selects is worked out once for as
long as the index stays as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, integers
from saapindex.errors import InvalidInputError
from saapindex.params import check_integer

__all__ = [
    "IDSelector",
    "IDSelectorAll",
    "IDSelectorAnd",
    "IDSelectorArray",
    "IDSelectorBatch",
    "IDSelectorBitmap",
    "IDSelectorNot",
    "IDSelectorOr",
    "IDSelectorRange",
    "IDSelectorXOr",
]

Mask = NDArray[np.bool_]


class IDSelector(ABC):
    """A set of ids."""

    @abstractmethod
    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids`, int64 (n,), are in the set."""

    def is_member(self, id: int) -> bool:
        """Return whether `id` is in the set.

        Examples
        --------
        >>> IDSelectorRange(3, 5).is_member(4), IDSelectorRange(3, 5).is_member(5)
        (True, False)
        """
        return bool(self.members(np.array([id], np.int64))[0])


class IDSelectorAll(IDSelector):
    """Every id."""

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return np.ones(len(ids), np.bool_)


class IDSelectorRange(IDSelector):
    """Ids from `imin` to ``imax - 1``: a window, or with ``imin = 0`` a causal mask.

    Parameters
    ----------
    imin, imax
        Bounds.
    assume_sorted
        Taken as Faiss takes it; makes no difference.
    """

    def __init__(self, imin: int, imax: int, assume_sorted: bool = False) -> None:
        lowest = np.iinfo(np.int64).min
        check_integer("imin", imin, lowest)
        check_integer("imax", imax, lowest)
        self.imin, self.imax = int(imin), int(imax)

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return (ids >= self.imin) & (ids < self.imax)


class IDSelectorArray(IDSelector):
    """Ids of an array, int (n,), in any order.

    Examples
    --------
    >>> IDSelectorArray([7, 3]).members(np.arange(3, 8)).tolist()
    [True, False, False, False, True]
    """

    def __init__(self, ids: ArrayLike) -> None:
        given = as_numpy(ids, "ids")
        self.ids = np.unique(integers(given, "ids", (given.size,)))

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        if not self.ids.size:
            return np.zeros(len(ids), np.bool_)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found: Mask = self.ids[place] == ids
        return found


class IDSelectorBatch(IDSelectorArray):
    """The same as `IDSelectorArray`; Faiss's other name for it, with a faster look-up there."""


class IDSelectorBitmap(IDSelector):
    """Ids whose bit is set: id `i` is bit ``i % 8`` of byte ``i // 8``.

    Parameters
    ----------
    bitmap
        uint8, (n,); bool, (n,), is taken one element an id. Ids beyond the end are not in the set.

    Examples
    --------
    >>> IDSelectorBitmap(np.array([0b101], np.uint8)).members(np.arange(9)).tolist()
    [True, False, True, False, False, False, False, False, False]
    """

    def __init__(self, bitmap: ArrayLike) -> None:
        given = as_numpy(bitmap, "bitmap")
        if given.dtype == np.bool_ and given.ndim == 1:
            given = np.packbits(given, bitorder="little")
        if given.dtype != np.uint8 or given.ndim != 1:
            raise InvalidInputError(
                f"bitmap is {given.dtype} of shape {given.shape}, expected uint8 or bool of shape (n,)"
            )
        self.bitmap = given.copy()

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        inside = (ids >= 0) & (ids < 8 * len(self.bitmap))
        known = np.where(inside, ids, 0)
        if not self.bitmap.size:
            return inside
        found: Mask = inside & ((self.bitmap[known >> 3] >> (known & 7).astype(np.uint8)) & 1).astype(
            np.bool_
        )
        return found


class IDSelectorNot(IDSelector):
    """Every id that is not in another set."""

    def __init__(self, sel: IDSelector) -> None:
        self.sel = _checked("sel", sel)

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return ~self.sel.members(ids)


class _Pair(IDSelector):
    def __init__(self, lhs: IDSelector, rhs: IDSelector) -> None:
        self.lhs, self.rhs = _checked("lhs", lhs), _checked("rhs", rhs)


class IDSelectorAnd(_Pair):
    """Ids that are in both sets."""

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return self.lhs.members(ids) & self.rhs.members(ids)


class IDSelectorOr(_Pair):
    """Ids that are in one set or in both."""

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return self.lhs.members(ids) | self.rhs.members(ids)


class IDSelectorXOr(_Pair):
    """Ids that are in one set and not in both."""

    def members(self, ids: NDArray[np.int64]) -> Mask:
        """Return which of `ids` are in the set."""
        return self.lhs.members(ids) ^ self.rhs.members(ids)


def _checked(name: str, sel: object) -> IDSelector:
    if not isinstance(sel, IDSelector):
        raise InvalidInputError(f"{name} is a {type(sel).__name__}, expected an IDSelector")
    return sel
