"""Rotary position embedding on a device."""

from __future__ import annotations

import math

import numpy as np

from saapindex.backends.base import Floats, Ints
from saapindex.backends.cuda.launch import element, on_device, rows
from saapindex.backends.cuda.module import kernel
from saapindex.backends.reference.rope import rotate as rotate_reference
from saapindex.devices import get_cupy

__all__ = ["rotate"]

_THREADS = 256


@on_device
def _rotate(x: Floats, positions: Ints, frequencies: Floats, scale: Floats, interleaved: bool) -> Floats:
    cupy = get_cupy()
    x = rows(x)
    n, d = x.shape
    pairs = len(frequencies)
    out: Floats = cupy.empty((n, d), x.dtype)
    stride = x.strides[0] // x.itemsize
    # Two pairs at once where every place of one is aligned for both.
    even = not any(size % 2 for size in (d, pairs, stride, x.data.ptr // 2))  # type: ignore[attr-defined]
    together = 2 if x.itemsize == 2 and even and not interleaved else 1
    threads = n * (d - pairs) // together
    if threads:
        kernel("rope", "rotate", ELEMENT=element(x), PAIRS=together)(
            (-(-threads // _THREADS),),
            (_THREADS,),
            (
                x,
                np.int64(stride),
                cupy.ascontiguousarray(positions, np.int64),
                cupy.ascontiguousarray(frequencies, np.float64) / math.pi,
                cupy.ascontiguousarray(scale, np.float64),
                out,
                np.int64(n),
                np.int32(d),
                np.int32(pairs),
                np.int32(interleaved),
            ),
        )
    return out


def rotate(x: Floats, positions: Ints, frequencies: Floats, scale: Floats, interleaved: bool) -> Floats:
    """Rotate pair `i` of each row by ``position * frequencies[i]``, times ``scale[i]``: see `Ops.rotate`.

    float16 and bfloat16 (as uint16) come back as they are; float64 is computed as the reference does.
    """
    if isinstance(x, np.ndarray) and x.dtype == np.float64:
        return rotate_reference(x, positions, frequencies, scale, interleaved)
    return _rotate(x, positions, frequencies, scale, interleaved)
