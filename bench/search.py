"""Search speed beside the real Faiss: the same lists, and equal recall on many attention heads.

Everything is timed in one process with the same number of threads, in turn, so that a ratio holds where
the machine's speed drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numba
import numpy as np
from numpy.typing import NDArray

from saapindex import IndexParameters, IndexSAAP, SearchParameters
from saapindex.learn import Trace, read_trace
from saapindex.learn.curves import recall
from saapindex.learn.search_peers import FaissIVF
from saapindex.partition import Partition, View
from saapindex.progress import track

DATA = Path(__file__).parent.parent / "saapindex" / "data"
K, TARGET, WINDOW = 10, 0.9, 2048
NLISTS = (128, 256, 512, 1024)
Vectors = NDArray[np.float32]
Run = Callable[[], Any]


def paired(runs: Mapping[str, Run], repeats: int = 9) -> dict[str, float]:
    """Time each function in turn, `repeats` times; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(0.02)  # until the threads of the one before have stopped waiting for work
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def singly(search: Callable[[Vectors], Any], queries: Vectors) -> Run:
    """Return a function that searches each query on its own."""

    def run() -> None:
        for i in range(len(queries)):
            search(queries[i : i + 1])

    return run


@dataclass(frozen=True)
class Head:
    """What one KV head offers a search: keys of one context, its queries, and training data of others."""

    name: str
    trace: Trace
    keys: Vectors
    queries: Vectors
    train_keys: Vectors
    train_positions: NDArray[np.int64]
    train_queries: Vectors
    train_query_positions: NDArray[np.int64]

    def truth(self) -> NDArray[np.int64]:
        """Ids of the `K` best keys of each query."""
        flat = faiss.IndexFlatIP(self.keys.shape[1])
        flat.add(self.keys)
        ids: NDArray[np.int64] = flat.search(self.queries, K)[1]
        return ids


def make_head(name: str, test: Trace, trains: list[Trace], head: int) -> Head:
    """Take the keys that lie a window before the last tenth of the queries, and those queries."""
    last = int(test.query_positions.max()) + 1
    n = min(test.keys.shape[1], last - last // 16 - WINDOW)
    queries, at = test.head_queries(head)
    parts = [train.head_queries(head) for train in trains]
    return Head(
        name,
        test,
        test.keys[head, :n].astype(np.float32),
        np.ascontiguousarray(queries[at >= n + WINDOW]),
        np.concatenate([train.keys[head] for train in trains]).astype(np.float32),
        np.concatenate([train.key_positions for train in trains]),
        np.concatenate([queries for queries, _ in parts]),
        np.concatenate([positions for _, positions in parts]),
    )


def heads(traces: Path) -> Iterator[Head]:
    """Every KV head of every layer that ``bench/capture.py search`` wrote to `traces`."""
    for path in sorted(traces.glob("test0-layer*.safetensors")):
        layer = path.stem.split("-")[1]
        trains = [read_trace(train) for train in sorted(traces.glob(f"train*-{layer}.safetensors"))]
        test = read_trace(path)
        for head in range(test.keys.shape[0]):
            yield make_head(f"{layer} head {head}", test, trains, head)


def _searcher(index: IndexSAAP, params: SearchParameters) -> Callable[[Vectors], Any]:
    return lambda queries: index.search(queries, K, params=params)[1]


def same_lists(head: Head, nlist: int, nprobes: tuple[int, ...]) -> dict[str, Any]:
    """Search and build with the very lists and routing of a Faiss IVFFlat."""
    d, keys = head.keys.shape[1], head.keys
    positions = np.arange(len(keys))
    peer = FaissIVF(keys, positions, nlist)
    peer.add(keys, positions)
    centroids = peer.index.quantizer.reconstruct_n(0, nlist)
    ours = {}
    for dtype in ("float32", "float16"):
        index = IndexSAAP(d, nlist, params="faiss-ivf", dtype=dtype)
        index.train(keys)
        index._adopt(Partition(View(), centroids, None, True, None), index.router, index._nothing())
        index.add(keys)
        assert (index.list_sizes == np.bincount(peer.labels, minlength=nlist)).all(), "not the same lists"
        ours[dtype] = index
    batch = np.resize(head.queries, (1000, d))
    rows = []
    for nprobe in nprobes:
        params = SearchParameters(nprobe=nprobe)
        peer.index.nprobe = nprobe
        searches = {"faiss": lambda q: peer.index.search(q, K)}
        searches |= {name: _searcher(index, params) for name, index in ours.items()}
        many = paired({name: partial(search, batch) for name, search in searches.items()})
        one = paired({name: singly(search, batch[:200]) for name, search in searches.items()})
        read = ours["float32"].route(batch, params=params)[1].mean()
        rows.append(
            {
                "nprobe": nprobe,
                "keys": float(read),
                "batch 1000": {name: 1000 / seconds for name, seconds in many.items()},
                "batch 1": {name: 200 / seconds for name, seconds in one.items()},
            }
        )

    def build_faiss() -> None:
        FaissIVF(keys, positions, nlist).add(keys, positions)

    def build_ours() -> None:
        index = IndexSAAP(d, nlist, params=IndexParameters(augment=0))
        index.train(keys, xq_train=head.train_queries, positions_xq=head.train_query_positions)
        index.add(keys)

    build = paired({"faiss": build_faiss, "saapindex": build_ours}, repeats=5)
    return {"head": head.name, "keys": len(keys), "nlist": nlist, "rows": rows, "build seconds": build}


def stages(head: Head, nlist: int, nprobe: int, dtype: str) -> dict[str, Any]:
    """Microseconds of one core a query in routing and in scanning, and what the scan reads a second."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    index = IndexSAAP(head.keys.shape[1], nlist, params=IndexParameters(augment=0), dtype=dtype)
    index.train(head.keys, xq_train=head.train_queries)
    index.add(head.keys)
    batch = np.resize(head.queries, (1000, index.d))
    state, routing = index._state, index._routing
    assert routing is not None
    probes, keys = index.route(batch, params=SearchParameters(nprobe=nprobe))
    limits = np.full(len(batch), index.ntotal)
    seconds = paired(
        {
            "route": lambda: index.ops.route(batch, routing.table, routing.by_key, nprobe),
            "scan": lambda: index.ops.scan(batch, state.lists.view, probes, limits, K, False),
            "search": lambda: index.search(batch, K, params=SearchParameters(nprobe=nprobe)),
        }
    )
    numba.set_num_threads(threads)
    read = float(keys.mean()) * index.d * index.dtype.itemsize
    return {
        "head": head.name,
        "nlist": nlist,
        "nprobe": nprobe,
        "dtype": dtype,
        "keys": float(keys.mean()),
        "microseconds": {name: 1e3 * value for name, value in seconds.items()},
        "scan GB/s": read / (1e-3 * seconds["scan"]) / 1e9,
    }


@dataclass(frozen=True)
class Contender:
    """One method on one head: how to make it, and what a key and a list cost to read."""

    make: Callable[[Head, int], Any]
    nlists: tuple[int, ...] = NLISTS
    key_bytes: int = 4


def _faiss(head: Head, nlist: int, keys: Vectors, quantizer: Any) -> Any:
    positions = np.arange(len(keys))
    peer = FaissIVF(keys, positions, nlist, quantizer=quantizer)
    peer.add(head.keys, positions[: len(head.keys)])
    sizes = np.bincount(peer.labels, minlength=nlist)

    def at(nprobe: int) -> tuple[Callable[[Vectors], Any], Callable[[Vectors], Any]]:
        params: Any = faiss.SearchParametersIVF()
        params.nprobe = nprobe
        return (
            lambda queries: peer.index.search(queries, K, params=params)[1],
            lambda queries: sizes[peer.index.quantizer.search(queries, nprobe)[1]].sum(axis=1),
        )

    return at


def _ours(head: Head, nlist: int, *, offline: bool, adapt: bool, dtype: str) -> Any:
    last = int(head.train_query_positions.max()) + 1
    params = IndexParameters(max_position=last, augment=int(offline))
    index = IndexSAAP(head.keys.shape[1], nlist, params=params, rope=head.trace.rope, dtype=dtype)
    index.train(
        head.train_keys if offline else head.keys,
        xq_train=head.train_queries,
        positions=head.train_positions if offline else None,
        positions_xq=head.train_query_positions,
    )
    index.add(head.keys)
    if adapt:
        index.adapt()

    def at(nprobe: int) -> tuple[Callable[[Vectors], Any], Callable[[Vectors], Any]]:
        params = SearchParameters(nprobe=nprobe)
        return _searcher(index, params), lambda queries: index.route(queries, params=params)[1]

    return at


CONTENDERS = {
    "Faiss, these keys, inner product": Contender(lambda h, n: _faiss(h, n, h.keys, "ip")),
    "Faiss, these keys, L2 k-means": Contender(lambda h, n: _faiss(h, n, h.keys, "l2")),
    "Faiss, other contexts, inner product": Contender(lambda h, n: _faiss(h, n, h.train_keys, "ip")),
    "Faiss, other contexts, L2 k-means": Contender(lambda h, n: _faiss(h, n, h.train_keys, "l2")),
    "saapindex, these keys": Contender(lambda h, n: _ours(h, n, offline=False, adapt=False, dtype="float32")),
    "saapindex, these keys, float16": Contender(
        lambda h, n: _ours(h, n, offline=False, adapt=False, dtype="float16"), key_bytes=2
    ),
    "saapindex, other contexts, float16": Contender(
        lambda h, n: _ours(h, n, offline=True, adapt=False, dtype="float16"), key_bytes=2
    ),
    "saapindex, other contexts, adapted, float16": Contender(
        lambda h, n: _ours(h, n, offline=True, adapt=True, dtype="float16"), key_bytes=2
    ),
}
GROUPS = {
    "Faiss IVFFlat trained on these keys": ("Faiss, these keys",),
    "Faiss IVFFlat trained on other contexts": ("Faiss, other contexts",),
    "saapindex float32": ("saapindex, these keys",),
    "saapindex": ("saapindex,",),
}
"""The best of each group, head by head, is what the geometric mean is taken of."""


def _least(found: Callable[[int], float], nlist: int) -> int | None:
    """The smallest number of lists that reaches the target."""
    low, high = 1, nlist
    if found(high) < TARGET:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= TARGET else (middle + 1, high)
    return low


def equal_recall(head: Head, *, show: bool = True) -> dict[str, Any]:
    """Queries per second of every contender at the least number of lists that reaches the target recall."""
    truth, d = head.truth(), head.keys.shape[1]
    batch = np.resize(head.queries, (1000, d))
    points, searches = [], {}
    cases = [(name, nlist) for name, contender in CONTENDERS.items() for nlist in contender.nlists]
    for name, nlist in track(cases, head.name, show=show):
        at = CONTENDERS[name].make(head, nlist)

        def found(nprobe: int, at: Any = at) -> float:
            return recall(at(nprobe)[0](head.queries), truth)

        nprobe = _least(found, nlist)
        if nprobe is None:
            continue
        search, read = at(nprobe)
        keys = float(read(head.queries).mean())
        key = f"{name} / {nlist}"
        searches[key] = search
        points.append(
            {
                "key": key,
                "method": name,
                "nlist": nlist,
                "nprobe": nprobe,
                "recall": found(nprobe),
                "keys": keys,
                "bytes": keys * d * CONTENDERS[name].key_bytes + nlist * d * 4,
            }
        )
    many = paired({key: partial(search, batch) for key, search in searches.items()}, repeats=5)
    one = paired({key: singly(search, batch[:100]) for key, search in searches.items()}, repeats=5)
    for point in points:
        key = point.pop("key")
        point["batch 1000"], point["batch 1"] = 1000 / many[key], 100 / one[key]
    return {"head": head.name, "keys": len(head.keys), "queries": len(head.queries), "points": points}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over heads of the best of each group, and the ratios that matter."""
    best: dict[str, dict[str, float]] = {}
    for group, prefixes in GROUPS.items():
        best[group] = {}
        for batch in ("batch 1000", "batch 1"):
            logs = []
            for result in results:
                group_points = [
                    point
                    for point in result["points"]
                    if point["method"].startswith(prefixes)
                    and (group != "saapindex float32" or "float16" not in point["method"])
                ]
                logs.append(np.log(max(point[batch] for point in group_points)))
            best[group][batch] = float(np.exp(np.mean(logs)))
    these, others = (best[f"Faiss IVFFlat trained on {which}"] for which in ("these keys", "other contexts"))
    return {
        "queries per second": best,
        "times Faiss trained on these keys": {b: best["saapindex"][b] / these[b] for b in these},
        "times Faiss trained on other contexts": {b: best["saapindex"][b] / others[b] for b in others},
    }
