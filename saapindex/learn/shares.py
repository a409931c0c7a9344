"""What each head of a model takes of a budget, from what was measured of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from saapindex.attention.shares import CODES, WEIGHTS
from saapindex.backends.base import Floats
from saapindex.codebook_layer import CodebookLayer

__all__ = ["ERRORS", "LEFT", "LOOKUPS", "best_weights", "share_out"]

ERRORS, LEFT, LOOKUPS = "shares.errors", "shares.left", "shares.lookups"
"""Names of the tensors in a codebook: error at two budgets, (H, 2); bytes that these leave, as a share of
all, (H, 2); of each held-out sequence the share of queries that look something up, and their error, (H,
n, 2)."""
RATE, LOST = 0.02, 0.02
"""A head looks things up if in some held-out sequence so many of its queries do, and loses them if their mean
error is so large."""
LOOKUP_WEIGHT, LOOKUP_CODES = 2.2, 0.75
"""A head that loses what it looks up takes at least so many times an even part, and so much of it for codes:
at 5 % of the bytes it reads the codes of all keys."""
_LEAST, _MOST = 0.3, 4.0
_POWERS = 0.2, 2.5


def share_out(layers: Mapping[int, CodebookLayer]) -> dict[int, CodebookLayer]:
    """Return the layers of a model with the shares of their heads, if they were measured.

    The error of a head is taken for a power of the bytes that it reads after statistics, and the mean error
    over all heads is made as small as it can be. A head that loses what it looks up takes more: a key that is
    wanted is no matter of means.
    """
    found = dict(layers)
    if not all({ERRORS, LEFT, LOOKUPS} <= layer.extra.keys() for layer in layers.values()):
        return found
    errors, left, lookups = (
        np.concatenate([layer.extra[name] for layer in layers.values()]).astype(np.float64)
        for name in (ERRORS, LEFT, LOOKUPS)
    )
    powers = _powers(errors, left)
    asks = ((lookups[..., 0] >= RATE) & (lookups[..., 1] >= LOST)).any(axis=1)
    weights = best_weights(errors[:, 0], powers, np.where(asks, LOOKUP_WEIGHT, _LEAST))
    codes = np.where(asks, LOOKUP_CODES, 0.0)
    start = 0
    for number, layer in layers.items():
        own = slice(start, start + layer.kv_heads)
        start = own.stop
        shares = {WEIGHTS: weights[own].astype(np.float32), CODES: codes[own].astype(np.float32)}
        found[number] = dataclasses.replace(layer, extra={**layer.extra, **shares})
    return found


def _powers(errors: Floats, left: Floats) -> Floats:
    """Return by which power of the bytes the error of each head falls."""
    fewer = np.maximum(left[:, 1], left[:, 0] / 10)  # a small budget may leave nothing
    ratio = np.log(np.maximum(left[:, 0], 1e-12) / np.maximum(fewer, 1e-12))
    fall = np.log(np.maximum(errors[:, 1], 1e-12) / np.maximum(errors[:, 0], 1e-12))
    powers: Floats = np.clip(fall / np.maximum(ratio, 1e-6), *_POWERS)
    return powers


def best_weights(errors: Floats, powers: Floats, least: Floats) -> Floats:
    """Return the weights of mean 1 that make the mean of ``errors * weights ** -powers`` least.

    Parameters
    ----------
    errors, powers
        (n,): of an even split, and how each falls; above 0.
    least
        (n,), of mean at most 1: what each weight is at least. It is at most 4, or `least`.

    Returns
    -------
    ndarray
        float64, (n,).

    Examples
    --------
    >>> best_weights(np.array([1.0, 4.0]), np.ones(2), np.zeros(2)).round(3)
    array([0.667, 1.333])
    >>> best_weights(np.array([1.0, 4.0]), np.ones(2), np.array([0.9, 0.0])).round(3)
    array([0.9, 1.1])
    """
    if least.mean() >= 1:
        alike: Floats = least / least.mean()
        return alike
    most = np.maximum(least, _MOST)

    def weights(price: float) -> Floats:
        # Where the error falls by the same for a byte more: p e w^(-p-1) = price.
        free = np.exp((np.log(np.maximum(errors * powers, 1e-300)) - price) / (powers + 1))
        clipped: Floats = np.clip(free, least, most)
        return clipped

    low, high = -800.0, 800.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle).mean() > 1 else (low, middle)
    found: Floats = weights(high)
    return found
