"""The operations on a CUDA device: CuPy RawKernels on raw pointers, on the caller's device and stream.

Arrays on a device are taken and given back without copies; NumPy arrays are copied there and back.
"""

from __future__ import annotations

from saapindex.backends.cuda.assign import accumulate, assign
from saapindex.backends.cuda.codes import encode
from saapindex.backends.cuda.rope import rotate
from saapindex.backends.cuda.route import route
from saapindex.backends.cuda.scan import range_scan, scan
from saapindex.backends.cuda.search import search
from saapindex.backends.reference import ReferenceOps

__all__ = ["CudaOps"]


class CudaOps(ReferenceOps):
    """CuPy, float32; what has no kernel here is computed as the reference does."""

    name = "cuda"
    rotate = staticmethod(rotate)
    assign = staticmethod(assign)
    accumulate = staticmethod(accumulate)
    route = staticmethod(route)
    scan = staticmethod(scan)
    range_scan = staticmethod(range_scan)
    search = staticmethod(search)
    encode = staticmethod(encode)
