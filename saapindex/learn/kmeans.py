"""k-means of all heads at once, in the metric of their queries, in torch.

The same method as `saapindex.partition.kmeans`, with the heads as a leading dimension. Every draw is common
to the heads, and heads do not otherwise touch: a head's result does not depend on which heads are with it.
"""

from __future__ import annotations

import torch

from saapindex.progress import track

__all__ = ["assign", "assignment_form", "kmeans", "query_metric", "segment_sums"]

# Scores held at once: 1 GiB on a GPU; on a CPU what its caches can hold.
_SCORES_CUDA, _SCORES_CPU = 1 << 28, 1 << 20


def query_metric(queries: torch.Tensor, *, shrinkage: float = 1e-3, unit: bool = False) -> torch.Tensor:
    """Return ``M = E[q q^T]`` of each head, scaled to a mean eigenvalue of 1.

    Parameters
    ----------
    queries
        (heads, n, d).
    shrinkage
        Weight of the identity, which keeps `M` positive definite.
    unit
        Give every query the same weight, whatever its norm.

    Returns
    -------
    Tensor
        float32, (heads, d, d).

    Examples
    --------
    >>> query_metric(torch.eye(2)[None] * torch.tensor([[1.0], [3.0]]), shrinkage=0.0)
    tensor([[[0.2000, 0.0000],
             [0.0000, 1.8000]]])
    """
    d = queries.shape[-1]
    eye = torch.eye(d, dtype=torch.float64, device=queries.device)
    total = torch.zeros((len(queries), d, d), dtype=torch.float64, device=queries.device)
    for part in torch.split(queries, 65536, dim=1):
        rows = part.float()
        if unit:
            rows = torch.nn.functional.normalize(rows, dim=-1)
        total += (rows.mT @ rows).double()
    trace = total.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    metric = torch.where(trace > 0, total * (d / trace.clamp(min=1e-30)), eye)
    return ((1 - shrinkage) * metric + shrinkage * eye).float()


def assignment_form(
    centroids: torch.Tensor, metric: torch.Tensor | None, *, spherical: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A` and `b` so that the nearest centroid of `x` is ``argmax_j x . A_j + b_j``.

    Parameters
    ----------
    centroids
        float32, (heads, nlist, d).
    metric
        float32, (heads, d, d); None for the Euclidean metric.
    spherical
        Whether the largest inner product wins.

    Returns
    -------
    forms : float32 (heads, nlist, d)
    bias : float32 (heads, nlist)
    """
    if spherical:
        return centroids, torch.zeros_like(centroids[..., 0])
    exact = centroids.double()
    forms = exact if metric is None else exact @ metric.double()
    return forms.float(), (-(forms * exact).sum(dim=-1) / 2).float()


def assign(x: torch.Tensor, forms: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best list of each row and its score: int64 and float32, (heads, n).

    Examples
    --------
    >>> forms, bias = assignment_form(torch.tensor([[[0.0], [2.0]]]), None)
    >>> assign(torch.tensor([[[0.4], [1.7]]]), forms, bias)[0]
    tensor([[0, 1]])
    """
    heads, n, _ = x.shape
    labels = torch.empty((heads, n), dtype=torch.int64, device=x.device)
    scores = torch.empty((heads, n), device=x.device)
    limit = _SCORES_CUDA if x.is_cuda else _SCORES_CPU
    step = max(1, limit // (heads * forms.shape[1]))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        products = torch.baddbmm(bias[:, None, :], x[:, rows].float(), forms.mT)
        scores[:, rows], labels[:, rows] = products.max(dim=2)
    return labels, scores


def segment_sums(x: torch.Tensor, labels: torch.Tensor, nlist: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the rows of each list, (heads, nlist, d), and their number, (heads, nlist); float32.

    A GPU adds by a product with the membership matrix: atomic additions would be as fast, but their order,
    and so the last digits, would change from run to run.

    Examples
    --------
    >>> segment_sums(torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1, 0, 1]]), 2)
    (tensor([[[2.],
             [5.]]]), tensor([[1., 2.]]))
    """
    heads, n, d = x.shape
    first = torch.arange(heads, device=x.device)[:, None] * nlist
    counts = torch.bincount((labels + first).reshape(-1), minlength=heads * nlist).view(heads, nlist).float()
    sums = torch.zeros((heads, nlist, d), device=x.device)
    if not x.is_cuda:
        sums.view(-1, d).index_add_(0, (labels + first).reshape(-1), x.reshape(-1, d).float())
        return sums, counts
    lists = torch.arange(nlist, device=x.device)
    step = max(1, _SCORES_CUDA // (heads * nlist))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        member = (labels[:, None, rows] == lists[:, None]).float()
        sums.baddbmm_(member, x[:, rows].float())
    return sums, counts


def kmeans(
    x: torch.Tensor,
    nlist: int,
    *,
    metric: torch.Tensor | None = None,
    spherical: bool = False,
    niter: int = 10,
    seed: int = 1234,
    start: torch.Tensor | None = None,
    show: bool = False,
) -> torch.Tensor:
    """Partition the rows of each head into `nlist` parts (Lloyd); return the centroids.

    Parameters
    ----------
    x
        (heads, n, d), ``n >= nlist``.
    nlist
        Number of parts.
    metric
        float32, (heads, d, d), positive definite; None for the Euclidean metric.
    spherical
        Unit centroids, assigned by inner product. Excludes a metric.
    niter
        Iterations.
    seed
        Of the rows that are drawn.
    start
        Centroids to start from, (heads, nlist, d); by default rows drawn at random.
    show
        Whether to show a progress bar.

    Returns
    -------
    Tensor
        float32, (heads, nlist, d).

    Notes
    -----
    An empty part is refilled with a row drawn by its error, so that crowded regions get it.

    Examples
    --------
    >>> x = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
    >>> kmeans(x, 2).sort(dim=1).values.squeeze()
    tensor([0.0500, 5.0500])
    """
    draws = torch.Generator().manual_seed(seed)
    if start is None:
        first = torch.randperm(x.shape[1], generator=draws)[:nlist].to(x.device)
        start = x[:, first]
    centroids = start.float()
    norms = _norms(x, metric)
    for iteration in track(range(niter), "k-means", show=show):
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=-1)
        labels, scores = assign(x, *assignment_form(centroids, metric, spherical=spherical))
        sums, counts = segment_sums(x, labels, nlist)
        filled = counts > 0
        centroids = torch.where(filled[..., None], sums / counts.clamp(min=1)[..., None], centroids)
        if not bool(filled.all()):
            error = norms.sqrt() - scores if spherical else norms - 2 * scores
            _refill(centroids, filled, x, error, seed + iteration + 1)
    return torch.nn.functional.normalize(centroids, dim=-1) if spherical else centroids


def _norms(x: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """``x^T M x`` of each row, (heads, n)."""
    out = torch.empty(x.shape[:2], device=x.device)
    for start in range(0, x.shape[1], 65536):
        rows = x[:, start : start + 65536].float()
        out[:, start : start + 65536] = ((rows if metric is None else rows @ metric) * rows).sum(dim=-1)
    return out


def _refill(
    centroids: torch.Tensor, filled: torch.Tensor, x: torch.Tensor, error: torch.Tensor, seed: int
) -> None:
    """Put into the empty parts rows that are drawn by their error; the draws of each head start alike."""
    for head in (~filled).any(dim=1).nonzero()[:, 0].tolist():
        empty = ~filled[head]
        chances = error[head].clamp(min=0).double().cpu()
        if not float(chances.sum()) > 0:
            chances = torch.ones_like(chances)
        draws = torch.Generator().manual_seed(seed)
        # By the inverse of the cumulated error: torch.multinomial takes at most 2^24 rows.
        total = chances.cumsum(0)
        at = torch.rand(int(empty.sum()), generator=draws, dtype=torch.float64) * total[-1]
        rows = torch.searchsorted(total, at, right=True).clamp(max=len(total) - 1)
        centroids[head, empty] = x[head, rows.to(x.device)].float()
