"""Quest: pages of consecutive keys, ranked by an upper bound of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.select import fill, pooled
from saapindex.params import check_integer

__all__ = ["Quest"]


class Quest(Peer):
    """Quest (Tang et al., *Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference*, arXiv
    2406.10774).

    Section 3: a page holds consecutive keys and the elementwise minimum and maximum of them. The sum over
    channels of ``max(q_i min_i, q_i max_i)`` bounds every logit of the page from above; the pages of the
    largest bound are attended in full. The paper's models have no grouped heads; here a group sums the
    softmax of its bounds.

    Reads: both bounds of every page, ``2 d`` elements of the cache's own width; keys and values of the pages
    taken. A page of 16 costs 1/16 of its keys and values in bounds, so longer pages are tried too.

    Parameters
    ----------
    page
        Keys of a page; the paper uses 16.
    count_bounds
        Whether the bounds count as bytes read. False only to compare with numbers that leave them out.
    """

    name: ClassVar[str] = "Quest"
    source: ClassVar[str] = "arXiv 2406.10774"

    def __init__(self, page: int = 16, count_bounds: bool = True) -> None:
        check_integer("page", page, 1)
        self.page, self.count_bounds = page, count_bounds

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return pages of 16 keys (the paper) to 128."""
        return [{"page": page} for page in (16, 32, 64, 128)]

    def build(self, context: Context) -> None:
        """Bound the keys of each page."""
        super().build(context)
        n = len(context.keys)
        pages = -(-n // self.page)
        short = pages * self.page - n
        keys = torch.cat([context.keys, context.keys[-1:].expand(short, -1)]).view(pages, self.page, -1)
        self._low, self._high = keys.amin(1), keys.amax(1)
        self._labels = torch.arange(n, device=keys.device) // self.page
        self._costs = torch.bincount(self._labels).double() * context.row

    def read(self, queries: Queries, budget: float) -> Read:
        """Read every page's bounds and the pages of the largest bound."""
        context = self.context
        x = queries.x
        bounds = (x.clamp(min=0) @ self._high.T + x.clamp(max=0) @ self._low.T) * context.scale
        fixed = float(self._low.numel() * 2 * context.element) if self.count_bounds else 0.0
        taken = fill(pooled(bounds), self._costs, budget - fixed)
        return Read(taken[:, self._labels], fixed + (taken * self._costs).sum(1).float())
