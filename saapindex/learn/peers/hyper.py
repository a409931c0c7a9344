"""HyperAttention: the keys beside the query in one sorted hash table, and a uniform sample of the others."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.lsh import hash_codes
from saapindex.learn.peers.select import affordable, best
from saapindex.params import check_integer

__all__ = ["HyperAttention"]

_BOUNDS = 8  # bytes of a bucket's bounds


class HyperAttention(Peer):
    """HyperAttention (Han et al., *HyperAttention: Long-context Attention in Near-Linear Time*, arXiv
    2310.05869, section 3).

    Keys are sorted by an angular hash of `bits` hyperplanes whose buckets are numbered so that neighbours
    differ in one bit (sortLSH). A query attends to the block of sorted keys around its own bucket, and to
    keys drawn uniformly from the rest, each of which stands for as many as were passed over for it. The
    paper speeds up prefill, where equal blocks of sorted queries and keys meet; a single query takes the
    block around its bucket's middle. A group takes the keys nearest to the bucket of any of its heads. As
    in the authors' code, all queries share one sample, of which the keys in the block are not read again.

    Reads: the bounds of one bucket, 8 bytes a head; keys and values of the blocks and of the sample.

    Parameters
    ----------
    bits
        Hyperplanes; 7 for the authors.
    sample
        Share of the keys read that is drawn uniformly; half for the authors (256 of each).
    seed
        Of the hyperplanes and the sample.
    """

    name: ClassVar[str] = "HyperAttention"
    source: ClassVar[str] = "arXiv 2310.05869"

    def __init__(self, bits: int = 7, sample: float = 0.5, seed: int = 0) -> None:
        check_integer("bits", bits, 1)
        self.bits, self.sample, self.seed = bits, sample, seed

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the authors' 7 bits and half, and blocks with a smaller sample."""
        return [{"bits": bits, "sample": share} for share in (0.5, 0.2) for bits in (7, 10)]

    def build(self, context: Context) -> None:
        """Hash and sort the keys."""
        super().build(context)
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(1, context.keys.shape[1], self.bits, generator=generator)
        self._planes = planes.to(context.keys.device)
        buckets = self._bucket(context.keys)
        order = buckets.argsort(stable=True)
        self._ranks = torch.empty(len(order), device=order.device)  # float32 holds any rank exactly
        self._ranks[order] = torch.arange(len(order), device=order.device).float()
        self._lots = torch.randperm(len(order), generator=generator).to(order.device)
        ends = torch.bincount(buckets, minlength=2**self.bits).cumsum(0)
        self._middles = (torch.cat([ends.new_zeros(1), ends[:-1]]) + ends - 1) / 2

    def _bucket(self, x: torch.Tensor) -> torch.Tensor:
        """Place of each row's bucket, so that neighbours differ in one bit: the inverse of the Gray code."""
        place = hash_codes(x, self._planes)[0]
        for shift in (8, 4, 2, 1):
            place = place ^ (place >> shift)
        return place

    def read(self, queries: Queries, budget: float) -> Read:
        """Read the block around the query's bucket, and a sample."""
        context = self.context
        n = len(context.keys)
        count = min(affordable(budget - len(queries.x) * _BOUNDS, context.row), n)
        drawn = round(self.sample * count)
        middles = self._middles[self._bucket(queries.x)][..., None]
        away = functools.reduce(torch.minimum, [(self._ranks - middle).abs() for middle in middles])
        block = best(-away, count - drawn)
        extra = (self._lots < drawn) & ~block
        rest, taken = (~block).sum(1, keepdim=True), extra.sum(1, keepdim=True).clamp(min=1)
        # Fetched keys weigh 1 already; what they stand for beyond that goes to the remainder.
        missing = (rest / taken - 1).clamp(min=0).log()
        logits = (queries.x @ context.keys.T) * context.scale
        weights = (logits + missing).masked_fill(~extra, -torch.inf)
        keys = block | extra
        return Read(
            keys, len(queries.x) * _BOUNDS + keys.sum(1).float() * context.row, weights, context.values
        )
