"""Routers of a codebook: a rung of the ladder for every KV head of a layer. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError

__all__ = ["Array", "ListRouters", "RouterKind", "finite"]

RouterKind: TypeAlias = Literal["centroid", "mean", "linear", "mlp", "mean+linear", "mean+mlp"]
"""The rungs. ``mean+...`` adds a learned correction to the score of the `mean` router."""

_KINDS = get_args(RouterKind)
# Which rungs each tensor of a learned router is for, and its axes.
_TENSORS = {
    "weight": (("linear",), 4),
    "offset": (("linear", "mlp"), 3),
    "hidden": (("mlp",), 4),
    "hidden_offset": (("mlp",), 3),
    "top": (("mlp",), 4),
}
Array: TypeAlias = NDArray[np.floating[Any]]


def finite(name: str, array: object, shape: tuple[int | None, ...]) -> Array:
    """Return `array` if it is of finite floats and of `shape`, in which None stands for any size."""
    given = np.asarray(array)
    fits = given.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(given.shape, shape, strict=True)
    )
    if not fits or given.dtype.kind != "f" or not np.isfinite(given).all():
        wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise InvalidInputError(
            f"{name} is {given.dtype} of shape {given.shape}, expected finite floats of shape {wanted}"
        )
    return given


@dataclass(frozen=True, eq=False)
class ListRouters:
    """Routers of the KV heads of a layer, for one partition; each head has a rung of its own.

    ``score_j = [scale * q . mean_j] + q . weight_j + relu(q . hidden + hidden_offset) . top_j + offset_j``
    is the predicted logarithm of the attention mass per key of list `j`, up to a constant of the query. `q`
    is in the view of its head, and `mean_j` is the mean of the keys that are in the list now.

    Attributes
    ----------
    kinds
        Rung of each KV head.
    weight
        (linear heads, r, nlist, d): of the heads of a linear rung, in their order.
    offset
        (learned heads, r, nlist): of the heads of a learned rung.
    hidden, hidden_offset, top
        (mlp heads, r, h, d), (mlp heads, r, h), (mlp heads, r, nlist, h).

    Examples
    --------
    >>> routers = ListRouters(("mean",))
    >>> means = np.array([[[1.0, 0.0], [0.0, 3.0]]])
    >>> routers.scores(np.ones((1, 1, 1, 2)), means, np.zeros_like(means), scale=0.5)
    array([[[[0.5, 1.5]]]])
    """

    kinds: Sequence[RouterKind]
    weight: Array | None = None
    offset: Array | None = None
    hidden: Array | None = None
    hidden_offset: Array | None = None
    top: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        strange = [kind for kind in self.kinds if kind not in _KINDS]
        if strange:
            raise InvalidInputError(f"router kinds {strange}, expected some of {', '.join(_KINDS)}")
        for name, (rungs, axes) in _TENSORS.items():
            array, count = getattr(self, name), len(self.heads(*rungs))
            if array is None and count:
                raise InvalidInputError(f"routers {self.kinds} without {name}, expected it of {count} heads")
            if array is not None:
                object.__setattr__(self, name, finite(name, array, (count, *[None] * (axes - 1))))

    def heads(self, *rungs: str) -> list[int]:
        """Return the KV heads whose learned part is one of `rungs`, ``"linear"`` or ``"mlp"``."""
        return [head for head, kind in enumerate(self.kinds) if kind.split("+")[-1] in rungs]

    @property
    def on_mean(self) -> NDArray[np.bool_]:
        """Whether the score of the `mean` router is added, (kv_heads,)."""
        return np.array([kind.startswith("mean") for kind in self.kinds], bool)

    def part(self, heads: slice) -> ListRouters:
        """Return the routers of some KV heads."""
        kept = range(len(self.kinds))[heads]
        tensors = {}
        for name, tensor in self.tensors().items():
            rows = [at for at, head in enumerate(self.heads(*_TENSORS[name][0])) if head in kept]
            if rows:
                tensors[name] = tensor[rows]
        return ListRouters(self.kinds[heads], **tensors)

    def weights(self, head: int) -> dict[str, Array]:
        """Return the learned weights of one KV head by name, without the axis of the heads."""
        own = {}
        for name, tensor in self.tensors().items():
            heads = self.heads(*_TENSORS[name][0])
            if head in heads:
                own[name] = tensor[heads.index(head)]
        return own

    def tensors(self) -> dict[str, Array]:
        """Return the learned weights of all heads by name."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def scores(self, queries: Array, means: Array, centroids: Array, *, scale: float) -> Array:
        """Return the score of each list: the definition, in the precision of the inputs.

        Parameters
        ----------
        queries
            (kv_heads, group, m, d), in the view of their head.
        means, centroids
            (kv_heads, nlist, d): means of the keys in the lists, and the centroids.
        scale
            Of the logits.

        Returns
        -------
        ndarray
            (kv_heads, group, m, nlist).
        """
        scores = np.zeros((*queries.shape[:3], centroids.shape[1]), queries.dtype)
        for head, kind in enumerate(self.kinds):
            q, own = queries[head], self.weights(head)
            if kind.startswith("mean"):
                scores[head] += scale * q @ means[head].T
            if kind == "centroid":
                scores[head] += scale * q @ centroids[head].T
            if "weight" in own:
                scores[head] += q @ own["weight"].swapaxes(1, 2).astype(q.dtype)
            if "hidden" in own:
                first = q @ own["hidden"].swapaxes(1, 2).astype(q.dtype) + own["hidden_offset"][:, None]
                scores[head] += np.maximum(first, 0) @ own["top"].swapaxes(1, 2).astype(q.dtype)
            if "offset" in own:
                scores[head] += own["offset"][:, None]
        return scores
