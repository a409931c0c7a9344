"""What was selected for a step of attention, in the forms that other implementations of attention take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, give_back, integers
from saapindex.devices import current, device_of, get_cupy
from saapindex.errors import InvalidInputError
from saapindex.params import check_integer

__all__ = ["Selection"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Keys that each KV head should attend to, besides the sinks and the window.

    Ids are positions in the sequence. Every array is in the framework of the queries, and where they are.
    From an index on a device rows are wider than what is selected, and other forms are made on the host when
    they are asked for.

    Attributes
    ----------
    ids
        int64, (batch, kv_heads, most): rising, -1 beyond the selected.
    lengths
        int64, (batch, kv_heads), how many are selected.
    partitions
        int64, (batch, kv_heads, lists): lists that were visited, rising, -1 beyond.
    sinks
        Positions below this are attended to always.
    window_start, ends
        int64, (batch,): so are positions from the one up to the other.

    Examples
    --------
    >>> selection = Selection(np.array([[[5, 9, -1]]]), np.array([[2]]), np.array([[[0]]]), 1, [12], [14])
    >>> selection.page_table(4)[0].tolist()
    [[[0, 1, 2, 3]]]
    >>> selection.bool_mask(14).astype(int).tolist()
    [[[1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1]]]
    """

    ids: ArrayLike
    lengths: ArrayLike
    partitions: ArrayLike
    sinks: int
    window_start: ArrayLike
    ends: ArrayLike

    def csr(self) -> tuple[ArrayLike, ArrayLike]:
        """Return the selected ids of all heads in a row, and where each head's begin.

        Returns
        -------
        indptr : int64, (batch * kv_heads + 1,)
        indices : int64, (indptr[-1],)
        """
        ids, lengths = _on_host(self.ids, "ids"), _on_host(self.lengths, "lengths")
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return _like(indptr, self.ids), _like(ids[ids >= 0], self.ids)

    def page_table(self, page_size: int, *, near: bool = True) -> tuple[ArrayLike, ArrayLike]:
        """Return the pages of `page_size` consecutive positions that hold something selected.

        Parameters
        ----------
        page_size
            Positions of a page; page `p` begins at ``p * page_size``.
        near
            Whether the sinks and the window belong to it.

        Returns
        -------
        pages : int64, (batch, kv_heads, most), rising, -1 beyond
        lengths : int64, (batch, kv_heads)
        """
        check_integer("page_size", page_size, 1)
        selected = self._selected(int(_on_host(self.ends, "ends").max(initial=0)), near)
        pages = -(-selected.shape[2] // page_size)
        padded = np.pad(selected, [(0, 0), (0, 0), (0, pages * page_size - selected.shape[2])])
        by_page = padded.reshape(*padded.shape[:2], pages, page_size)
        table, lengths = packed(np.any(by_page, axis=3))
        return _like(table, self.ids), _like(lengths, self.ids)

    def bool_mask(self, n: int, *, near: bool = True, offsets: ArrayLike | None = None) -> ArrayLike:
        """Return what may be attended to, bool (batch, kv_heads, n).

        Parameters
        ----------
        n
            Columns: slots of the cache that is attended to.
        near
            Whether the sinks and the window belong to it.
        offsets
            int, (batch,): the column of each sequence's position 0, where it is padded on the left.

        Raises
        ------
        InvalidInputError
            If a selected key would lie beyond the last column.
        """
        return _like(self._mask(n, near, offsets), self.ids)

    def additive_mask(self, n: int, *, near: bool = True, offsets: ArrayLike | None = None) -> ArrayLike:
        """Return `bool_mask` as float32 to add to logits: zero or minus infinity."""
        mask = np.where(self._mask(n, near, offsets), np.float32(0), np.float32(-np.inf))
        return _like(mask, self.ids)

    def _mask(self, n: int, near: bool, offsets: ArrayLike | None) -> NDArray[np.bool_]:
        check_integer("n", n, 0)
        ends = _on_host(self.ends, "ends")
        shift = np.zeros_like(ends)
        if offsets is not None:
            shift = integers(offsets, "offsets", ends.shape, minimum=0)
        most = int((ends + shift).max(initial=0))
        if most > n:
            raise InvalidInputError(f"n is {n}, expected at least {most} columns for the keys that are held")
        selected = self._selected(int(ends.max(initial=0)), near)
        mask = np.zeros((*selected.shape[:2], n), np.bool_)
        for b, start in enumerate(shift):
            mask[b, :, start : start + ends[b]] = selected[b, :, : ends[b]]
        return mask

    def _selected(self, n: int, near: bool) -> NDArray[np.bool_]:
        """Which of `n` positions are selected, (batch, kv_heads, n)."""
        ids = _on_host(self.ids, "ids")
        mask = np.zeros((*ids.shape[:2], n), np.bool_)
        b, h, place = np.nonzero(ids >= 0)
        mask[b, h, ids[b, h, place]] = True
        if near:
            at, ends = np.arange(n), _on_host(self.ends, "ends")[:, None]
            close = (at < self.sinks) | (at >= _on_host(self.window_start, "window_start")[:, None])
            mask |= (close & (at < ends))[:, None]
        return mask


def _on_host(value: ArrayLike, name: str) -> NDArray[Any]:
    if device_of(value) is None:
        return as_numpy(value, name)
    return as_numpy(value.get() if hasattr(value, "get") else value.cpu(), name)


def _like(result: NDArray[Any], model: ArrayLike) -> ArrayLike:
    """Return `result` in the framework of `model`, and on its device."""
    if device_of(model) is None:
        return give_back(result, model)
    if hasattr(model, "get"):  # of CuPy
        with current(model):
            return get_cupy().asarray(result)
    import torch

    return torch.from_numpy(result).to(model.device)


def packed(used: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the true elements of each row, padded with -1, and how many there are.

    Examples
    --------
    >>> packed(np.array([[False, True], [False, False]]))
    (array([[ 1],
           [-1]]), array([1, 0]))
    """
    lengths = used.sum(axis=-1)
    most = int(lengths.max(initial=0))
    order = np.argsort(~used, axis=-1, kind="stable")[..., :most]
    return np.where(np.arange(most) < lengths[..., None], order, -1), lengths
