"""The operations in numba: compiled once and cached, on all cores, in float32."""

from __future__ import annotations

from saapindex.backends.cpu.assign import accumulate, assign
from saapindex.backends.cpu.coded import range_scan_coded, scan_coded
from saapindex.backends.cpu.rescore import rescore
from saapindex.backends.cpu.rope import rotate
from saapindex.backends.cpu.route import route
from saapindex.backends.cpu.scan import range_scan, scan
from saapindex.backends.cpu.search import search
from saapindex.backends.reference import ReferenceOps

__all__ = ["CpuOps"]


class CpuOps(ReferenceOps):
    """Numba, float32, all cores."""

    name = "cpu"
    rotate = staticmethod(rotate)
    assign = staticmethod(assign)
    accumulate = staticmethod(accumulate)
    route = staticmethod(route)
    scan = staticmethod(scan)
    range_scan = staticmethod(range_scan)
    scan_coded = staticmethod(scan_coded)
    range_scan_coded = staticmethod(range_scan_coded)
    rescore = staticmethod(rescore)
    search = staticmethod(search)
