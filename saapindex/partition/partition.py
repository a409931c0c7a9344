"""A trained partition of key space: which list a key belongs to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Ints, Ops
from saapindex.errors import PositionWarning
from saapindex.params import IndexParameters
from saapindex.partition.kmeans import assignment_form, kmeans, query_metric
from saapindex.partition.view import View
from saapindex.rope import Rope

__all__ = ["Partition", "train_partition"]


@dataclass(frozen=True, eq=False)
class Partition:
    """Centroids in a view, with the metric that assigns keys to them.

    Attributes
    ----------
    view
        The space of the centroids.
    centroids
        float32, (nlist, d).
    metric
        float64, (d, d), the query-aware ``M``; None for the Euclidean metric.
    spherical
        Whether keys are assigned by inner product to unit centroids.
    max_position
        Positions below this are known; None where positions do not matter.
    """

    view: View
    centroids: NDArray[np.float32]
    metric: NDArray[np.float64] | None
    spherical: bool
    max_position: int | None

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return len(self.centroids)

    @cached_property
    def _form(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return assignment_form(self.centroids, self.metric, self.spherical)

    def assign(self, x: NDArray[np.float32], ops: Ops) -> Ints:
        """Return the list of each row of `x`, which is already in the view."""
        return ops.assign(x, *self._form)[0]

    def check_position(self, last: int) -> None:
        """Warn if position `last` lies past those that the partition was trained for."""
        if self.max_position is not None and last >= self.max_position:
            warnings.warn(
                f"position {last} lies past the range that this codebook was trained for "
                f"(below {self.max_position}); train with max_position={last + 1} or more",
                PositionWarning,
                stacklevel=5,
            )

    def adapt(self, x: NDArray[np.float32], niter: int, rng: np.random.Generator, ops: Ops) -> Partition:
        """Return the partition after a few Lloyd steps on `x`, which is already in the view."""
        centroids = kmeans(
            x,
            self.nlist,
            ops=ops,
            rng=rng,
            metric=self.metric,
            spherical=self.spherical,
            niter=niter,
            start=self.centroids,
        )
        return Partition(self.view, centroids, self.metric, self.spherical, self.max_position)


def train_partition(
    keys: NDArray[np.float32],
    key_positions: Ints,
    queries: NDArray[np.float32] | None,
    query_positions: Ints | None,
    nlist: int,
    params: IndexParameters,
    *,
    rope: Rope | None,
    ops: Ops,
    show: bool = False,
) -> Partition:
    """Train a partition on `keys`, in the metric of `queries`.

    Parameters
    ----------
    keys, queries
        float32, (n, d) and (q, d), rotated at their positions; `queries` may be None.
    key_positions, query_positions
        int64, (n,) and (q,).
    nlist
        At most n.
    params
        View, metric, augmentation and the settings of k-means.
    show
        Whether to show progress.
    """
    rng = np.random.default_rng(params.seed)
    view = View(params.view, params.cutoff, rope)
    limit = nlist * params.max_points_per_centroid
    if len(keys) > limit:
        sample = np.sort(rng.choice(len(keys), limit, replace=False))
        keys, key_positions = keys[sample], key_positions[sample]
    max_position = None
    if view.keeps_rotation:
        last_query = key_positions.max() + 1 if query_positions is None else query_positions.max()
        max_position = params.max_position or int(max(key_positions.max(), last_query)) + 1
    moves = params.augment if view.keeps_rotation else 0
    x = _moved(view, keys, key_positions, max_position, moves, rng, ops)
    metric = None
    if params.query_aware and queries is not None and query_positions is not None:
        q = _moved(view, queries, query_positions, max_position, moves, rng, ops)
        metric = query_metric(q)
    centroids = kmeans(
        x,
        nlist,
        ops=ops,
        rng=rng,
        metric=metric,
        spherical=params.spherical,
        niter=params.niter,
        init=params.init,
        show=show,
    )
    return Partition(view, centroids, metric, params.spherical, max_position)


def _moved(
    view: View,
    x: NDArray[np.float32],
    positions: Ints,
    max_position: int | None,
    moves: int,
    rng: np.random.Generator,
    ops: Ops,
) -> NDArray[np.float32]:
    """View of `x` where it stands, or of `moves` copies at random positions."""
    if not moves or max_position is None:
        return view.apply(x, positions, ops)
    return np.concatenate([view.scatter(x, positions, max_position, rng, ops) for _ in range(moves)])
