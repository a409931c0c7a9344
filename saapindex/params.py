"""Parameters: frozen, keyword-only, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError

__all__ = [
    "PRESETS",
    "AttendParameters",
    "IndexParameters",
    "PolicyName",
    "RankBy",
    "RouterName",
    "SearchParameters",
    "Selector",
    "ViewName",
    "check_choice",
    "check_integer",
    "check_k_factor",
    "default_nlist",
    "get_preset",
]

ViewName: TypeAlias = Literal["rotated", "unrotated", "windowed"]
RouterName: TypeAlias = Literal["centroid", "mean", "linear", "mlp"]
RankBy: TypeAlias = Literal["key", "mass"]
PolicyName: TypeAlias = Literal["sum", "max", "union"]


@runtime_checkable
class Selector(Protocol):
    """What says which ids a search may return; `saapindex.selectors` has them by Faiss's names."""

    def members(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `ids`, int64 (n,), may be returned."""


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


def check_k_factor(value: object) -> None:
    """Refuse `value` unless it is a finite number of at least 1."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 1 <= float(value) < math.inf:
        raise InvalidInputError(f"k_factor is {value!r}, expected a finite number of at least 1")


def default_nlist(n: int) -> int:
    """Return how many lists suit `n` keys: about one for 128 keys, a power of two.

    So few, since every list is read about, and codes tell keys apart within a list. Measured at 8k, 32k and
    128k keys (`bench/results/sweep.json`).

    Examples
    --------
    >>> default_nlist(8_000), default_nlist(30_000), default_nlist(131_072)
    (64, 256, 1024)
    """
    return 1 << max(0, round(math.log2(max(n, 1) / 128)))


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
    bits
        Bits per dimension of the codes that are scanned, 1, 2 or 4, in whole words of 32 bits a key; 0 scans
        the keys themselves.
    refine
        Keep the keys beside their codes and score the best candidates exactly; needs `bits`.

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
    bits: int = 0
    refine: bool = False

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
        if isinstance(self.bits, bool) or self.bits not in (0, 1, 2, 4):
            raise InvalidInputError(f"bits is {self.bits!r}, expected 0, 1, 2 or 4")
        if not isinstance(self.refine, bool):
            raise InvalidInputError(f"refine is {self.refine!r}, expected True or False")
        if self.refine and not self.bits:
            raise InvalidInputError("refine is given without bits: keys that are scanned need no refining")
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
    """What one search may read; at most one of the first three is set, otherwise ``index.nprobe`` counts.

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
    sel
        The ids that may be found, a selector of `saapindex.selectors`. The others are passed over inside the
        scan and cost nothing: lists are ranked, shares are taken and keys are counted as if the index held
        the selected keys alone.
    k_factor
        Overrides ``index.k_factor``, where codes are refined: candidates for each result that are scored
        exactly, at least 1.

    Examples
    --------
    >>> SearchParameters(budget=0.05).keys(1000)
    50
    """

    nprobe: int | None = None
    budget: float | int | None = None
    top_p: float | None = None
    rank: RankBy | None = None
    sel: Selector | None = None
    k_factor: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("nprobe", "budget", "top_p") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"{' and '.join(given)} are given together, expected one of them")
        if self.nprobe is not None:
            check_integer("nprobe", self.nprobe, 1)
        if self.sel is not None and not isinstance(self.sel, Selector):
            raise InvalidInputError(
                f"sel is a {type(self.sel).__name__}, expected a selector of saapindex.selectors"
            )
        if self.k_factor is not None:
            check_k_factor(self.k_factor)
        if isinstance(self.budget, numbers.Integral):
            check_integer("budget", self.budget, 1)
        elif self.budget is not None and not _is_share(self.budget):
            raise InvalidInputError(f"budget is {self.budget!r}, expected a share in (0, 1] or a count")
        if self.top_p is not None and not _is_share(self.top_p):
            raise InvalidInputError(f"top_p is {self.top_p!r}, expected a share in (0, 1]")
        if self.rank is not None:
            check_choice("rank", self.rank, ("key", "mass"))

    @property
    def is_plain(self) -> bool:
        """Whether lists are visited by `nprobe`, and every key in them may be found."""
        return self.budget is None and self.top_p is None and self.sel is None

    def keys(self, ntotal: int) -> int:
        """Return the budget as a count of keys, at least 1."""
        if self.budget is None:
            return ntotal
        counted = isinstance(self.budget, numbers.Integral)
        return int(self.budget) if counted else max(1, round(float(self.budget) * ntotal))


@dataclass(frozen=True, kw_only=True)
class AttendParameters:
    """What one step of attention may read of the keys in lists, and how; at most one of the first three is
    set.

    Attributes
    ----------
    budget
        Share of the bytes of these keys and their values, in (0, 1]; everything that is read counts:
        statistics of lists, codes, keys and values. 1 is dense attention. The default, 0.05, counts where
        none is set.
    nprobe
        Lists to visit instead; all of their keys are fetched, as in the paper.
    top_p
        Visit lists until this share of the predicted softmax mass is covered instead, and fetch all of
        their keys.
    policy
        How the query heads that share a KV head choose together: by the ``"sum"`` of their weights, the
        ``"max"``, or the ``"union"`` of what each chooses alone with its part of the budget.
    rank
        Visit lists by predicted mass per ``"key"`` or by predicted ``"mass"`` of the whole list; by default
        per key where keys are counted (`budget`) and by mass where lists are.
    refine
        With a budget: read the codes of many keys and fetch the best; otherwise fetch whole lists. By default
        codes are read, except on devices that attend to whole lists so fast that a larger budget of these
        takes less time for the same error (compute capability 9.0 and up), and there too in layers that
        have heads which look things up, by the codebook: these need to see all codes.
    remainder
        Let the keys that are not fetched count by their estimates.
    slopes
        Of keys that are not fetched, take the value that their code lets expect, by a regression that is
        fitted to the context, and not the mean value of their list. By default on the host alone, and where
        its matrix takes no more than a tenth of the budget: the kernels of a device do without.
    scan_share
        Share of the budget that goes to codes, after statistics, in (0, 1).
    by_head
        Give each head the share of the budget that the codebook has for it, and to codes at least as much of
        that as it says: heads that look things up read more, heads that lose little read less. The mean over
        all heads of a model is the budget; a layer alone may read more or less. By default where the codebook
        says something of heads. True asks for it.

    Examples
    --------
    >>> AttendParameters().budget, AttendParameters(nprobe=32).budget
    (0.05, None)
    >>> AttendParameters(budget=0.02, nprobe=32)
    Traceback (most recent call last):
    saapindex.errors.InvalidInputError: budget and nprobe are given together, expected one of them
    """

    budget: float | None = None
    nprobe: int | None = None
    top_p: float | None = None
    policy: PolicyName = "sum"
    rank: RankBy | None = None
    refine: bool | None = None
    remainder: bool = True
    slopes: bool | None = None
    scan_share: float = 0.4
    by_head: bool | None = None

    def __post_init__(self) -> None:
        limits = ("budget", "nprobe", "top_p")
        given = [name for name in limits if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"{' and '.join(given)} are given together, expected one of them")
        if not given:
            object.__setattr__(self, "budget", 0.05)
        if self.nprobe is not None:
            check_integer("nprobe", self.nprobe, 1)
        for name in ("budget", "top_p"):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise InvalidInputError(f"{name} is {value!r}, expected a share in (0, 1]")
        check_choice("policy", self.policy, ("sum", "max", "union"))
        if self.rank is not None:
            check_choice("rank", self.rank, ("key", "mass"))
        if not isinstance(self.remainder, bool):
            raise InvalidInputError(f"remainder is {self.remainder!r}, expected True or False")
        for name in ("refine", "slopes", "by_head"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidInputError(f"{name} is {value!r}, expected True, False or None")
        if not _is_share(self.scan_share) or self.scan_share == 1:
            raise InvalidInputError(f"scan_share is {self.scan_share!r}, expected a share in (0, 1)")

    @property
    def ranks_by_mass(self) -> bool:
        """Whether lists are visited by predicted mass, and not by mass per key."""
        return (self.rank or ("mass" if self.budget is None else "key")) == "mass"

    def reads_codes(self, *, default: bool = True) -> bool:
        """Whether codes are read to choose the keys that are fetched; `default` if `refine` is open."""
        return (default if self.refine is None else self.refine) and self.budget is not None

    def replace(self, **changes: Any) -> AttendParameters:
        """Return a copy with some fields changed; a new limit takes the place of the old one.

        Examples
        --------
        >>> AttendParameters(budget=0.1, policy="max").replace(nprobe=8).policy
        'max'
        """
        if any(changes.get(name) is not None for name in ("budget", "nprobe", "top_p")):
            changes = {"budget": None, "nprobe": None, "top_p": None, **changes}
        return dataclasses.replace(self, **changes)


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
