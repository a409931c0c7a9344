"""Rows in int8, each with a scale of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["quantise_rows", "rounded_rows"]


def quantise_rows(x: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round rows to int8: ``x`` is about ``rows * scales[..., None]``.

    Parameters
    ----------
    x
        (..., d), finite.

    Returns
    -------
    rows : (..., d) int8, in -127 to 127
    scales : (...) float32, the largest magnitude of the row over 127; zero for a row of zeros

    Examples
    --------
    >>> rows, scales = quantise_rows(np.array([[1.0, -2.0, 0.5]]))
    >>> rows.tolist(), float(scales[0] * 127)
    ([[64, -127, 32]], 2.0)
    """
    scales = (np.abs(x).max(axis=-1, initial=0) / 127).astype(np.float32)
    inverse = np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales))
    rows = np.clip(np.rint(x * inverse[..., None]), -127, 127).astype(np.int8)
    return rows, scales


def rounded_rows(x: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return what is left of rows once they were in int8.

    Examples
    --------
    >>> rounded_rows(np.array([[127.0, 1.4, -0.2]])).round(4).tolist()
    [[127.0, 1.0, 0.0]]
    """
    rows, scales = quantise_rows(x)
    rounded: NDArray[np.float32] = rows.astype(np.float32) * scales[..., None]
    return rounded
