"""Recall against queries per second, keys read, build time and memory, beside the libraries people use.

Every method is built in several settings. Of each, the operating points are the cheapest that reach each
recall of `TARGETS`, found by bisection on what the setting has to tune (lists to visit, size of the beam).
All points of a data set are then timed in turn in one process on the same threads, round after round, so that
ratios hold where the machine's speed drifts.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pareto_data import Dataset, Vectors
from pareto_methods import OPTIONAL, Built, Method
from search import paired, singly

from saapindex.learn.curves import recall
from saapindex.progress import track

TARGETS = (0.8, 0.9, 0.95, 0.99)
KS = (10, 100)
TARGET, SERVED = 0.9, 10_000
"""The recall@10 that the summary compares at, and the queries that a build is shared by."""

Point = dict[str, Any]


def least(
    built: Built, queries: Vectors, truth: NDArray[np.int64], targets: tuple[float, ...]
) -> dict[int, float]:
    """Return the smallest values of the ladder that reach each target, and their recalls."""
    k, seen, chosen = truth.shape[1], {}, {}

    def at(place: int) -> float:
        if place not in seen:
            seen[place] = recall(built.search(queries, k, built.ladder[place]), truth)
        return seen[place]

    low, last = 0, len(built.ladder) - 1
    for target in targets:
        high, step = low, 1
        while at(high) < target and high < last:  # from below, since the top of the ladder reads everything
            low, high, step = min(high + 1, last), min(high + step, last), 2 * step
        if at(high) < target:
            break
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) >= target else (middle + 1, high)
        chosen[built.ladder[low]] = at(low)
    return chosen


def measure(
    data: Dataset,
    methods: list[Method],
    *,
    repeats: int,
    single: int,
    targets: tuple[float, ...] = TARGETS,
    limit: float = float("inf"),
    show: bool = True,
) -> dict[str, Any]:
    """Build every method on `data`, find its operating points and time them in turn.

    Methods whose turn to be built has not come after `limit` seconds are left out, and named.
    """
    begin, left_out = time.perf_counter(), []
    truths = {k: data.truth(k) for k in KS}
    points: list[Point] = []
    short: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    for method in track(methods, data.name, show=show):
        start = time.perf_counter()
        if start - begin > limit:
            left_out.append(f"{method.group}: {method.setting}")
            continue
        built = method.make(data)
        seconds = time.perf_counter() - start
        for k, truth in truths.items():
            reached = least(built, data.queries, truth, targets)
            if not reached:
                found = recall(built.search(data.queries, k, built.ladder[-1]), truth)
                short.append({"group": method.group, "setting": method.setting, "k": k, "most": float(found)})
            for value, found in reached.items():
                name = str(len(points))
                points.append(
                    {
                        "group": method.group,
                        "setting": method.setting,
                        "k": k,
                        "tuned": value,
                        "recall": round(float(found), 4),
                        "keys read": built.read(data.queries, k, value),
                        "build seconds": seconds,
                        "bytes a key": built.nbytes / len(data.keys),
                    }
                )
                search = partial(_search, built, k, value)
                runs[f"batch {name}"] = partial(search, data.queries)
                runs[f"single {name}"] = singly(search, data.queries[:single])
    times = paired(runs, repeats)
    for number, point in enumerate(points):
        point["queries/s, batch"] = len(data.queries) / times[f"batch {number}"]
        point["queries/s, batch 1"] = min(single, len(data.queries)) / times[f"single {number}"]
    sizes = {"keys": len(data.keys), "training queries": len(data.train), "queries": len(data.queries)}
    return {
        "name": data.name,
        "kind": data.kind,
        "d": data.keys.shape[1],
        **sizes,
        "points": points,
        "short of every target": short,
        "left out": left_out,
        "seconds": time.perf_counter() - begin,
    }


def _search(built: Built, k: int, value: int, queries: Vectors) -> Any:
    return built.search(queries, k, value)


def best(result: dict[str, Any], group: str, k: int = 10, key: str = "queries/s, batch") -> Point | None:
    """Return a group's fastest point of at least the target recall."""
    reached = [p for p in result["points"] if p["group"] == group and p["k"] == k and p["recall"] >= TARGET]
    return max(reached, key=lambda p: p[key], default=None)


def served(result: dict[str, Any], group: str) -> float | None:
    """Return the least seconds of a build and `SERVED` queries one by one, at the target recall@10."""
    reached = [p for p in result["points"] if p["group"] == group and p["k"] == 10 and p["recall"] >= TARGET]
    return min((p["build seconds"] + SERVED / p["queries/s, batch 1"] for p in reached), default=None)


def groups(results: list[dict[str, Any]]) -> list[str]:
    """Names of the groups, in order of appearance."""
    parts = ("points", "short of every target")
    return list(dict.fromkeys(p["group"] for result in results for part in parts for p in result[part]))


def _mean(values: list[Any]) -> float | None:
    """Geometric mean, None if one is missing."""
    known = [value for value in values if value is not None]
    return float(np.exp(np.mean(np.log(known)))) if known and len(known) == len(values) else None


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of the best point of each group, over the data sets of a kind where it has one."""
    out: dict[str, Any] = {}
    for kind in dict.fromkeys(result["kind"] for result in results):
        alike = [result for result in results if result["kind"] == kind]
        rows: dict[str, Any] = {}
        for group in groups(alike):
            row: dict[str, Any] = {}
            for k in KS:
                for key in ("queries/s, batch", "queries/s, batch 1"):
                    found = [best(result, group, k, key) for result in alike]
                    row[f"recall@{k}, {key}"] = _mean([p[key] for p in found if p])
            found = [best(result, group) for result in alike]
            row["data sets that reach it"] = sum(p is not None for p in found)
            for key in ("keys read", "build seconds", "bytes a key"):
                row[key] = _mean([p and p[key] for p in found if p])
            seconds = [served(r, group) for r in alike]
            row[f"seconds for the build and {SERVED} queries"] = _mean([s for s in seconds if s])
            rows[group] = row
        out[kind] = {"data sets": len(alike), "groups": rows, "ratios": _ratios(alike, list(rows))}
    return out


def _fastest(result: dict[str, Any], names: list[str], k: int, key: str) -> float | None:
    found = [best(result, name, k, key) for name in names]
    return max((point[key] for point in found if point is not None), default=None)


def _least_served(result: dict[str, Any], names: list[str]) -> float | None:
    found = [served(result, name) for name in names]
    return min((seconds for seconds in found if seconds is not None), default=None)


def _ratios(results: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """How many times faster the best of ours is than each other group, at the target recall.

    Geometric means, and the extremes, over the data sets where both reach it.
    """
    ours = [name for name in names if name.startswith("saapindex")]
    ratios: dict[str, Any] = {}
    for group in (name for name in names if name not in ours):
        ratios[group] = {}
        for k in KS:
            for key in ("queries/s, batch", "queries/s, batch 1"):
                pairs = [(_fastest(r, ours, k, key), _fastest(r, [group], k, key)) for r in results]
                ratios[group][f"recall@{k}, {key}"] = _spread([a / b for a, b in pairs if a and b])
        pairs = [(_least_served(r, [group]), _least_served(r, ours)) for r in results]
        key = f"seconds for the build and {SERVED} queries"
        ratios[group][key] = _spread([a / b for a, b in pairs if a and b])
    return ratios


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {"mean": _mean(values), "least": min(values), "most": max(values), "data sets": len(values)}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw recall@10 against queries per second, batched and one by one, a column for each kind."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result["kind"] for result in results))
    figure = Figure(figsize=(3.6 * len(kinds) + 0.6, 7.6), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False)
    names = groups(results)
    for column, kind in enumerate(kinds):
        result = next(result for result in results if result["kind"] == kind)
        for row, key in enumerate(("queries/s, batch", "queries/s, batch 1")):
            panel = panels[row][column]
            for number, group in enumerate(names):
                front = _front([p for p in result["points"] if p["group"] == group and p["k"] == 10], key)
                style = "-o" if group.startswith("saapindex") else "--s"
                panel.plot(
                    [p["recall"] for p in front],
                    [p[key] for p in front],
                    style,
                    color=f"C{number}",
                    markersize=4,
                    linewidth=2.2 if group.startswith("saapindex") else 1.2,
                    label=group,
                )
            panel.set_yscale("log")
            panel.set(xlabel="recall@10", ylabel=key if not column else "")
            panel.grid(alpha=0.3, which="both")
            if not row:
                panel.set_title(f"{result['name']}\n{result['keys']:,} keys", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(names)), frameon=False)
    figure.savefig(path, dpi=110)


def _front(points: list[Point], key: str) -> list[Point]:
    """Points that none of the same group beats in both recall and speed."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p["recall"], -p[key])):
        if not kept or point[key] > kept[-1][key]:
            kept.append(point)
    return kept


def missing(found: dict[str, str | None]) -> list[str]:
    """Names of the optional methods that are not installed."""
    return [name for package, name in OPTIONAL.items() if found[package] is None]
