"""Tuning: which settings of a search reach which recall, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.errors import InvalidInputError
from saapindex.index.searcher import Searcher
from saapindex.index.statistics import SearchStatistics
from saapindex.params import SearchParameters, check_choice, check_integer, check_k_factor

__all__ = ["OperatingPoint", "OperatingPoints", "ParameterSpace"]

Cost = Literal["seconds", "keys", "nbytes"]


@dataclass(frozen=True)
class OperatingPoint:
    """One setting.

    Attributes
    ----------
    params
        To be given to `search`.
    recall
        Share of the true neighbours that were found.
    seconds, keys, nbytes
        Time, keys scored and bytes read, a query; the time is the best of several runs of all queries
        together.
    """

    params: SearchParameters
    recall: float
    seconds: float
    keys: float
    nbytes: float


class OperatingPoints(Sequence[OperatingPoint]):
    """Every setting that was tried, in the order of recall."""

    def __init__(self, points: Sequence[OperatingPoint]) -> None:
        self._points = sorted(points, key=lambda point: (point.recall, point.keys))

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]  # an integer or a slice, as of any list
        return self._points[place]

    def optimal(self, cost: Cost = "seconds") -> list[OperatingPoint]:
        """Return the points that no other beats in recall without costing more, in rising order."""
        check_choice("cost", cost, ("seconds", "keys", "nbytes"))
        best: list[OperatingPoint] = []
        for point in sorted(self, key=lambda point: (getattr(point, cost), -point.recall)):
            if not best or point.recall > best[-1].recall:
                best.append(point)
        return best

    def for_recall(self, recall: float, cost: Cost = "seconds") -> OperatingPoint | None:
        """Return the cheapest point of at least this recall; None if no point reaches it."""
        reach = [point for point in self.optimal(cost) if point.recall >= recall]
        return reach[0] if reach else None


class ParameterSpace:
    """The settings of an index's searches: ``nprobe``, and ``k_factor`` where codes are refined.

    Parameters
    ----------
    index
        Trained, with its keys.

    Examples
    --------
    >>> import saapindex as sx
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.standard_normal((2000, 8), dtype=np.float32)
    >>> queries = rng.standard_normal((200, 8), dtype=np.float32)
    >>> index = sx.IndexSAAP(8, 32)
    >>> index.train(keys, xq_train=queries)
    >>> index.add(keys)
    >>> points = ParameterSpace(index).explore(queries[:50], target=0.9)
    >>> point = points.for_recall(0.9, cost="keys")
    >>> point.recall >= 0.9, index.search(queries, 10, params=point.params)[1].shape
    (True, (200, 10))
    """

    def __init__(self, index: Searcher) -> None:
        self.index = index
        doubled = [1 << power for power in range((index.nlist - 1).bit_length())]
        self.ranges: dict[str, list[float]] = {"nprobe": [*doubled, index.nlist]}
        if index.params.refine:
            self.ranges["k_factor"] = [1, 2, 4, 8, 16]

    def add_range(self, name: Literal["nprobe", "k_factor"], values: Sequence[float]) -> None:
        """Try these values of a setting instead."""
        check_choice("name", name, tuple(self.ranges))
        if not len(values):
            raise InvalidInputError(f"values of {name} are empty, expected at least one")
        for value in values:
            if name == "nprobe":
                check_integer(name, value, 1)
            else:
                check_k_factor(value)
        self.ranges[name] = sorted({*values})

    def explore(
        self,
        xq: ArrayLike,
        gt: ArrayLike | None = None,
        k: int = 10,
        *,
        target: float | None = None,
        positions: ArrayLike | None = None,
        repeats: int = 3,
    ) -> OperatingPoints:
        """Search with many settings and return what each gives.

        Parameters
        ----------
        xq
            Queries like those that will come, (n, d), at least one.
        gt
            int, (n, k): the ids of their true neighbours, by default those of an exact search among the keys
            of the index.
        k
            Neighbours that count.
        target
            A recall: settings near it are tried too, so that the fewest lists that reach it are among them.
        positions
            As for `search`.
        repeats
            Runs of each setting that is timed.

        Raises
        ------
        InvalidInputError
            On arrays of other shapes, and without `gt` if the index stores codes alone.
        """
        check_integer("k", k, 1)
        check_integer("repeats", repeats, 1)
        if target is not None and not 0 < target <= 1:
            raise InvalidInputError(f"target is {target!r}, expected a recall in (0, 1]")
        queries = arrays.vectors(xq, "xq", self.index.d)
        if not len(queries):
            raise InvalidInputError("xq holds no queries, expected at least one")
        truth = self._truth(queries, k, positions) if gt is None else arrays.as_numpy(gt, "gt")
        truth = arrays.integers(truth, "gt", (len(queries), k))
        trial = _Trial(self.index, queries, truth, positions, repeats)
        nprobes = [int(nprobe) for nprobe in self.ranges["nprobe"]]
        factors: Sequence[float | None] = self.ranges.get("k_factor", (None,))
        for k_factor in factors:
            for nprobe in nprobes:
                trial.run(nprobe, k_factor)
            if target is not None:
                trial.narrow(target, k_factor)
        return OperatingPoints(list(trial.points.values()))

    def _truth(self, queries: NDArray[np.float32], k: int, positions: ArrayLike | None) -> NDArray[np.int64]:
        if self.index.params.bits and not self.index.params.refine:
            raise InvalidInputError("the index stores codes alone, expected gt: the ids of true neighbours")
        most = max(1.0, self.index.ntotal / k)
        params = SearchParameters(nprobe=self.index.nlist, k_factor=most)
        found: NDArray[np.int64] = self.index.search(queries, k, params=params, positions=positions)[1]
        return found


class _Trial:
    """Runs settings, each once."""

    def __init__(
        self,
        index: Searcher,
        queries: NDArray[np.float32],
        truth: NDArray[np.int64],
        positions: ArrayLike | None,
        repeats: int,
    ) -> None:
        self.index, self.queries, self.truth = index, queries, truth
        self.positions, self.repeats = positions, repeats
        self.points: dict[tuple[int, float | None], OperatingPoint] = {}

    def run(self, nprobe: int, k_factor: float | None) -> OperatingPoint:
        """Search with one setting."""
        if (nprobe, k_factor) in self.points:
            return self.points[nprobe, k_factor]
        params = SearchParameters(nprobe=nprobe, k_factor=k_factor)
        stats, k = SearchStatistics(), self.truth.shape[1]
        search = self.index.search
        _, ids = search(self.queries, k, params=params, positions=self.positions, stats=stats)
        seconds = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            search(self.queries, k, params=params, positions=self.positions)
            seconds.append(time.perf_counter() - start)
        wanted = self.truth >= 0
        hits = ((ids[:, :, None] == self.truth[:, None]) & wanted[:, None]).sum()
        n = len(self.queries)
        recall = float(hits / wanted.sum()) if wanted.any() else 1.0
        point = OperatingPoint(params, recall, min(seconds) / n, stats.ndis / n, stats.nbytes / n)
        self.points[nprobe, k_factor] = point
        return point

    def narrow(self, target: float, k_factor: float | None) -> None:
        """Find the fewest lists that reach the target, between two numbers that were tried."""
        tried = sorted((nprobe, point.recall) for (nprobe, f), point in self.points.items() if f == k_factor)
        reach = [nprobe for nprobe, recall in tried if recall >= target]
        if not reach:
            return
        high = reach[0]
        low = max((nprobe for nprobe, _ in tried if nprobe < high), default=0)
        while high - low > 1:
            middle = (low + high) // 2
            if self.run(middle, k_factor).recall >= target:
                high = middle
            else:
                low = middle
