"""Routing: scores of all lists, and the best of them."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import Floats, Ints


def route(features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
    """See `Ops.route`."""
    rows = table.transpose(0, 2, 1).reshape(-1, table.shape[1])[: len(bias)]
    scores = features @ rows.T + bias
    lists = np.argsort(-scores, axis=1, kind="stable")[:, :p]
    best = np.take_along_axis(scores, lists, axis=1)
    return np.where(best > -np.inf, lists, -1), best
