"""Which request of a paged runtime each row of a step is, told by the pages that it has.

A step of vLLM gives an attention backend tables of blocks and lengths, but no names. Requests are told apart
by what they hold: a row goes on with the sequence whose blocks its own begin with. Blocks that a step writes
to are lost to every other sequence that was in them, so what is known is never stale.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention import SlotIndex

__all__ = ["Requests", "Row", "Step", "follow"]


@dataclass(frozen=True, eq=False)
class Row:
    """A request in a step.

    Attributes
    ----------
    name
        Of its sequence.
    slots
        int64, (n,), of all its tokens, those of this step among them.
    parent, shared
        A sequence that has the first `shared` tokens too; -1 for none.
    """

    name: int
    slots: NDArray[np.int64]
    parent: int = -1
    shared: int = 0


@dataclass(frozen=True, eq=False)
class Step:
    """The requests of a step, and how many tokens of each sequence are good after it."""

    rows: tuple[Row, ...]
    alive: dict[Hashable, int]


@dataclass(eq=False)
class _Known:
    blocks: NDArray[np.int64]
    length: int
    seen: int


@dataclass(eq=False)
class Requests:
    """The sequences of a runtime, as far as its steps have shown them.

    Parameters
    ----------
    block_size
        Tokens of a block.
    idle
        Sequences that are kept though the last step did not have them: they may come back, or share what they
        begin with.
    """

    block_size: int
    idle: int = 4
    _known: dict[int, _Known] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)
    _steps: int = field(default=0, init=False)

    def step(self, blocks: NDArray[Any], lengths: NDArray[Any], new: NDArray[Any]) -> Step:
        """Recognise the rows of a step.

        Parameters
        ----------
        blocks
            int, (rows, most): blocks of each request in order.
        lengths, new
            int, (rows,): tokens that each has after the step, and how many of them the step computes.
        """
        self._steps += 1
        rows: list[Row] = []
        before = dict(self._known)
        for table, n, m in zip(blocks, lengths.tolist(), new.tolist(), strict=True):
            own = np.array(table[: -(-n // self.block_size)], np.int64)
            at = np.arange(n)
            slots = own[at // self.block_size] * self.block_size + at % self.block_size
            rows.append(self._row(own, slots, n - m, before, {row.name for row in rows}))
        for row, n, m in zip(rows, lengths.tolist(), new.tolist(), strict=True):
            if m:
                self._overwrite(row, n - m)
        self._drop()
        return Step(tuple(rows), {name: known.length for name, known in self._known.items()})

    def _row(
        self,
        own: NDArray[np.int64],
        slots: NDArray[np.int64],
        computed: int,
        before: dict[int, _Known],
        taken: set[int],
    ) -> Row:
        """Return the row of a request of which `computed` tokens are in the cache already."""
        best, shared = -1, 0
        for name, known in before.items():
            common = self._common(own, known, computed)
            if common == known.length == computed and name not in taken:
                self._known[name] = _Known(own, len(slots), self._steps)
                return Row(name, slots)
            if common > shared:
                best, shared = name, common
        self._count += 1
        self._known[self._count] = _Known(own, len(slots), self._steps)
        return Row(self._count, slots, best, shared)

    def _common(self, own: NDArray[np.int64], known: _Known, computed: int) -> int:
        """Tokens that a request has in common with a sequence, all computed."""
        most = min(len(own), len(known.blocks))
        differ = np.flatnonzero(own[:most] != known.blocks[:most])
        same = int(differ[0]) if len(differ) else most
        return min(same * self.block_size, known.length, computed)

    def _overwrite(self, row: Row, computed: int) -> None:
        """Cut sequences that the step does not have where they were in what `row` writes to.

        Those that it does have may share a block that is filled in this very step.
        """
        written = row.slots[computed:]
        first = int(written[0] % self.block_size)
        touched = np.unique(written // self.block_size)
        for known in self._known.values():
            if known.seen == self._steps:
                continue
            hit = np.flatnonzero(np.isin(known.blocks, touched))
            if len(hit):
                # Only the first block that is written to may hold older tokens, of those who share it.
                begins = first if known.blocks[hit[0]] == written[0] // self.block_size else 0
                known.length = min(known.length, int(hit[0]) * self.block_size + begins)

    def _drop(self) -> None:
        idle = sorted((k.seen, name) for name, k in self._known.items() if k.seen < self._steps)
        gone = {name for _, name in idle[: max(0, len(idle) - self.idle)]}
        gone |= {name for name, k in self._known.items() if not k.length}
        self._known = {name: known for name, known in self._known.items() if name not in gone}


def follow(index: SlotIndex, step: Step) -> None:
    """Bring an index to where it is after a step, whose keys and values are in the cache."""
    for row in step.rows:
        if row.name not in index and row.parent in index:
            index.fork(row.parent, row.name)
            index.truncate(row.name, min(row.shared, index.length(row.name)))
    for name in index.names:
        if name not in step.alive:
            index.free(name)
        elif step.alive[name] < index.length(name):
            index.truncate(name, step.alive[name])
    new = {}
    for row in step.rows:
        there = index.length(row.name) if row.name in index else 0
        if there < len(row.slots):
            new[row.name] = row.slots[there:]
    index.extend(new)
