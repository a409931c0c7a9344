"""A look at a small code of every key first, in place of choosing lists: what was tried for needles.

`TwoLooks` reads the first words of the codes of many keys, the other words of the best of these, and fetches
the best. It is simulated by ``bench/generate.py --at looks=0.05,first=1,second=0.3``, see `PeerMethod`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from saapindex.attention.limits import MATRIX_EXTRA
from saapindex.learn.peers.base import Context, Queries, Read
from saapindex.learn.peers.ladder import Ladder
from saapindex.learn.peers.select import best, fill

__all__ = ["TwoLooks"]


class TwoLooks(Ladder):
    """`Ladder` with two looks at the codes, and without slopes, which would need all words of every key.

    Parameters
    ----------
    first
        Words of the first look; as many as there are for one look.
    second
        Share of the bytes left after the first look that goes to the other words.
    scan_share
        Share of the bytes left after statistics that goes to the first look; it ends with the last key.
    any_head
        Rank a key by its best place in any head of the group, not by the sum of its weights.
    exact
        Rank keys by their logits, as if codes were perfect.
    """

    name: ClassVar[str] = "looks"

    def __init__(
        self,
        first: int = 1,
        second: float = 0.3,
        scan_share: float = 0.8,
        any_head: bool = False,
        exact: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(scan_share=scan_share, slopes=False, **settings)
        self.first, self.second, self.any_head, self.exact = first, second, any_head, exact

    def build(self, context: Context) -> None:
        """Assign the keys of the context, and code them."""
        super().build(context)
        assert self._learned is not None
        widths = self._learned(len(context.keys)).code.widths[0]
        words = np.repeat(np.arange(len(widths)), 32 // widths)[: len(self._code.step)]
        self._seen_first = torch.from_numpy(words < self.first).to(context.keys.device)
        self._words = len(widths)

    def reads(self, queries: Queries, budgets: Sequence[float]) -> Iterator[Read]:
        """Yield a read for each budget."""
        context, code = self.context, self._code
        scale, empty = context.scale, self._sizes == 0
        projected = queries.x @ code.inverse
        squares = scale * scale / 2 * projected**2
        means = (queries.x @ self._anchors.T) * scale
        means = means + ((squares @ code.spread)[..., None] * self._spread).clamp(max=3.0)
        counts = self._sizes.clamp(min=1).log()
        lists = (means + counts).masked_fill(empty, -torch.inf)
        total = torch.logsumexp(lists, -1, keepdim=True)
        ranked = torch.logsumexp(means - total, 0).masked_fill(empty, -torch.inf)
        fixed = float(
            len(self._anchors) * (2 * context.keys.shape[1] + 8)
            + (code.inverse.shape[0] + MATRIX_EXTRA) * code.inverse.shape[1]
        )
        one = 4 * min(self.first, self._words) + 1
        more = code.bytes - one
        coarse, fine = self._coarse(projected, queries, squares), self._estimates(projected, queries, squares)
        logits = (queries.x @ context.keys.T) * scale
        for budget in budgets:
            left = max(0.0, budget - fixed)
            visited = fill(ranked, self._sizes.double() * one, self.scan_share * left) & ~empty
            scanned = (visited * self._sizes.double()).sum(1)
            left_then = left - scanned * one
            looked = torch.zeros_like(scanned)
            seen, estimates = visited[:, self._labels], coarse
            if more:
                looked = torch.minimum((self.second * left_then / more).floor(), scanned)
                scores = self._ranks_of(logits if self.exact else coarse, total, seen)
                estimates = torch.where(best(scores, looked.long()), fine, coarse)
            keep = ((left_then - looked * more) / context.row + 1e-9).long().clamp(min=0)
            fetched = best(self._ranks_of(logits if self.exact else estimates, total, seen), keep)
            spent: Any = fixed + scanned * one + looked * more
            yield self._read(queries, projected, fetched, estimates, visited, means, counts, spent, 0)

    def _ranks_of(self, logits: torch.Tensor, total: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if not self.any_head:
            return torch.logsumexp(logits - total, 0).masked_fill(~seen, -torch.inf)
        places = logits.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True).argsort(dim=-1)
        return (-places.amin(0).float()).masked_fill(~seen, -torch.inf)

    def _coarse(self, projected: torch.Tensor, queries: Queries, squares: torch.Tensor) -> torch.Tensor:
        """Logit of every key from the first words of its code, (g, m, n), with queries in int8."""
        code, scale, first = self._code, self.context.scale, self._seen_first
        weights = projected * code.step * first * scale
        unit = weights.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        products = ((weights / unit).round() * unit @ self._levels.T).mul_(self._scales)
        products += ((queries.x @ self._anchors.T) * scale)[..., self._labels]
        left_over = torch.where(first, code.distortion, code.spread)
        return products + ((squares @ left_over)[..., None] * self._scales**2).clamp_(max=3.0)
