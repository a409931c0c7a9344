"""Faiss's coarse quantiser, trained by Faiss itself. Needs faiss, not torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError, MissingDependencyError

__all__ = ["CoarseName", "require_faiss", "train_coarse"]

CoarseName = Literal["ip", "l2"]


def require_faiss() -> Any:
    """Return the module `faiss`.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError("faiss-cpu", "the comparison with Faiss", "demo") from error
    return faiss


def train_coarse(
    x: NDArray[np.float32], nlist: int, quantizer: CoarseName, *, niter: int = 10
) -> tuple[Any, Any]:
    """Cluster `x` as `IndexIVFFlat` with inner product does; return what assigns keys and what routes
    queries.

    Parameters
    ----------
    x
        (n, d), at least `nlist` rows.
    nlist
        Number of lists.
    quantizer
        ``"ip"``: spherical k-means and inner products, Faiss's default for this metric; ``"l2"``: plain
        k-means, keys go to the nearest centroid and queries to the centroids of the largest inner product.
    niter
        Iterations; 10 as `IndexIVF` has it.

    Returns
    -------
    assigner, router : faiss.IndexFlat
        Both hold the `nlist` centroids; the same index twice for ``"ip"``.

    Raises
    ------
    MissingDependencyError
        Without faiss.
    InvalidInputError
        If there are fewer rows than lists.
    """
    faiss = require_faiss()
    if len(x) < nlist:
        raise InvalidInputError(f"nlist is {nlist}, expected at most the {len(x)} keys to train on")
    d, spherical = x.shape[1], quantizer == "ip"
    clustering = faiss.Clustering(d, nlist)
    clustering.spherical, clustering.niter = spherical, niter
    clustering.min_points_per_centroid = 1  # says nothing about small training sets
    assigner = faiss.IndexFlatIP(d) if spherical else faiss.IndexFlatL2(d)
    clustering.train(np.ascontiguousarray(x), assigner)
    if spherical:
        return assigner, assigner
    router = faiss.IndexFlatIP(d)
    router.add(assigner.reconstruct_n(0, nlist))
    return assigner, router
