"""Assignment of vectors to centroids, and the sums that k-means needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints


def assign(x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
    """See `Ops.assign`."""
    scores = x @ centroids.T + bias
    labels = scores.argmax(axis=1)
    return labels, np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]


def accumulate(x: Floats, labels: Ints, nlist: int) -> tuple[NDArray[np.float64], Ints]:
    """See `Ops.accumulate`."""
    sums = np.zeros((nlist, x.shape[1]))
    np.add.at(sums, labels, x)
    return sums, np.bincount(labels, minlength=nlist)
