"""What the code of a key says of its value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats
from saapindex.codes.rows import rounded_rows

__all__ = ["SLOPE_KEYS", "fit_slopes"]

SLOPE_KEYS = 16384
"""Of more keys than twice this, slopes are fitted on those at every second, third, ... position."""
_FROM = 16
"""Fewer keys a coded dimension than this say too little."""
_RIDGE = 0.01
"""Ridge, relative to the mean square of a coded dimension."""


def fit_slopes(y: Floats, residuals: Floats) -> NDArray[np.float32]:
    """Regress values on coded keys, both relative to the mean of their list: ``residuals`` is about ``y @
    slopes``.

    Keys and values of a model go together: among the keys of a list, those on the side of a query have
    values of their own kind. Errors that share a direction do not cancel in a sum, so a regression that
    explains only a tenth of the variance takes a quarter off the error of attention.

    Parameters
    ----------
    y
        (n, R), what the codes hold of the keys.
    residuals
        (n, d), values minus the mean value of their list.

    Returns
    -------
    ndarray
        float32, (R, d), rounded to int8 with a scale for each row; zero where there are fewer than 16 keys
        for a dimension.

    Notes
    -----
    Ridge regression, with a penalty of a hundredth of the mean square of a coded dimension.

    Examples
    --------
    >>> y = np.random.default_rng(0).standard_normal((100, 2))
    >>> fit_slopes(y, y @ [[3.0], [0.0]]).round(1)
    array([[3.],
           [0.]], dtype=float32)
    """
    n, dimensions = y.shape
    if n < _FROM * dimensions:
        return np.zeros((dimensions, residuals.shape[1]), np.float32)
    exact = y.astype(np.float64)
    squares = exact.T @ exact
    penalty = _RIDGE * np.trace(squares) / max(dimensions, 1)
    if not penalty > 0:
        return np.zeros((dimensions, residuals.shape[1]), np.float32)
    products = exact.T @ residuals.astype(np.float64)
    return rounded_rows(np.linalg.solve(squares + penalty * np.eye(dimensions), products))
