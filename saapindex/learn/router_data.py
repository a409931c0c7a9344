"""What routers are trained on and measured by: queries, masses and lists of contexts, for all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.contexts import Context, Snapshot, snapshots
from saapindex.learn.head_views import HeadViews
from saapindex.learn.kmeans import assign
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.masses import RouterData, list_masses, list_means

__all__ = ["router_data", "routing"]


def routing(
    job: LayerJob,
    context: Context,
    moments: Sequence[Snapshot],
    listed: Sequence[tuple[HeadViews, torch.Tensor, torch.Tensor, int, int]],
) -> list[RouterData]:
    """Return what routers see of a context under several partitions, from one pass over its logits.

    Parameters
    ----------
    job
        For the scale of the logits.
    context
        Queries and keys.
    moments
        `saapindex.learn.contexts.snapshots` of it.
    listed
        For each partition the views, the keys in them, (heads, n, d), their lists, (heads, n), the number of
        lists, and the offset that the context was moved by.

    Returns
    -------
    list of RouterData
    """
    if not moments:
        raise InvalidInputError(
            f"{context.name}: no query sees keys more than {job.settings.window} positions back, so there is "
            "nothing to learn"
        )
    stored = torch.float16 if job.device.type == "cuda" else torch.float32
    masses = list_masses(
        context,
        moments,
        [(labels, nlist) for _, _, labels, nlist, _ in listed],
        scale=job.scale,
        softcap=job.softcap,
        dtype=stored,
    )
    first, last = moments[0].first, moments[-1].last
    counts = torch.tensor([moment.last - moment.first for moment in moments])
    snapshot = torch.arange(len(moments)).repeat_interleave(counts).to(job.device)
    queries, positions = context.queries[:, :, first:last], context.query_positions[first:last]
    result = []
    for (views, x, labels, nlist, offset), mass in zip(listed, masses, strict=True):
        features = views.apply(queries, positions, positions + offset if offset else None)
        means, sizes = list_means(x, labels, nlist, moments)
        says = torch.empty_like(mass)
        for at, moment in enumerate(moments):
            rows = slice(moment.first - first, moment.last - first)
            says[:, :, rows] = (job.scale * features[:, :, rows]) @ means[:, None, at].mT
        result.append(RouterData(features, mass, says, sizes.log(), snapshot))
    return result


def router_data(job: LayerJob, contexts: Sequence[Context], *, moves: int) -> dict[int, RouterData]:
    """Return the routing of all contexts, for each number of lists.

    Parameters
    ----------
    job
        After the first stage.
    contexts
        Of the job.
    moves
        Copies of each context at random offsets, beside the one where it stands.
    """
    settings = job.settings
    draws = torch.Generator().manual_seed(settings.seed)
    views = job.head_views()
    rotated = bool(views.keeps_rotation.any())
    forms = {nlist: job.assignment(nlist) for nlist in settings.nlist}
    parts: dict[int, list[RouterData]] = {nlist: [] for nlist in settings.nlist}
    for context in contexts:
        moments = snapshots(context, window=settings.window, count=settings.snapshots)
        room = job.max_position - 1 - int(context.query_positions[-1])
        offsets = [0]
        if rotated and room > 0:
            offsets += torch.randint(1, room + 1, (moves,), generator=draws).tolist()
        listed, kinds = [], []
        for offset in offsets:
            to = context.key_positions + offset if offset else None
            x = views.apply(context.keys, context.key_positions, to)
            for nlist in settings.nlist:
                listed.append((views, x, assign(x, *forms[nlist])[0], nlist, offset))
                kinds.append(nlist)
        for nlist, data in zip(kinds, routing(job, context, moments, listed), strict=True):
            parts[nlist].append(data)
    return {nlist: RouterData.cat(data) for nlist, data in parts.items()}
