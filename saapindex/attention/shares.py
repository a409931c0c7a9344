"""What a model's heads take of the bytes that a step may read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats
from saapindex.errors import InvalidInputError

__all__ = ["MOST_SEEN", "HeadShares"]

CODES, WEIGHTS = "shares.codes", "shares.weights"
SCARCE, ASKS, LENGTHS = "shares.scarce", "shares.asks", "shares.lengths"
"""Names of the tensors in a codebook: of each head a row, for every length in tokens."""
MOST_SEEN = 16384
"""Heads that look things up need not see the codes of more keys: in long contexts lists lose less."""


class HeadShares(NamedTuple):
    """How the KV heads of a layer share out what a budget leaves after statistics of lists.

    Attributes
    ----------
    weights
        float32, (H,): times what an even split would give a head; the mean over all heads of a model is 1.
    codes
        float32, (H,): at least this share of it goes to codes, below 1.
    scarce
        float32, (H,): weights of mean 1 too, which leave as much as can be to the heads that look things up.
        Between these and `weights` a step goes so far as such heads need to see the codes of all keys, or of
        as many as 16,384; None for never.
    asks
        float32, (3,), of the heads of the model that look things up: their least weight in `weights` and in
        `scarce`, and their share of codes.

    Examples
    --------
    >>> shares = HeadShares(np.float32([0.8, 2.0]), np.float32([0.0, 0.75]))
    >>> left, codes = shares.apply(np.array([100, 100]), np.array([150, 150]), np.array([90, 90]), 0.4)
    >>> left.round(2).tolist(), codes.round(2).tolist()
    ([80.0, 150.0], [0.4, 0.75])
    >>> shares = shares._replace(scarce=np.float32([0.2, 1.8]), asks=np.float32([1.2, 1.8, 0.75]))
    >>> shares.apply(np.array([50, 50]), np.array([150, 150]), np.array([60, 60]), 0.4)[0].round(2).tolist()
    [20.0, 93.33]
    """

    weights: NDArray[np.float32]
    codes: NDArray[np.float32]
    scarce: NDArray[np.float32] | None = None
    asks: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]], n: int) -> Self | None:
        """Return what the tensors of a layer of a codebook say of contexts of `n` tokens, or None.

        That is what they say of the length that is closest, of two as close of the longer.
        """
        if WEIGHTS not in tensors or CODES not in tensors:
            return None
        if LENGTHS not in tensors:  # a codebook that knows of one length, and of no scarcity
            return cls(tensors[WEIGHTS].astype(np.float32), tensors[CODES].astype(np.float32))
        lengths = tensors[LENGTHS][0]
        at = max(range(len(lengths)), key=lambda i: (-abs(round(math.log2(lengths[i] / max(n, 1)), 9)), i))
        found = (tensors[name][:, at].astype(np.float32) for name in (WEIGHTS, CODES, SCARCE, ASKS))
        weights, codes, scarce, asks = found
        return cls(weights, codes, scarce, asks[0])

    def check(self, heads: int) -> None:
        """Refuse shares that are not for so many heads, or no shares."""
        arrays = {"weights": self.weights, "codes": self.codes}
        if (self.scarce is None) != (self.asks is None):
            raise InvalidInputError("scarce or asks of the shares are given alone, expected both or neither")
        if self.scarce is not None and self.asks is not None:
            arrays["scarce"] = self.scarce
            if self.asks.dtype != np.float32 or self.asks.shape != (3,):
                raise InvalidInputError(
                    f"asks of the shares are {self.asks.dtype} of shape {self.asks.shape}, expected float32 "
                    "of (3,)"
                )
            least, most, codes = self.asks.tolist()
            if not (0 < least <= most < np.inf and 0 < codes < 1):
                raise InvalidInputError(
                    f"asks are {self.asks.tolist()}, expected two rising weights above 0 and a share in "
                    "(0, 1)"
                )
        for name, array in arrays.items():
            if array.dtype != np.float32 or array.shape != (heads,):
                raise InvalidInputError(
                    f"{name} of the shares are {array.dtype} of shape {array.shape}, expected float32 of "
                    f"({heads},)"
                )
        for name in arrays.keys() - {"codes"}:
            if not (np.isfinite(arrays[name]).all() and (arrays[name] > 0).all()):
                raise InvalidInputError(f"{name} are {arrays[name].tolist()}, expected numbers above 0")
        if not ((self.codes >= 0) & (self.codes < 1)).all():
            raise InvalidInputError(f"shares of codes are {self.codes.tolist()}, expected some in [0, 1)")

    @property
    def most(self) -> float:
        """The largest weight that a head can have."""
        arrays = [self.weights] if self.scarce is None else [self.weights, self.scarce]
        return float(max(array.max() for array in arrays))

    def apply(self, left: Floats, most: Floats, codes: Floats, scan_share: float) -> tuple[Floats, Floats]:
        """Return the bytes that streams may read, (S,), and the share of codes in them.

        Parameters
        ----------
        left
            (S,), of an even split, after statistics.
        most
            (S,), of all keys and values: more is of no use.
        codes
            (S,), of the codes of all keys, or of as many as are to be seen.
        scan_share
            Of heads that ask for no more.
        """
        sequences = len(left) // max(len(self.weights), 1)
        weights = np.tile(self.weights, sequences).astype(np.float64)
        if self.scarce is not None and self.asks is not None:
            least, largest, share = self.asks.astype(np.float64)
            needed = codes / np.maximum(share * left, 1)
            lack = np.clip((needed - least) / max(largest - least, 1e-9), 0, 1)
            weights += lack * (np.tile(self.scarce, sequences) - weights)
        own: Floats = np.minimum(left * weights, most)
        shares: Floats = np.maximum(scan_share, np.tile(self.codes, sequences).astype(np.float64))
        return own, shares
