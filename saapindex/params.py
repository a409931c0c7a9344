"""Parameters: frozen, keyword-only, checked when they are made."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from saapindex.errors import InvalidInputError

__all__ = [
    "PRESETS",
    "IndexParameters",
    "RankBy",
    "RouterName",
    "SearchParameters",
    "ViewName",
    "check_choice",
    "check_integer",
    "get_preset",
]

ViewName: TypeAlias = Literal["rotated", "unrotated", "windowed"]
RouterName: TypeAlias = Literal["centroid", "mean", "linear", "mlp"]
RankBy: TypeAlias = Literal["key", "mass"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse `value` unless it is one of `choices`."""
    if value not in choices:
        raise InvalidInputError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_integer(name: str, value: object, minimum: int) -> None:
    """Refuse `value` unless it is an integer of at least `minimum`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise InvalidInputError(f"{name} is {value!r}, expected an integer of at least {minimum}")
    if number < minimum:
        raise InvalidInputError(f"{name} is {value}, expected at least {minimum}")


def _is_share(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) <= 1


@dataclass(frozen=True, kw_only=True)
class IndexParameters:
    """How an index is trained and how it routes (design of SAAP, arXiv 2502.08246, and beyond).

    Attributes
    ----------
    view
        Space in which keys are partitioned: ``"rotated"`` (as cached), ``"unrotated"`` (RoPE undone)
        or ``"windowed"`` (only pairs of a wavelength below `cutoff` undone). Without a `Rope` all
        three are the same.
    cutoff
        Wavelength in tokens below which ``"windowed"`` un-rotates a pair.
    query_aware
        Measure distances by ``M = E[q q^T]``, so that k-means minimises the error of ``q . x``.
    spherical
        Unit centroids and assignment by inner product, as Faiss does for inner products; excludes
        `query_aware`.
    router
        ``"centroid"``, ``"mean"`` (of the keys now in the list), ``"linear"`` or ``"mlp"``.
    rank
        Visit lists by predicted mass per ``"key"`` or by predicted ``"mass"`` of the whole list.
    niter
        Lloyd iterations.
    init
        ``"random"`` or ``"kmeans++"``.
    max_points_per_centroid
        More training keys than this times `nlist` are sampled down.
    augment
        Copies of the training keys moved to random positions; 0 trains on the positions as they are.
    max_position
        Positions that will be served are below this; None for the longest seen in training.
    seed
        Of every random choice in training.

    Examples
    --------
    >>> IndexParameters(router="centroid").view
    'rotated'
    """

    view: ViewName = "rotated"
    cutoff: float = 1000.0
    query_aware: bool = True
    spherical: bool = False
    router: RouterName = "mean"
    rank: RankBy = "key"
    niter: int = 10
    init: Literal["random", "kmeans++"] = "random"
    max_points_per_centroid: int = 256
    augment: int = 1
    max_position: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        check_choice("view", self.view, ("rotated", "unrotated", "windowed"))
        check_choice("router", self.router, ("centroid", "mean", "linear", "mlp"))
        check_choice("rank", self.rank, ("key", "mass"))
        check_choice("init", self.init, ("random", "kmeans++"))
        check_integer("niter", self.niter, 0)
        check_integer("max_points_per_centroid", self.max_points_per_centroid, 1)
        check_integer("augment", self.augment, 0)
        check_integer("seed", self.seed, 0)
        if self.max_position is not None:
            check_integer("max_position", self.max_position, 1)
        if not (isinstance(self.cutoff, numbers.Real) and self.cutoff > 0):
            raise InvalidInputError(f"cutoff is {self.cutoff!r}, expected a wavelength above 0")
        if self.spherical and self.query_aware:
            raise InvalidInputError(
                "spherical and query_aware are given together, expected one of them: spherical centroids "
                "have a metric of their own"
            )

    def replace(self, **changes: Any) -> IndexParameters:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class SearchParameters:
    """What one search may read; at most one of the three is set, otherwise ``index.nprobe`` counts.

    Attributes
    ----------
    nprobe
        Lists to visit.
    budget
        Keys to read: a count (int) or a share of `ntotal` (float in (0, 1]). Lists are visited in
        order of rank and the last one is read in part.
    top_p
        Visit lists until this share of the predicted softmax mass is covered, in (0, 1].
    rank
        Overrides `IndexParameters.rank`.

    Examples
    --------
    >>> SearchParameters(budget=0.05).keys(1000)
    50
    """

    nprobe: int | None = None
    budget: float | int | None = None
    top_p: float | None = None
    rank: RankBy | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("nprobe", "budget", "top_p") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"{' and '.join(given)} are given together, expected one of them")
        if self.nprobe is not None:
            check_integer("nprobe", self.nprobe, 1)
        if isinstance(self.budget, numbers.Integral):
            check_integer("budget", self.budget, 1)
        elif self.budget is not None and not _is_share(self.budget):
            raise InvalidInputError(f"budget is {self.budget!r}, expected a share in (0, 1] or a count")
        if self.top_p is not None and not _is_share(self.top_p):
            raise InvalidInputError(f"top_p is {self.top_p!r}, expected a share in (0, 1]")
        if self.rank is not None:
            check_choice("rank", self.rank, ("key", "mass"))

    def keys(self, ntotal: int) -> int:
        """Return the budget as a count of keys, at least 1."""
        if self.budget is None:
            return ntotal
        counted = isinstance(self.budget, numbers.Integral)
        return int(self.budget) if counted else max(1, round(float(self.budget) * ntotal))


PRESETS: Mapping[str, IndexParameters] = MappingProxyType(
    {
        "best": IndexParameters(),
        "faiss-ivf": IndexParameters(query_aware=False, spherical=True, router="centroid", augment=0),
        "paper": IndexParameters(
            view="unrotated", query_aware=False, spherical=True, router="mlp", rank="mass", augment=0
        ),
    }
)
"""Named settings: ``"best"`` (measured, the default), ``"faiss-ivf"`` and ``"paper"`` (SAAP as published)."""


def get_preset(name: str) -> IndexParameters:
    """Return the preset called `name`.

    Examples
    --------
    >>> get_preset("paper").view
    'unrotated'
    """
    check_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]
