"""Second stage: the ladder of routers. A head keeps a learned rung only where it beats the one below it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from saapindex.codebook_routers import ListRouters, RouterKind
from saapindex.learn.fit_routers import FitSettings, RouterWeights, fit_router
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.masses import RouterData
from saapindex.learn.report import ListsReport
from saapindex.learn.router_data import router_data
from saapindex.learn.scoring import imbalance, mass_recall

__all__ = ["fit_routers"]


def fit_routers(job: LayerJob) -> None:
    """Train every rung for every head and number of lists; keep the best on the held-out sequences."""
    settings = job.settings
    train = router_data(job, job.train, moves=settings.moves) if _learned(job) else {}
    held_out = router_data(job, job.held_out, moves=0)
    for nlist in settings.nlist:
        learned = {kind: _fit(job, kind, nlist, train[nlist], held_out[nlist]) for kind in _learned(job)}
        train.pop(nlist, None)
        _choose(job, nlist, held_out.pop(nlist), learned)


def _learned(job: LayerJob) -> list[RouterKind]:
    return [kind for kind in job.settings.routers if kind not in ("centroid", "mean")]


def _fit(
    job: LayerJob, kind: RouterKind, nlist: int, train: RouterData, held_out: RouterData
) -> RouterWeights:
    settings = job.settings
    fit = FitSettings(
        on_mean=kind.startswith("mean"),
        hidden=settings.hidden if kind.endswith("mlp") else 0,
        per_query_head=settings.per_query_head,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        batch=settings.batch,
        epochs=settings.epochs,
        patience=settings.patience,
        seed=settings.seed,
    )
    weights, _ = fit_router(train, held_out, fit, start=job.scale * job.centroids[nlist])
    return weights.with_parameters({name: job.rounded(part) for name, part in weights.parameters().items()})


def _choose(
    job: LayerJob, nlist: int, held_out: RouterData, learned: dict[RouterKind, RouterWeights]
) -> None:
    """Measure every rung and note for each head the one that is kept."""
    settings = job.settings
    centroids = job.scale * job.centroids[nlist][:, None].mT

    def recall(scores: Callable[[slice], torch.Tensor]) -> list[float]:
        found: list[float] = mass_recall(
            scores, held_out, share=settings.share, shared=settings.shared_selection
        ).tolist()
        return found

    found: dict[RouterKind, list[float]] = {}
    for kind in settings.routers:
        if kind == "centroid":
            found[kind] = recall(lambda rows: held_out.features[:, :, rows] @ centroids)
        elif kind == "mean":
            found[kind] = recall(held_out.mean_scores)
        else:
            found[kind] = recall(partial(learned[kind].per_key, held_out))
    bound = recall(held_out.true_scores)
    sizes = held_out.log_sizes.exp()
    uneven = imbalance(sizes[:, int(sizes[0].sum(dim=1).argmax())]).tolist()
    kinds = [_kept(job, {kind: found[kind][head] for kind in found}) for head in range(job.heads)]
    job.routers[nlist] = _packed(job, kinds, learned)
    job.lists[nlist] = [
        ListsReport(kind, {name: found[name][head] for name in found}, bound[head], uneven[head])
        for head, kind in enumerate(kinds)
    ]


def _kept(job: LayerJob, recall: dict[RouterKind, float]) -> RouterKind:
    """Return the rung of one head: each must beat by `min_gain` what is kept of those before it."""
    kept: RouterKind = job.settings.fallback
    for kind, found in recall.items():
        learned = kind not in ("centroid", "mean")
        if learned and found > recall[kept] + job.settings.min_gain:
            kept = kind
    return kept


def _packed(job: LayerJob, kinds: list[RouterKind], learned: dict[RouterKind, RouterWeights]) -> ListRouters:
    """Put the weights of the rungs that are kept together, head by head."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for head, kind in enumerate(kinds):
        if kind in learned:
            weights = learned[kind]
            parts = weights.parameters()
            if weights.hidden is not None:
                parts = {**parts, "top": parts["weight"]}
                del parts["weight"]
            for name, part in parts.items():
                tensors.setdefault(name, []).append(part[head])
    packed = {name: job.stored(torch.stack(parts)) for name, parts in tensors.items()}
    return ListRouters(tuple(kinds), **packed)
