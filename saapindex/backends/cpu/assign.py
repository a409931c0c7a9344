"""Assignment of vectors to centroids: BLAS for the products, numba for the rest."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints

# Scores held at once: 16 MiB, whatever the number of rows.
BLOCK = 1 << 22


@njit(cache=True, nogil=True, parallel=True, fastmath={"nnan", "nsz"})
def _argmax(scores, bias, labels, best):  # type: ignore[no-untyped-def]
    """Add the bias in place and find the best of each row."""
    for i in prange(scores.shape[0]):
        row = scores[i]
        top = row[0] + bias[0]
        for j in range(row.shape[0]):
            row[j] += bias[j]
            top = max(top, row[j])
        label = 0
        while row[label] != top and label < row.shape[0] - 1:
            label += 1
        labels[i], best[i] = label, top


def assign(x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
    """See `Ops.assign`."""
    labels, best = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    step = max(1, BLOCK // len(centroids))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        _argmax(x[rows] @ centroids.T, bias, labels[rows], best[rows])
    return labels, best


@njit(cache=True, nogil=True)
def _accumulate(x, labels, sums, counts):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        label = labels[i]
        counts[label] += 1
        for j in range(x.shape[1]):
            sums[label, j] += x[i, j]


def accumulate(x: Floats, labels: Ints, nlist: int) -> tuple[NDArray[np.float64], Ints]:
    """See `Ops.accumulate`."""
    sums, counts = np.zeros((nlist, x.shape[1])), np.zeros(nlist, np.int64)
    _accumulate(x, labels, sums, counts)
    return sums, counts
