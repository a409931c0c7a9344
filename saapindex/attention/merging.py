"""Joining attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy
from saapindex.attention.tensors import queries, returned
from saapindex.backends import get_ops
from saapindex.errors import InvalidInputError

__all__ = ["merge"]


def merge(
    outs: Sequence[ArrayLike], lses: Sequence[ArrayLike], *, backend: str = "cpu"
) -> tuple[ArrayLike, ArrayLike]:
    """Join attention over disjoint parts of the keys into attention over all of them.

    Parameters
    ----------
    outs
        Output over each part, (..., d).
    lses
        Log of the sum of ``exp(logit)`` over each part, (...); minus infinity for a part without keys.
    backend
        ``"cpu"`` or ``"reference"``.

    Returns
    -------
    out : (..., d), in the precision of the first output
    lse : (...), float32

    Raises
    ------
    InvalidInputError
        On shapes that do not fit each other, or an output that is not finite.

    Examples
    --------
    >>> one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> out, lse = merge([one, other], [np.log([3.0]), np.log([1.0])])
    >>> out.round(3).tolist(), float(np.exp(lse[0]).round(3))
    ([[0.75, 0.25]], 4.0)
    """
    if not len(outs) or len(outs) != len(lses):
        raise InvalidInputError(
            f"{len(outs)} outputs and {len(lses)} lses, expected as many of both, and some"
        )
    ops, shape = get_ops(backend), tuple(outs[0].shape)
    parts = np.stack([queries(out, f"outs[{i}]", shape, ops) for i, out in enumerate(outs)])
    logs = np.stack([_log_sums(lse, f"lses[{i}]", shape[:-1]) for i, lse in enumerate(lses)])
    out, lse = ops.merge(parts, logs)
    return returned(out, outs[0], own_precision=True), returned(lse, outs[0])


def _log_sums(value: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = as_numpy(value, name)
    if array.shape != shape or array.dtype.kind != "f" or np.isnan(array).any() or np.isposinf(array).any():
        raise InvalidInputError(
            f"{name} is {array.dtype} of shape {array.shape}, expected numbers or minus infinity of {shape}"
        )
    return array.astype(np.float32)
