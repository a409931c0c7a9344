"""Selection at a budget, alike for every method: what to read first, and where to stop."""

from __future__ import annotations

import math

import torch

__all__ = ["affordable", "best", "fill", "fill_lists", "list_ranks", "pooled"]


def pooled(logits: torch.Tensor) -> torch.Tensor:
    """Score each unit for a group of heads, which select together: the log of the summed softmax shares.

    A single head's scores come back as they are.

    Parameters
    ----------
    logits
        (g, m, u): the estimated log of the weight that each head gives each unit; minus infinity for none.

    Returns
    -------
    Tensor
        (m, u).

    Examples
    --------
    >>> pooled(torch.log(torch.tensor([[[1.0, 3.0]], [[30.0, 10.0]]]))).exp().round(decimals=4)
    tensor([[1., 1.]])
    """
    if len(logits) == 1:
        return logits[0]
    total = torch.logsumexp(logits, -1, keepdim=True)
    return torch.logsumexp(logits - total.masked_fill(total == -math.inf, 0.0), 0)


def affordable(left: float, unit: float) -> int:
    """Return how many units of `unit` bytes fit into `left` bytes.

    Examples
    --------
    >>> affordable(0.05 * 100 * 256, 256), affordable(-3, 256)
    (5, 0)
    """
    return max(0, math.floor(left / unit + 1e-9))


def best(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return which units have the `count` largest scores, without any of minus infinity.

    Parameters
    ----------
    scores
        (m, u).
    count
        For all rows, or int64, (m,).

    Returns
    -------
    Tensor
        bool, (m, u).

    Examples
    --------
    >>> best(torch.tensor([[3.0, 1.0, 2.0]]), 2).tolist()
    [[True, False, True]]
    """
    most = min(count if isinstance(count, int) else int(count.max()), scores.shape[1])
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if most <= 0:
        return chosen
    found = scores.topk(most, dim=1)
    taken = found.values > -math.inf
    if not isinstance(count, int):
        taken &= torch.arange(most, device=scores.device) < count[:, None]
    return chosen.scatter_(1, found.indices, taken)


def fill(scores: torch.Tensor, costs: torch.Tensor, budget: float) -> torch.Tensor:
    """Take units by falling score while they fit; stop at the first that does not. Ties go to the lower unit.

    Parameters
    ----------
    scores
        (m, u).
    costs
        (u,), bytes.
    budget
        Bytes.

    Returns
    -------
    Tensor
        bool, (m, u).

    Examples
    --------
    >>> fill(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([5.0, 1.0, 5.0]), 9).tolist()
    [[True, False, False]]
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    spent = costs.double()[order].cumsum(1)
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return taken.scatter_(1, order, spent <= budget + 1e-6)


def list_ranks(labels: torch.Tensor, nlist: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank of each key within its list, by rising id, and the sizes of the lists.

    Examples
    --------
    >>> [part.tolist() for part in list_ranks(torch.tensor([1, 0, 1]), 3)]
    [[0, 0, 1], [1, 2, 0]]
    """
    sizes = torch.bincount(labels, minlength=nlist)
    order = labels.argsort(stable=True)
    within = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    return torch.empty_like(within).scatter_(0, order, within), sizes


def fill_lists(
    scores: torch.Tensor, labels: torch.Tensor, ranks: torch.Tensor, sizes: torch.Tensor, count: int
) -> torch.Tensor:
    """Read whole lists by falling score until `count` keys are read; the last list is cut to fit.

    Parameters
    ----------
    scores
        (m, nlist).
    labels
        (n,): the list of each key.
    ranks, sizes
        From `list_ranks`.
    count
        Keys to read.

    Returns
    -------
    Tensor
        bool, (m, n).

    Examples
    --------
    >>> labels = torch.tensor([1, 0, 1])
    >>> fill_lists(torch.tensor([[1.0, 2.0]]), labels, *list_ranks(labels, 2), 1).tolist()
    [[True, False, False]]
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ordered = sizes[order]
    before = torch.zeros_like(ordered).scatter_(1, order, ordered.cumsum(1) - ordered)
    return before[:, labels] + ranks < count
