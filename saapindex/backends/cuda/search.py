"""Route and scan on a device, with nothing of either coming to the host."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import Floats, Ints, Lists
from saapindex.backends.cuda.launch import on_device
from saapindex.backends.cuda.route import choose
from saapindex.backends.cuda.scan import best_of, planned, ready
from saapindex.devices import get_cupy

__all__ = ["search"]


@on_device
def search(
    features: Floats,
    queries: Floats,
    table: Floats,
    bias: Floats,
    p: int,
    lists: Lists,
    k: int,
    l2: bool,
) -> tuple[Floats, Ints]:
    """See `Ops.search`."""
    cupy = get_cupy()
    if not len(queries):
        return cupy.empty((0, k), np.float32), cupy.empty((0, k), np.int64)
    queries, lists = ready(queries, lists)
    probes, _, before, takes = choose(features, table, bias, p, lists.sizes)
    if before is None:
        before, takes = planned(lists, probes, cupy.full(len(queries), len(lists.ids)))
    return best_of(queries, lists, probes, before, takes, k, l2)
