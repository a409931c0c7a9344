"""Operations that keep on the device what they are given again and again: lists, tables, training keys."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats, Ints, Lists, QuickSearch
from saapindex.backends.cuda import CudaOps
from saapindex.backends.cuda.launch import host, mapped
from saapindex.backends.cuda.quick import DeviceSearch
from saapindex.backends.cuda.scan import ready
from saapindex.devices import current, device_of, get_cupy

__all__ = ["ResidentOps"]


class _Mirror:
    """Lists on the device, and what they were copied from."""

    def __init__(self, source: Lists, copy: Lists) -> None:
        self.source, self.copy = source, copy

    def shows(self, lists: Lists) -> bool:
        """Whether these very lists are here."""
        tables = ("vectors", "offsets", "sizes")
        return all(getattr(self.source, name) is getattr(lists, name) for name in tables)


def _changed(old: Lists, new: Lists) -> Ints:
    """Return the blocks of the pool that `new` reads and `old`, in the same pool, did not."""
    kept = np.where(old.offsets == new.offsets, np.minimum(old.sizes, new.sizes), 0)
    first, last = (new.offsets + kept) // LANES, -(-(new.offsets + new.sizes) // LANES)
    counts = np.where(new.sizes > kept, last - first, 0)
    before = np.cumsum(counts) - counts
    blocks: Ints = np.repeat(first - before, counts) + np.arange(int(counts.sum()))
    return blocks


class ResidentOps(CudaOps):
    """`CudaOps` of one device for one index, whose lists are kept there.

    Lists live in the memory of the host, and the device holds a copy: of lists that grew in the same pool
    only what is new is sent. Results are NumPy arrays for NumPy queries, CuPy for CuPy.

    Parameters
    ----------
    device
        Number of the device.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._mirror: _Mirror | None = None
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._training = False

    def __deepcopy__(self, memo: Any) -> ResidentOps:
        return ResidentOps(self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return ResidentOps, (self.device,)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Keep the keys that are assigned on the device until this ends; they must not change meanwhile."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
            self._kept.clear()

    def hold(self, lists: Lists) -> Lists:
        """Copy to the device what is not there yet of `lists`, and return them there."""
        cupy = get_cupy()
        old = self._mirror
        if old is not None and old.shows(lists):
            copy = old.copy
        else:
            with current(self.device):
                tables = {name: cupy.asarray(getattr(lists, name)) for name in ("offsets", "sizes")}
                if old is not None and old.source.vectors is lists.vectors:
                    vectors, ids = old.copy.vectors, old.copy.ids
                    blocks = _changed(old.source, lists)
                    if len(blocks):
                        where = cupy.asarray(blocks)
                        vectors[where] = cupy.asarray(lists.vectors[blocks])
                        ids.reshape(-1, LANES)[where] = cupy.asarray(lists.ids.reshape(-1, LANES)[blocks])
                else:
                    vectors, ids = cupy.asarray(lists.vectors), cupy.asarray(lists.ids)
            copy = lists._replace(vectors=vectors, ids=ids, **tables)
            self._mirror = _Mirror(lists, copy)
        extras = [name for name in lists._fields if name not in ("vectors", "ids", "offsets", "sizes")]
        return copy._replace(**{name: self.keep(getattr(lists, name)) for name in extras})

    def keep(self, array: Any) -> Any:
        """Return an array, which never changes, on the device; the same one is sent once."""
        if not isinstance(array, np.ndarray):
            return array
        kept, key = self._kept, id(array)
        found = kept.get(key)
        if found is None or found[0]() is not array:
            reference = weakref.ref(array, lambda _: kept.pop(key, None))
            kept[key] = reference, get_cupy().asarray(array)
        return kept[key][1]

    def _run(self, run: Callable[..., Any], like: Any, *arguments: Any) -> Any:
        """Run on this device, and return results where `like` is."""
        with current(self.device):
            found = run(
                *(mapped(x, get_cupy().asarray) if isinstance(x, np.ndarray) else x for x in arguments)
            )
            return found if device_of(like) is not None else mapped(found, host)

    def _rows(self, x: Any) -> Any:
        if not self._training:
            return x
        with current(self.device):
            return self.keep(x)

    def rotate(
        self, x: Floats, positions: Ints, frequencies: Floats, scale: Floats, interleaved: bool
    ) -> Floats:
        """See `Ops.rotate`."""
        if x.dtype == np.float64:
            return CudaOps.rotate(x, positions, frequencies, scale, interleaved)
        found: Floats = self._run(
            CudaOps.rotate, x, self._rows(x), positions, frequencies, scale, interleaved
        )
        return found

    def assign(self, x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
        """See `Ops.assign`."""
        found: tuple[Ints, Floats] = self._run(CudaOps.assign, x, self._rows(x), centroids, bias)
        return found

    def accumulate(self, x: Floats, labels: Ints, nlist: int) -> tuple[NDArray[np.float64], Ints]:
        """See `Ops.accumulate`."""
        found: tuple[NDArray[np.float64], Ints] = self._run(
            CudaOps.accumulate, x, self._rows(x), labels, nlist
        )
        return found

    def route(self, features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
        """See `Ops.route`."""
        with current(self.device):
            table, bias = self.keep(table), self.keep(bias)
        found: tuple[Ints, Floats] = self._run(CudaOps.route, features, features, table, bias, p)
        return found

    def scan(
        self, queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool
    ) -> tuple[Floats, Ints]:
        """See `Ops.scan`."""
        held = self.hold(lists)
        found: tuple[Floats, Ints] = self._run(CudaOps.scan, queries, queries, held, probes, limits, k, l2)
        return found

    def range_scan(
        self, queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
    ) -> tuple[Ints, Floats, Ints]:
        """See `Ops.range_scan`."""
        held = self.hold(lists)
        found: tuple[Ints, Floats, Ints] = self._run(
            CudaOps.range_scan, queries, queries, held, probes, limits, radius, l2
        )
        return found

    def prepare(self, table: Floats, bias: Floats, lists: Lists, l2: bool) -> QuickSearch | None:
        """See `Ops.prepare`; what it returns takes queries on this device, and says which `fits`."""
        if lists.allowed is not None:
            return None
        with current(self.device):
            cupy = get_cupy()
            try:
                kept_table, kept_bias = (
                    cupy.ascontiguousarray(self.keep(part), np.float32) for part in (table, bias)
                )
                _, held = ready(kept_bias, self.hold(lists))
            except MemoryError:  # of which the general way tells more
                return None
        return DeviceSearch(kept_table, kept_bias, held, l2, self.device)

    def search(
        self,
        features: Floats,
        queries: Floats,
        table: Floats,
        bias: Floats,
        p: int,
        lists: Lists,
        k: int,
        l2: bool,
    ) -> tuple[Floats, Ints]:
        """See `Ops.search`."""
        held = self.hold(lists)
        with current(self.device):
            table, bias = self.keep(table), self.keep(bias)
        found: tuple[Floats, Ints] = self._run(
            CudaOps.search, queries, features, queries, table, bias, p, held, k, l2
        )
        return found
