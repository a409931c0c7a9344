"""Choice of the lists that a query visits."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import Floats, Ints


def top_lists(scores: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.top_lists`."""
    scores = scores + bias
    lists = np.argsort(-scores, axis=1, kind="stable")[:, :p]
    best = np.take_along_axis(scores, lists, axis=1)
    return np.where(best > -np.inf, lists, -1), best
