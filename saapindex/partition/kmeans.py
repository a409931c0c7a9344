"""k-means in any quadratic metric: the error that counts is the error of the logit."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats, Ints, Ops
from saapindex.progress import track

__all__ = ["assignment_form", "kmeans", "query_metric"]

# k-means++ draws from a sample of this many rows a centroid, so that it costs about one Lloyd iteration each.
_POOL = 8


def query_metric(queries: Floats, *, shrinkage: float = 1e-3) -> NDArray[np.float64]:
    """Return ``M = E[q q^T]``, scaled to a mean eigenvalue of 1.

    ``E[(q.x - q.c)^2] = (x - c)^T M (x - c)``, so distances under `M` are expected squared errors of
    the inner product with a query.

    Parameters
    ----------
    queries
        (n, d).
    shrinkage
        Weight of the identity, which keeps `M` positive definite.

    Examples
    --------
    >>> query_metric(np.eye(2)).round(3)
    array([[1., 0.],
           [0., 1.]])
    """
    queries = queries.astype(np.float64)
    metric = queries.T @ queries
    d = len(metric)
    trace = metric.trace()
    metric = metric * (d / trace) if trace > 0 else np.eye(d)
    return (1 - shrinkage) * metric + shrinkage * np.eye(d)


def assignment_form(
    centroids: Floats, metric: Floats | None, spherical: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return `A` and `b` so that the nearest centroid of `x` is ``argmax_j x . A_j + b_j``.

    ``(x-c)^T M (x-c) = x^T M x - 2 (x . M c - c^T M c / 2)``, and ``x^T M x`` does not depend on `j`: neither
    training nor adding needs the square root of `M`. Spherical assignment has ``A = c``, ``b = 0``.
    """
    if spherical:
        return centroids.astype(np.float32), np.zeros(len(centroids), np.float32)
    centroids = centroids.astype(np.float64)
    forms = centroids if metric is None else centroids @ metric
    bias = -(forms * centroids).sum(axis=1) / 2
    return np.ascontiguousarray(forms, np.float32), bias.astype(np.float32)


def kmeans(
    x: NDArray[np.float32],
    nlist: int,
    *,
    ops: Ops,
    rng: np.random.Generator,
    metric: Floats | None = None,
    spherical: bool = False,
    niter: int = 10,
    init: Literal["random", "kmeans++"] = "random",
    start: NDArray[np.float32] | None = None,
    show: bool = False,
) -> NDArray[np.float32]:
    """Partition `x` into `nlist` parts (Lloyd); return the centroids, float32 (nlist, d).

    Parameters
    ----------
    x
        (n, d), ``n >= nlist``.
    metric
        (d, d), positive definite; None for the Euclidean metric.
    spherical
        Unit centroids, assigned by inner product. Excludes a metric.
    niter
        Iterations.
    init
        ``"random"`` distinct rows, or ``"kmeans++"`` (rows drawn by their squared distance to those
        drawn before; Arthur and Vassilvitskii, 2007).
    start
        Centroids to start from instead, (nlist, d).
    show
        Whether to show a progress bar.

    Notes
    -----
    An empty part is refilled with a row drawn by its error, so that crowded regions get it.
    """
    forms, _ = assignment_form(x, metric, spherical)
    norms = np.einsum("ij,ij->i", x, forms)  # x^T M x of each row
    if start is not None:
        centroids = start.astype(np.float32)
    elif init == "kmeans++":
        centroids = x[_plus_plus(x, forms, norms, nlist, rng)]
    else:
        centroids = x[rng.choice(len(x), nlist, replace=False)]
    if spherical:
        centroids = _unit(centroids)
    for _ in track(range(niter), "k-means", show=show):
        labels, scores = ops.assign(x, *assignment_form(centroids, metric, spherical))
        sums, counts = ops.accumulate(x, labels, nlist)
        filled = counts > 0
        centroids = np.where(filled[:, None], sums / np.maximum(counts, 1)[:, None], centroids).astype(
            np.float32
        )
        if not filled.all():
            error = np.maximum(norms - 2 * scores, 0) if not spherical else np.sqrt(norms) - scores
            centroids[~filled] = x[_draw(error, int((~filled).sum()), rng)]
        if spherical:
            centroids = _unit(centroids)
    return np.ascontiguousarray(centroids)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(x, norms, where=norms > 0, out=np.zeros_like(x))
    return unit


def _draw(weights: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Draw rows with a chance in proportion to their weight; all alike if no weight is left."""
    weights = np.maximum(weights.astype(np.float64), 0)
    total = weights.sum()
    chances = weights / total if total > 0 and np.isfinite(total) else None
    return rng.choice(len(weights), count, p=chances)


def _plus_plus(x: Floats, forms: Floats, norms: Floats, nlist: int, rng: np.random.Generator) -> Ints:
    """Rows drawn one after the other by their squared distance to the nearest drawn before."""
    pool = np.arange(len(x))
    if len(x) > _POOL * nlist:
        pool = rng.choice(len(x), _POOL * nlist, replace=False)
        x, forms, norms = x[pool], forms[pool], norms[pool]
    chosen = np.empty(nlist, np.int64)
    chosen[0] = rng.integers(len(x))
    error = np.full(len(x), np.inf, np.float32)
    for i, where in enumerate(rng.random(nlist - 1), 1):
        last = chosen[i - 1]
        distance = norms - 2 * (x @ forms[last]) + norms[last]
        np.minimum(error, np.maximum(distance, 0, out=distance), out=error)
        total = np.cumsum(error, dtype=np.float64)
        chosen[i] = min(np.searchsorted(total, where * total[-1], side="right"), len(x) - 1)
    return pool[chosen]
