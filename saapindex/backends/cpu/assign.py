"""Assignment of vectors to centroids: BLAS and NumPy's SIMD on what fits the cache; sums in numba."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints

# Scores held at once: 1 MiB, which stays in the second-level cache.
BLOCK = 1 << 18


def assign(x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
    """See `Ops.assign`."""
    labels, best = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    step = max(1, BLOCK // len(centroids))
    scores = np.empty((min(step, len(x)), len(centroids)), np.float32)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        part = scores[: len(x[rows])]
        np.matmul(x[rows], centroids.T, out=part)
        part += bias
        np.argmax(part, axis=1, out=labels[rows])
        best[rows] = part[np.arange(len(part)), labels[rows]]
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
