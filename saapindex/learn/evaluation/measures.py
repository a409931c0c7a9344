"""How close a method comes to dense attention, and what it reads for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.evaluation.snapshot import Snapshot
from saapindex.learn.peers.base import Peer, Queries, Read

__all__ = ["MODES", "Mode", "Record", "measure", "query_errors"]

Mode: TypeAlias = Literal["group", "per_head"]
MODES: tuple[Mode, ...] = ("group", "per_head")
"""Whether the query heads of a group select together, their bytes counted once, or each alone."""

# Logits of a group's queries over all keys that are held at once, in floats: 256 MB.
_HELD = 2**26


@dataclass(frozen=True)
class Record:
    """One method at one budget on one query head of one sequence; means over queries unless said otherwise.

    Attributes
    ----------
    method, setting
        Name of the method, and its arguments.
    mode
        ``"group"``: the heads of the group select together; ``"per_head"``: this head selects alone.
    budget
        Share of the long-range bytes that was allowed.
    sequence, layer, kv_head, q_head
        Where it was measured; `q_head` counts over the whole layer.
    keys_total, queries
        Long-range keys, and queries.
    error, error_median, error_p90
        ``||o - o_dense|| / ||o_dense||``: mean, median and 90th percentile over queries.
    mass
        Share of the long-range attention mass that lies on keys fetched in full.
    recall_10, recall_100
        Share of the 10 and 100 keys of the largest weights that were fetched in full.
    bytes, keys
        Bytes read as a share of the long-range bytes, and keys fetched as a share of the long-range keys.
    """

    method: str
    setting: str
    mode: Mode
    budget: float
    sequence: str
    layer: int
    kv_head: int
    q_head: int
    keys_total: int
    queries: int
    error: float
    error_median: float
    error_p90: float
    mass: float
    recall_10: float
    recall_100: float
    bytes: float
    keys: float


@torch.no_grad()
def measure(
    peer: Peer,
    snapshot: Snapshot,
    budgets: Sequence[float],
    *,
    modes: Iterable[Mode] = MODES,
    method: str | None = None,
    setting: str = "",
) -> list[Record]:
    """Read at each budget and compare with dense attention.

    The output is one exact log-sum-exp merge of the sinks and the recent keys, the keys fetched, and what
    the method estimates for the others.

    Parameters
    ----------
    peer
        Built on ``snapshot.context``.
    budgets
        Shares of the long-range bytes.
    modes
        Which of `MODES`.
    method, setting
        What the records say; by default the peer's name.

    Returns
    -------
    list of Record
        One for each mode, budget and query head.

    Raises
    ------
    InvalidInputError
        If a budget is not above zero, or the method returns arrays of the wrong shape.

    Notes
    -----
    Queries are taken in chunks whose logits fit into 256 MB.

    Examples
    --------
    >>> from saapindex.learn.evaluation.snapshot import Protocol, take_snapshot
    >>> from saapindex.learn.peers import PEERS
    >>> from saapindex.learn.traces import Trace
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 100, 8)).astype(np.float32)
    >>> trace = Trace(x, x, x, np.arange(100), np.arange(100))
    >>> snapshot = take_snapshot(trace, 0, Protocol(window=9, span=10))
    >>> peer = PEERS["exact"]()
    >>> peer.build(snapshot.context)
    >>> [record.bytes for record in measure(peer, snapshot, [0.25, 1.0], modes=["group"])]
    [0.25, 1.0]
    """
    for budget in budgets:
        if not budget > 0:
            raise InvalidInputError(f"budget is {budget!r}, expected a share of the bytes above 0")
    modes = list(modes)
    g, m, _ = snapshot.queries.x.shape
    n = len(snapshot.context.keys)
    total = n * snapshot.context.row
    found: dict[tuple[Mode, float, int], list[torch.Tensor]] = {}
    for rows in torch.split(torch.arange(m, device=snapshot.queries.x.device), max(1, _HELD // (g * n))):
        truth = _Truth(snapshot, rows)
        groups: Mapping[Mode, list[slice]] = {
            "group": [slice(0, g)],
            "per_head": [slice(head, head + 1) for head in range(g)],
        }
        for mode in modes:
            for heads in groups[mode]:
                queries = Queries(truth.queries.x[heads], truth.queries.positions, truth.peaks[heads])
                reads = peer.reads(queries, [budget * total for budget in budgets])
                for budget, read in zip(budgets, reads, strict=True):
                    _check(read, queries, snapshot)
                    for head, part in enumerate(truth.compare(read, heads), heads.start):
                        found.setdefault((mode, budget, head), []).append(part)
    records = []
    for mode, budget, head in itertools.product(modes, budgets, range(g)):
        part = torch.cat(found[mode, budget, head], 1).double().cpu()
        means = part.mean(1).tolist()
        records.append(
            Record(
                method=method or peer.name,
                setting=setting,
                mode=mode,
                budget=budget,
                sequence=snapshot.sequence,
                layer=snapshot.layer,
                kv_head=snapshot.head,
                q_head=snapshot.head * g + head,
                keys_total=n,
                queries=m,
                error=means[0],
                error_median=float(part[0].quantile(0.5)),
                error_p90=float(part[0].quantile(0.9)),
                mass=means[1],
                recall_10=means[2],
                recall_100=means[3],
                bytes=means[4] / total,
                keys=means[5],
            )
        )
    return records


@torch.no_grad()
def query_errors(peer: Peer, snapshot: Snapshot, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `measure` takes the mean of, and how much each query looks something up.

    Parameters
    ----------
    peer
        Built on ``snapshot.context``.
    budget
        Share of the long-range bytes.

    Returns
    -------
    errors
        float32, (g, m): ``||o - o_dense|| / ||o_dense||``.
    peaks
        float32, (g, m): of all the attention, the share of the long-range key that has the most.
    """
    g, m, _ = snapshot.queries.x.shape
    total = len(snapshot.context.keys) * snapshot.context.row
    errors, peaks = [], []
    step = max(1, _HELD // (g * len(snapshot.context.keys)))
    for rows in torch.split(torch.arange(m, device=snapshot.queries.x.device), step):
        truth = _Truth(snapshot, rows)
        read = peer.read(Queries(truth.queries.x, truth.queries.positions, truth.peaks), budget * total)
        errors.append(torch.stack([part[0] for part in truth.compare(read, slice(0, g))]))
        weights = torch.softmax(torch.stack([truth.near[0], truth.far[0]]), 0)[1]
        peaks.append(weights * truth.shares.amax(-1))
    return torch.cat(errors, 1), torch.cat(peaks, 1)


def _attend(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the last axis, and the mean of `values` by softmax: zeros where all is minus
    infinity.
    """
    total = torch.logsumexp(logits, -1)
    shift = total.masked_fill(total == -torch.inf, 0.0)
    return total, torch.exp(logits - shift[..., None]) @ values


def _merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over the union of disjoint parts."""
    weights = torch.softmax(torch.stack([total for total, _ in parts]), 0)
    return (weights[..., None] * torch.stack([mean for _, mean in parts])).sum(0)


class _Truth:
    """Dense attention of some queries, and what it is compared with."""

    def __init__(self, snapshot: Snapshot, rows: torch.Tensor) -> None:
        context, queries = snapshot.context, snapshot.queries
        self.context = context
        self.queries = Queries(queries.x[:, rows], queries.positions[rows])
        x = self.queries.x * context.scale
        near = x @ snapshot.near_keys.T
        near.masked_fill_(snapshot.near_positions > self.queries.positions[:, None], -torch.inf)
        self.peaks = near.amax(-1)
        self.near = _attend(near, snapshot.near_values)
        self.logits = x @ context.keys.T
        total = torch.logsumexp(self.logits, -1)
        self.shares = torch.exp(self.logits - total[..., None])
        self.far = total, self.shares @ context.values
        self.output = _merge([self.near, self.far])
        self.best = self.logits.topk(min(100, len(context.keys)), -1).indices

    def _fetched(self, read: Read, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the keys fetched: from the shares, unless they are too small for float32."""
        shares = self.shares[heads] * read.keys
        mass = shares.sum(-1)
        if bool(((mass < 1e-30) & read.keys.any(1)).any()):
            return _attend(self.logits[heads].masked_fill(~read.keys, -torch.inf), self.context.values)
        return mass.log() + self.far[0][heads], (shares @ self.context.values) / mass.clamp(min=1e-30)[
            ..., None
        ]

    def compare(self, read: Read, heads: slice) -> torch.Tensor:
        """Return error, mass, recall at 10 and 100, bytes and keys of each query, (heads, 6, c)."""
        fetched = self._fetched(read, heads)
        parts = [(self.near[0][heads], self.near[1][heads]), fetched]
        if read.log_weights is not None and read.values is not None:
            total, mean = _attend(read.log_weights, read.values)
            parts.append((total, mean if read.shift is None else mean + read.shift))
        dense = self.output[heads]
        error = (_merge(parts) - dense).norm(dim=-1) / dense.norm(dim=-1)
        mass = torch.exp(fetched[0] - self.far[0][heads])
        hit = torch.stack([read.keys.gather(1, ids) for ids in self.best[heads]]).float()
        shared = torch.stack([read.bytes, read.keys.float().mean(1)]).expand(len(error), 2, -1)
        each = torch.stack([error, mass, hit[..., :10].mean(-1), hit.mean(-1)], 1)
        return torch.cat([each, shared], 1)


def _check(read: Read, queries: Queries, snapshot: Snapshot) -> None:
    g, m, d = queries.x.shape
    n = len(snapshot.context.keys)
    if read.keys.shape != (m, n) or read.keys.dtype != torch.bool or read.bytes.shape != (m,):
        raise InvalidInputError(
            f"a read has keys {read.keys.dtype} of {tuple(read.keys.shape)} and bytes of "
            f"{tuple(read.bytes.shape)}, expected bool of {(m, n)} and {(m,)}"
        )
    if (read.log_weights is None) != (read.values is None):
        raise InvalidInputError("a read has log_weights or values alone, expected both or neither")
    if read.log_weights is not None and read.values is not None:
        r = len(read.values)
        if read.log_weights.shape != (g, m, r) or read.values.shape != (r, d):
            raise InvalidInputError(
                f"a read has log_weights of {tuple(read.log_weights.shape)} and values of "
                f"{tuple(read.values.shape)}, expected {(g, m, r)} and {(r, d)}"
            )
    if read.shift is not None and (read.values is None or read.shift.shape != (g, m, d)):
        raise InvalidInputError(f"a read has a shift of {tuple(read.shift.shape)}, expected {(g, m, d)}")
