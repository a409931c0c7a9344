"""The short way through `search`: queries where the index is, by `nprobe` alone, nothing to convert.

A search of one query takes a few microseconds, less than all the questions that the general way asks first.
What can be asked once for a state of the index is asked here, when the first such search comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saapindex.backends.base import Floats, Ints, Ops
from saapindex.index.state import Held
from saapindex.params import RankBy
from saapindex.partition import Router

__all__ = ["FEW", "Quick"]

FEW = 4
"""Queries up to which the short way is taken."""
_FLOAT = np.dtype(np.float32)


class Quick:
    """Short searches of one state.

    Parameters
    ----------
    held
        The state.
    ops
        The backend.
    d, nlist
        Of the index.
    l2
        Whether scores are distances.
    rank
        What ranks lists where a search does not say.

    Attributes
    ----------
    run
        See `Ops.prepare`; None where the short way is closed: another backend, codes, queries that must be
        rotated or warned of, features beside the query itself.
    """

    def __init__(self, held: Held, ops: Ops, d: int, nlist: int, l2: bool, rank: RankBy) -> None:
        self.held, self.ops, self.d, self.nlist, self.rank = held, ops, d, nlist, rank
        self.run: Callable[[Any, int, int], tuple[Floats, Ints] | None] | None = None
        self._fits: Callable[[Any, Any], bool] | None = None  # of queries on a device
        routing, partition = held.routing, held.partition
        if routing is None or partition is None or held.coder is not None:
            return
        known = partition.max_position is None or held.state.next_id < partition.max_position
        if known and not partition.view.needs_positions and type(routing.router).features is Router.features:
            self.run = ops.prepare(routing.table, routing.bias(rank), held.state.lists.view, l2)
        self._fits = getattr(self.run, "fits", None)

    def fits(self, x: Any, k: Any) -> bool:
        """Whether these queries can go the short way as they are, if they are finite.

        In the memory of the host only a few, of which the general way is slower; on a device any.
        """
        if self._fits is not None:
            return bool(self._fits(x, k))
        return (
            type(x) is np.ndarray
            and x.ndim == 2
            and x.dtype is _FLOAT
            and x.shape[1] == self.d
            and 0 < x.shape[0] < FEW
            and type(k) is int
            and k > 0
            and x.flags.c_contiguous
            and x.flags.writeable
        )

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copy of an index makes its own, of its own arrays."""

    def __reduce__(self) -> Any:
        return type(None), ()
