"""Searching an index: by router, in given lists, within a radius."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.backends.base import Floats, Ints
from saapindex.devices import device_of
from saapindex.errors import InvalidInputError
from saapindex.index.device import on_any_device, placed_router
from saapindex.index.probing import Probes, choose_lists, same_limit
from saapindex.index.quick import Quick
from saapindex.index.scanning import Allowed, Scanner
from saapindex.index.state import Held, Routing, keys_at
from saapindex.index.statistics import SearchStatistics
from saapindex.index.store import KeyStore
from saapindex.params import SearchParameters, check_integer

__all__ = ["Searcher"]

# Queries times lists at once, which bounds the memory that routes take.
_BLOCK = 1 << 22
_DEFAULT = SearchParameters()
_NONE = np.zeros(0, np.int64)

Probe = Callable[[slice], Probes]


class Searcher(KeyStore):
    """What a trained index answers; base of `IndexSAAP`."""

    _allowed: Allowed | None = None
    _short: Quick | None = None

    @property
    def can_search_in_place(self) -> bool:
        """Whether a search by `nprobe` reads nothing but keys, so that a device can do all of it."""
        return self._coder is None

    def search(
        self,
        x: ArrayLike,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: ArrayLike | None = None,
        I: ArrayLike | None = None,  # noqa: E741  Faiss's name
        positions: ArrayLike | None = None,
        stats: SearchStatistics | None = None,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Find the `k` best keys of each query among the lists it visits.

        Parameters
        ----------
        x
            Queries, (n, d); NumPy or a CPU torch tensor, for an index on a device also CuPy or a CUDA tensor;
            it also says what comes back. NaN is refused, but on a device finds nothing.
        k
            At least 1; more than the keys that are read leaves the rest -1.
        params
            What may be read, by default `nprobe` lists.
        D, I
            Buffers to write to, float32 and int64 of shape (n, k).
        positions
            int, (n,), by default the end of the context for every query.
        stats
            What is read is added to it.

        Returns
        -------
        D : float32 (n, k)
            Inner products, largest first (distances, smallest first); minus infinity (infinity) where
            there are fewer. Estimates where the index holds codes alone.
        I : int64 (n, k)
            Ids; -1 where there are fewer.
        """
        if D is None and I is None and positions is None and stats is None:
            found = self._search_shortly(x, k, params)
            if found is not None:
                return found
        return self._search(x, k, params=params, D=D, I=I, positions=positions, stats=stats)

    def _search_shortly(
        self, x: ArrayLike, k: int, params: SearchParameters | None
    ) -> tuple[ArrayLike, ArrayLike] | None:
        """Search for a few plain queries; None for others, of which the general way says what is wrong."""
        quick, held = self._short, self._held
        if quick is None or quick.held is not held or quick.ops is not self.ops:
            l2, rank = self._l2, self.params.rank
            quick = self._short = Quick(held, self.ops, self.d, self.nlist, l2, rank)
        if quick.run is None or not quick.fits(x, k):
            return None
        p = self._nprobe
        if params is not None:
            if type(params) is not SearchParameters or not params.is_plain or params.rank is not None:
                return None
            p = params.nprobe or p
        return quick.run(x, min(p, quick.nlist), k)

    @on_any_device
    def _search(
        self,
        x: ArrayLike,
        k: int,
        *,
        params: SearchParameters | None,
        D: ArrayLike | None,
        I: ArrayLike | None,  # noqa: E741  Faiss's name
        positions: ArrayLike | None,
        stats: SearchStatistics | None,
    ) -> tuple[ArrayLike, ArrayLike]:
        check_integer("k", k, 1)
        held, routing = self._ready()
        queries, seen = self._queries(x, positions, held)
        params = self._checked(params)
        out = _buffers(D, I, (len(queries), k))
        if held.coder is None and params.is_plain and stats is None:
            p = min(params.nprobe or self.nprobe, self.nlist)
            found = self.ops.search(
                placed_router(routing.router, seen, self.ops).features(seen),
                queries,
                routing.table,
                routing.bias(params.rank or self.params.rank),
                p,
                held.state.lists.view,
                int(k),
                self._l2,
            )
        else:
            scanner, routing = self._scanner(held, routing, params, stats)
            found = self._scan(queries, scanner, self._router_probe(seen, routing, params), int(k))
        return _deliver(found, out, x, D, I)

    @on_any_device
    def search_preassigned(
        self,
        x: ArrayLike,
        k: int,
        Iq: ArrayLike,
        Dq: ArrayLike | None = None,
        *,
        params: SearchParameters | None = None,
        D: ArrayLike | None = None,
        I: ArrayLike | None = None,  # noqa: E741  Faiss's name
        stats: SearchStatistics | None = None,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Find the `k` best keys of each query in the lists `Iq`, (n, p), -1 for none.

        `Dq`, Faiss's distances to centroids, is not needed and not read. Of `params` only a budget, a
        selector and `k_factor` count. See `search` for the rest.
        """
        check_integer("k", k, 1)
        held, routing = self._ready()
        queries = arrays.vectors(x, "x", self.d)
        params = self._checked(params)
        scanner, routing = self._scanner(held, routing, params, stats)
        probe = self._given(Iq, len(queries), params.keys(routing.ntotal))
        out = _buffers(D, I, (len(queries), k))
        found = self._scan(queries, scanner, probe, int(k))
        return _deliver(found, out, x, D, I)

    @on_any_device
    def range_search(
        self,
        x: ArrayLike,
        thresh: float,
        *,
        params: SearchParameters | None = None,
        positions: ArrayLike | None = None,
        stats: SearchStatistics | None = None,
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        """Find every key that scores above `thresh` (lies nearer, for L2) in the lists that are visited.

        Returns
        -------
        lims : int64 (n + 1,)
            The results of query `i` are ``lims[i] : lims[i + 1]`` of the other two.
        D : float32
            Scores, in no order.
        I : int64
            Ids.
        """
        radius = _radius(thresh)
        held, routing = self._ready()
        queries, seen = self._queries(x, positions, held)
        params = self._checked(params)
        scanner, routing = self._scanner(held, routing, params, stats)
        return self._within(x, queries, scanner, self._router_probe(seen, routing, params), radius)

    @on_any_device
    def range_search_preassigned(
        self,
        x: ArrayLike,
        thresh: float,
        Iq: ArrayLike,
        Dq: ArrayLike | None = None,
        *,
        params: SearchParameters | None = None,
        stats: SearchStatistics | None = None,
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        """Find every key that scores above `thresh` in the lists `Iq`, (n, p), -1 for none.

        See `range_search` and `search_preassigned`.
        """
        radius = _radius(thresh)
        held, routing = self._ready()
        queries = arrays.vectors(x, "x", self.d)
        params = self._checked(params)
        scanner, routing = self._scanner(held, routing, params, stats)
        probe = self._given(Iq, len(queries), params.keys(routing.ntotal))
        return self._within(x, queries, scanner, probe, radius)

    @on_any_device
    def assign(self, x: ArrayLike, k: int = 1, labels: ArrayLike | None = None) -> ArrayLike:
        """Return the ids of the `k` best keys of each query, int64 (n, k), as `search` finds them."""
        return self.search(x, k, I=labels)[1]

    @on_any_device
    def route(
        self,
        x: ArrayLike,
        *,
        params: SearchParameters | None = None,
        positions: ArrayLike | None = None,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Return what a search would read, without reading it.

        Returns
        -------
        Iq : int64 (n, p)
            Lists to visit, best first; -1 where there are no more. Fit for `search_preassigned`.
        keys : int64 (n,)
            Keys that are read in them.
        """
        held, routing = self._ready()
        queries, seen = self._queries(x, positions, held)
        params = self._checked(params)
        scanner, routing = self._scanner(held, routing, params, None)
        probe = self._router_probe(seen, routing, params)
        blocks = [probe(rows) for rows in self._blocks(len(queries))]
        width = max((block.lists.shape[1] for block in blocks), default=0)
        lists = np.full((len(queries), width), -1, np.int64)
        keys = np.zeros(len(queries), np.int64)
        for rows, block in zip(self._blocks(len(queries)), blocks, strict=True):
            lists[rows, : block.lists.shape[1]] = block.lists
            keys[rows] = block.keys_read(scanner.sizes)
        return arrays.give_back(lists, x), arrays.give_back(keys, x)

    @on_any_device
    def search_and_reconstruct(
        self, x: ArrayLike, k: int, *, params: SearchParameters | None = None
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        """Return what `search` returns, and the keys that were found, float32 (n, k, d); NaN for none.

        In an index that others change meanwhile, a key that was found may be gone: then it is NaN too.
        """
        scores, found = self.search(x, k, params=params)
        ids = arrays.as_numpy(found, "I")
        held = self._held
        lists = held.state.lists
        keys = np.full((*ids.shape, self.d), np.nan, np.float32)
        known = lists.contains(ids.reshape(-1)).reshape(ids.shape)
        rows = lists.find(ids[known])
        keys[known] = keys_at(lists, rows, lists.labels_at(rows), held.coder)
        return scores, found, arrays.give_back(keys, x)

    def _scan(
        self, queries: NDArray[np.float32], scanner: Scanner, probe: Probe, k: int
    ) -> tuple[Floats, Ints]:
        """Scan what `probe` says of each block of queries."""
        blocks = self._blocks(len(queries))
        parts = [scanner.search(queries[rows], probe(rows), k) for rows in blocks]
        scores, ids = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return scores, ids

    def _within(
        self, x: ArrayLike, queries: NDArray[np.float32], scanner: Scanner, probe: Probe, radius: float
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        parts: tuple[list[NDArray[Any]], ...] = ([np.zeros(1, np.int64)], [np.empty(0, np.float32)], [_NONE])
        for rows in self._blocks(len(queries)):
            ends, best, found = scanner.within(queries[rows], probe(rows), radius)
            new: Iterable[NDArray[Any]] = (parts[0][-1][-1] + ends[1:], best, found)
            for part, more in zip(parts, new, strict=True):
                if part is not parts[0] or len(more):
                    part.append(more)
        lims, scores, ids = (arrays.give_back(np.concatenate(part), x) for part in parts)
        return lims, scores, ids

    def _ready(self) -> tuple[Held, Routing]:
        held = self._held
        if held.routing is None:
            self.router  # noqa: B018  raises
        assert held.routing is not None
        return held, held.routing

    def _queries(
        self, x: ArrayLike, positions: ArrayLike | None, held: Held
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the queries, and the partition's view of them."""
        # To look for NaN on a device would be to wait for it; such a query finds nothing.
        place = device_of(x)
        queries = arrays.vectors(x, "x", self.d, finite=place is None, device=place)
        partition = held.partition
        assert partition is not None
        if positions is None:
            partition.check_position(held.state.next_id)
        else:
            places = self._positions(positions, "positions", len(queries), _NONE)
            partition.check_position(int(places.max(initial=0)))
        view = partition.view
        if not view.needs_positions:
            return queries, queries
        if positions is None:
            places = np.full(len(queries), held.state.next_id, np.int64)
        return queries, view.apply(queries, places, self.ops)

    def _checked(self, params: SearchParameters | None) -> SearchParameters:
        if params is None:
            return _DEFAULT
        if not isinstance(params, SearchParameters):
            raise InvalidInputError(f"params is a {type(params).__name__}, expected SearchParameters")
        if self._l2 and (params.top_p is not None or params.rank == "mass"):
            raise InvalidInputError(
                "top_p and rank='mass' need an inner product, but metric_type is METRIC_L2"
            )
        return params

    def _blocks(self, n: int) -> list[slice]:
        """Cut `n` queries into blocks; at least one, which may be empty."""
        step = max(1, _BLOCK // self.nlist)
        return [slice(start, start + step) for start in range(0, max(n, 1), step)]

    def _scanner(
        self, held: Held, routing: Routing, params: SearchParameters, stats: SearchStatistics | None
    ) -> tuple[Scanner, Routing]:
        """Return what scans, and the routing among the keys that may be read."""
        if stats is not None and not isinstance(stats, SearchStatistics):
            raise InvalidInputError(f"stats is a {type(stats).__name__}, expected SearchStatistics")
        allowed = None
        if params.sel is not None:
            allowed, lists = self._allowed, held.state.lists
            if allowed is None or allowed.lists is not lists or allowed.sel is not params.sel:
                self._allowed = allowed = Allowed.of(lists, params.sel)
            routing = routing.among(allowed.sizes)
        k_factor = params.k_factor or self.k_factor
        return Scanner(held, allowed, self._l2, k_factor, stats, self.ops), routing

    def _router_probe(self, seen: NDArray[np.float32], routing: Routing, params: SearchParameters) -> Probe:
        rank, nprobe = self.params.rank, self.nprobe
        return lambda rows: choose_lists(seen[rows], routing, rank, nprobe, params, self.ops)

    def _given(self, lists: ArrayLike, n: int, limit: int) -> Probe:
        found = arrays.as_numpy(lists, "Iq")
        found = arrays.integers(found, "Iq", (n, found.shape[-1] if found.ndim else 0))
        # As unsigned numbers, everything below -1 is large: one look finds both ends.
        if found.size and np.maximum.reduce((found + 1).view(np.uint64), axis=None) > self.nlist:
            raise InvalidInputError(
                f"Iq holds lists from {found.min()} to {found.max()}, expected -1 to {self.nlist - 1}"
            )
        limits = same_limit(n, limit)
        return lambda rows: Probes(found[rows], limits[rows])


def _radius(thresh: float) -> float:
    if not (isinstance(thresh, numbers.Real) and abs(thresh) <= float(np.finfo(np.float32).max)):
        raise InvalidInputError(f"thresh is {thresh!r}, expected a finite float32 number")
    return float(thresh)


def _buffers(
    D: ArrayLike | None,
    I: ArrayLike | None,  # noqa: E741  Faiss's name
    shape: tuple[int, int],
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Check the caller's buffers, before anything is computed."""
    return (
        None if D is None else arrays.check_out(D, "D", shape, np.float32, device=device_of(D)),
        None if I is None else arrays.check_out(I, "I", shape, np.int64, device=device_of(I)),
    )


def _deliver(
    found: tuple[NDArray[Any], NDArray[Any]],
    buffers: tuple[NDArray[Any] | None, NDArray[Any] | None],
    x: ArrayLike,
    D: ArrayLike | None,
    I: ArrayLike | None,  # noqa: E741  Faiss's name
) -> tuple[ArrayLike, ArrayLike]:
    """Return scores and ids in the caller's buffers, or in the framework of the queries."""
    if D is None and I is None and isinstance(x, np.ndarray):
        return found
    for buffer, result in zip(buffers, found, strict=True):
        if buffer is not None:
            arrays.fill(buffer, result)
    return (
        arrays.give_back(found[0], x) if D is None else D,
        arrays.give_back(found[1], x) if I is None else I,
    )
