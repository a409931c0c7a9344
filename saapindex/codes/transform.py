"""Transform codes: a few bits a dimension, given to the directions in which queries tell keys apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import FieldCode, Floats, Ops
from saapindex.backends.paged import Code
from saapindex.backends.reference import codes as definition
from saapindex.codes.rows import rounded_rows
from saapindex.errors import InvalidInputError

__all__ = ["MOST_WORDS", "TransformCode"]

MOST_WORDS = 256
"""Words of 32 bits that a code may have."""


@dataclass(frozen=True, eq=False)
class TransformCode:
    """The codes of the KV heads of a layer; made by `fit_codes`.

    A key's residual `r` to the anchor of its list is rotated and scaled, ``y = r @ forward``, so that the
    expected squared error of a logit is that of `y`. Each of its first dimensions is a field of 1, 2 or 4
    bits.

    Attributes
    ----------
    forward, inverse
        float32, (H, d, R): of residuals and of queries; ``q . r`` is about ``(q @ inverse) . (r @ forward)``.
    step
        float32, (H, R): step of the quantiser of ``y / |y|``; zero where a head codes fewer dimensions.
    widths
        int64, (H, W): bits of the fields of each 32-bit word, 1, 2 or 4, falling.
    base
        float32, (H,): the scale of a typical key.
    spread, distortion
        float32, (H, R): mean square of ``y / f`` and of its error, in training.

    Raises
    ------
    InvalidInputError
        If the arrays do not belong together.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> from saapindex.codes import fit_codes
    >>> code = fit_codes(rng.standard_normal((2, 500, 16)), np.stack([np.eye(16)] * 2), words=1)
    >>> code.heads, code.d, code.nbytes_per_key
    (2, 16, 5)
    """

    forward: NDArray[np.float32]
    inverse: NDArray[np.float32]
    step: NDArray[np.float32]
    widths: NDArray[np.int64]
    base: NDArray[np.float32]
    spread: NDArray[np.float32]
    distortion: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.forward.ndim != 3 or self.widths.ndim != 2:
            raise InvalidInputError(
                f"forward and widths have shapes {self.forward.shape} and {self.widths.shape}, "
                "expected (heads, d, R) and (heads, words)"
            )
        heads, _, coded = self.forward.shape
        shapes = {
            "inverse": self.forward.shape,
            "step": (heads, coded),
            "widths": (heads, self.widths.shape[1]),
            "base": (heads,),
            "spread": (heads, coded),
            "distortion": (heads, coded),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InvalidInputError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        for name, array in self.tensors().items():
            expected = np.int64 if name == "widths" else np.float32
            if array.dtype != expected:
                raise InvalidInputError(f"{name} is {array.dtype}, expected {np.dtype(expected)}")
            if not np.isfinite(array).all():
                raise InvalidInputError(f"{name} holds NaN or infinity, expected finite values")
        if not np.isin(self.widths, (1, 2, 4)).all() or not 1 <= self.words <= MOST_WORDS:
            raise InvalidInputError(
                f"widths are {self.widths.tolist()}, expected 1 to {MOST_WORDS} words of fields of 1, 2 or 4 "
                "bits"
            )
        if not (self.base > 0).all():
            raise InvalidInputError(f"base is {self.base.tolist()}, expected scales above 0")

    @property
    def heads(self) -> int:
        """Number of KV heads."""
        return len(self.forward)

    @property
    def d(self) -> int:
        """Dimension of keys."""
        return int(self.forward.shape[1])

    @property
    def words(self) -> int:
        """Words of 32 bits in a code."""
        return int(self.widths.shape[1])

    @property
    def nbytes_per_key(self) -> int:
        """Bytes of the code of a key, with its scale."""
        return 4 * self.words + 1

    @cached_property
    def coded(self) -> NDArray[np.int64]:
        """Dimensions that each head codes, int64 (H,)."""
        counts: NDArray[np.int64] = np.minimum((32 // self.widths).sum(axis=1), self.forward.shape[2])
        return counts

    @cached_property
    def view(self) -> Code:
        """The codes as kernels see them."""
        return Code(**self.tensors())

    @cached_property
    def fields(self) -> FieldCode:
        """How the codes of the only head are read.

        Raises
        ------
        InvalidInputError
            If there are more heads.
        """
        if self.heads != 1:
            raise InvalidInputError(f"codes are of {self.heads} heads, expected 1")
        count, bits = definition.coded(self.view, 0)
        return FieldCode(
            np.ascontiguousarray(self.inverse[0, :, :count]),
            np.ascontiguousarray(self.step[0, :count]),
            (((1 << bits) - 1) / 2).astype(np.float32),
            self.widths[0],
            definition.scales(np.arange(256).astype(np.uint8), np.asarray(self.base[0])),
        )

    def head(self, number: int) -> TransformCode:
        """Return the codes of one head."""
        return TransformCode(**{name: array[number : number + 1] for name, array in self.tensors().items()})

    def rounded(self) -> TransformCode:
        """Return codes whose matrix of the queries is one of int8, as `fit_codes` makes it."""
        inverse = rounded_rows(self.inverse.swapaxes(1, 2)).swapaxes(1, 2)
        return replace(self, inverse=np.ascontiguousarray(inverse))

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def encode(self, residuals: Floats, ops: Ops) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Return words, (H, n, W), and exponents, (H, n), of residuals, (H, n, d): see `Ops.encode`."""
        return ops.encode(residuals, self.view)

    def decode(self, words: NDArray[np.uint32], exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return `y` as the codes hold it, float32 (H, n, R), zero beyond a head's coded dimensions."""
        decoded = np.zeros((*exponents.shape, self.forward.shape[2]), np.float32)
        for h, count in enumerate(self.coded):
            _, _, bits = definition.fields(self.widths[h])
            high = ((1 << bits) - 1)[:count] / 2
            level = (definition.unpack(words[h], self.widths[h])[:, :count] - high) * self.step[h, :count]
            decoded[h, :, :count] = definition.scales(exponents[h], self.base[h])[:, None] * level
        return decoded

    def estimate(
        self, queries: Floats, words: NDArray[np.uint32], exponents: NDArray[np.uint8], scale: float
    ) -> Floats:
        """Return estimates of ``scale * q . r``, (H, g, n), for queries (H, g, d): see `Ops.scan_codes`."""
        return np.stack(
            [
                definition.estimate(q, words[h], exponents[h], self.view, h, scale)
                for h, q in enumerate(queries)
            ]
        )
