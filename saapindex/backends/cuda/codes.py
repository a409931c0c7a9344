"""Transform codes on a device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Floats
from saapindex.backends.cuda.launch import on_device
from saapindex.backends.cuda.module import kernel
from saapindex.backends.paged import Code
from saapindex.devices import get_cupy

__all__ = ["encode"]

_ROWS = 64  # of a block of threads


@on_device
def encode(residuals: Floats, code: Code) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """See `Ops.encode`."""
    cupy = get_cupy()
    heads, n, d = residuals.shape
    coded, width = code.step.shape[1], code.widths.shape[1]
    words = cupy.empty((heads, n, width), np.uint32)
    exponents = cupy.empty((heads, n), np.uint8)
    if heads * n:
        floats = [
            cupy.ascontiguousarray(array, np.float32)
            for array in (residuals, code.forward, code.step, code.base)
        ]
        kernel("codes", "encode", COLUMNS=-(-coded // 32))(
            (-(-n // _ROWS), heads),
            (256,),
            (
                *floats[:3],
                cupy.ascontiguousarray(code.widths, np.int64),
                floats[3],
                words,
                exponents,
                *map(np.int32, (n, d, coded, width)),
            ),
        )
    return words, exponents
