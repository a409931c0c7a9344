"""A2ATS: keys as codes of a codebook that is trained offline in the metric of the queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.errors import InvalidInputError, NotTrainedError
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.cluster import cluster, nearest, sample
from saapindex.learn.peers.select import affordable, best, pooled
from saapindex.learn.peers.views import turn, unrotate
from saapindex.params import check_integer

__all__ = ["A2ATS"]

_KEYS_PER_WORD = 64  # more training keys than this a code word are sampled down


class A2ATS(Peer):
    """A2ATS (He et al., *A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and
    Query-Aware Vector Quantization*, arXiv 2502.12665, section 4).

    Beyond a window, positions are treated as one constant distance: keys are taken with RoPE undone, and
    queries as if they stood `distance` positions on. A codebook of 4096 words is trained by k-means on such
    keys times the Cholesky factor of ``H = E[q^T q]``, so that it minimises the error of the logits. Every
    key's code is scanned, and the keys of the largest estimated logits are attended. Each head of a group
    would select alone, and their union be read; at an equal budget a group sums the softmax of its
    estimates instead.

    Reads: ``log2(words)`` bits for each part of every key; the codebook at 2 bytes an element; keys and
    values attended. In short contexts the codebook outweighs the codes, so smaller ones are tried, and
    product quantisation (several parts, each with a codebook of its own).

    Parameters
    ----------
    words
        Words of each codebook; 4096 for the authors.
    parts
        Subspaces, of equal size; 1 for the authors.
    distance
        The constant distance; 2048 for the authors.
    seed
        Of k-means.
    """

    name: ClassVar[str] = "A2ATS"
    source: ClassVar[str] = "arXiv 2502.12665"
    offline: ClassVar[bool] = True

    def __init__(self, words: int = 4096, parts: int = 1, distance: int = 2048, seed: int = 0) -> None:
        check_integer("words", words, 2)
        check_integer("parts", parts, 1)
        check_integer("distance", distance, 0)
        self.words, self.parts, self.distance, self.seed = words, parts, distance, seed
        self._codebooks: list[torch.Tensor] | None = None

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return the authors' 4096 words, and codebooks that a short context can pay for."""
        grid = [(4096, 1), (1024, 1), (256, 2), (256, 4), (256, 8)]
        fits = [{"words": words, "parts": parts} for words, parts in grid if words <= n // 4]
        return fits or [{"words": max(2, n // 4), "parts": 1}]

    def fit(self, contexts: Sequence[Context], queries: Sequence[Queries]) -> None:
        """Learn the metric from the queries and the codebooks from the keys.

        Raises
        ------
        InvalidInputError
            If there are fewer keys than words, or the parts do not divide the dimension.
        """
        d = contexts[0].keys.shape[1]
        if d % self.parts:
            raise InvalidInputError(f"parts is {self.parts}, expected a divisor of the dimension {d}")
        q = torch.cat([self._query(some, context) for some, context in zip(queries, contexts, strict=True)])
        metric = q.double().T @ q.double()
        metric = metric * (d / metric.trace().clamp(min=1e-30))
        # The authors add 1e-6; float32 keys need somewhat more for the inverse to be accurate.
        factor = torch.linalg.cholesky(metric + 1e-4 * torch.eye(d, dtype=metric.dtype, device=metric.device))
        self._factor, self._inverse = factor.float(), torch.linalg.inv(factor).float()
        keys = torch.cat([unrotate(part.keys, part.positions, part.rope) for part in contexts])
        if len(keys) < self.words:
            raise InvalidInputError(
                f"words is {self.words}, expected at most the {len(keys)} keys to train on"
            )
        rows = sample(keys, _KEYS_PER_WORD * self.words, self.seed) @ self._factor
        self._codebooks = [
            cluster(part.contiguous(), self.words, 15, seed=self.seed) for part in rows.chunk(self.parts, 1)
        ]

    def _query(self, queries: Queries, context: Context) -> torch.Tensor:
        """Queries as if they stood at the constant distance, (g * m, d)."""
        if context.rope is None:
            return queries.x.flatten(0, 1)
        steps = self.distance - queries.positions
        return turn(queries.x, steps, context.rope, context.rope.attention_factor).flatten(0, 1)

    def build(self, context: Context) -> None:
        """Code the keys of the context."""
        if self._codebooks is None:
            raise NotTrainedError(f"{self.name} has no codebook, call fit first")
        super().build(context)
        rows = unrotate(context.keys, context.positions, context.rope) @ self._factor
        parts = zip(rows.chunk(self.parts, 1), self._codebooks, strict=True)
        self._codes = [nearest(part, codebook) for part, codebook in parts]

    def read(self, queries: Queries, budget: float) -> Read:
        """Scan all codes, and read the keys of the largest estimates."""
        context = self.context
        n, d = context.keys.shape
        g, m, _ = queries.x.shape
        q = self._query(queries, context) @ self._inverse.T
        logits = torch.zeros(g * m, n, device=q.device)
        for part, codebook, codes in zip(
            q.chunk(self.parts, 1), self._codebooks or (), self._codes, strict=True
        ):
            logits += (part @ codebook.T)[:, codes]
        fixed = n * self.parts * math.log2(self.words) / 8 + self.words * d * 2
        count = affordable(budget - fixed, context.row)
        keys = best(pooled(logits.view(g, m, n) * context.scale), count)
        return Read(keys, fixed + keys.sum(1).float() * context.row)
