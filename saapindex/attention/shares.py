"""What a model's heads take of the bytes that a step may read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats
from saapindex.errors import InvalidInputError

__all__ = ["HeadShares"]

CODES, WEIGHTS = "shares.codes", "shares.weights"
"""Names of the tensors in a codebook."""


class HeadShares(NamedTuple):
    """How the KV heads of a layer share out what a budget leaves after statistics of lists.

    Attributes
    ----------
    weights
        float32, (H,): times what an even split would give a head; the mean over all heads of a model is 1.
    codes
        float32, (H,): at least this share of it goes to codes, below 1.

    Examples
    --------
    >>> shares = HeadShares(np.float32([0.8, 2.0]), np.float32([0.0, 0.75]))
    >>> left, codes = shares.apply(np.array([100, 100]), np.array([150, 150]), 0.4)
    >>> left.round(2).tolist(), codes.round(2).tolist()
    ([80.0, 150.0], [0.4, 0.75])
    """

    weights: NDArray[np.float32]
    codes: NDArray[np.float32]

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Self | None:
        """Return what the tensors of a layer of a codebook say, or None."""
        if WEIGHTS not in tensors or CODES not in tensors:
            return None
        return cls(tensors[WEIGHTS].astype(np.float32), tensors[CODES].astype(np.float32))

    def check(self, heads: int) -> None:
        """Refuse shares that are not for so many heads, or no shares."""
        for name, array in self._asdict().items():
            if array.dtype != np.float32 or array.shape != (heads,):
                raise InvalidInputError(
                    f"{name} of the shares are {array.dtype} of shape {array.shape}, expected float32 of "
                    f"({heads},)"
                )
        if not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
            raise InvalidInputError(f"weights are {self.weights.tolist()}, expected numbers above 0")
        if not ((self.codes >= 0) & (self.codes < 1)).all():
            raise InvalidInputError(f"shares of codes are {self.codes.tolist()}, expected some in [0, 1)")

    def apply(self, left: Floats, most: Floats, scan_share: float) -> tuple[Floats, Floats]:
        """Return the bytes that streams may read, (S,), and the share of codes in them.

        Parameters
        ----------
        left
            (S,), of an even split, after statistics.
        most
            (S,), of all keys and values: more is of no use.
        scan_share
            Of heads that ask for no more.
        """
        sequences = len(left) // max(len(self.weights), 1)
        own: Floats = np.minimum(left * np.tile(self.weights, sequences).astype(np.float64), most)
        codes: Floats = np.maximum(scan_share, np.tile(self.codes, sequences).astype(np.float64))
        return own, codes
