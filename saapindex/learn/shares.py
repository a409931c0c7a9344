"""What each head of a model takes of a budget, from what was measured of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.shares import ASKS, CODES, LENGTHS, SCARCE, WEIGHTS
from saapindex.backends.base import Floats, Ints
from saapindex.codebook_layer import CodebookLayer

__all__ = ["ERRORS", "LEFT", "LOOKUPS", "TOKENS", "best_weights", "share_out"]

ERRORS, LEFT, LOOKUPS, TOKENS = "shares.errors", "shares.left", "shares.lookups", "shares.tokens"
"""Names of the tensors in a codebook: error at two budgets, (H, 2); bytes that these leave, as a share of
all, (H, 2); of each held-out sequence the share of queries that look something up, and their error, (H,
n, 2), and its length, (H, n)."""
RATE, LOST = 0.02, 0.02
"""A head looks things up if in some held-out sequence so many of its queries do, and loses them if their mean
error is so large."""
LOOKUP_WEIGHT, LOOKUP_CODES = 2.2, 0.75
"""A head that loses what it looks up takes at least so many times an even part, and so much of it for codes:
at 5 % of the bytes it reads the codes of all keys."""
OTHERS = 0.15
"""Of an even part, what the other heads keep at least where bytes are scarce."""
_LEAST, _MOST = 0.3, 4.0
_POWERS = 0.2, 2.5


def share_out(layers: Mapping[int, CodebookLayer]) -> dict[int, CodebookLayer]:
    """Return the layers of a model with the shares of their heads, if they were measured.

    The error of a head is taken for a power of the bytes that it reads after statistics, and the mean error
    over all heads is made as small as it can be. A head that loses what it looks up takes more: a key that is
    wanted is no matter of means. Where a budget leaves them too little to see the codes of all keys, they
    take as much more as that needs of what the others have, but for a rest.

    That is so for every length that was held out. Which heads look things up is another matter at each: at a
    length it is those that do so in sequences that are no longer.
    """
    found = dict(layers)
    if not all({ERRORS, LEFT, LOOKUPS, TOKENS} <= layer.extra.keys() for layer in layers.values()):
        return found
    errors, left, lookups = (
        np.concatenate([layer.extra[name] for layer in layers.values()]).astype(np.float64)
        for name in (ERRORS, LEFT, LOOKUPS)
    )
    tokens = next(iter(layers.values())).extra[TOKENS][0]
    powers = _powers(errors, left)
    losing = (lookups[..., 0] >= RATE) & (lookups[..., 1] >= LOST)
    lengths = _lengths(tokens)
    rows: list[tuple[Floats, ...]] = []
    for length in lengths:
        asks: NDArray[np.bool_] = np.asarray(losing[:, tokens <= length].any(axis=1))
        weights = best_weights(errors[:, 0], powers, np.where(asks, LOOKUP_WEIGHT, _LEAST))
        rows.append((weights, np.where(asks, LOOKUP_CODES, 0.0), *_scarce(weights, asks)))
    parts = [np.stack(part, axis=-1) for part in zip(*rows, strict=True)]
    start = 0
    for number, layer in layers.items():
        own = slice(start, start + layer.kv_heads)
        start = own.stop
        shares = {
            name: part[own].astype(np.float32)
            for name, part in zip((WEIGHTS, CODES, SCARCE), parts[:3], strict=True)
        }
        for name, part in ((ASKS, parts[3].T.astype(np.float32)), (LENGTHS, np.array(lengths, np.int64))):
            shares[name] = np.stack([part] * layer.kv_heads)
        found[number] = dataclasses.replace(layer, extra={**layer.extra, **shares})
    return found


def _lengths(tokens: Ints) -> list[int]:
    """Return the lengths of sequences, of those that are alike the longest.

    Examples
    --------
    >>> _lengths(np.array([8192, 32768, 30000, 8000]))
    [8192, 32768]
    """
    found: list[int] = []
    for length in sorted(set(tokens.tolist()), reverse=True):
        if not found or 2 * length <= found[-1]:
            found.append(length)
    return found[::-1]


def _scarce(weights: Floats, asks: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return weights of mean 1 that leave the most to heads that ask, and the least of both that they have.

    Where no head asks, or too many do, that is what they have anyway.
    """
    found, ends = weights, (1.0, 1.0)
    if 0 < asks.mean() < 1:
        most = (1 - OTHERS * (~asks).mean()) / asks.mean()
        if most > weights[asks].max():
            found = np.where(asks, most, weights / weights[~asks].mean() * OTHERS)
            ends = float(weights[asks].min()), float(most)
    return found, np.array([*ends, LOOKUP_CODES])


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
