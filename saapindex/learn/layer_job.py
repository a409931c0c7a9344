"""The training of one layer, or of several alike: its data, its stages and what they have made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from saapindex.codebook_layer import CodebookLayer
from saapindex.codebook_routers import ListRouters
from saapindex.errors import InvalidInputError
from saapindex.learn.contexts import Context
from saapindex.learn.head_views import HeadViews
from saapindex.learn.kmeans import assign, assignment_form
from saapindex.learn.report import HeadReport, ListsReport, TrainingReport
from saapindex.learn.settings import TrainingSettings
from saapindex.partition import View
from saapindex.rope import Rope

__all__ = ["LayerJob", "ListedKeys", "Stage", "run_stages"]


class ListedKeys(NamedTuple):
    """Keys of a context as the lists of a partition see them.

    Attributes
    ----------
    x
        float32, (heads, n, d): keys in the view of their head.
    labels
        int64, (heads, n): list of each key.
    """

    x: torch.Tensor
    labels: torch.Tensor


@dataclass(kw_only=True)
class LayerJob:
    """What the stages read and write. Heads are the KV heads of all `layers`, one layer after the other.

    Attributes
    ----------
    layers
        Numbers of the layers.
    head_numbers
        Numbers of the KV heads of each layer in the model.
    train, held_out
        Contexts, on the device of the training.
    rope, scale, softcap
        Of the layers.
    settings
        Of the training.
    views
        Written by the first stage: the view of each head.
    metric
        float32, (heads, d, d), or None.
    centroids, routers
        For each number of lists: float32, (heads, nlist, d), and the routers.
    extra
        Tensors that further stages add to the codebook, each with the heads first.
    layer_extra
        More tensors of each of `layers`, which may differ in shape.
    tried_views
        Recall of each view that was tried, (heads,).
    view_errors
        Where views are judged by it, error of the output in each, (held-out sequences, 2, heads).
    lists
        For each number of lists, the report of every head.
    notes
        What further stages add to the report.
    seconds
        Time of each stage.
    """

    layers: Sequence[int]
    head_numbers: Sequence[int]
    train: Sequence[Context]
    held_out: Sequence[Context]
    rope: Rope | None
    scale: float
    settings: TrainingSettings
    softcap: float | None = None
    views: list[View] = field(default_factory=list)
    metric: torch.Tensor | None = None
    centroids: dict[int, torch.Tensor] = field(default_factory=dict)
    routers: dict[int, ListRouters] = field(default_factory=dict)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)
    layer_extra: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    tried_views: dict[str, list[float]] = field(default_factory=dict)
    view_errors: dict[str, torch.Tensor] = field(default_factory=dict)
    lists: dict[int, list[ListsReport]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise InvalidInputError("training needs sequences to train on and at least one that is held out")
        shapes = {(c.kv_heads, c.group_size, c.d) for c in (*self.train, *self.held_out)}
        if len(shapes) != 1:
            raise InvalidInputError(
                f"layers {list(self.layers)}: sequences of different heads: {sorted(shapes)}"
            )

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train[0].keys.device

    @property
    def heads(self) -> int:
        """KV heads of all layers together."""
        return self.train[0].kv_heads

    @property
    def max_position(self) -> int:
        """Positions that will be served are below this."""
        seen = 1 + max(
            int(positions[-1])
            for context in (*self.train, *self.held_out)
            for positions in (context.key_positions, context.query_positions)
            if len(positions)
        )
        return self.settings.max_position or seen

    def head_views(self) -> HeadViews:
        """Return the views that the first stage chose."""
        return HeadViews.of(self.views, self.rope, self.device)

    def assignment(self, nlist: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `A` and `b`: a key is in list ``argmax_j x . A_j + b_j``."""
        return assignment_form(self.centroids[nlist], self.metric, spherical=self.settings.spherical)

    def listed(self, context: Context, nlist: int, *, offset: int = 0) -> ListedKeys:
        """Return the keys of a context in their views, and their lists; moved as a whole by `offset` first.

        What a stage that codes residuals starts from: ``x - mean of the keys of the same list``.
        """
        to = context.key_positions + offset if offset else None
        x = self.head_views().apply(context.keys, context.key_positions, to)
        return ListedKeys(x, assign(x, *self.assignment(nlist))[0])

    def stored(self, tensor: torch.Tensor) -> NDArray[Any]:
        """Return a tensor as the codebook stores it."""
        array: NDArray[Any] = tensor.detach().cpu().numpy().astype(self.settings.stored)
        return array

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as it will be once stored and read again: this is what is measured."""
        return tensor.to(getattr(torch, self.settings.stored)).float()

    def results(self) -> list[tuple[CodebookLayer, TrainingReport]]:
        """Return each layer with its report."""
        per = len(self.head_numbers)
        held_out = [context.name for context in self.held_out]
        parts = []
        for at, layer in enumerate(self.layers):
            own = slice(at * per, (at + 1) * per)
            heads = []
            for number, head in zip(self.head_numbers, range(own.start, own.stop), strict=True):
                heads.append(
                    HeadReport(
                        layer,
                        number,
                        _named(self.views[head]),
                        {name: recall[head] for name, recall in self.tried_views.items()},
                        {nlist: reports[head] for nlist, reports in self.lists.items()},
                        {
                            name: _by_sequence(held_out, errors[..., head])
                            for name, errors in self.view_errors.items()
                        },
                    )
                )
            seconds = {name: spent / len(self.layers) for name, spent in self.seconds.items()}
            notes = {str(layer): dict(self.notes)} if self.notes else {}
            report = TrainingReport(heads, held_out, self.settings.share, seconds, notes)
            more = self.layer_extra[at] if self.layer_extra else {}
            parts.append((self._layer(layer, own, more), report))
        return parts

    def _layer(self, layer: int, own: slice, more: dict[str, NDArray[Any]]) -> CodebookLayer:
        extra = {name: part[own] for name, part in self.extra.items()} | more
        views = self.views[own]
        rotated = any(view.keeps_rotation for view in views)
        return CodebookLayer(
            layer,
            views=views,
            centroids={nlist: self.stored(part[own]) for nlist, part in self.centroids.items()},
            q_heads=len(views) * self.train[0].group_size,
            scale=self.scale,
            metric=None if self.metric is None else self.metric[own].cpu().numpy(),
            spherical=self.settings.spherical,
            routers={nlist: routers.part(own) for nlist, routers in self.routers.items()},
            max_position=self.max_position if rotated else None,
            softcap=self.softcap,
            heads=self.head_numbers,
            extra={name: np.ascontiguousarray(part) for name, part in extra.items()},
        )


def _by_sequence(names: Sequence[str], errors: torch.Tensor) -> dict[str, float]:
    """Return the errors of one head as a report has them."""
    named = {}
    for name, (every, lookups) in zip(names, errors.tolist(), strict=True):
        if not math.isnan(every):
            named[name] = every
        if not math.isnan(lookups):
            named[f"{name}, lookups"] = lookups
    return named


def _named(view: View) -> str:
    return f"windowed {view.cutoff:g}" if view.kind == "windowed" else view.kind


Stage: TypeAlias = Callable[[LayerJob], None]
"""A step of the training: reads the job, adds what it made to it."""


def run_stages(job: LayerJob, stages: Sequence[Stage]) -> None:
    """Run the stages in order and note the seconds of each."""
    for stage in stages:
        start = time.perf_counter()
        stage(job)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        job.seconds[stage.__name__] = time.perf_counter() - start
