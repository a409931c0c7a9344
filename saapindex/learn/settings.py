"""Settings of the training of a codebook."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from saapindex.codebook_routers import RouterKind
from saapindex.errors import InvalidInputError
from saapindex.params import ViewName, check_choice, check_integer

__all__ = ["TrainingSettings"]

_RUNGS = get_args(RouterKind)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a codebook is trained.

    Attributes
    ----------
    nlist
        Numbers of lists; a partition for each.
    view
        ``"auto"`` measures all on the held-out sequences and picks one for every head; otherwise
        ``"rotated"``, ``"unrotated"`` or ``"windowed"`` (at the first cut-off) for all.
    judge
        What picks the view. ``"recall"``: the attention mass that whole lists find at `share` of the keys,
        mean over the held-out sequences. ``"error"``: the error of the output of the index at `share` of the
        bytes, of all queries and of those that look something up, a geometric mean; slower, and for what
        `AttentionIndex` is to serve. Hold out sequences that make the model look things up, see
        `saapindex.learn.texts.with_copies`.
    cutoffs
        Wavelengths in tokens below which ``"windowed"`` un-rotates; ``"auto"`` tries each.
    metric
        ``"unit-queries"``: ``M = E[q q^T]`` of queries scaled to one length, so that long queries, whose
        attention is peaked, do not alone decide; ``"queries"``: as they are; ``"euclidean"``: ``M = I``.
    shrinkage
        Weight of the identity in the metric.
    spherical
        Unit centroids and assignment by inner product; only with the Euclidean metric.
    niter
        k-means iterations.
    max_points_per_centroid
        More training keys than this times `nlist` are sampled down.
    augment
        Copies of the training keys and queries moved to random positions; 0 leaves positions as they are.
    max_position
        Positions that will be served are below this; None for the longest seen in training. Far beyond the
        traces ``view="auto"`` compares lists of which these fill only a part: then say which view.
    routers
        Rungs that are tried, of ``"centroid"``, ``"mean"``, ``"linear"``, ``"mlp"``, ``"mean+linear"`` and
        ``"mean+mlp"``; ``"mean"`` is always among them.
    fallback
        Rung that a head has unless a learned one beats it.
    min_gain
        Recall that a learned router, or a view other than the first, must add to be kept; of the error, the
        share by which such a view must lower it.
    share
        Of the keys that may be read where recall is measured.
    shared_selection
        Whether recall is that of one selection for all query heads of a KV head.
    per_query_head
        A learned router for each query head, in place of one for all that share a KV head.
    hidden
        Width of the hidden layer of the MLPs.
    learning_rate, weight_decay, batch, epochs, patience
        Of AdamW; `batch` counts query positions, `patience` epochs.
    moves
        Copies of each training context, moved as a whole to a random offset, that routers also see.
    snapshots
        Fills of the lists that queries of one context are spread over.
    max_queries
        Query positions kept of each sequence.
    window, sinks
        Keys no further back than `window`, and the first `sinks`, are in no list.
    stored
        ``"float16"`` or ``"float32"``: what centroids and routers are stored, and measured, as.
    words
        Size of a key's code, in words of 32 bits; of several, each layer takes the best, if `judge` is
        ``"error"``.
    scan_share
        Share of the budget that the index will spend on codes, where `judge` simulates it: as in
        `saapindex.AttendParameters`.
    seed
        Of every random choice.

    Examples
    --------
    >>> TrainingSettings(nlist=[512, 128]).nlist
    (128, 512)
    """

    nlist: Sequence[int] = (64, 256, 1024)
    view: Literal["auto", "rotated", "unrotated", "windowed"] = "auto"
    judge: Literal["recall", "error"] = "recall"
    cutoffs: Sequence[float] = (300.0, 1000.0, 3000.0)
    metric: Literal["queries", "unit-queries", "euclidean"] = "unit-queries"
    shrinkage: float = 1e-3
    spherical: bool = False
    niter: int = 10
    max_points_per_centroid: int = 256
    augment: int = 1
    max_position: int | None = None
    routers: Sequence[RouterKind] = ("centroid", "mean", "mean+linear", "mean+mlp")
    fallback: RouterKind = "mean"
    min_gain: float = 0.002
    share: float = 0.05
    shared_selection: bool = True
    per_query_head: bool = False
    hidden: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    batch: int = 128
    epochs: int = 15
    patience: int = 3
    moves: int = 1
    snapshots: int = 16
    max_queries: int = 4096
    window: int = 2047
    sinks: int = 1
    stored: Literal["float16", "float32"] = "float16"
    words: Sequence[int] = (3,)
    scan_share: float = 0.4
    seed: int = 1234

    def __post_init__(self) -> None:
        lists = self.nlist if isinstance(self.nlist, Sequence) else (self.nlist,)
        if not lists:
            raise InvalidInputError("nlist is empty, expected at least one number of lists")
        for nlist in lists:
            check_integer("nlist", nlist, 1)
        object.__setattr__(self, "nlist", tuple(sorted({int(nlist) for nlist in lists})))
        check_choice("view", self.view, ("auto", "rotated", "unrotated", "windowed"))
        check_choice("judge", self.judge, ("recall", "error"))
        check_choice("metric", self.metric, ("queries", "unit-queries", "euclidean"))
        check_choice("stored", self.stored, ("float16", "float32"))
        check_choice("fallback", self.fallback, _RUNGS)
        for router in self.routers:
            check_choice("router", router, _RUNGS)
        rungs = {"mean", self.fallback, *self.routers}
        object.__setattr__(self, "routers", tuple(rung for rung in _RUNGS if rung in rungs))
        for name, minimum in (
            ("niter", 0), ("max_points_per_centroid", 1), ("augment", 0), ("hidden", 1), ("batch", 1),
            ("epochs", 1), ("patience", 1), ("moves", 0), ("snapshots", 1), ("max_queries", 1), ("window", 0),
            ("sinks", 0), ("seed", 0),
        ):  # fmt: skip
            check_integer(name, getattr(self, name), minimum)
        sizes = self.words if isinstance(self.words, Sequence) else (self.words,)
        if not sizes:
            raise InvalidInputError("words is empty, expected at least one size of codes")
        for words in sizes:
            check_integer("words", words, 1)
            if words > 8:
                raise InvalidInputError(f"words is {words}, expected at most 8")
        object.__setattr__(self, "words", tuple(sorted({int(words) for words in sizes})))
        if len(self.words) > 1 and self.judge != "error":
            raise InvalidInputError(
                f"words is {self.words}, expected one size, or judge='error' to choose by"
            )
        if not (_above_zero(self.scan_share) and self.scan_share < 1):
            raise InvalidInputError(f"scan_share is {self.scan_share!r}, expected a share in (0, 1)")
        if self.max_position is not None:
            check_integer("max_position", self.max_position, 1)
        cutoffs = tuple(self.cutoffs)
        object.__setattr__(self, "cutoffs", cutoffs)
        if not cutoffs or not all(_above_zero(cutoff) for cutoff in cutoffs):
            raise InvalidInputError(f"cutoffs is {cutoffs}, expected wavelengths above 0")
        if not (_above_zero(self.share) and self.share <= 1):
            raise InvalidInputError(f"share is {self.share!r}, expected one in (0, 1]")
        if not (isinstance(self.shrinkage, numbers.Real) and 0 <= float(self.shrinkage) <= 1):
            raise InvalidInputError(f"shrinkage is {self.shrinkage!r}, expected a weight in [0, 1]")
        for name in ("learning_rate", "weight_decay", "min_gain"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
                raise InvalidInputError(f"{name} is {value!r}, expected a number of at least 0")
        if self.spherical and self.metric != "euclidean":
            raise InvalidInputError("spherical centroids have a metric of their own: give metric='euclidean'")

    @property
    def views(self) -> tuple[tuple[ViewName, float], ...]:
        """The views that are tried, each with its cut-off; the first is kept unless another gains enough."""
        windowed: tuple[tuple[ViewName, float], ...] = tuple(("windowed", cutoff) for cutoff in self.cutoffs)
        if self.view == "windowed":
            return windowed[:1]
        if self.view != "auto":
            return ((self.view, self.cutoffs[0]),)
        return (("rotated", self.cutoffs[0]), ("unrotated", self.cutoffs[0]), *windowed)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def paper(cls, **changes: Any) -> TrainingSettings:
        """Return SAAP as published: spherical k-means on un-rotated keys, and an MLP for every head.

        One thing differs: the MLP predicts masses per key, so that contexts that fill the lists differently
        can share it.

        Examples
        --------
        >>> TrainingSettings.paper(nlist=64).view
        'unrotated'
        """
        settings = {
            "nlist": 1024, "view": "unrotated", "metric": "euclidean", "spherical": True, "augment": 0,
            "routers": ("mlp",), "fallback": "mlp", "moves": 0,
        }  # fmt: skip
        return cls(**{**settings, **changes})


def _above_zero(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) > 0
