"""Attention mass per list, of all heads at once: what routers are trained on and measured by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saapindex.learn.contexts import Context, Snapshot
from saapindex.learn.kmeans import segment_sums

__all__ = ["RouterData", "list_masses", "list_means"]

# Logits held at once, in elements: 8 GiB with their softmax on a GPU, 64 MiB on a CPU.
_LOGITS_CUDA, _LOGITS_CPU = 1 << 30, 1 << 23


@dataclass(frozen=True)
class RouterData:
    """What routers see and should say: `r` queries of a query head, `s` snapshots of the lists.

    Attributes
    ----------
    features
        float32, (kv_heads, group, r, d): queries in the view of their head.
    mass
        (kv_heads, group, r, nlist): share of the long-range attention that falls on each list; rows sum to 1.
    means
        (kv_heads, group, r, nlist): the logit of each list's mean key, what the `mean` router says.
    log_sizes
        float32, (kv_heads, s, nlist): logarithm of the keys in each list, minus infinity for none.
    snapshot
        int64, (r,): which snapshot a query sees.
    """

    features: torch.Tensor
    mass: torch.Tensor
    means: torch.Tensor
    log_sizes: torch.Tensor
    snapshot: torch.Tensor

    @classmethod
    def without_means(
        cls, features: torch.Tensor, mass: torch.Tensor, log_sizes: torch.Tensor, snapshot: torch.Tensor
    ) -> RouterData:
        """Return data for routers that do not build on the `mean` router."""
        return cls(features, mass, mass.new_zeros(()).expand(mass.shape), log_sizes, snapshot)

    @classmethod
    def cat(cls, parts: Sequence[RouterData]) -> RouterData:
        """Join several contexts into one set."""
        first, shift = [], 0
        for part in parts:
            first.append(part.snapshot + shift)
            shift += part.log_sizes.shape[1]
        return cls(
            torch.cat([part.features for part in parts], dim=2),
            torch.cat([part.mass for part in parts], dim=2),
            torch.cat([part.means for part in parts], dim=2),
            torch.cat([part.log_sizes for part in parts], dim=1),
            torch.cat(first),
        )

    @property
    def rows(self) -> int:
        """Queries of each query head."""
        return int(self.features.shape[2])

    def mean_scores(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return what the `mean` router says of some queries, float32."""
        return self.means[:, :, rows].float()

    def true_scores(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return what a router that knew the masses would say: the logarithm of the mass per key."""
        return self.mass[:, :, rows].float().clamp(min=1e-30).log() - self.priors(rows).clamp(min=0)

    def priors(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return the log sizes that some queries see, (kv_heads, 1, rows, nlist)."""
        return self.log_sizes[:, self.snapshot[rows]][:, None]


def list_masses(
    context: Context,
    moments: Sequence[Snapshot],
    partitions: Sequence[tuple[torch.Tensor, int]],
    *,
    scale: float,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Return the share of the long-range attention of each query that falls on each list.

    One pass over the logits serves several partitions. On a GPU the logits are formed in TF32 and summed by
    list in bfloat16 (an error of some thousandths of a mass, and no bias); on a CPU all is float32.

    Parameters
    ----------
    context
        `n` keys, whose logits with the queries are formed.
    moments
        Which keys are in the lists for which queries: `saapindex.learn.contexts.snapshots`.
    partitions
        For each partition the list of every key, int64 (kv_heads, n), and the number of lists.
    scale, softcap
        Of the logits.
    dtype
        Of the result.

    Returns
    -------
    list of Tensor
        For each partition (kv_heads, group, r, nlist), the `r` queries of all `moments`, in their order.

    Examples
    --------
    >>> at = torch.arange(4)
    >>> context = Context("a", torch.ones(1, 4, 2), torch.ones(1, 1, 4, 2), at, at)
    >>> labels = torch.tensor([[0, 0, 0, 1]])
    >>> list_masses(context, [Snapshot(4, 3, 4)], [(labels, 2)], scale=1.0)
    [tensor([[[[0.7500, 0.2500]]]])]
    """
    first, last = moments[0].first, moments[-1].last
    heads, group, device = context.kv_heads, context.group_size, context.keys.device
    out = [
        torch.empty((heads, group, last - first, nlist), dtype=dtype, device=device)
        for _, nlist in partitions
    ]
    weight_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit = _LOGITS_CUDA if device.type == "cuda" else _LOGITS_CPU
    for moment in moments:
        n, count = moment.n_keys, moment.last - moment.first
        together = max(1, min(heads, limit // (group * count * n)))
        step = max(1, min(count, limit // (together * group * n)))
        for top in range(0, heads, together):
            part = slice(top, top + together)
            keys = context.keys[part, :n].float().mT
            members = [_membership(labels[part, :n], nlist, weight_dtype) for labels, nlist in partitions]
            for start in range(moment.first, moment.last, step):
                stop = min(start + step, moment.last)
                queries = context.queries[part, :, start:stop].float() * scale
                with _tf32():
                    logits = queries.reshape(len(queries), -1, context.d) @ keys
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = torch.softmax(logits, dim=-1).to(weight_dtype)
                del logits
                for result, member in zip(out, members, strict=True):
                    mass = (weights @ member).float()
                    mass /= mass.sum(dim=-1, keepdim=True)
                    result[part, :, start - first : stop - first] = mass.view(
                        len(queries), group, stop - start, -1
                    )
    return out


def _membership(labels: torch.Tensor, nlist: int, dtype: torch.dtype) -> torch.Tensor:
    """Which key is in which list, as 0 and 1, (heads, n, nlist)."""
    member = torch.zeros((*labels.shape, nlist), dtype=dtype, device=labels.device)
    return member.scatter_(2, labels[..., None], 1.0)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Let a GPU round the factors of float32 products to TF32; the caller's setting is put back."""
    module: Any = torch.backends.cuda.matmul
    # torch 2.9 renamed the setting, and warns of the old name.
    name, value = ("fp32_precision", "tf32") if hasattr(module, "fp32_precision") else ("allow_tf32", True)
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def list_means(
    x: torch.Tensor, labels: torch.Tensor, nlist: int, moments: Sequence[Snapshot]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the keys in each list at each moment, and their number.

    Parameters
    ----------
    x
        float32, (kv_heads, n, d): keys in the view.
    labels
        int64, (kv_heads, n).
    nlist
        Number of lists.
    moments
        Rising in their keys.

    Returns
    -------
    means : float32 (kv_heads, moments, nlist, d), zero where a list is empty
    sizes : float32 (kv_heads, moments, nlist)

    Examples
    --------
    >>> x, labels = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 1]])
    >>> means, sizes = list_means(x, labels, 2, [Snapshot(1, 0, 1), Snapshot(3, 1, 2)])
    >>> means.squeeze().tolist(), sizes.tolist()
    ([[1.0, 0.0], [2.0, 5.0]], [[[1.0, 0.0], [2.0, 1.0]]])
    """
    heads, _, d = x.shape
    means = torch.zeros((heads, len(moments), nlist, d), device=x.device)
    sizes = torch.zeros((heads, len(moments), nlist), device=x.device)
    sums, counts, done = torch.zeros_like(means[:, 0]), torch.zeros_like(sizes[:, 0]), 0
    for i, moment in enumerate(moments):
        if moment.n_keys > done:
            part = slice(done, moment.n_keys)
            more, number = segment_sums(x[:, part], labels[:, part], nlist)
            sums, counts, done = sums + more, counts + number, moment.n_keys
        means[:, i], sizes[:, i] = sums / counts.clamp(min=1)[..., None], counts
    return means, sizes
