"""What frames every comparison: exact top-k for free, random keys, and no long-range keys at all."""

from __future__ import annotations

from typing import ClassVar

import torch

from saapindex.learn.peers.base import Peer, Queries, Read
from saapindex.learn.peers.select import affordable, best, pooled

__all__ = ["ExactTopK", "RandomKeys", "WindowOnly"]


class ExactTopK(Peer):
    """The keys of the largest weights, found for free: no method that drops the rest can select better.

    Reads: the keys and values fetched; that all keys were scored is not counted.
    """

    name: ClassVar[str] = "exact top-k"
    source: ClassVar[str] = "the true weights, as an oracle"

    def read(self, queries: Queries, budget: float) -> Read:
        """Read the keys of the largest true weights, summed over the group."""
        context = self.context
        count = min(affordable(budget, context.row), len(context.keys))
        keys = best(pooled((queries.x @ context.keys.T) * context.scale), count)
        return Read(keys, torch.full((len(keys),), float(count * context.row), device=keys.device))


class RandomKeys(Peer):
    """Keys drawn evenly, others for each query: what a selection that knows nothing finds.

    Reads: the keys and values fetched.
    """

    name: ClassVar[str] = "random keys"
    source: ClassVar[str] = "the floor of any selection"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def read(self, queries: Queries, budget: float) -> Read:
        """Read keys at random, the same again for the same seed and queries."""
        context = self.context
        count = min(affordable(budget, context.row), len(context.keys))
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(len(queries.positions), len(context.keys), generator=generator)
        keys = best(scores.to(context.keys.device), count)
        return Read(keys, torch.full((len(keys),), float(count * context.row), device=keys.device))


class WindowOnly(Peer):
    """Sinks and the recent window alone, as StreamingLLM (Xiao et al., arXiv 2309.17453) attends.

    Reads: nothing of the long range.
    """

    name: ClassVar[str] = "window only"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    def read(self, queries: Queries, budget: float) -> Read:
        """Read nothing."""
        m, keys = len(queries.positions), self.context.keys
        none = torch.zeros(m, len(keys), dtype=torch.bool, device=keys.device)
        return Read(none, torch.zeros(m, device=keys.device))
