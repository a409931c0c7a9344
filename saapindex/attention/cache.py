"""The cache of another runtime: keys and values in its own pages, read where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy
from saapindex.attention.tensors import STORED, element_type
from saapindex.backends.base import LANES, Ints
from saapindex.backends.paged import Pages, Slots
from saapindex.errors import InvalidInputError
from saapindex.params import check_choice

__all__ = ["PagedCache"]


class PagedCache:
    """Keys and values of all sequences in the pages of a runtime.

    A slot is the place of one token: slot `s` is lane ``s % page_size`` of page ``s // page_size``. Nothing
    is copied, so what the runtime writes is seen at once.

    Parameters
    ----------
    keys, values
        (pages, kv_heads, page_size, d) in layout ``"HND"``, (pages, page_size, kv_heads, d) in ``"NHD"``; in
        the memory of the CPU. Pages may lie apart, and keys and values may alternate.
    layout
        ``"HND"`` or ``"NHD"``, as FlashInfer names them.

    Attributes
    ----------
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    heads, d, page_size, slots
        KV heads, dimension, tokens of a page, and places of tokens.
    pages
        The same as kernels see it: rows of `d` elements, see `rows`.

    Raises
    ------
    InvalidInputError
        If the layout is not supported: the last dimension is not contiguous, a page begins within a row, or
        keys and values are laid out differently.

    Examples
    --------
    >>> pool = np.zeros((2, 10, 3, 16, 64), np.float16)  # keys and values, pages, heads, lanes, d
    >>> cache = PagedCache(*pool, layout="HND")
    >>> cache.slots, cache.rows(np.array([0, 17]), 1).tolist()
    (160, [16, 65])
    """

    def __init__(self, keys: ArrayLike, values: ArrayLike, *, layout: str = "HND") -> None:
        check_choice("layout", layout, ("HND", "NHD"))
        self.dtype = element_type(keys, "keys")
        k, v = (_bits(x, name, self.dtype) for x, name in ((keys, "keys"), (values, "values")))
        if layout == "NHD":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        self.heads, self.page_size, self.d = (int(size) for size in k.shape[1:])
        self.slots = len(k) * self.page_size
        row = self.d * k.itemsize
        if k.shape != v.shape or k.strides != v.strides or not k.size:
            raise InvalidInputError(
                f"keys have shape {k.shape} and strides {k.strides}, values {v.shape} and {v.strides}, "
                "expected the same of both, and some"
            )
        if k.strides[3] != k.itemsize or any(step % row or step < 0 for step in k.strides[:3]):
            raise InvalidInputError(
                f"keys have strides {k.strides}, expected multiples of a row of {row} bytes: this layout "
                "is not supported"
            )
        by_page, by_head, by_lane = (int(step) // row for step in k.strides[:3])
        self._steps = by_page, by_head, by_lane
        count = 1 + sum((n - 1) * step for n, step in zip(k.shape[:3], self._steps, strict=True))
        if count % LANES:
            raise InvalidInputError(
                f"the pages have {count} rows in all, expected a multiple of {LANES}: choose a page_size "
                "that is one"
            )
        shape = count // LANES, LANES, self.d
        flat = [np.lib.stride_tricks.as_strided(x, shape, (LANES * row, row, k.itemsize)) for x in (k, v)]
        self._rows = {
            name: np.lib.stride_tricks.as_strided(x, (count, self.d), (row, k.itemsize))
            for name, x in (("keys", k), ("values", v))
        }
        columns: dict[str, Any] = {
            "keys": flat[0],
            "values": flat[1],
            "codes": np.empty((0, 1, LANES), np.uint32),
            "exponents": np.empty((0, LANES), np.uint8),
            "ids": np.empty((0, LANES), np.int32),
        }
        self.pages = Pages(
            **{name: (array,) for name, array in columns.items()},
            addresses=np.array([[array.ctypes.data] for array in columns.values()], np.int64),
            span=shape[0],
        )

    def rows(self, slots: Ints, heads: Ints | int) -> Ints:
        """Return the rows of `slots` for KV heads `heads`; the two are broadcast."""
        page, lane = np.divmod(slots, self.page_size)
        by_page, by_head, by_lane = self._steps
        found: Ints = page * by_page + lane * by_lane + np.asarray(heads) * by_head
        return found

    def take(self, field: str, slots: Ints, heads: Ints | int) -> NDArray[Any]:
        """Return ``"keys"`` or ``"values"`` of `slots`, copied: the shape of both broadcast, and `d`."""
        return self._rows[field][self.rows(slots, heads)]

    def of_sequences(self, tables: tuple[Ints, ...]) -> Slots:
        """Return where the keys of sequences are, whose tokens are in the slots of `tables`, for kernels."""
        return Slots(tables, self.pages, self.heads, self.page_size, *self._steps)


def _bits(value: ArrayLike, name: str, dtype: str) -> NDArray[Any]:
    """View `value` as it is stored, without a copy."""
    if len(getattr(value, "shape", ())) != 4 or element_type(value, name) != dtype:
        raise InvalidInputError(
            f"{name} are {getattr(value, 'dtype', '')} of shape {getattr(value, 'shape', None)}, expected "
            f"{dtype} of four dimensions"
        )
    if dtype == "bfloat16":
        import torch

        return as_numpy(value.detach().view(torch.int16), name).view(np.uint16)
    array = as_numpy(value, name)
    if array.dtype != STORED[dtype]:
        raise InvalidInputError(f"{name} are {array.dtype}, expected one of {', '.join(STORED)}")
    return array
