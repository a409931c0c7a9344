"""The definition: each operation in short NumPy, in the precision of its inputs."""

from __future__ import annotations

from saapindex.backends.base import Ops
from saapindex.backends.reference.assign import accumulate, assign
from saapindex.backends.reference.rope import rotate
from saapindex.backends.reference.route import route
from saapindex.backends.reference.scan import range_scan, scan

__all__ = ["ReferenceOps"]


class ReferenceOps(Ops):
    """NumPy, float64-able."""

    name = "reference"
    rotate = staticmethod(rotate)
    assign = staticmethod(assign)
    accumulate = staticmethod(accumulate)
    route = staticmethod(route)
    scan = staticmethod(scan)
    range_scan = staticmethod(range_scan)
