"""Third stage: the transform codes of each head, for each number of lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saapindex.codes import TransformCode, fit_codes
from saapindex.learn.contexts import Context
from saapindex.learn.head_views import HeadViews
from saapindex.learn.judging import Candidate, index_errors, log_errors
from saapindex.learn.kmeans import assign, query_metric, segment_sums
from saapindex.learn.layer_job import LayerJob
from saapindex.partition import View

__all__ = ["codes_of", "fit_layer_codes"]

# Keys of all training contexts that the codes of a head are fitted on.
_KEYS = 16384


def fit_layer_codes(job: LayerJob) -> None:
    """Fit codes to what remains of rotated keys once the mean of their list is taken off.

    Of several sizes, a layer takes that of the least error of the index, mean over its heads, judged as views
    are.
    """
    settings = job.settings
    codes = codes_of(job, settings.words, settings.nlist)
    finest, per = settings.nlist[-1], len(job.head_numbers)
    words = [settings.words[0]] * len(job.layers)
    if len(settings.words) > 1:
        candidate = Candidate(job.views, job.metric, job.centroids[finest])
        errors = [index_errors(job, candidate, codes[size, finest]) for size in settings.words]
        means = log_errors(errors).reshape(len(errors), len(job.layers), per).mean(dim=2)
        words = [settings.words[at] for at in means.argmin(dim=0).tolist()]
    for at, size in enumerate(words):
        own = slice(at * per, (at + 1) * per)
        job.layer_extra.append(
            {
                f"codes.{nlist}.{name}": tensor[own]
                for nlist in settings.nlist
                for name, tensor in codes[size, nlist].tensors().items()
            }
        )


def codes_of(
    job: LayerJob, words: Sequence[int], nlists: Sequence[int]
) -> dict[tuple[int, int], TransformCode]:
    """Return codes of all heads for each size and number of lists.

    Codes see keys and queries as they are cached, whatever the view of the partition. Where a partition
    serves positions that it was not trained at, so do its codes: keys and queries are moved alike.
    """
    rotated = HeadViews.of([View("rotated", rope=job.rope)] * job.heads, job.rope, job.device)
    queries = []
    for context in job.train:
        to = _target(job, context.query_positions, 0)
        queries.append(rotated.apply(context.queries, context.query_positions, to).flatten(1, 2))
    unit = job.settings.metric == "unit-queries"
    metric = query_metric(torch.cat(queries, dim=1), shrinkage=job.settings.shrinkage, unit=unit)
    found = {}
    for nlist in nlists:
        parts = [_residuals(job, rotated, context, nlist, number) for number, context in enumerate(job.train)]
        residuals = torch.cat(parts, dim=1).cpu().numpy()
        for size in words:
            found[size, nlist] = fit_codes(residuals, metric.cpu().numpy(), size)
    return found


def _target(job: LayerJob, positions: torch.Tensor, number: int) -> torch.Tensor | None:
    if not job.settings.augment or job.rope is None:
        return None
    draws = torch.Generator().manual_seed(job.settings.seed + 7 * number)
    return torch.randint(job.max_position, positions.shape, generator=draws).to(job.device)


def _residuals(job: LayerJob, rotated: HeadViews, context: Context, nlist: int, number: int) -> torch.Tensor:
    """Sample keys of a context and take off the mean of their list, (heads, n, d)."""
    to = _target(job, context.key_positions, number + 1)
    keys = rotated.apply(context.keys, context.key_positions, to)
    positions = context.key_positions if to is None else to
    seen = job.head_views().apply(keys, positions)
    labels = assign(seen, *job.assignment(nlist))[0]
    sums, counts = segment_sums(keys, labels, nlist)
    means = sums / counts.clamp(min=1)[..., None]
    wanted = min(keys.shape[1], -(-_KEYS // len(job.train)))
    draws = torch.Generator().manual_seed(job.settings.seed + number)
    rows = torch.randperm(keys.shape[1], generator=draws)[:wanted].sort().values.to(job.device)
    labels = labels[:, rows, None].expand(-1, -1, keys.shape[2])
    return keys[:, rows] - means.gather(1, labels)
