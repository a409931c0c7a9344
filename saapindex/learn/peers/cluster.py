"""k-means of one head's keys, shared by the methods that cluster them."""

from __future__ import annotations

import torch

from saapindex.learn import kmeans

__all__ = ["cluster", "nearest", "sample"]


def sample(x: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return at most `count` distinct rows of `x`, the same for the same seed on every device.

    Examples
    --------
    >>> sample(torch.ones(5, 2), 3, seed=0).shape
    torch.Size([3, 2])
    """
    if len(x) <= count:
        return x
    generator = torch.Generator().manual_seed(seed)
    return x[torch.randperm(len(x), generator=generator)[:count].to(x.device)]


def cluster(
    x: torch.Tensor,
    count: int,
    niter: int,
    *,
    spherical: bool = False,
    start: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Return `count` centroids, (count, d), of the rows of `x`, (n, d), after `niter` Lloyd steps.

    Spherical centroids have length 1 and take the rows of the largest inner product. Without `start`,
    (count, d), the steps begin from random rows.

    Examples
    --------
    >>> cluster(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2, 5).flatten().sort().values
    tensor([ 0.5000, 10.5000])
    """
    first = None if start is None else start[None]
    return kmeans.kmeans(x[None], count, spherical=spherical, niter=niter, start=first, seed=seed)[0]


def nearest(x: torch.Tensor, centroids: torch.Tensor, *, spherical: bool = False) -> torch.Tensor:
    """Return the centroid of each row: the nearest, or that of the largest inner product if spherical.

    Parameters
    ----------
    x, centroids
        float32, (n, d) and (count, d).

    Returns
    -------
    Tensor
        int64, (n,).

    Examples
    --------
    >>> nearest(torch.tensor([[3.0], [-1.0]]), torch.tensor([[-1.0], [2.0]])).tolist()
    [1, 0]
    """
    form = kmeans.assignment_form(centroids[None], None, spherical=spherical)
    return kmeans.assign(x[None], *form)[0][0]
