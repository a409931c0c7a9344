"""Contexts: one layer over one sequence, as tensors on the device of the training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.trace import Trace

__all__ = ["Context", "Snapshot", "snapshots"]

# Queries that see less than this share of the context are left out: their lists are nearly empty.
_LEAST_SEEN = 1 / 16


class Snapshot(NamedTuple):
    """What is in the lists at one moment, and the queries of that moment.

    Attributes
    ----------
    n_keys
        The first so many keys of the context are in the lists.
    first, last
        Rows ``first : last`` of the context's queries ask.
    """

    n_keys: int
    first: int
    last: int


@dataclass(frozen=True)
class Context:
    """Keys and queries of one layer over one sequence.

    Attributes
    ----------
    name
        Of the sequence.
    keys, values
        Floats, (kv_heads, n, d), in order of position, without the sinks; keys as cached, values or None.
    queries
        Floats, (kv_heads, group_size, m, d), in order of position.
    key_positions, query_positions
        int64, (n,) and (m,), rising.
    sinks
        Keys and values of the sinks, (kv_heads, s, d) each, or None.

    Raises
    ------
    InvalidInputError
        If a shape is wrong or positions do not rise.
    """

    name: str
    keys: torch.Tensor
    queries: torch.Tensor
    key_positions: torch.Tensor
    query_positions: torch.Tensor
    values: torch.Tensor | None = None
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        heads, n, d = self.keys.shape
        m = len(self.query_positions)
        if self.queries.dim() != 4 or self.queries.shape[0] != heads or self.queries.shape[2:] != (m, d):
            raise InvalidInputError(
                f"{self.name}: queries have shape {tuple(self.queries.shape)}, "
                f"expected ({heads}, group, {m}, {d})"
            )
        if len(self.key_positions) != n:
            raise InvalidInputError(f"{self.name}: {len(self.key_positions)} positions for {n} keys")
        for positions in (self.key_positions, self.query_positions):
            if bool((positions.diff() < 0).any()):
                raise InvalidInputError(f"{self.name}: positions fall, expected them in rising order")

    @classmethod
    def of(
        cls,
        trace: Trace,
        name: str,
        *,
        sinks: int = 1,
        max_queries: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Context:
        """Put a trace on the device, in order of position.

        Parameters
        ----------
        trace
            Of one layer over one sequence.
        name
            Of the sequence.
        sinks
            Keys at positions below this are kept apart: they are always attended and never in a list.
        max_queries
            Query positions to keep, spread evenly; None for all.
        device
            Where the tensors go.
        """
        keys = np.argsort(trace.key_positions, kind="stable")
        first, keys = np.split(keys, [int((trace.key_positions < sinks).sum())])
        rows = np.argsort(trace.query_positions, kind="stable")
        heads = trace.keys.shape[0]
        grouped = trace.queries.reshape(heads, trace.group_size, -1, trace.d)

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        context = cls(
            name,
            tensor(trace.keys[:, keys]),
            tensor(grouped[:, :, rows]),
            tensor(trace.key_positions[keys]),
            tensor(trace.query_positions[rows]),
            tensor(trace.values[:, keys]),
            (tensor(trace.keys[:, first]), tensor(trace.values[:, first])),
        )
        return context if max_queries is None else context.thinned(max_queries)

    @classmethod
    def stack(cls, parts: Sequence[Context]) -> Context:
        """Return the heads of several layers over one sequence as one context.

        Raises
        ------
        InvalidInputError
            If their positions differ.
        """
        first = parts[0]
        for part in parts[1:]:
            same = torch.equal(part.key_positions, first.key_positions)
            if not (same and torch.equal(part.query_positions, first.query_positions)):
                raise InvalidInputError(
                    f"{first.name}: the layers have different positions, expected the same: train them with "
                    "layers_together=1"
                )
        if len(parts) == 1:
            return first
        values = [part.values for part in parts if part.values is not None]
        sinks = [part.sinks for part in parts if part.sinks is not None]
        keys_of_sinks, values_of_sinks = zip(*sinks, strict=True) if len(sinks) == len(parts) else ((), ())
        return replace(
            first,
            keys=torch.cat([part.keys for part in parts]),
            queries=torch.cat([part.queries for part in parts]),
            values=torch.cat(values) if len(values) == len(parts) else None,
            sinks=(torch.cat(keys_of_sinks), torch.cat(values_of_sinks)) if keys_of_sinks else None,
        )

    def thinned(self, max_queries: int) -> Context:
        """Return the context with at most so many query positions, spread evenly."""
        m = len(self.query_positions)
        if m <= max_queries:
            return self
        rows = torch.linspace(0, m - 1, max_queries).round().long().to(self.keys.device)
        return replace(self, queries=self.queries[:, :, rows], query_positions=self.query_positions[rows])

    @property
    def d(self) -> int:
        """Size of a head."""
        return int(self.keys.shape[2])

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return int(self.keys.shape[0])

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return int(self.queries.shape[1])


def snapshots(context: Context, *, window: int, count: int) -> list[Snapshot]:
    """Cut the queries of a context into `count` runs that see the same keys.

    A key is in a list once it lies more than `window` positions before the first query of the run, as at
    inference, where keys leave the window in batches: what lies between is attended anyway.

    Examples
    --------
    >>> zeros, at = torch.zeros(1, 8, 2), torch.arange(8)
    >>> context = Context("a", zeros, zeros[:, None], at, at)
    >>> snapshots(context, window=2, count=2)
    [Snapshot(n_keys=1, first=3, last=6), Snapshot(n_keys=4, first=6, last=8)]
    """
    seen = torch.searchsorted(context.key_positions, context.query_positions - window)
    least = max(1, int(_LEAST_SEEN * context.keys.shape[1]))
    first = int((seen < least).sum())
    edges = np.linspace(first, len(seen), count + 1).round().astype(int).tolist()
    return [Snapshot(int(seen[a]), a, b) for a, b in itertools.pairwise(edges) if b > a]
