"""The library's own method: lists, transform codes, exact fetches and a bounded remainder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from saapindex.attention import LayerCodebook
from saapindex.attention.limits import MATRIX_EXTRA
from saapindex.codebook import Codebook
from saapindex.codes import TransformCode, fit_codes
from saapindex.codes.slopes import SLOPE_KEYS, fit_slopes
from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.learn.head_views import HeadViews
from saapindex.learn.kmeans import assign, assignment_form, kmeans, query_metric, segment_sums
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.select import affordable, best, fill, fill_lists, list_ranks
from saapindex.params import check_integer, default_nlist
from saapindex.partition import View

__all__ = ["Ladder", "Learned", "Policy", "peers_from_codebook"]

Policy = Literal["sum", "max"]

_CAP = 3.0
"""Second-order corrections of a logit are at most this large, in nats."""
_SAMPLE = 65536
"""Keys and queries that a partition is fitted on, when it is fitted here."""
_LIST_EXTRA = 8
"""Bytes of a list besides its int8 vectors: their two scales, its count and its spread."""


class Learned(NamedTuple):
    """What is learnt offline about one head.

    Attributes
    ----------
    view
        In which keys are assigned.
    centroids
        float32, (nlist, d), in that view.
    metric
        float32, (d, d), or None for the Euclidean.
    spherical
        Whether keys are assigned by inner product.
    code
        Of one head.
    """

    view: View
    centroids: torch.Tensor
    metric: torch.Tensor | None
    spherical: bool
    code: TransformCode


class Ladder(Peer):
    """`AttentionIndex` as the evaluation sees it: what it would read, and what it would return.

    Lists are ranked by the mean logit of their keys with a second-order correction. Keys of the first lists
    are scored by their codes, the best of them fetched; all others count by their estimates, with the value
    that is expected of them. `tests/learn/test_ladder.py` compares this with `AttentionIndex.attend` itself.

    Reads: the int8 mean key and mean value of every list with their scales, count and spread; the matrices
    that turn queries into the space of the codes, and sums of codes into values; codes, each with its scale;
    keys and values fetched.

    Parameters
    ----------
    nlist
        Lists; a codebook's own that come closest to one for 256 keys are taken instead.
    words
        32-bit words of a code.
    scan_share
        Share of the bytes left after statistics that goes to codes.
    adapt
        Lloyd steps on the context's own keys, from the offline centroids.
    refine, remainder
        Whether codes are used, and whether what was not fetched is estimated. Without `refine` whole lists
        are fetched.
    correction
        Whether estimates are corrected to second order.
    slopes
        Whether codes say something of values too.
    augment
        Move training keys and queries to random positions below this, so that short training contexts serve
        long ones; None for not at all.
    unit
        Whether every query has the same weight in the metric, whatever its norm.
    """

    name: ClassVar[str] = "saapindex"
    source: ClassVar[str] = "this library"
    offline: ClassVar[bool] = True

    def __init__(
        self,
        nlist: int = 128,
        words: int = 3,
        scan_share: float = 0.4,
        adapt: int = 3,
        refine: bool = True,
        remainder: bool = True,
        correction: bool = True,
        slopes: bool = True,
        policy: Policy = "sum",
        augment: int | None = None,
        unit: bool = True,
    ) -> None:
        for name, value, minimum in (("nlist", nlist, 1), ("words", words, 1), ("adapt", adapt, 0)):
            check_integer(name, value, minimum)
        if not 0 < scan_share < 1:
            raise InvalidInputError(f"scan_share is {scan_share!r}, expected a share between 0 and 1")
        self.nlist, self.words, self.scan_share, self.adapt = nlist, words, scan_share, adapt
        self.refine, self.remainder, self.correction, self.slopes = refine, remainder, correction, slopes
        self.policy, self.augment, self.unit = policy, augment, unit
        self._learned: Callable[[int], Learned] | None = None

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return two numbers of lists, widths of the codes, and how the bytes are split."""
        middle = default_nlist(n)
        return [
            {"nlist": nlist, "words": words, "scan_share": share}
            for nlist in (middle, max(1, middle // 2))
            for words in (2, 3, 4)
            for share in (0.3, 0.4, 0.5)
        ]

    def learned(self, learned: Callable[[int], Learned]) -> Ladder:
        """Take what was learnt elsewhere, given by the number of keys of a context; return self."""
        self._learned = learned
        return self

    def fit(self, contexts: Sequence[Context], queries: Sequence[Queries]) -> None:
        """Learn the partition in the metric of the queries, and the codes of what it leaves over."""
        keys = _sample(torch.cat([self._moved(c.keys, c.positions, c) for c in contexts]))
        asked = [
            self._moved(q.x, q.positions, c).flatten(0, 1) for c, q in zip(contexts, queries, strict=True)
        ]
        metric = query_metric(_sample(torch.cat(asked))[None], unit=self.unit)
        centroids = kmeans(keys[None], self.nlist, metric=metric)
        labels, _ = assign(keys[None], *assignment_form(centroids, metric))
        residuals = (keys - centroids[0][labels[0]]).cpu().numpy()
        code = fit_codes(residuals[None], metric.cpu().numpy(), self.words)
        fitted = Learned(View(), centroids[0], metric[0], False, code)
        self.learned(lambda n: fitted)

    def _moved(self, x: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        if self.augment is None or context.rope is None:
            return x
        views = HeadViews.of([View("rotated", rope=context.rope)], context.rope, x.device)
        draws = torch.Generator().manual_seed(len(x))
        target = torch.randint(self.augment, positions.shape, generator=draws).to(x.device)
        return views.apply(x.reshape(1, *x.shape), positions, target)[0]

    def build(self, context: Context) -> None:
        """Assign the keys of the context, and code them."""
        super().build(context)
        if self._learned is None:
            raise NotTrainedError("the partition is not trained, call fit first")
        view, centroids, metric, spherical, code = self._learned(len(context.keys))
        keys, nlist = context.keys, len(centroids)
        seen = HeadViews.of([view], view.rope, keys.device).apply(keys[None], context.positions)
        form = None if metric is None else metric[None]
        centroids = centroids[None]
        if self.adapt:
            centroids = kmeans(
                seen, nlist, metric=form, spherical=spherical, niter=self.adapt, start=centroids
            )
        labels = assign(seen, *assignment_form(centroids, form, spherical=spherical))[0]
        means = [segment_sums(x[None], labels, nlist)[0][0] for x in (keys, context.values)]
        self._ranks, self._sizes = list_ranks(labels[0], nlist)
        counts = self._sizes.clamp(min=1)[:, None]
        self._labels = labels[0]
        self._anchors, self._means = _int8(means[0] / counts), _int8(means[1] / counts)
        self._code = _HeadCode(code, keys.device)
        self._levels, self._scales = self._code.encode(keys - self._anchors[self._labels])
        squares = segment_sums((self._scales**2)[None, :, None], labels, nlist)[0][0, :, 0]
        self._spread = squares / counts[:, 0]
        if self.slopes:
            chosen = context.positions % max(1, len(keys) // SLOPE_KEYS) == 0
            y = self._levels[chosen] * self._code.step * self._scales[chosen, None]
            residuals = (context.values - self._means[self._labels])[chosen]
            slopes = fit_slopes(y.cpu().numpy(), residuals.cpu().numpy())
            self._slopes = torch.from_numpy(slopes).to(keys.device)

    def read(self, queries: Queries, budget: float) -> Read:
        """Read statistics, codes of the first lists, and the best keys."""
        return next(self.reads(queries, [budget]))

    def reads(self, queries: Queries, budgets: Sequence[float]) -> Iterator[Read]:
        """Yield a read for each budget; estimates are made once."""
        context, code = self.context, self._code
        scale = context.scale
        projected = queries.x @ code.inverse
        squares = scale * scale / 2 * projected**2
        means = (queries.x @ self._anchors.T) * scale
        empty = self._sizes == 0
        counts = self._sizes.clamp(min=1).log()
        if self.correction:
            means = means + ((squares @ code.spread)[..., None] * self._spread).clamp(max=_CAP)
        lists = (means + counts).masked_fill(empty, -torch.inf)
        total = torch.logsumexp(lists, -1, keepdim=True)
        ranked = self._pooled(means - total).masked_fill(empty, -torch.inf)
        fixed = float(len(self._anchors) * (2 * context.keys.shape[1] + _LIST_EXTRA))
        d, coded = code.inverse.shape
        fixed += float((d + MATRIX_EXTRA) * coded * (1 + (self.slopes and self.remainder)))
        if not self.refine:
            for budget in budgets:
                count = affordable(budget - fixed, context.row)
                fetched = fill_lists(ranked, self._labels, self._ranks, self._sizes, count)
                visited = torch.zeros_like(ranked, dtype=torch.bool)
                yield self._read(queries, projected, fetched, None, visited, means, counts, fixed, 0)
            return
        estimates = self._estimates(projected, queries, squares)
        scores = self._pooled(estimates - total)
        sizes = self._sizes.double()
        for budget in budgets:
            left = max(0.0, budget - fixed)
            visited = fill(ranked, sizes * code.bytes, self.scan_share * left) & ~empty
            scanned = (visited * sizes).sum(1)
            keep = ((left - scanned * code.bytes) / context.row + 1e-9).long().clamp(min=0)
            seen = visited[:, self._labels]
            fetched = best(scores.masked_fill(~seen, -torch.inf), keep)
            yield self._read(queries, projected, fetched, estimates, visited, means, counts, fixed, scanned)

    def _pooled(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(logits, 0) if self.policy == "sum" else logits.amax(0)

    def _estimates(self, projected: torch.Tensor, queries: Queries, squares: torch.Tensor) -> torch.Tensor:
        """Logit of every key from its code, (g, m, n), with queries in int8."""
        code, scale = self._code, self.context.scale
        weights = projected * code.step * scale
        unit = weights.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        weights = (weights / unit).round() * unit
        products = (weights @ self._levels.T).mul_(self._scales)
        products += ((queries.x @ self._anchors.T) * scale)[..., self._labels]
        if self.correction:
            products += ((squares @ code.distortion)[..., None] * self._scales**2).clamp_(max=_CAP)
        return products

    def _read(
        self,
        queries: Queries,
        projected: torch.Tensor,
        fetched: torch.Tensor,
        estimates: torch.Tensor | None,
        visited: torch.Tensor,
        means: torch.Tensor,
        counts: torch.Tensor,
        fixed: float,
        scanned: torch.Tensor | int,
    ) -> Read:
        """Put a read together, with the remainder by list."""
        context = self.context
        count = fetched.sum(1)
        spent = fixed + scanned * self._code.bytes + count * context.row
        spent = (
            spent.float() if isinstance(spent, torch.Tensor) else torch.full_like(count, int(spent)).float()
        )
        if not self.remainder:
            return Read(fetched, spent)
        exact = (queries.x @ context.keys.T).mul_(context.scale).masked_fill_(~fetched, -torch.inf)
        bound = exact.amax(-1, keepdim=True)
        bound = bound if queries.peaks is None else torch.maximum(bound, queries.peaks[..., None])
        bound = bound.masked_fill(bound == -torch.inf, torch.inf)
        del exact
        if estimates is None:
            # Of a list that was cut, the keys that were not fetched count by its mean.
            got = torch.zeros_like(visited, dtype=torch.float32).index_add_(1, self._labels, fetched.float())
            away = torch.minimum(means, bound) + (self._sizes - got).clamp(min=0).log()
            return Read(fetched, spent, away, self._means, self._shift(projected, away))
        away = torch.minimum(means, bound) + counts.masked_fill(self._sizes == 0, -torch.inf)
        away = away.masked_fill(visited, -torch.inf)
        dropped = visited[:, self._labels] & ~fetched
        top = bound.masked_fill(bound == torch.inf, 0.0)
        weights = torch.exp(torch.minimum(estimates, bound) - top) * dropped
        sums = torch.zeros_like(away).index_add_(-1, self._labels, weights).log() + top
        shift = self._shift(projected, away, top, weights)
        return Read(fetched, spent, torch.logaddexp(away, sums), self._means, shift)

    def _shift(
        self,
        projected: torch.Tensor,
        away: torch.Tensor,
        top: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return what codes say of the values of what was not fetched, (g, m, d).

        `away` is the log of the weight of whole lists, `weights` those of single keys over ``exp(top)``.
        """
        if not self.slopes:
            return None
        code, scale = self._code, self.context.scale
        peak = away.amax(-1, keepdim=True).clamp(min=-1e30)
        if weights is not None and top is not None:
            peak = torch.maximum(peak, top)
            weights = weights * torch.exp(top - peak)
        lists = torch.exp(away - peak)
        parts = [(lists, self._spread, code.spread)]
        total = lists.sum(-1, keepdim=True)
        moved = torch.zeros_like(projected)
        if weights is not None:
            squares = self._scales**2
            parts.append((weights, squares, code.distortion))
            total = total + weights.sum(-1, keepdim=True)
            moved = ((weights * self._scales) @ self._levels) * code.step
        for part, squares, share in parts:
            cap = _CAP / (scale * scale / 2 * (projected**2 @ share)).clamp(min=1e-30)[..., None]
            moved += scale * share * projected * (part * torch.minimum(squares, cap)).sum(-1, keepdim=True)
        return (moved / total.clamp(min=1e-30)) @ self._slopes


def _sample(x: torch.Tensor) -> torch.Tensor:
    if len(x) <= _SAMPLE:
        return x
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
    return x[rows.sort().values.to(x.device)]


def _int8(x: torch.Tensor) -> torch.Tensor:
    """Round each row to 8 bits of its largest element, and back."""
    unit = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-24)
    return (x / unit).round().clamp(-127, 127) * unit


def peers_from_codebook(
    codebook: Codebook | Path,
    *,
    device: torch.device | str = "cpu",
    kind: type[Ladder] = Ladder,
    **settings: Any,
) -> Callable[[int, int], Peer]:
    """Return what makes the method for a layer and KV head of a codebook.

    Parameters
    ----------
    codebook
        Of a model, or the path of its file.
    device
        Of the evaluation.
    kind
        `Ladder`, or a method that goes on from it.
    settings
        Its arguments.
    """
    book = codebook if isinstance(codebook, Codebook) else Codebook.load(codebook)

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)

    def make(number: int, head: int) -> Peer:
        layer = book.layer(number)
        at = list(layer.heads or ()).index(head)

        def learned(n: int) -> Learned:
            found = LayerCodebook.of(layer, n)
            metric = None if found.metric is None else tensor(found.metric[at])
            view, centroids = found.views[at], tensor(found.centroids[at])
            return Learned(view, centroids, metric, found.spherical, found.code.head(at))

        return kind(**settings).learned(learned)

    return make


class _HeadCode:
    """Transform codes of one head as tensors; the definition is `saapindex.backends.reference.codes`."""

    def __init__(self, code: TransformCode, device: torch.device) -> None:
        count = int(code.coded[0])

        def tensor(array: Any) -> torch.Tensor:
            return torch.from_numpy(array[0, ..., :count]).to(device)

        self.forward, self.inverse, self.step = map(tensor, (code.forward, code.inverse, code.step))
        self.spread, self.distortion = tensor(code.spread), tensor(code.distortion)
        self.base = float(code.base[0])
        bits = torch.from_numpy(code.widths[0]).repeat_interleave(torch.from_numpy(32 // code.widths[0]))
        self.high = ((1 << bits[:count]) - 1).to(device) / 2
        self.bytes = code.nbytes_per_key

    def encode(self, residuals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the levels of each key in units of the step, (n, R), and its scale, (n,), as stored."""
        y = residuals @ self.forward
        unit = y / y.norm(dim=1, keepdim=True).clamp(min=1e-30) / self.step
        fields = (unit + self.high).round().clamp(min=0).minimum(2 * self.high)
        levels = fields - self.high
        decoded = levels * self.step
        scales = (y * decoded).sum(1) / (decoded * decoded).sum(1).clamp(min=1e-30)
        exponents = (16 * torch.log2(scales.clamp(min=1e-30) / self.base)).round().clamp(-128, 127)
        return levels, self.base * torch.exp2(exponents / 16)
