"""RetroInfer: many small clusters in context, some fetched, some estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from saapindex.learn.kmeans import segment_sums
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.cluster import cluster, nearest
from saapindex.learn.peers.select import fill, pooled
from saapindex.params import check_integer

__all__ = ["RetroInfer"]

_COUNTER = 2  # bytes of a cluster's size, which the authors keep in half precision


class RetroInfer(Peer):
    """The wave index of RetroInfer (Chen et al., *RetroInfer: A Vector-Storage Approach for Scalable
    Long-Context LLM Inference*, arXiv 2505.02922, section 4).

    The keys less their mean are clustered by spherical k-means within segments of 8192 keys, about 16 keys
    a cluster; then every key goes to its best centroid, and a cluster keeps the mean of its keys, the sum
    of its values and its size. A query scores all clusters by its inner product with their means, summing
    the softmax of the heads of a group. The first are fetched (retrieval zone), the next are estimated by
    ``size exp(q . mean)`` with the mean value (estimation zone), the rest is left out. Initial centroids
    and steps follow the authors' code.

    Reads: all means; value sum and size of the clusters estimated; keys and values of those fetched.

    Parameters
    ----------
    cluster
        Keys of a cluster, on average; 16 in the paper.
    estimation
        Share of the bytes left after the means that goes to the estimation zone. The authors fetch 1.8 % of
        the clusters and estimate 23.2 %, which with 16 keys a cluster is 0.29.
    segment
        Keys of a segment.
    """

    name: ClassVar[str] = "RetroInfer"
    source: ClassVar[str] = "arXiv 2505.02922"

    def __init__(self, cluster: int = 16, estimation: float = 0.29, segment: int = 8192) -> None:
        check_integer("cluster", cluster, 1)
        check_integer("segment", segment, 1)
        self.cluster, self.estimation, self.segment = cluster, estimation, segment

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return clusters of 16 keys (the authors') to 128, and two sizes of the estimation zone."""
        sizes = (16, 32, 64, 128)
        return [{"cluster": size, "estimation": share} for share in (0.29, 0.1) for size in sizes]

    def build(self, context: Context) -> None:
        """Cluster the keys of the context."""
        super().build(context)
        n, device = len(context.keys), context.keys.device
        segments = max(1, round(n / self.segment))
        each = max(1, round(n / self.cluster / segments))
        keys = context.keys - context.keys.mean(0)
        starts = []
        for part in keys[: n // segments * segments].chunk(segments):
            at = ((torch.arange(each, device=device) + 0.5) * (len(part) / each)).long()
            start = part[at.clamp(max=len(part) - 1)]
            starts.append(cluster(part, each, 9, spherical=True, start=start))
        labels = nearest(keys, torch.cat(starts), spherical=True)
        # Clusters that no key chose are left out: nothing of them would ever be read.
        _, self._labels, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        self._sizes = counts.float()

        def mean(x: torch.Tensor) -> torch.Tensor:
            sums, _ = segment_sums(x[None], self._labels[None], len(counts))
            result: torch.Tensor = sums[0] / self._sizes[:, None]
            return result

        self._keys, self._values = mean(context.keys), mean(context.values)

    def read(self, queries: Queries, budget: float) -> Read:
        """Read the means, the clusters ranked first, and the statistics of the next."""
        context, element = self.context, self.context.element
        clusters, d = self._keys.shape
        fixed = float(clusters * d * element)
        left = max(0.0, budget - fixed)
        logits = (queries.x @ self._keys.T) * context.scale
        ranked = pooled(logits)
        costs = self._sizes * context.row
        statistics = float(d * element + _COUNTER)
        zone = min(self.estimation * left, clusters * statistics)
        fetched = fill(ranked, costs, left - zone)
        spent = (fetched * costs.double()).sum(1)
        # What whole clusters left over goes to the estimation zone too.
        count = ((left - spent) / statistics + 1e-9).long()
        order = ranked.masked_fill(fetched, -torch.inf).argsort(dim=1, descending=True, stable=True)
        within = torch.arange(clusters, device=order.device) < count[:, None]
        estimated = torch.zeros_like(fetched).scatter_(1, order, within) & ~fetched
        weights = (logits + self._sizes.log()).masked_fill(~estimated, -torch.inf)
        total = fixed + spent + statistics * estimated.sum(1)
        return Read(fetched[:, self._labels], total.float(), weights, self._values)
