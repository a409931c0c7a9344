"""What is evaluated: one KV head of one sequence, frozen at one moment of decoding.

The protocol
------------
A trace has keys at positions 0 to N - 1. Queries are those at positions in the last `span`, at most
`max_queries` of them, evenly spaced. Let `first` be the position of the first. The index holds the
*long-range* keys: those at positions from `sinks` to ``first - window - 1``. It does not change while the
queries pass, as in a runtime that flushes its window in batches. Every query attends to the sinks and to
all keys from ``first - window`` up to its own position exactly, and these are not counted.

A budget is a share of the *long-range bytes*: the cached keys and values of all long-range keys of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saapindex.errors import InvalidInputError
from saapindex.learn.peers.base import Context, Queries
from saapindex.learn.traces import Trace
from saapindex.params import check_integer

__all__ = ["Protocol", "Snapshot", "take_snapshot", "training_sequence"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Numbers of the protocol.

    Attributes
    ----------
    sinks
        First positions, always attended.
    window
        Recent positions before the first query, always attended.
    span
        Queries come from this many last positions.
    max_queries
        Queries at most, evenly spaced.

    Examples
    --------
    >>> Protocol(window=1023).span
    2048
    """

    sinks: int = 1
    window: int = 2047
    span: int = 2048
    max_queries: int = 128

    def __post_init__(self) -> None:
        for name, minimum in (("sinks", 0), ("window", 0), ("span", 1), ("max_queries", 1)):
            check_integer(name, getattr(self, name), minimum)


@dataclass(frozen=True)
class Snapshot:
    """One KV head at one moment.

    Attributes
    ----------
    context
        The long-range keys.
    queries
        Of the group, (g, m, d).
    near_keys, near_values, near_positions
        Sinks and everything from the window on, (c, d), (c, d) and (c,); a query sees those at its position
        or before.
    sequence, layer, head
        Where it comes from; `head` is the KV head.
    """

    context: Context
    queries: Queries
    near_keys: torch.Tensor
    near_values: torch.Tensor
    near_positions: torch.Tensor
    sequence: str = ""
    layer: int = 0
    head: int = 0


def take_snapshot(
    trace: Trace,
    head: int,
    protocol: Protocol | None = None,
    *,
    sequence: str = "",
    device: torch.device | str = "cpu",
) -> Snapshot:
    """Freeze KV head `head` of `trace` as the protocol says.

    Raises
    ------
    InvalidInputError
        If the trace has no such head, capped logits, no query among its last positions, or no long-range key.

    Examples
    --------
    >>> import numpy as np
    >>> zeros = np.zeros((1, 100, 8), np.float32)
    >>> trace = Trace(zeros, zeros, zeros, np.arange(100), np.arange(100))
    >>> snapshot = take_snapshot(trace, 0, Protocol(window=9, span=10, max_queries=4))
    >>> snapshot.queries.positions, len(snapshot.context.keys), len(snapshot.near_keys)
    (tensor([90, 93, 96, 99]), 80, 20)
    """
    protocol = protocol or Protocol()
    row = _row(trace, head)
    end = int(trace.key_positions.max(initial=-1)) + 1
    positions = torch.from_numpy(trace.query_positions).long()
    usable = ((positions >= end - protocol.span) & (positions < end)).nonzero()[:, 0]
    if not len(usable):
        raise InvalidInputError(f"no query stands in the last {protocol.span} of {end} positions")
    if len(usable) > protocol.max_queries:
        usable = usable[torch.linspace(0, len(usable) - 1, protocol.max_queries).round().long()]
    positions = positions[usable]
    at = torch.from_numpy(trace.key_positions).long()
    far = (at >= protocol.sinks) & (at < positions.min() - protocol.window)
    if not far.any():
        raise InvalidInputError(
            f"no key lies between {protocol.sinks} sinks and the window of {protocol.window} before position "
            f"{int(positions.min())}, expected a longer trace"
        )
    group = slice(row * trace.group_size, (row + 1) * trace.group_size)
    x = torch.from_numpy(trace.queries[group][:, usable.numpy()])
    keys, values = (
        torch.from_numpy(array[row]).to(device, torch.float32) for array in (trace.keys, trace.values)
    )
    far, at = far.to(device), at.to(device)
    return Snapshot(
        _context(trace, keys[far], values[far], at[far], protocol.window),
        Queries(x.to(device, torch.float32), positions.to(device)),
        keys[~far],
        values[~far],
        at[~far],
        sequence,
        int(trace.info.get("layer", 0)),
        head,
    )


def training_sequence(
    trace: Trace, head: int, protocol: Protocol | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Context, Queries]:
    """Return all keys past the sinks of KV head `head`, and every query that sees one beyond its window.

    Raises
    ------
    InvalidInputError
        If the trace has no such head, capped logits, or no such query.

    Examples
    --------
    >>> import numpy as np
    >>> zeros = np.zeros((1, 100, 8), np.float32)
    >>> trace = Trace(zeros, zeros, zeros, np.arange(100), np.arange(100))
    >>> context, queries = training_sequence(trace, 0, Protocol(window=9))
    >>> len(context.keys), queries.positions[0]
    (99, tensor(11))
    """
    protocol = protocol or Protocol()
    row = _row(trace, head)
    at, positions = (torch.from_numpy(array).long() for array in (trace.key_positions, trace.query_positions))
    far = at >= protocol.sinks
    first = at[far].min() if far.any() else torch.tensor(2**62)
    usable = positions - protocol.window > first
    if not usable.any():
        raise InvalidInputError(
            f"no query sees a key beyond its window of {protocol.window}, expected a longer trace"
        )
    group = slice(row * trace.group_size, (row + 1) * trace.group_size)
    x = torch.from_numpy(trace.queries[group][:, usable.numpy()]).to(device, torch.float32)
    keys, values = (
        torch.from_numpy(array[row][far.numpy()]).to(device, torch.float32)
        for array in (trace.keys, trace.values)
    )
    context = _context(trace, keys, values, at[far].to(device), protocol.window)
    return context, Queries(x, positions[usable].to(device))


def _context(
    trace: Trace, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, window: int
) -> Context:
    order = positions.argsort(stable=True)
    keys, values, positions = keys[order], values[order], positions[order]
    return Context(keys, values, positions, trace.rope, trace.scale, window=window)


def _row(trace: Trace, head: int) -> int:
    """Place of KV head `head` in the arrays of a trace that can be evaluated."""
    if trace.softcap is not None:
        raise InvalidInputError(
            f"the trace's logits are capped at {trace.softcap}, expected plain softmax attention"
        )
    if head not in trace.heads:
        raise InvalidInputError(f"head is {head}, expected one of the KV heads {trace.heads} of the trace")
    return trace.heads.index(head)
