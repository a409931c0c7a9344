"""Fitting of transform codes: bits go to the directions that carry the error of a logit."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats
from saapindex.backends.paged import Code
from saapindex.backends.reference import codes as definition
from saapindex.codes.rows import rounded_rows
from saapindex.codes.transform import MOST_WORDS, TransformCode
from saapindex.errors import InvalidInputError
from saapindex.params import check_integer

__all__ = ["fit_codes"]

# Of a Gaussian of unit variance: the best step of a uniform mid-rise quantiser, and its mean squared error.
# Source: Max, "Quantizing for minimum distortion", 1960, table II.
_STEP = {1: 1.596, 2: 0.9957, 4: 0.3352}
_ERROR = {1: 0.3634, 2: 0.1188, 4: 0.01154}
_TINY = 1e-12


def fit_codes(residuals: Floats, metric: Floats, words: int = 3) -> TransformCode:
    """Fit the codes of `H` KV heads.

    With ``M = E[q q^T]`` and ``T = M^(1/2)``, the directions are the eigenvectors of ``E[t t^T]``, ``t = T
    r / |T r|`` (the Karhunen-Loeve transform of what a query sees of a residual). Each word takes fields of
    4, 2 or 1 bits, whichever leaves the least error. The matrix of the queries is rounded to int8, a scale
    for each direction, since every step reads it.

    Parameters
    ----------
    residuals
        (H, n, d), keys minus the centroid of their list, as a model caches keys; at least one.
    metric
        (H, d, d), positive definite, of the queries of each head; its overall factor does not matter.
    words
        1 to 256 words of 32 bits a key.

    Raises
    ------
    InvalidInputError
        On arrays of other shapes, values that are not finite, or a metric that is not positive definite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> residuals = rng.standard_normal((1, 1000, 8)) * 0.5 ** np.arange(8)
    >>> fit_codes(residuals, np.eye(8)[None], words=1).widths
    array([[4]])
    """
    check_integer("words", words, 1)
    if words > MOST_WORDS:
        raise InvalidInputError(f"words is {words}, expected at most {MOST_WORDS}")
    if residuals.ndim != 3 or not residuals.shape[1]:
        raise InvalidInputError(f"residuals have shape {residuals.shape}, expected (heads, n, d) with n > 0")
    heads, _, d = residuals.shape
    if metric.shape != (heads, d, d):
        raise InvalidInputError(f"metric has shape {metric.shape}, expected {(heads, d, d)}")
    if not (np.isfinite(residuals).all() and np.isfinite(metric).all()):
        raise InvalidInputError("residuals or metric hold NaN or infinity, expected finite values")
    heads_codes = [
        _fit_head(r.astype(np.float64), m.astype(np.float64), words)
        for r, m in zip(residuals, metric, strict=True)
    ]
    coded = max(part["step"].shape[-1] for part in heads_codes)
    return TransformCode(
        **{name: _stacked([part[name] for part in heads_codes], name, coded) for name in Code._fields}
    )


def _stacked(parts: list[NDArray[Any]], name: str, coded: int) -> NDArray[Any]:
    """Stack the arrays of all heads, padded with zeros to as many dimensions as the widest head codes."""
    if name in ("widths", "base"):
        return np.stack(parts)
    widened = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, coded - x.shape[-1])]) for x in parts]
    return np.stack(widened).astype(np.float32)


def _fit_head(residuals: Floats, metric: Floats, words: int) -> dict[str, NDArray[Any]]:
    values, vectors = np.linalg.eigh(metric)
    if values[0] <= 0:
        raise InvalidInputError(
            f"metric has the eigenvalue {values[0]:g}, expected a positive definite matrix"
        )
    root, inverse_root = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    seen = residuals @ root
    seen /= np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), _TINY)
    variances, directions = np.linalg.eigh(seen.T @ seen / len(seen))
    directions = directions[:, ::-1]
    widths = allocate(np.maximum(variances[::-1], 0), words)
    _, _, bits = definition.fields(widths)
    bits = bits[: len(metric)]
    forward, inverse = root @ directions[:, : len(bits)], inverse_root @ directions[:, : len(bits)]
    y = residuals @ forward
    unit = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), _TINY)
    deviation = np.sqrt((unit**2).mean(axis=0))
    step = np.array([_STEP[int(b)] for b in bits]) * np.maximum(deviation, 1e-4 * max(deviation.max(), _TINY))
    _, level, scale = definition.quantised(y, step, bits)
    used = scale > _TINY
    base = np.median(scale[used]) if used.any() else 1.0
    relative = y[used] / scale[used, None]
    return {
        "forward": forward,
        "inverse": rounded_rows(inverse.T).T,
        "step": step,
        "widths": widths,
        "base": np.float32(max(base, 1e-20)),
        "spread": (relative**2).sum(axis=0) / max(len(relative), 1),
        "distortion": ((relative - level[used]) ** 2).sum(axis=0) / max(len(relative), 1),
    }


def allocate(variances: Floats, words: int) -> NDArray[np.int64]:
    """Return the bits of each word's fields, wider words first, that leave the least error.

    Parameters
    ----------
    variances
        (d,), falling.

    Examples
    --------
    >>> allocate(np.ones(64), 2).tolist(), allocate(np.eye(64)[0] + 1e-6, 1).tolist()
    ([1, 1], [4])
    """
    choices = [np.array(choice) for choice in combinations_with_replacement((4, 2, 1), words)]

    def error(widths: NDArray[np.int64]) -> float:
        bits = np.repeat(widths, 32 // widths)[: len(variances)]
        left = np.ones(len(variances))
        left[: len(bits)] = [_ERROR[int(b)] for b in bits]
        return float(left @ variances)

    return min(choices, key=error)
