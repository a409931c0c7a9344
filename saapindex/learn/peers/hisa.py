"""HISA: blocks first, then keys by their small codes, then the best in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.learn.kmeans import segment_sums
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.scan4 import quantized
from saapindex.learn.peers.select import best, fill, pooled
from saapindex.params import check_integer

__all__ = ["HISA"]

_SCALE = 2  # bytes of a code's scale


class HISA(Peer):
    """HISA (Xu et al., *HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention*, arXiv
    2603.28458).

    The indexer's keys are mean-pooled over blocks of consecutive keys. A query ranks the blocks by their
    pooled key, scores every key of the blocks retained by its indexer key, and attends to the best keys.
    The paper speeds up the trained indexer of DeepSeek's sparse attention, whose keys have 8 bits; a model
    without one is served here by its own keys in 8 or 4 bits with a scale each, and the fixed numbers of
    blocks and keys give way to a budget. A group sums the softmax of its scores.

    Reads: the pooled keys of all blocks and the indexer keys of the blocks retained, ``d bits / 8`` bytes
    and a scale of 2 bytes each; keys and values attended.

    Parameters
    ----------
    block
        Keys of a block.
    bits
        Bits per dimension of an indexer key and of a pooled key.
    scan
        Share of the bytes left after the pooled keys that goes to indexer keys.
    """

    name: ClassVar[str] = "HISA"
    source: ClassVar[str] = "arXiv 2603.28458"

    def __init__(self, block: int = 128, bits: int = 8, scan: float = 0.5) -> None:
        check_integer("block", block, 1)
        check_integer("bits", bits, 2)
        self.block, self.bits, self.scan = block, bits, scan

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the authors' blocks of 128 keys and smaller ones, with codes of 8 and 4 bits."""
        grid = [(block, bits) for bits in (8, 4) for block in (128, 32)]
        return [{"block": block, "bits": bits} for block, bits in grid]

    def build(self, context: Context) -> None:
        """Quantise the keys and the means of the blocks."""
        super().build(context)
        n, device = len(context.keys), context.keys.device
        self._labels = torch.arange(n, device=device) // self.block
        self._sizes = torch.bincount(self._labels)
        sums = segment_sums(context.keys[None], self._labels[None], len(self._sizes))[0][0]
        means = sums / self._sizes[:, None]
        self._pooled, self._keys = quantized(means, self.bits), quantized(context.keys, self.bits)

    def read(self, queries: Queries, budget: float) -> Read:
        """Read the pooled keys, the codes of the blocks ranked first, and the keys ranked first in these."""
        context = self.context
        code = context.keys.shape[1] * self.bits / 8 + _SCALE
        fixed = len(self._sizes) * code
        left = max(0.0, budget - fixed)
        blocks = pooled((queries.x @ self._pooled.T) * context.scale)
        scanned = fill(blocks, self._sizes * code, self.scan * left)
        spent = (scanned * self._sizes).sum(1).double() * code
        logits = (queries.x @ self._keys.T) * context.scale
        scores = pooled(logits.masked_fill_(~scanned[:, self._labels], -torch.inf))
        keys = best(scores, ((left - spent) / context.row + 1e-9).long())
        return Read(keys, (fixed + spent + keys.sum(1) * context.row).float())
