"""Rotary position embedding, by definition (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import Floats, Ints

__all__ = ["rotate"]


def rotate(x: Floats, positions: Ints, frequencies: Floats, scale: Floats, interleaved: bool) -> Floats:
    """Rotate pair `i` of each row by ``position * frequencies[i]``, times ``scale[i]``: see `Ops.rotate`.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0, 7.0]])
    >>> rotate(x, np.array([1]), np.array([np.pi / 2]), np.ones(1), False).round(3)
    array([[0., 1., 7.]])
    """
    pairs = len(frequencies)
    angles = positions[:, None].astype(np.float64) * frequencies
    cos = (np.cos(angles) * scale).astype(x.dtype)
    sin = (np.sin(angles) * scale).astype(x.dtype)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    out = np.array(x, order="C")
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out
