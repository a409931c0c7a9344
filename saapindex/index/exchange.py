"""Faiss's own inverted files: making one of our lists, and reading one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Ints
from saapindex.errors import InvalidInputError, MissingDependencyError

__all__ = ["FaissLists", "make_ivf", "read_ivf"]


def _faiss(purpose: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError("faiss", purpose, "demo") from error
    return faiss


class FaissLists(NamedTuple):
    """What a Faiss inverted file holds, list by list.

    Attributes
    ----------
    centroids
        float32, (nlist, d).
    l2
        Whether scores are distances.
    spherical
        Whether keys go to the centroid of the largest inner product, rather than to the nearest.
    nprobe
        Lists that a search visits.
    keys
        float32 or float16, (n, d).
    ids, labels
        int64, (n,): ids, and the list of each key.
    """

    centroids: NDArray[np.float32]
    l2: bool
    spherical: bool
    nprobe: int
    keys: NDArray[np.floating[Any]]
    ids: Ints
    labels: Ints


def make_ivf(content: FaissLists) -> Any:
    """Return a `faiss.IndexIVFFlat` of this content."""
    faiss = _faiss("to_faiss")
    nlist, d = content.centroids.shape
    quantizer = (faiss.IndexFlatIP if content.spherical else faiss.IndexFlatL2)(d)
    quantizer.add(content.centroids)
    metric = faiss.METRIC_L2 if content.l2 else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFFlat(quantizer, d, nlist, metric)
    index.is_trained, index.nprobe = True, content.nprobe
    keys = np.ascontiguousarray(content.keys, np.float32)
    parts = keys, np.ascontiguousarray(content.ids), np.ascontiguousarray(content.labels)
    index.add_core(len(keys), *map(faiss.swig_ptr, parts))
    return index


def read_ivf(index: Any) -> FaissLists:
    """Return what a trained `IndexIVFFlat`, or `IndexIVFScalarQuantizer` of float16, holds.

    Raises
    ------
    InvalidInputError
        If it is another index, is not trained, or assigns keys in a way that this library does not know.
    """
    faiss = _faiss("from_faiss")
    if not isinstance(index, faiss.Index):
        raise InvalidInputError(f"index is a {type(index).__name__}, expected an index of Faiss")
    index = faiss.downcast_index(index)
    half = (
        isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    )
    if half and index.by_residual:
        raise InvalidInputError("index holds residuals, expected by_residual = False")
    if not half and type(index) is not faiss.IndexIVFFlat:
        raise InvalidInputError(
            f"index is a {type(index).__name__}, expected an IndexIVFFlat or an IndexIVFScalarQuantizer "
            "of QT_fp16"
        )
    if not index.is_trained:
        raise InvalidInputError("index is not trained: train it in Faiss first")
    quantizer = faiss.downcast_index(index.quantizer)
    metrics = quantizer.metric_type, index.metric_type
    if {*metrics} - {faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT}:
        raise InvalidInputError(f"index has metrics {metrics}, expected inner products or L2")
    if metrics == (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise InvalidInputError("index assigns by inner product but scores distances, expected one of them")
    dtype = np.float16 if half else np.float32
    keys, ids = [np.empty((0, index.d), dtype)], [np.empty(0, np.int64)]
    sizes = np.array([index.invlists.list_size(j) for j in range(index.nlist)], np.int64)
    for j in np.flatnonzero(sizes):
        size = int(sizes[j])
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(int(j)), size * index.code_size)
        keys.append(codes.view(dtype).reshape(size, index.d).copy())
        ids.append(faiss.rev_swig_ptr(index.invlists.get_ids(int(j)), size).copy())
    return FaissLists(
        quantizer.reconstruct_n(0, index.nlist),
        metrics[1] == faiss.METRIC_L2,
        metrics[0] == faiss.METRIC_INNER_PRODUCT,
        int(index.nprobe),
        np.concatenate(keys),
        np.concatenate(ids),
        np.repeat(np.arange(index.nlist, dtype=np.int64), sizes),
    )
