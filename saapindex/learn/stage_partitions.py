"""First stage: the view of each head, the metric of its queries, and a partition for each number of lists."""

from __future__ import annotations

from dataclasses import replace

import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.contexts import snapshots
from saapindex.learn.head_views import HeadViews
from saapindex.learn.judging import Candidate, chosen, index_errors
from saapindex.learn.kmeans import assign, assignment_form, kmeans, query_metric
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.router_data import routing
from saapindex.learn.scoring import mass_recall
from saapindex.learn.stage_codes import codes_of
from saapindex.partition import View

__all__ = ["fit_partitions"]

# Held-out query positions that views are compared on.
_VIEW_QUERIES = 512


def fit_partitions(job: LayerJob) -> None:
    """Choose the view of each head and train its partitions.

    Every view is tried with the largest number of lists. A head keeps the first unless another is better by
    ``settings.min_gain``, by what ``settings.judge`` says: so heads that do not care share one view.
    """
    settings = job.settings
    finest = settings.nlist[-1]
    kinds = settings.views if job.rope is not None else settings.views[:1]
    candidates = []
    for kind, cutoff in kinds:
        views = [View(kind, cutoff, job.rope)] * job.heads
        metric = _metric(job, views)
        candidates.append(Candidate(views, metric, _centroids(job, views, metric, finest)))
    best = [0] * job.heads
    if len(candidates) > 1:
        recall = torch.stack(_recalls(job, candidates))
        names = [f"{kind} {cutoff:g}" if kind == "windowed" else kind for kind, cutoff in kinds]
        for name, found in zip(names, recall, strict=True):
            job.tried_views[name] = found.tolist()
        if settings.judge == "error":
            errors = [_errors(job, candidate) for candidate in candidates]
            best = chosen(errors, settings.min_gain)
            job.view_errors.update(zip(names, errors, strict=True))
        else:
            recall[0] += settings.min_gain
            best = recall.argmax(dim=0).tolist()
    job.views = [candidates[at].views[head] for head, at in enumerate(best)]
    metrics = [candidates[at].metric for at in best]
    job.metric = (
        torch.stack([metric[head] for head, metric in enumerate(metrics) if metric is not None])
        if settings.metric != "euclidean"
        else None
    )
    job.centroids[finest] = torch.stack([candidates[at].centroids[head] for head, at in enumerate(best)])
    for nlist in settings.nlist[:-1]:
        job.centroids[nlist] = _centroids(job, job.views, job.metric, nlist)


def _moved(job: LayerJob, views: HeadViews, count: int, seed: int) -> torch.Tensor | None:
    """Random positions to move `count` vectors to, or None where positions stay as they are."""
    if not job.settings.augment or not bool(views.keeps_rotation.any()):
        return None
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(job.max_position, (count,), generator=draws).to(job.device)


def _metric(job: LayerJob, views: list[View]) -> torch.Tensor | None:
    settings = job.settings
    if settings.metric == "euclidean":
        return None
    seen = HeadViews.of(views, job.rope, job.device)
    parts = []
    for number, context in enumerate(job.train):
        for copy in range(max(1, settings.augment)):
            to = _moved(job, seen, len(context.query_positions), settings.seed + 1000 * copy + 2 * number)
            parts.append(seen.apply(context.queries, context.query_positions, to).flatten(1, 2))
    unit = settings.metric == "unit-queries"
    return query_metric(torch.cat(parts, dim=1), shrinkage=settings.shrinkage, unit=unit)


def _centroids(job: LayerJob, views: list[View], metric: torch.Tensor | None, nlist: int) -> torch.Tensor:
    """k-means on keys of all training contexts, an even share of each; rounded as they will be stored."""
    settings = job.settings
    seen = HeadViews.of(views, job.rope, job.device)
    copies = max(1, settings.augment) if bool(seen.keeps_rotation.any()) else 1
    wanted = -(-nlist * settings.max_points_per_centroid // (len(job.train) * copies))
    parts = []
    for number, context in enumerate(job.train):
        for copy in range(copies):
            seed = settings.seed + 1000 * copy + 2 * number + 1
            draws = torch.Generator().manual_seed(seed)
            rows = (
                torch.randperm(context.keys.shape[1], generator=draws)[:wanted].sort().values.to(job.device)
            )
            to = _moved(job, seen, len(rows), seed)
            parts.append(seen.apply(context.keys[:, rows], context.key_positions[rows], to))
    x = torch.cat(parts, dim=1)
    if x.shape[1] < nlist:
        raise InvalidInputError(f"{x.shape[1]} training keys for {nlist} lists, expected at least as many")
    centroids = kmeans(
        x,
        nlist,
        metric=metric,
        spherical=settings.spherical,
        niter=settings.niter,
        seed=settings.seed,
    )
    return job.rounded(centroids)


def _errors(job: LayerJob, candidate: Candidate) -> torch.Tensor:
    """What `index_errors` says of the candidate with codes of its own, of the largest size that is tried."""
    finest, words = job.settings.nlist[-1], max(job.settings.words)
    centroids = {finest: candidate.centroids}
    trial = replace(job, views=candidate.views, metric=candidate.metric, centroids=centroids)
    return index_errors(job, candidate, codes_of(trial, [words], [finest])[words, finest])


def _recalls(job: LayerJob, candidates: list[Candidate]) -> list[torch.Tensor]:
    """Mass recall of the `mean` router in each view, (heads,), mean over the held-out sequences."""
    settings, finest = job.settings, job.settings.nlist[-1]
    total = [torch.zeros(job.heads, device=job.device) for _ in candidates]
    for whole in job.held_out:
        context = whole.thinned(_VIEW_QUERIES)
        moments = snapshots(context, window=settings.window, count=settings.snapshots)
        listed = []
        for candidate in candidates:
            seen = HeadViews.of(candidate.views, job.rope, job.device)
            x = seen.apply(context.keys, context.key_positions)
            form = assignment_form(candidate.centroids, candidate.metric, spherical=settings.spherical)
            listed.append((seen, x, assign(x, *form)[0], finest, 0))
        for at, data in enumerate(routing(job, context, moments, listed)):
            found = mass_recall(
                data.mean_scores, data, share=settings.share, shared=settings.shared_selection
            )
            total[at] += found / len(job.held_out)
    return total
