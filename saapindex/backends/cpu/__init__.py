"""The operations in numba: compiled once and cached, on all cores, in float32."""

from __future__ import annotations

from saapindex.backends.cpu.assign import accumulate, assign
from saapindex.backends.cpu.attend import attend_rows, estimate_rest, merge
from saapindex.backends.cpu.coded import range_scan_coded, scan_coded
from saapindex.backends.cpu.codes import encode, scan_codes
from saapindex.backends.cpu.helpers import announce_job
from saapindex.backends.cpu.rescore import rescore
from saapindex.backends.cpu.rope import rotate
from saapindex.backends.cpu.route import route
from saapindex.backends.cpu.scan import range_scan, scan
from saapindex.backends.cpu.search import prepare, search
from saapindex.backends.cpu.select import rank_lists, select_keys, select_lists
from saapindex.backends.cpu.step import attend_all, attend_lists, attend_slots
from saapindex.backends.cpu.widen import as_floats
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
    prepare = staticmethod(prepare)
    encode = staticmethod(encode)
    rank_lists = staticmethod(rank_lists)
    select_lists = staticmethod(select_lists)
    scan_codes = staticmethod(scan_codes)
    select_keys = staticmethod(select_keys)
    attend_rows = staticmethod(attend_rows)
    estimate_rest = staticmethod(estimate_rest)
    merge = staticmethod(merge)
    announce_step = staticmethod(announce_job)
    as_floats = staticmethod(as_floats)
    attend_all = staticmethod(attend_all)
    attend_lists = staticmethod(attend_lists)
    attend_slots = staticmethod(attend_slots)
