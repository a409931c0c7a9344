"""The short way through a search on a device: fewer launches, and what can be asked before is."""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import numpy as np

from saapindex.backends.base import LANES, Lists
from saapindex.backends.cuda.launch import SHARED_MOST, has_clusters, multiprocessors, power_of_two
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.route import ENTRY, MOST_LISTS, THREADS, routing_shape
from saapindex.backends.cuda.scan import MOST_RESULTS, part_shape, scan_shape
from saapindex.devices import current, get_cupy

__all__ = ["CLUSTERS", "DeviceSearch", "Few", "few_shape"]

_KEPT = 64  # shapes of searches that are remembered
_FLOAT = np.dtype(np.float32)
CLUSTERS = 8, 4, 2
"""Blocks that may work on a query where one launch does all."""
_FEW_RESULTS, _FEW_READ = 256, 5 << 20  # up to which one launch is worth it; bytes that a query reads


class Few(NamedTuple):
    """How many queries are searched for in one launch.

    Attributes
    ----------
    cluster
        Blocks of a query.
    chosen_room, part_room, room, capacity
        Of a block: for lists that are chosen, for those of a block, for results, and for keys on the way.
    shared
        Memory of a block in bytes.
    """

    cluster: int
    chosen_room: int
    part_room: int
    room: int
    capacity: int
    shared: int


def few_shape(q: int, p: int, k: int, nlist: int, d: int, read: int, multiprocessors: int) -> Few | None:
    """Return how ``search.cu`` is launched for `q` queries; None where several launches are faster.

    Clusters are as large as there are multiprocessors for all queries at once.

    Parameters
    ----------
    read
        Bytes of the table and of the keys that a query reads.

    Examples
    --------
    >>> few_shape(1, 24, 10, 512, 64, 200_000, 132)
    Few(cluster=8, chosen_room=32, part_room=32, room=16, capacity=2048, shared=39396)
    >>> few_shape(1024, 24, 10, 512, 64, 200_000, 132) is None
    True
    """
    cluster = next((c for c in CLUSTERS if q * c <= multiprocessors), None)
    if cluster is None or k > _FEW_RESULTS or read > _FEW_READ:
        return None
    room, capacity = part_shape(k)
    blocks = -(-nlist // LANES)
    own = -(-blocks // cluster) * LANES  # lists of a block of threads, at most
    chosen, part = power_of_two(p), power_of_two(min(p, own))
    entries = chosen + cluster * (part + room) + max(part, room) + capacity
    shared = ENTRY * entries + 4 * (d + own + 2 * p + 1) + 8736  # of which a histogram is the largest part
    return Few(cluster, chosen, part, room, capacity, shared) if shared <= SHARED_MOST else None


class _Plan:
    """The launches of a search of `q` queries for `k` keys in `p` lists, with their arguments in place.

    Kernels read their arguments from cells of 8 bytes, which all launches share; a search fills in its own.

    Parameters
    ----------
    constants
        What never changes: pointers, and numbers. Their cells follow each other, behind the ones of `counts`.
    counts
        Bytes of each array that it works in.
    launches
        A kernel, its grid, its shared memory, and its arguments: names of `constants`, of `counts`, or `x`,
        `best` and `found`.
    """

    def __init__(
        self,
        constants: dict[str, int],
        counts: dict[str, int],
        launches: list[tuple[Any, tuple[int, int], int, list[str]]],
    ) -> None:
        names = ["x", "best", "found", *counts, *constants]
        *places, self.nbytes = np.cumsum([0, *(-(-count // 256) * 256 for count in counts.values())]).tolist()
        self._places = np.array(places, np.uint64)
        self._cells = np.zeros(len(names), np.uint64)
        self._cells[3 + len(counts) :] = list(constants.values())
        self._own, self._work = self._cells[:3], self._cells[3 : 3 + len(counts)]
        address = {name: self._cells.ctypes.data + 8 * i for i, name in enumerate(names)}
        self._given = [np.array([address[name] for name in given], np.uint64) for *_, given in launches]
        self._kernels = [run.kernel for run, *_ in launches]  # keeps them loaded
        self._launches = [
            (function.ptr, *grid, 1, THREADS, 1, 1, shared, given.ctypes.data)
            for function, (_, grid, shared, _), given in zip(
                self._kernels, launches, self._given, strict=True
            )
        ]
        self._lock, self._device = threading.Lock(), get_cupy().cuda.runtime.getDevice()

    def run(self, x: int, best: int, found: int, work: int, stream: int) -> None:
        """Launch with the addresses of queries, of results, and of memory to work in."""
        cuda = get_cupy().cuda
        launch = cuda.driver.launchKernel
        cuda.runtime.setDevice(self._device)  # so that a thread which is new to the device has its context
        with self._lock:  # the driver has copied the arguments when it comes back
            self._own[:] = x, best, found
            np.add(self._places, np.uint64(work), out=self._work)
            for *how, given in self._launches:
                launch(*how, stream, given, 0)


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
        self._plans: dict[tuple[int, int, int], _Plan] = {}

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
        try:
            if type(x) is get_cupy().ndarray:
                return self._on_cupy(x, p, k)
            with current(x):
                return self._on_torch(x, p, k)
        except MemoryError:  # of which the general way tells more
            return None

    def _on_cupy(self, x: Any, p: int, k: int) -> tuple[Any, Any]:
        empty, shape = get_cupy().empty, (len(x), k)
        best, found = empty(shape, np.float32), empty(shape, np.int64)
        self._launch(x.data.ptr, best.data.ptr, found.data.ptr, (len(x), p, k))
        return best, found

    def _on_torch(self, x: Any, p: int, k: int) -> tuple[Any, Any]:
        torch, shape = sys.modules["torch"], (len(x), k)
        best, found = (
            torch.empty(shape, dtype=kind, device=x.device) for kind in (torch.float32, torch.int64)
        )
        self._launch(x.data_ptr(), best.data_ptr(), found.data_ptr(), (len(x), p, k))
        return best, found

    def _launch(self, x: int, best: int, found: int, shape: tuple[int, int, int]) -> None:
        cupy, plan = get_cupy(), self._plans.get(shape)
        if plan is None:
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            plan = self._plans[shape] = self._planned(*shape)
        work = cupy.empty(plan.nbytes, np.uint8).data if plan.nbytes else None
        place = 0 if work is None else work.ptr
        plan.run(x, best, found, place, cupy.cuda.get_current_stream().ptr)

    def _planned(self, q: int, p: int, k: int) -> _Plan:
        held: Any = self.lists
        d, nlist, item = self.d, self.nlist, held.vectors.dtype.itemsize
        macros = {"ELEMENT": 0 if item == 2 else 2, "D": d}
        arrays = {
            "table": self.table,
            "bias": self.bias,
            **{name: getattr(held, name) for name in ("vectors", "ids", "offsets", "sizes")},
        }
        constants = {name: int(array.data.ptr) for name, array in arrays.items()}
        constants |= {"nlist": nlist, "p": p, "k": k}
        read = 4 * nlist * d + len(held.ids) * p // nlist * d * item
        few = None
        if has_clusters(self.device):
            few = few_shape(q, p, k, nlist, d, read, multiprocessors(self.device))
        if few:
            rooms = {name: getattr(few, name) for name in ("chosen_room", "part_room", "room", "capacity")}
            macros |= {"CLUSTER": few.cluster, "DISTANCES": int(self.l2)}
            run = kernel("search", "search", shared=few.shared, **macros)
            # Its argument is a struct of all cells, in this order.
            return _Plan(constants | rooms, {}, [(run, (q * few.cluster, 1), few.shared, ["x"])])
        return self._in_several(q, p, k, constants, macros)

    def _in_several(self, q: int, p: int, k: int, constants: dict[str, int], macros: dict[str, int]) -> _Plan:
        """Plan routing, the choice of lists, the scan of their parts, and what merges these."""
        d, nlist = self.d, self.nlist
        splits, room, capacity, shared, merging = scan_shape(q, p, self.lists, k)
        score_grid, select_room, select_shared = routing_shape(q, nlist, p)
        numbers = {
            "allowed": 0,
            "q": q,
            "d": d,
            "select_room": select_room,
            "room": room,
            "capacity": capacity,
            "parts": splits * k,
            "l2": int(self.l2),
        }
        counts = {
            "scores": 4 * q * nlist,
            "lists": 8 * q * p,
            "list_scores": 4 * q * p,
            "before": 4 * q * (p + 1),
            "takes": 4 * q * p,
        }
        some = ["best", "found"]
        if splits > 1:
            some = ["some", "some_found"]
            counts |= {"some": 4 * q * splits * k, "some_found": 8 * q * splits * k}
        scan = kernel("scan", "scan_l2" if self.l2 else "scan_ip", shared=shared, **macros)
        reading = ["x", "vectors", "ids", "offsets", "allowed", "lists", "before", "takes"]
        scored = ["x", "table", "bias", "scores", "q", "d", "nlist"]
        chosen = ["scores", "lists", "list_scores", "nlist", "p", "select_room", "sizes", "before", "takes"]
        launches = [
            (kernel("route", "route_scores"), score_grid, 0, scored),
            (kernel("route", "route_select", shared=select_shared), (q, 1), select_shared, chosen),
            (scan, (q, splits), shared, [*reading, "p", "k", "room", "capacity", *some]),
        ]
        if splits > 1:
            merge = kernel("scan", "scan_merge", shared=merging, **macros)
            launches.append((merge, (q, 1), merging, [*some, "parts", "k", "room", "l2", "best", "found"]))
        return _Plan(constants | numbers, counts, launches)
