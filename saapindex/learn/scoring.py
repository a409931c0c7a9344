"""What a ranking of lists finds: mass recall at a share of the keys, and the evenness of lists."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saapindex.learn.masses import RouterData

__all__ = ["imbalance", "mass_recall"]

# Scores held at once, in elements.
_SCORES = 1 << 24


def mass_recall(
    scores: Callable[[slice], torch.Tensor], data: RouterData, *, share: float, shared: bool = True
) -> torch.Tensor:
    """Return the share of the long-range mass that is read where `share` of the keys is, per KV head.

    Lists are read in the order of their predicted mass per key until the budget is full; the last in part.

    Parameters
    ----------
    scores
        Gives for some rows the predicted logarithm of the mass per key, (kv_heads, group, rows, nlist), up to
        a constant of the query.
    data
        The true masses.
    share
        Of the keys in the lists.
    shared
        Whether the query heads of a group read the same lists, by the sum of their predicted masses, as they
        do where they share a KV head.

    Returns
    -------
    Tensor
        float32, (kv_heads,), mean over queries and query heads.

    Examples
    --------
    >>> half = torch.full((1, 1, 1, 2), 0.5)
    >>> sizes = torch.tensor([[[10.0, 30.0]]])
    >>> data = RouterData(half, half, half, sizes.log(), torch.zeros(1, dtype=torch.int64))
    >>> mass_recall(lambda rows: torch.tensor([[[[1.0, 0.0]]]]), data, share=0.5)
    tensor([0.6667])
    """
    heads, group, _, nlist = data.mass.shape
    total = torch.zeros(heads, dtype=torch.float64, device=data.mass.device)
    step = max(1, _SCORES // (heads * group * nlist))
    for start in range(0, data.rows, step):
        rows = slice(start, min(start + step, data.rows))
        log_sizes = data.priors(rows)
        sizes = log_sizes.exp()
        per_key = scores(rows)
        if shared:
            log_mass = torch.log_softmax(per_key + log_sizes, dim=-1)
            per_key = torch.logsumexp(log_mass, dim=1, keepdim=True) - log_sizes.clamp(min=0)
        per_key = per_key.masked_fill(sizes == 0, -torch.inf)
        order = per_key.argsort(dim=-1, descending=True)
        sizes = sizes.expand_as(order).gather(-1, order)
        before = sizes.cumsum(dim=-1) - sizes
        budget = share * sizes.sum(dim=-1, keepdim=True)
        read = ((budget - before) / sizes.clamp(min=1)).clamp(0, 1)
        mass = data.mass[:, :, rows].float().gather(-1, order.expand(-1, group, -1, -1))
        total += (mass * read).sum(dim=-1).mean(dim=1).sum(dim=1).double()
    return (total / data.rows).float()


def imbalance(sizes: torch.Tensor) -> torch.Tensor:
    """Return the mean list size that a key sees over the even size: 1 for lists of one size.

    Parameters
    ----------
    sizes
        (..., nlist).

    Examples
    --------
    >>> imbalance(torch.tensor([[4.0, 4.0], [8.0, 0.0]]))
    tensor([1., 2.])
    """
    shares = sizes / sizes.sum(dim=-1, keepdim=True).clamp(min=1)
    return sizes.shape[-1] * (shares**2).sum(dim=-1)
