"""SALE: a scan of all keys in 4 bits, then the best in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.select import affordable, best, fill, pooled
from saapindex.params import check_integer

__all__ = ["SALE", "quantized"]

_SCALE = 2  # bytes of a key's scale


def quantized(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round rows to `bits` bits, symmetric, with a scale for each row, and return what they stand for.

    Examples
    --------
    >>> quantized(torch.tensor([[7.0, 0.4, -3.0]]), 4)
    tensor([[ 7.,  0., -3.]])
    """
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=1e-30)
    rounded: torch.Tensor = (x / scale).round() * scale
    return rounded


class SALE(Peer):
    """SALE (Ji et al., *SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM
    Prefilling*, arXiv 2505.24179, section 3).

    Keys less their mean and queries are quantised to 4 bits with a scale each; their products estimate
    every logit, and blocks of 32 keys that hold a large estimate are attended in full. The method is made
    for prefill, where a block of queries shares the scan; here it serves single queries, and the fixed
    threshold gives way to a budget. The mean query that the authors subtract before rounding exists in
    prefill alone and is left out. A group sums the softmax of its estimates.

    Reads: ``d / 2`` bytes and a scale of 2 bytes for every key; keys and values of the blocks taken. With d
    = 64 the scan alone is 13 % of all keys and values: at smaller budgets the method reads that, and
    fetches nothing.

    Parameters
    ----------
    block
        Keys of a block: 32 for the authors, 1 to fetch single keys.
    """

    name: ClassVar[str] = "SALE"
    source: ClassVar[str] = "arXiv 2505.24179"

    def __init__(self, block: int = 32) -> None:
        check_integer("block", block, 1)
        self.block = block

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return blocks of 32 keys (the authors') and single keys."""
        return [{"block": block} for block in (32, 1)]

    def build(self, context: Context) -> None:
        """Quantise the keys less their mean, which adds the same to all logits of a query."""
        super().build(context)
        n = len(context.keys)
        self._keys = quantized(context.keys - context.keys.mean(0), 4)
        self._labels = torch.arange(n, device=context.keys.device) // self.block
        self._costs = torch.bincount(self._labels).double() * context.row

    def read(self, queries: Queries, budget: float) -> Read:
        """Scan all codes, then read the blocks of the largest estimates."""
        context = self.context
        n, d = context.keys.shape
        scores = pooled((quantized(queries.x, 4) @ self._keys.T) * context.scale)
        fixed = float(n * (d / 2 + _SCALE))
        if self.block == 1:
            keys = best(scores, affordable(budget - fixed, context.row))
            return Read(keys, fixed + keys.sum(1).float() * context.row)
        padded = torch.nn.functional.pad(scores, (0, -n % self.block), value=-torch.inf)
        blocks = padded.view(len(scores), -1, self.block).amax(2)
        taken = fill(blocks, self._costs, budget - fixed)
        return Read(taken[:, self._labels], fixed + (taken * self._costs).sum(1).float())
