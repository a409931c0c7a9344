"""The short way through a search on a device: the kernels of `search`, and what can be asked before is."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import numpy as np

from saapindex.backends.base import Lists
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.route import MOST_LISTS, THREADS, routing_shape
from saapindex.backends.cuda.scan import MOST_RESULTS, scan_shape
from saapindex.devices import current, get_cupy

__all__ = ["DeviceSearch"]

_KEPT = 64  # shapes of searches that are remembered
_FLOAT = np.dtype(np.float32)


class _Plan(NamedTuple):
    """How a search of `q` queries for `k` keys in `p` lists is launched.

    Attributes
    ----------
    nbytes, places
        Of the memory that it works in, and where in that each array begins.
    kernels, grids, shared
        Of each launch.
    sizes
        The numbers that each launch takes, int32.
    """

    nbytes: int
    places: tuple[int, ...]
    kernels: tuple[Any, ...]
    grids: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]
    sizes: tuple[tuple[np.int32, ...], ...]


class DeviceSearch:
    """`Ops.search` with a table, whose features are the queries themselves, in lists on a device.

    Parameters
    ----------
    table, bias, lists
        On the device, C-contiguous, as `Ops.search` takes them; all keys may be read.
    l2
        Whether scores are distances.
    device
        Number of the device.
    """

    def __init__(self, table: Any, bias: Any, lists: Lists, l2: bool, device: int) -> None:
        self.d, self.nlist, self.l2, self.device = table.shape[1], len(bias), l2, device
        self.table, self.bias, self.lists = table, bias, lists
        self._plan = functools.lru_cache(_KEPT)(self._planned)
        held: Any = lists
        self._held = tuple(
            np.uint64(array.data.ptr)
            for array in (table, bias, held.vectors, held.ids, held.offsets, held.sizes)
        )

    def fits(self, x: Any, k: Any) -> bool:
        """Whether these queries are float32 on this device, side by side, and `k` of them can be sorted."""
        if type(k) is not int or not 0 < k <= MOST_RESULTS:
            return False
        cupy = get_cupy()
        if type(x) is cupy.ndarray:
            return (
                x.dtype == _FLOAT
                and x.flags.c_contiguous
                and x.data.device_id == self.device == cupy.cuda.runtime.getDevice()
                and self._shaped(x.shape)
            )
        torch = sys.modules.get("torch")
        return (
            torch is not None
            and type(x) is torch.Tensor
            and x.is_cuda
            and x.dtype is torch.float32
            and x.device.index == self.device
            and x.is_contiguous()
            and self._shaped(x.shape)
        )

    def _shaped(self, shape: Any) -> bool:
        return len(shape) == 2 and shape[0] > 0 and shape[1] == self.d

    def __call__(self, x: Any, p: int, k: int) -> tuple[Any, Any] | None:
        """Search for queries that fit; None for what another way must do, or say what is wrong with."""
        if p > MOST_LISTS:
            return None
        if type(x) is get_cupy().ndarray:
            shape = len(x), k
            try:
                best, found = get_cupy().empty(shape, np.float32), get_cupy().empty(shape, np.int64)
                self._launch(x.data.ptr, p, k, len(x), best.data.ptr, found.data.ptr)
            except MemoryError:
                return None
            return best, found
        torch = sys.modules["torch"]
        with current(x):
            best = torch.empty((len(x), k), dtype=torch.float32, device=x.device)
            found = torch.empty((len(x), k), dtype=torch.int64, device=x.device)
            try:
                self._launch(x.data_ptr(), p, k, len(x), best.data_ptr(), found.data_ptr())
            except MemoryError:
                return None
        return best, found

    def _planned(self, q: int, p: int, k: int) -> _Plan:
        splits, room, capacity, shared, merging = scan_shape(q, p, self.lists, k)
        lists = self.lists
        macros = {"ELEMENT": 0 if lists.vectors.dtype == np.float16 else 2, "D": self.d}
        counts = (
            4 * q * self.nlist,  # scores
            8 * q * p,  # lists
            4 * q * p,  # their scores
            4 * q * (p + 1),  # blocks of keys before each
            4 * q * p,  # and what is read of each
            4 * q * splits * k if splits > 1 else 0,
            8 * q * splits * k if splits > 1 else 0,
        )
        ends = np.cumsum([-(-count // 256) * 256 for count in counts]).tolist()
        score_grid, select_room, select_shared = routing_shape(q, self.nlist, p)
        merge = kernel("scan", "scan_merge", shared=merging, **macros)
        return _Plan(
            nbytes=ends[-1],
            places=(0, *ends[:-1]),
            kernels=(
                kernel("route", "route_scores"),
                kernel("route", "route_select", shared=select_shared),
                kernel("scan", "scan_l2" if self.l2 else "scan_ip", shared=shared, **macros),
                *([merge] if splits > 1 else []),
            ),
            grids=(score_grid, (q,), (q, splits), (q,)),
            shared=(0, select_shared, shared, merging),
            sizes=tuple(
                tuple(map(np.int32, sizes))
                for sizes in (
                    (q, self.d, self.nlist),
                    (self.nlist, p, select_room),
                    (p, k, room, capacity),
                    (splits * k, k, room, self.l2),
                )
            ),
        )

    def _launch(self, x: int, p: int, k: int, q: int, best: int, found: int) -> None:
        plan, pointer = self._plan(q, p, k), np.uint64
        work = get_cupy().empty(plan.nbytes, np.uint8)
        at = [pointer(work.data.ptr + place) for place in plan.places]
        queries, out = pointer(x), (pointer(best), pointer(found))
        table, bias, vectors, ids, offsets, sizes = self._held
        scores, lists, list_scores, before, takes, some, some_found = at
        merged = len(plan.kernels) > 3
        arguments = (
            (queries, table, bias, scores, *plan.sizes[0]),
            (scores, lists, list_scores, *plan.sizes[1], sizes, before, takes),
            (
                *(queries, vectors, ids, offsets, pointer(0), lists, before, takes),
                *plan.sizes[2],
                *((some, some_found) if merged else out),
            ),
            (some, some_found, *plan.sizes[3], *out),
        )
        for run, grid, given, shared in zip(plan.kernels, plan.grids, arguments, plan.shared, strict=False):
            run(grid, (THREADS,), given, shared_mem=shared)
