"""The definition: each operation in short NumPy, in the precision of its inputs."""

from __future__ import annotations

from saapindex.backends.base import Ops
from saapindex.backends.reference.assign import accumulate, assign
from saapindex.backends.reference.attend import attend_all, attend_rows, estimate_rest, merge
from saapindex.backends.reference.coded import range_scan_coded, scan_coded
from saapindex.backends.reference.codes import encode, scan_codes
from saapindex.backends.reference.rope import rotate
from saapindex.backends.reference.route import route
from saapindex.backends.reference.scan import range_scan, rescore, scan
from saapindex.backends.reference.select import rank_lists, select_keys, select_lists

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
    scan_coded = staticmethod(scan_coded)
    range_scan_coded = staticmethod(range_scan_coded)
    rescore = staticmethod(rescore)
    encode = staticmethod(encode)
    rank_lists = staticmethod(rank_lists)
    select_lists = staticmethod(select_lists)
    scan_codes = staticmethod(scan_codes)
    select_keys = staticmethod(select_keys)
    attend_rows = staticmethod(attend_rows)
    estimate_rest = staticmethod(estimate_rest)
    merge = staticmethod(merge)
    attend_all = staticmethod(attend_all)
