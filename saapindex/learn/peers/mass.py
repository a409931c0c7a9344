"""Attention mass per list on any device: what a classifier of queries is trained on."""

from __future__ import annotations

import torch

from saapindex.learn.peers.base import Context, Queries

__all__ = ["list_mass"]

# Logits that are held at once, in floats.
_HELD = 2**25


@torch.no_grad()
def list_mass(
    context: Context, queries: Queries, labels: torch.Tensor, nlist: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of each query's long-range attention that falls on each list.

    Parameters
    ----------
    context
        Keys of a sequence.
    queries
        (g, m, d), anywhere in the sequence; one at `p` sees the keys below ``p - context.window``.
    labels
        int64, (n,): the list of each key.
    nlist
        Number of lists.

    Returns
    -------
    mass : float32, (g, m, nlist)
        Rows sum to 1, or to 0 where a query sees no key.
    seen : int64, (m,)
        Keys that each query sees.

    Examples
    --------
    >>> keys = torch.zeros(4, 2)
    >>> context = Context(keys, keys, torch.arange(4), None, 1.0, window=1)
    >>> queries = Queries(torch.ones(1, 1, 2), torch.tensor([4]))
    >>> list_mass(context, queries, torch.tensor([0, 0, 1, 1]), 2)
    (tensor([[[0.6667, 0.3333]]]), tensor([3]))
    """
    g, m, _ = queries.x.shape
    seen = torch.searchsorted(context.positions, (queries.positions - context.window).contiguous())
    ids = torch.arange(len(context.keys), device=context.keys.device)
    mass = torch.zeros(g, m, nlist, device=context.keys.device)
    step = max(1, _HELD // (g * len(context.keys)))
    for start in range(0, m, step):
        rows = slice(start, start + step)
        logits = (queries.x[:, rows] @ context.keys.T) * context.scale
        logits.masked_fill_(ids >= seen[rows, None], -torch.inf)
        weights = torch.softmax(logits, -1).nan_to_num_(0.0)
        mass[:, rows] = mass[:, rows].index_add_(2, labels, weights)
    return mass, seen
