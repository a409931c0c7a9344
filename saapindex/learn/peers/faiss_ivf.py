"""Faiss IVFFlat, the real one, as a method of sparse attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from saapindex.errors import NotTrainedError
from saapindex.learn.peers.base import Context, Peer, Queries, Read
from saapindex.learn.peers.coarse import CoarseName, require_faiss, train_coarse
from saapindex.learn.peers.select import affordable, fill_lists, list_ranks, pooled
from saapindex.learn.peers.views import unrotate
from saapindex.params import check_integer

__all__ = ["FaissInContext", "FaissOffline"]


class FaissOffline(Peer):
    """Faiss `IndexIVFFlat` with inner product (Douze et al., *The Faiss library*, arXiv 2401.08281, section
    5).

    Faiss trains its coarse quantiser once, on the keys of the training sequences; a context's keys are
    assigned by it, and a query visits the lists of the largest centroid scores until the budget is full,
    the last one in part. A group sums the softmax of its centroid scores. Everything but that sum and the
    cut runs in Faiss, on the CPU.

    Reads: the centroids, ``nlist`` times ``d`` elements of 4 bytes as Faiss stores them; keys and values
    visited.

    Parameters
    ----------
    nlist
        Number of lists.
    unrotated
        Whether Faiss sees keys and queries with RoPE undone. What is fetched are the cached keys always.
    quantizer
        ``"ip"``: spherical k-means, Faiss's default for inner product; ``"l2"``: plain k-means for the keys,
        queries still routed by inner product.
    centroid_element
        Bytes of an element of a centroid; 2 counts them in half precision.

    Raises
    ------
    MissingDependencyError
        Without faiss.
    """

    name: ClassVar[str] = "Faiss IVF"
    source: ClassVar[str] = "arXiv 2401.08281"
    offline: ClassVar[bool] = True

    def __init__(
        self,
        nlist: int = 1024,
        unrotated: bool = False,
        quantizer: CoarseName = "ip",
        centroid_element: int = 4,
    ) -> None:
        require_faiss()
        check_integer("nlist", nlist, 1)
        check_integer("centroid_element", centroid_element, 1)
        self.nlist, self.unrotated = nlist, unrotated
        self.quantizer, self.centroid_element = quantizer, centroid_element
        self._assigner: Any = None
        self._router: Any = None

    @classmethod
    def settings(cls, n: int) -> Sequence[Mapping[str, Any]]:
        """Return numbers of lists from Faiss's guideline (4 to 16 roots of n) down, on both views of the
        keys.
        """
        lists = [nlist for nlist in (1024, 512, 256, 128) if nlist <= n // 16] or [max(1, n // 16)]
        grid = [{"nlist": nlist, "unrotated": view} for view in (False, True) for nlist in lists]
        return [*grid, *({"nlist": nlist, "quantizer": "l2"} for nlist in lists)]

    def _seen(self, x: torch.Tensor, positions: torch.Tensor, context: Context) -> NDArray[np.float32]:
        seen = unrotate(x, positions, context.rope) if self.unrotated else x
        array: NDArray[np.float32] = seen.reshape(-1, x.shape[-1]).cpu().numpy()
        return np.ascontiguousarray(array)

    def fit(self, contexts: Sequence[Context], queries: Sequence[Queries]) -> None:
        """Train the coarse quantiser on the keys of all contexts."""
        keys = [self._seen(context.keys, context.positions, context) for context in contexts]
        self._assigner, self._router = train_coarse(np.concatenate(keys), self.nlist, self.quantizer)

    def build(self, context: Context) -> None:
        """Assign the keys to lists."""
        if self._assigner is None:
            raise NotTrainedError(f"{self.name} has no coarse quantiser, call fit first")
        super().build(context)
        labels = self._assigner.search(self._seen(context.keys, context.positions, context), 1)[1][:, 0]
        self._labels = torch.from_numpy(labels).to(context.keys.device)
        self._ranks, self._sizes = list_ranks(self._labels, self.nlist)

    def read(self, queries: Queries, budget: float) -> Read:
        """Read all centroids and the lists that Faiss ranks first."""
        context, device = self.context, self.context.keys.device
        shape = *queries.x.shape[:2], self.nlist
        found, lists = self._router.search(self._seen(queries.x, queries.positions, context), self.nlist)
        scores = torch.empty(found.shape).scatter_(1, torch.from_numpy(lists), torch.from_numpy(found))
        ranked = pooled(scores.view(shape).to(device) * context.scale)
        ranked = ranked.masked_fill(self._sizes == 0, -torch.inf)
        fixed = float(self.nlist * context.keys.shape[1] * self.centroid_element)
        count = affordable(budget - fixed, context.row)
        keys = fill_lists(ranked, self._labels, self._ranks, self._sizes, count)
        return Read(keys, fixed + keys.sum(1).float() * context.row)


class FaissInContext(FaissOffline):
    """Faiss `IndexIVFFlat` whose coarse quantiser is trained on the very keys that it then serves.

    As `FaissOffline` in all else. Training then falls into the prefill of every context.
    """

    name: ClassVar[str] = "Faiss IVF, in context"
    offline: ClassVar[bool] = False

    def build(self, context: Context) -> None:
        """Train on the keys of the context and assign them."""
        self.fit([context], [])
        super().build(context)
