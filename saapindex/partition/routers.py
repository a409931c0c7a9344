"""Routers: how much attention mass a query will find in each list.

Every router is linear in some features of the query, ``scores = features(q) . table_j + offset_j``, in
natural logarithms. What it predicts is the mass per key of list `j` (up to a constant of the query), or, for
a learned router that was not conditioned on the sizes of the lists, the mass of the whole list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError, InvalidInputError
from saapindex.params import RankBy
from saapindex.partition.partition import Partition

__all__ = [
    "CentroidRouter",
    "LinearRouter",
    "MLPRouter",
    "MeanRouter",
    "Router",
    "make_router",
    "router_from_tensors",
]

Array = NDArray[np.float32]


class Router(ABC):
    """Predicts where the mass of a query lies."""

    name: ClassVar[str]
    predicts: RankBy = "key"
    """Whether scores are masses per key or of whole lists."""

    @abstractmethod
    def table(self, partition: Partition, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Array:
        """Return one row a list, (nlist, h), for lists of these sums and sizes."""

    def offset(self, nlist: int) -> Array:
        """Return what is added to the score of each list, (nlist,)."""
        return np.zeros(nlist, np.float32)

    def features(self, queries: Array) -> Array:
        """Return the features of queries in the view: (q, d) to (q, h)."""
        return queries

    def bias(self, counts: NDArray[np.int64], rank: RankBy) -> Array:
        """Return what turns scores into a ranking by `rank`; minus infinity on empty lists."""
        bias = self.offset(len(counts))
        if rank != self.predicts:
            size = np.log(np.maximum(counts, 1)).astype(np.float32)
            bias = bias + size if rank == "mass" else bias - size
        return np.where(counts > 0, bias, -np.inf).astype(np.float32)

    def tensors(self) -> Mapping[str, Array]:
        """Return the learned weights by name."""
        return {}


class CentroidRouter(Router):
    """``q . c_j``: what Faiss does, with the centroids of this partition."""

    name = "centroid"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def table(self, partition: Partition, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Array:
        """Return the scaled centroids."""
        return (partition.centroids * np.float32(self.scale)).astype(np.float32)


class MeanRouter(Router):
    """``q . mean`` of the keys that are in the list now; the centroid where there are none."""

    name = "mean"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def table(self, partition: Partition, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Array:
        """Return the scaled means."""
        means = sums / np.maximum(counts, 1)[:, None]
        means = np.where(counts[:, None] > 0, means, partition.centroids)
        return (means * self.scale).astype(np.float32)


def _finite(name: str, array: object, shape: tuple[int | None, ...]) -> Array:
    array = np.asarray(array)
    fits = array.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InvalidInputError(
            f"{name} is {array.dtype} of shape {array.shape}, expected finite floats of shape {shape}"
        )
    return np.ascontiguousarray(array, np.float32)


class LinearRouter(Router):
    """``q . w_j + b_j``, trained on attention mass.

    Parameters
    ----------
    weight, offset
        (nlist, d) and (nlist,).
    predicts
        What the scores were trained to be.
    """

    name = "linear"

    def __init__(self, weight: object, offset: object, predicts: RankBy = "key") -> None:
        self.weight = _finite("weight", weight, (None, None))
        self._offset = _finite("offset", offset, (len(self.weight),))
        self.predicts = predicts

    def table(self, partition: Partition, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Array:
        """Return the weights."""
        return self.weight

    def offset(self, nlist: int) -> Array:
        """Return the trained offsets."""
        return self._offset

    def tensors(self) -> Mapping[str, Array]:
        """Return the learned weights by name."""
        return {"weight": self.weight, "offset": self._offset}


class MLPRouter(LinearRouter):
    """``relu(q . A + a) . w_j + b_j``: the paper's two-layer classifier over lists.

    Parameters
    ----------
    hidden, hidden_offset
        (h, d) and (h,), the first layer.
    weight, offset
        (nlist, h) and (nlist,), the second.
    predicts
        What the scores were trained to be: ``"mass"`` in the paper.
    """

    name = "mlp"

    def __init__(
        self,
        hidden: object,
        hidden_offset: object,
        weight: object,
        offset: object,
        predicts: RankBy = "mass",
    ) -> None:
        self.hidden = _finite("hidden", hidden, (None, None))
        self.hidden_offset = _finite("hidden_offset", hidden_offset, (len(self.hidden),))
        super().__init__(_finite("weight", weight, (None, len(self.hidden))), offset, predicts)

    def features(self, queries: Array) -> Array:
        """Return the hidden layer's output, (q, h)."""
        hidden: Array = np.maximum(queries @ self.hidden.T + self.hidden_offset, 0)
        return hidden

    def tensors(self) -> Mapping[str, Array]:
        """Return the learned weights by name."""
        return {"hidden": self.hidden, "hidden_offset": self.hidden_offset, **super().tensors()}


def make_router(name: str, scale: float) -> Router | None:
    """Return the router called `name`, or None if it must be trained first."""
    untrained: dict[str, type[CentroidRouter | MeanRouter]] = {
        "centroid": CentroidRouter,
        "mean": MeanRouter,
    }
    return untrained[name](scale) if name in untrained else None


def router_from_tensors(name: str, scale: float, predicts: Any, tensors: Mapping[str, Any]) -> Router:
    """Rebuild a router from what `Router.tensors` gave.

    Raises
    ------
    FileFormatError
        If the weights do not make such a router.
    """
    learned: dict[str, type[LinearRouter]] = {"linear": LinearRouter, "mlp": MLPRouter}
    try:
        if name in learned:
            return learned[name](**tensors, predicts=predicts)
        router = make_router(name, scale)
    except (TypeError, InvalidInputError) as error:
        raise FileFormatError(f"not the weights of a {name} router: {error}") from error
    if router is None:
        raise FileFormatError(f"unknown router {name!r}")
    return router
