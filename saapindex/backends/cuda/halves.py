"""Float32 matrices as the sums of two in float16, for tensor cores, in the order of the kernels that read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["fragments", "halves"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device
_TERM = 13  # the largest elements are brought to about 2 ** 13


def _scale(x: Array, axis: tuple[int, ...], xp: Any) -> Array:
    """Return powers of two, which bring the largest elements along `axis` to about ``2 ** 13``."""
    largest = xp.maximum(xp.abs(x).max(axis=axis, keepdims=True), np.float32(2.0**-100))
    return xp.exp2(_TERM - xp.ceil(xp.log2(largest))).astype(np.float32)


def _split(x: Array, xp: Any) -> Array:
    """Return four numbers in a row as four words: float16 high parts, then low parts."""
    high = x.astype(np.float16)
    low = (x - high.astype(np.float32)).astype(np.float16)
    pairs = [part.view(np.uint16).reshape(*x.shape[:-1], -1, 4) for part in (high, low)]
    found: Array = xp.ascontiguousarray(xp.concatenate(pairs, axis=-1)).view(np.uint32).reshape(x.shape)
    return found


def halves(forms: Array, xp: Any) -> tuple[Array, Array]:
    """Return float32 forms, (heads, lists, d), as sums of two float16, and what to multiply these with.

    Returns
    -------
    parts : (heads, lists, d) uint32, of every four dimensions two words of high parts and two of low ones
    unit : (heads,) float32

    Examples
    --------
    >>> parts, unit = halves(np.array([[[1, 0, 0, 2.0**-15]]], np.float32), np)
    >>> parts.view(np.float16).tolist(), unit.tolist()
    ([[[8192.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0]]], [0.0001220703125])
    """
    scale = _scale(forms, (1, 2), xp)
    return _split(forms * scale, xp), (1 / scale).reshape(-1)


def fragments(
    forward: NDArray[np.float32], step: NDArray[np.float32]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return matrices and steps of codes, (H, d, fields) and (H, fields), as lanes of tensor cores read them.

    Returns
    -------
    matrices : (H, ceil(d / 32), 2, ceil(fields / 8), 32, 4) uint32
        Of 32 dimensions lane ``4 g + t`` takes four from ``8 t`` on, then the next four, split as in
        `halves`; of 8 fields field ``g // 2``, or ``g // 2 + 4`` for an odd `g`.
    steps : (H, fields, 4) float32
        A field's step, one by it, and what its products are to be multiplied with.

    Examples
    --------
    >>> [part.shape for part in fragments(np.ones((2, 80, 24), np.float32), np.ones((2, 24), np.float32))]
    [(2, 3, 2, 3, 32, 4), (2, 24, 4)]
    """
    heads, d, fields = forward.shape
    scale = _scale(forward, (1,), np)
    padded = np.zeros((heads, -(-d // 32) * 32, -(-fields // 8) * 8), np.float32)
    padded[:, :d, :fields] = forward * scale
    # Slabs, t, halves, dimensions; tiles, odd or not, g // 2.
    parts = padded.reshape(heads, -1, 4, 2, 4, padded.shape[2] // 8, 2, 4)
    lanes = np.ascontiguousarray(parts.transpose(0, 1, 3, 5, 7, 6, 2, 4))
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    steps = np.stack([step, inverse, 1 / scale[:, 0], np.zeros_like(step)], axis=2)
    return _split(lanes.reshape(*lanes.shape[:4], 32, 4), np), np.ascontiguousarray(steps, np.float32)
