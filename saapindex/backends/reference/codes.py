"""Codes of keys: bit fields, encoding, and logits estimated from codes alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends.common import Floats, Ints
from saapindex.backends.paged import Code, PagedLists, Pages, Scaling, widened

CORRECTION = 3.0
"""The most that a second-order term adds to a logit."""
_TINY = 1e-30


def fields(widths: Ints) -> tuple[Ints, Ints, Ints]:
    """Return word, shift and bits of each field of a code, in the order of dimensions.

    Examples
    --------
    >>> word, shift, bits = fields(np.array([4, 1]))
    >>> shift[:8].tolist(), len(word)
    ([0, 8, 16, 24, 4, 12, 20, 28], 40)
    """
    bits = np.repeat(widths, 32 // widths)
    word = np.repeat(np.arange(len(widths)), 32 // widths)
    local = np.concatenate([np.arange(32 // width) for width in widths])
    return word, 8 * (local % 4) + bits * (local // 4), bits


def pack(levels: Ints, widths: Ints) -> NDArray[np.uint32]:
    """Pack fields, (n, R) integers, into words, (n, W); fields beyond `R` are zero.

    Examples
    --------
    >>> [hex(word) for word in pack(np.array([[1, 2, 3, 4, 5]]), np.array([4]))[0]]
    ['0x4030251']
    """
    word, shift, _ = (part[: levels.shape[1]] for part in fields(widths))
    words = np.zeros((len(levels), len(widths)), np.uint32)
    for r in range(len(word)):
        words[:, word[r]] |= levels[:, r].astype(np.uint32) << np.uint32(shift[r])
    return words


def unpack(words: NDArray[np.uint32], widths: Ints) -> Ints:
    """Return the fields of `words`, (n, W): (n, fields) int64.

    Examples
    --------
    >>> unpack(np.array([[0x40302510]], np.uint32), np.array([4]))
    array([[0, 5, 0, 0, 1, 2, 3, 4]])
    """
    word, shift, bits = fields(widths)
    return (words[:, word].astype(np.int64) >> shift) & ((1 << bits) - 1)


def coded(code: Code, head: int) -> tuple[int, Ints]:
    """Return how many dimensions of a head are coded, and the bits of each."""
    _, _, bits = fields(code.widths[head])
    count = min(len(bits), code.step.shape[1])
    return count, bits[:count]


def scales(exponents: NDArray[np.uint8], base: Floats) -> Floats:
    """Return the scale `f` of each key."""
    steps = (exponents.astype(base.dtype) - 128) / 16
    found: Floats = base * np.exp2(steps)
    return found


def quantised(y: Floats, step: Floats, bits: Ints) -> tuple[Floats, Floats, Floats]:
    """Return fields, levels and the scale of each row of `y`, (n, R): ``y`` is about ``scale * level``."""
    high = ((1 << bits) - 1).astype(y.dtype)
    unit = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), _TINY)
    place = np.where(step > 0, unit / np.where(step > 0, step, 1) + high / 2, 0)
    field = np.clip(np.rint(place), 0, high)
    level = (field - high / 2) * step
    scale = (y * level).sum(axis=1) / np.maximum((level**2).sum(axis=1), _TINY)
    return field, level, scale


def encode(residuals: Floats, code: Code) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """See `Ops.encode`."""
    heads, n, _ = residuals.shape
    words = np.empty((heads, n, code.widths.shape[1]), np.uint32)
    exponents = np.empty((heads, n), np.uint8)
    for h, residual in enumerate(residuals):
        count, bits = coded(code, h)
        y = residual @ code.forward[h, :, :count].astype(residual.dtype)
        field, _, scale = quantised(y, code.step[h, :count].astype(y.dtype), bits)
        exponent = np.rint(16 * np.log2(np.maximum(scale, _TINY) / code.base[h])) + 128
        words[h] = pack(field.astype(np.int64), code.widths[h])
        exponents[h] = np.clip(exponent, 0, 255).astype(np.uint8)
    return words, exponents


def capped(logits: Floats, softcap: float) -> Floats:
    """Return logits under the cap of the model."""
    return softcap * np.tanh(logits / softcap) if softcap else logits


def estimate(
    queries: Floats,
    words: NDArray[np.uint32],
    exponents: NDArray[np.uint8],
    code: Code,
    head: int,
    scale: float,
) -> Floats:
    """Return what codes say of ``scale * q . residual``, with the second order: (g, n) for queries (g, d)."""
    dtype = queries.dtype
    count, bits = coded(code, head)
    u = queries @ code.inverse[head, :, :count].astype(dtype)
    a = u * code.step[head, :count].astype(dtype) * dtype.type(scale)
    factor = np.maximum(np.abs(a).max(axis=1, initial=0), _TINY) / 127
    # Sums of whole numbers below 2^24 are exact in float32 too, and products of matrices of floats are fast.
    rounded = np.rint(a / factor[:, None])
    twice = (2 * unpack(words, code.widths[head])[:, :count] - ((1 << bits) - 1)).astype(dtype)
    f = scales(exponents, code.base[head].astype(dtype))
    kappa = scale**2 / 2 * (u**2 @ code.distortion[head, :count].astype(dtype))
    found: Floats = factor[:, None] * f * (rounded @ twice.T / 2) + np.minimum(
        kappa[:, None] * f**2, CORRECTION
    )
    return found.astype(dtype, copy=False)


def decoded(
    words: NDArray[np.uint32], exponents: NDArray[np.uint8], code: Code, head: int, dtype: DTypeLike
) -> tuple[Floats, Floats]:
    """Return the levels of keys, (n, coded dimensions), and their scales, (n,): `y` is their product."""
    count, bits = coded(code, head)
    high = ((1 << bits) - 1).astype(dtype) / 2
    level = (unpack(words, code.widths[head])[:, :count] - high) * code.step[head, :count].astype(dtype)
    return level, scales(exponents, code.base[head].astype(dtype))


def expected(
    queries: Floats,
    weights: Floats,
    spreads: Floats,
    words: NDArray[np.uint32],
    exponents: NDArray[np.uint8],
    code: Code,
    head: int,
    scale: float,
) -> Floats:
    """Return the weighted sum of the expected `y` of `L` lists and of `n` keys behind them, (g, R).

    Parameters
    ----------
    queries, weights
        (g, d) and (g, L + n).
    spreads
        (L,).
    """
    dtype = queries.dtype
    level, f = decoded(words, exponents, code, head, dtype)
    count = level.shape[1]
    u = queries @ code.inverse[head, :, :count].astype(dtype)
    parts = weights[:, : len(spreads)], weights[:, len(spreads) :]
    total: Floats = (parts[1] * f) @ level
    squares = spreads.astype(dtype), f**2
    for part, square, share in zip(parts, squares, (code.spread, code.distortion), strict=True):
        lam = share[head, :count].astype(dtype)
        variance = scale**2 / 2 * (u**2 @ lam)
        cap = CORRECTION / np.maximum(variance, _TINY)
        total += scale * lam * u * (part * np.minimum(square, cap[:, None])).sum(axis=1, keepdims=True)
    return total.astype(dtype, copy=False)


def scan_codes(
    queries: Floats, taken: Ints, lists: PagedLists, pages: Pages, code: Code, scaling: Scaling
) -> tuple[Floats, Ints, Ints]:
    """See `Ops.scan_codes`."""
    rows = lists.all_rows(taken)
    labels = np.full_like(rows, -1)
    estimates = np.full((*queries.shape[:3], rows.shape[2]), -np.inf, queries.dtype)
    heads = len(code.step)
    for s, i in np.ndindex(*taken.shape[:2]):
        found, label = lists.rows(s, taken[s, i])
        n = len(found)
        anchors = widened(lists.anchors[s], queries.dtype) * lists.anchor_scales[s][:, None].astype(
            queries.dtype
        )
        centers = scaling.scale * (queries[s, i] @ anchors.T)
        words, exponents = pages.take("codes", found), pages.take("exponents", found)
        residual = estimate(queries[s, i], words, exponents, code, s % heads, scaling.scale)
        estimates[s, i, :, :n] = capped(centers[:, label] + residual, scaling.softcap)
        labels[s, i, :n] = label
    return estimates, rows, labels
