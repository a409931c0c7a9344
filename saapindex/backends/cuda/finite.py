"""Whether arrays on a device are finite, told later: the host need not wait before it launches more."""

from __future__ import annotations

from typing import Any

import numpy as np

from saapindex.backends.cuda.launch import element, multiprocessors
from saapindex.backends.cuda.module import kernel
from saapindex.devices import get_cupy

__all__ = ["Finiteness"]

_THREADS, _AT_ONCE, _MOST = 256, 8, 8  # as in finite.cu; arrays that are looked at


class Finiteness:
    """What was found in arrays on the current device.

    Kernels write it to memory of the host, so that `bad` waits for the looks alone and not for what was
    launched after them.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._bad: Any = None
        self._looked: Any = None

    def __del__(self) -> None:
        if self._names:  # the memory goes to others
            self._looked.synchronize()

    def look(self, name: str, array: Any) -> None:
        """Launch a look at an array of float16, float32 or uint16 (bfloat16), to be called `name`."""
        cupy = get_cupy()
        if self._bad is None:
            self._bad = np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * _MOST), np.int32, _MOST)
            self._bad[:] = 0
            self._looked = cupy.cuda.Event(disable_timing=True)
        flat = _flat(array)
        if not flat.size:
            return
        pieces, blocks = flat.nbytes // 16, 8 * multiprocessors(array.device.id)
        kernel("finite", "finite", ELEMENT=element(flat))(
            (min(blocks, -(-pieces // (_THREADS * _AT_ONCE))),),
            (_THREADS,),
            (flat, np.int64(pieces), np.uint64(self._bad[len(self._names) :].ctypes.data)),
        )
        self._looked.record()
        self._names.append(name)

    def bad(self) -> list[str]:
        """Wait, and return the names of arrays that hold NaN or infinity; forget all."""
        if not self._names:
            return []
        self._looked.synchronize()
        found = [name for name, bad in zip(self._names, self._bad, strict=False) if bad]
        self._names, self._bad = [], None
        return found


def _flat(array: Any) -> Any:
    """Return all elements side by side, in any order, in whole pieces of 16 bytes; a copy if they are not."""
    cupy = get_cupy()
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    flat = array.transpose(order)
    if flat.flags.c_contiguous and flat.data.ptr % 16 == 0 and flat.nbytes % 16 == 0:
        return flat
    padded = cupy.zeros(-(-array.size // 8) * 8, array.dtype)
    padded[: array.size] = array.reshape(-1)
    return padded
