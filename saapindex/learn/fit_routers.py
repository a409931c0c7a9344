"""Training of learned routers, of all heads at once: cross-entropy against the attention mass per list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from saapindex.learn.masses import RouterData
from saapindex.progress import track

__all__ = ["FitSettings", "RouterWeights", "cross_entropy", "fit_router"]

# Scores of the held-out rows held at once, in elements.
_SCORES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a router is trained.

    Attributes
    ----------
    on_mean
        Whether the router adds to the score of the `mean` router, from which it then starts.
    conditioned
        Whether the router predicts masses per key, so that contexts that fill the lists differently can
        share it, or of whole lists.
    hidden
        Width of the hidden layer; 0 for a linear router.
    per_query_head
        A router for each query head, in place of one for all that share a KV head.
    learning_rate, weight_decay
        Of AdamW; the rate falls to zero along a half cosine.
    batch
        Query positions a step.
    epochs, patience
        Passes at most, and passes without improvement after which a head stops.
    seed
        Of the first weights and of the order.
    """

    on_mean: bool = True
    conditioned: bool = True
    hidden: int = 0
    per_query_head: bool = False
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    batch: int = 256
    epochs: int = 20
    patience: int = 4
    seed: int = 1234


@dataclass(frozen=True)
class RouterWeights:
    """Learned routers of the KV heads of a layer.

    ``scores = [mean score] + features . weight_j + offset_j``, where an MLP replaces the features by
    ``relu(features . hidden + hidden_offset)``.

    Attributes
    ----------
    weight, offset
        (kv_heads, routers, nlist, h) and (kv_heads, routers, nlist); `routers` is 1, or the size of the group
        where every query head has its own, and `h` is d or the width of the hidden layer.
    hidden, hidden_offset
        (kv_heads, routers, h, d) and (kv_heads, routers, h), or None.
    on_mean
        Whether the score of the `mean` router is added.
    conditioned
        Whether scores are masses per key.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    hidden: torch.Tensor | None = None
    hidden_offset: torch.Tensor | None = None
    on_mean: bool = field(default=True, kw_only=True)
    conditioned: bool = field(default=True, kw_only=True)

    def scores(self, data: RouterData, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return what the router says of some rows, (kv_heads, group, rows, nlist)."""
        x = data.features[:, :, rows]
        if self.hidden is not None and self.hidden_offset is not None:
            x = torch.relu(x @ self.hidden.mT + self.hidden_offset[..., None, :])
        scores = x @ self.weight.mT + self.offset[..., None, :]
        return scores + data.means[:, :, rows].float() if self.on_mean else scores

    def per_key(self, data: RouterData, rows: slice) -> torch.Tensor:
        """Return the predicted logarithm of the mass per key, whatever the router was trained to predict."""
        scores = self.scores(data, rows)
        return scores if self.conditioned else scores - data.priors(rows).clamp(min=0)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        named = {name: getattr(self, name) for name in ("weight", "offset", "hidden", "hidden_offset")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_parameters(self, tensors: Mapping[str, torch.Tensor]) -> RouterWeights:
        """Return the same kind of router with other tensors."""
        return RouterWeights(**tensors, on_mean=self.on_mean, conditioned=self.conditioned)


def cross_entropy(weights: RouterWeights, data: RouterData, rows: torch.Tensor | slice) -> torch.Tensor:
    """Return the mean cross-entropy of some rows in nats, (kv_heads,).

    Lists that are empty for a query are masked.
    """
    log_sizes = data.priors(rows)
    scores = weights.scores(data, rows)
    # A finite floor: the product of a mass of 0 with minus infinity would be no number.
    floor = log_sizes.clamp(min=-1e4)
    scores = scores + (floor if weights.conditioned else floor.clamp(max=0))
    loss = -(data.mass[:, :, rows].float() * torch.log_softmax(scores, dim=-1)).sum(dim=-1)
    mean: torch.Tensor = loss.mean(dim=(1, 2))
    return mean


def fit_router(
    train: RouterData,
    held_out: RouterData,
    settings: FitSettings,
    *,
    start: torch.Tensor | None = None,
    show: bool = False,
) -> tuple[RouterWeights, torch.Tensor]:
    """Train a router for every head.

    Heads do not touch: each keeps the weights that were best for it on the held-out rows, and stops after
    its own `patience`.

    Parameters
    ----------
    train, held_out
        Of different sequences.
    settings
        Of the router and of its training.
    start
        float32, (kv_heads, nlist, d): weights that a linear router without `on_mean` starts from, such as the
        centroids times the scale of the logits.
    show
        Whether to show progress.

    Returns
    -------
    weights : RouterWeights
    loss : float32 (kv_heads,), on the held-out rows, in nats

    Notes
    -----
    A router that adds to the `mean` router starts at it exactly, so it is never worse on the held-out loss.
    """
    spread = train.features.square().mean(dim=(1, 2, 3)).sqrt().clamp(min=1e-6)
    model = _first_weights(train, settings, spread, start)
    names = list(model.parameters())
    parameters = [tensor.requires_grad_() for tensor in model.parameters().values()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=train.features.is_cuda,
    )
    steps = settings.epochs * -(-train.rows // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaled_train, scaled_held_out = _scaled(train, spread), _scaled(held_out, spread)
    with torch.no_grad():
        best = _loss(model, scaled_held_out)
    kept = [parameter.detach().clone() for parameter in parameters]
    waited = torch.zeros_like(best)
    for rows in track(list(_epochs(train.rows, settings)), "training routers", show=show):
        for batch in torch.split(rows.to(train.features.device), settings.batch):
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(cross_entropy(model, scaled_train, batch).sum())
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = _loss(model, scaled_held_out)
            better = (loss < best) & (waited < settings.patience)
            best = torch.where(better, loss, best)
            waited = torch.where(better, 0, waited + 1)
            for copy, parameter in zip(kept, parameters, strict=True):
                copy[better] = parameter[better]
        if bool((waited >= settings.patience).all()):
            break
    first = "weight" if model.hidden is None else "hidden"
    tensors = dict(zip(names, kept, strict=True))
    tensors[first] /= spread[:, None, None, None]
    return model.with_parameters(tensors), best


def _epochs(rows: int, settings: FitSettings) -> Iterator[torch.Tensor]:
    draws = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield torch.randperm(rows, generator=draws)


def _scaled(data: RouterData, spread: torch.Tensor) -> RouterData:
    """The same data with features of unit size."""
    return replace(data, features=data.features / spread[:, None, None, None])


def _loss(model: RouterWeights, data: RouterData) -> torch.Tensor:
    heads, group, _, nlist = data.mass.shape
    step = max(1, _SCORES // (heads * group * nlist))
    total = torch.zeros(heads, dtype=torch.float64, device=data.mass.device)
    for first in range(0, data.rows, step):
        rows = slice(first, min(first + step, data.rows))
        total += cross_entropy(model, data, rows).double() * (rows.stop - first)
    return (total / data.rows).float()


def _first_weights(
    data: RouterData, settings: FitSettings, spread: torch.Tensor, start: torch.Tensor | None
) -> RouterWeights:
    """Weights before training: the rung below where there is one, else small ones, alike for all heads."""
    heads, group, _, d = data.features.shape
    nlist, device = data.mass.shape[3], data.features.device
    routers = group if settings.per_query_head else 1
    draws = torch.Generator().manual_seed(settings.seed)

    def uniform(*shape: int) -> torch.Tensor:
        drawn = (2 * torch.rand(shape, generator=draws) - 1) / math.sqrt(shape[-1])
        return drawn.to(device).expand(heads, routers, *shape).clone()

    size = settings.hidden or d
    if settings.on_mean:
        weight = torch.zeros((heads, routers, nlist, size), device=device)
    elif start is not None and not settings.hidden:
        weight = (start * spread[:, None, None])[:, None].expand(heads, routers, nlist, d).clone()
    else:
        weight = uniform(nlist, size)
    offset = torch.zeros((heads, routers, nlist), device=device)
    hidden = zeros = None
    if settings.hidden:
        hidden = uniform(settings.hidden, d)
        zeros = torch.zeros((heads, routers, settings.hidden), device=device)
    return RouterWeights(
        weight, offset, hidden, zeros, on_mean=settings.on_mean, conditioned=settings.conditioned
    )
