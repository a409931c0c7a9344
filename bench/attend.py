"""One decode step of attention over all heads of a layer, beside torch's dense attention on the same tensors.

::

    python bench/attend.py                # a quarter of an hour; results in bench/results/attend.json
    python bench/attend.py --repeats 5 --longest 8192

The tensors are made up: keys in clusters of very different sizes, turned by the rotary embedding of a model,
and queries that look for some of the clusters. What is compared takes turns in one process, with as many
threads each. Dense attention is torch's `scaled_dot_product_attention` with one query, in the type in which
it is fastest here.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import saapindex
from saapindex.attention import AttentionIndex, LayerCodebook, fit_layer
from saapindex.backends.cpu import step, tasks
from saapindex.params import default_nlist
from saapindex.progress import track
from saapindex.rope import Rope

RESULTS = Path(__file__).parent / "results"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STAGES = ("plan, a third of near", "scan", "choose, the rest of near", "fetch", "rest", "merge")
CONTEXT, BUDGET, QUERIES = 32_768, 0.05, 16
FLUSHED = 40 << 20
LENGTHS = [1 << i for i in range(10, 17)]
console = Console()


@dataclass(frozen=True)
class Shape:
    """A layer: its heads, and the base of its rotary embedding."""

    name: str
    kv_heads: int
    group: int
    d: int
    theta: float


SHAPES = [Shape("SmolLM2-135M", 3, 3, 64, 1e5), Shape("Llama-3.1-8B", 8, 4, 128, 5e5)]


class Layer:
    """Keys, values and queries of a made-up layer, and a codebook from another context of the same model."""

    def __init__(self, shape: Shape, n: int) -> None:
        self.shape, self.n = shape, n
        self.rng = np.random.default_rng(n)
        self.rope = Rope(theta=shape.theta, dim=shape.d)
        model = np.random.default_rng(0)
        self.centres = model.standard_normal((shape.kv_heads, 512, shape.d)) * 0.98 ** np.arange(shape.d)
        self.shares = model.dirichlet(np.full(512, 0.3))
        sample = min(n, 16_384)
        self.codebook: LayerCodebook = fit_layer(
            self._keys(sample), self._queries(sample, 256), default_nlist(n), niter=5
        )
        self.keys = torch.from_numpy(self._keys(n)[None])
        self.values = torch.from_numpy(self.rng.standard_normal(self.keys.shape, dtype=np.float32))
        queries = self._queries(n, QUERIES).transpose(1, 0, 2)
        self.queries = torch.from_numpy(np.ascontiguousarray(queries))

    def _turned(self, x: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.stack([self.rope.rotate(rows.astype(np.float32), positions) for rows in x])

    def _keys(self, n: int) -> NDArray[np.float32]:
        label = self.rng.choice(512, n, p=self.shares)
        x = self.centres[:, label] + self.rng.standard_normal((self.shape.kv_heads, n, self.shape.d))
        return self._turned(x, np.arange(n))

    def _queries(self, position: int, m: int) -> NDArray[np.float32]:
        """Queries of all heads, (q_heads, m, d); those that share a KV head look for the same cluster."""
        heads, g, d = self.shape.kv_heads, self.shape.group, self.shape.d
        wanted = self.centres[np.arange(heads)[:, None], self.rng.integers(512, size=(heads, m))]
        x = 1.5 * wanted[:, None] + self.rng.standard_normal((heads, g, m, d))
        return self._turned(x.reshape(heads * g, m, d), np.full(m, position))

    @functools.cache  # noqa: B019, a layer lives for one measurement
    def index(self, dtype: str) -> AttentionIndex:
        """Return an index that holds the keys; fork it to add more."""
        index = AttentionIndex(self.codebook, dense_below=0)
        kind = TYPES[dtype]
        index.add(self.keys.to(kind), self.values.to(kind))
        return index

    def dense(self, dtype: str) -> Callable[[int], Any]:
        """Return torch's attention for one of the queries."""
        kind = TYPES[dtype]
        keys, values, queries = (x.to(kind) for x in (self.keys, self.values, self.queries))

        def run(i: int) -> Any:
            query = queries[i % QUERIES][None, :, None]
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return run

    def sparse(self, dtype: str, budget: float) -> Callable[[int], Any]:
        """Return a step of the library for one of the queries."""
        index, queries = self.index(dtype), self.queries.to(TYPES[dtype])
        return lambda i: index.attend(queries[i % QUERIES][None], budget=budget)


def in_turn(runs: Mapping[str, Callable[[int], Any]], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Run everything `repeats` times, one after the other; return microseconds of each.

    Before each, other memory is read and written: caches are cold, as where the layers of a model take turns,
    and the threads of what ran before have come to rest. The pause after it keeps a busy machine from taking
    the core away just then.
    """
    other = np.zeros(FLUSHED // 4, np.float32)
    times = {name: np.empty(repeats) for name in runs}
    for run in runs.values():
        run(0)
    for i in range(repeats):
        for name, run in runs.items():
            other += 1
            time.sleep(0.005)
            start = time.perf_counter()
            run(i)
            times[name][i] = 1e6 * (time.perf_counter() - start)
    return times


def spread(times: NDArray[np.float64]) -> dict[str, float]:
    """Microseconds: the median and the fastest."""
    return {"median": round(float(np.median(times)), 1), "fastest": round(float(times.min()), 1)}


def best_type(layer: Layer) -> str:
    """Return the type in which torch's attention is fastest here."""
    found = {name: float(in_turn({name: layer.dense(name)}, 3)[name].min()) for name in TYPES}
    return min(found, key=lambda name: found[name])


def against_dense(layer: Layer, dtype: str, repeats: int) -> dict[str, Any]:
    """One step of the library in every type, and torch's in its best."""
    runs = {name: layer.sparse(name, BUDGET) for name in TYPES}
    times = in_turn({**runs, "torch": layer.dense(dtype)}, repeats)
    return {
        "shape": asdict(layer.shape),
        "keys": layer.n,
        "lists": layer.codebook.nlist,
        "torch in": dtype,
        "microseconds": {name: spread(found) for name, found in times.items()},
        "times faster": {
            name: {
                "median of pairs": round(float(np.median(times["torch"] / times[name])), 1),
                "fastest": round(float(times["torch"].min() / times[name].min()), 1),
            }
            for name in TYPES
        },
    }


def by_stage(layer: Layer, dtype: str, repeats: int) -> dict[str, Any]:
    """Microseconds of each stage of a step, in one thread and in all of them, and of the call around them."""
    index, queries = layer.index(dtype), layer.queries.to(TYPES[dtype])
    jobs: list[Any] = []
    held: list[Any] = []
    module: Any = step
    run_job, attend_once = module.run_job, module.attend_once

    def keep(*job: Any) -> None:
        jobs.append(job)
        run_job(*job)

    def hold(*arguments: Any) -> None:
        attend_once(*arguments)
        held.extend((arguments, step.take_memory()))  # what the stages read and write from now on

    try:
        module.run_job, module.attend_once = keep, hold
        index.attend(queries[:1], budget=BUDGET)
    finally:
        module.run_job, module.attend_once = run_job, attend_once
    do, record, counts, _ = jobs[0]
    threads = numba.get_num_threads()
    one_stage = {name: np.where(np.arange(tasks.STAGES) == i, counts, 0) for i, name in enumerate(STAGES)}
    found: dict[str, Any] = {"type": dtype, "tasks": dict(zip(STAGES, counts.tolist(), strict=True))}
    for title, number in (("one thread", 1), (f"{threads} threads", threads)):
        runs = {
            name: lambda _, some=some, number=number: run_job(do, record, some, number - 1)
            for name, some in {**one_stage, "all": counts}.items()
        }
        found[title] = {name: spread(times) for name, times in in_turn(runs, repeats).items()}
    call = in_turn({"call": lambda i: index.attend(queries[i % QUERIES][None], budget=BUDGET)}, repeats)
    held.clear()
    return {**found, "whole call": spread(call["call"])}


def adding(layer: Layer, dtype: str, steps: int) -> dict[str, Any]:
    """Microseconds that adding one token takes: most of the time, and on average with what enters lists."""
    index, kind = layer.index(dtype).fork(), TYPES[dtype]
    tokens = [
        (layer.keys[:, :, i : i + 1].to(kind), layer.values[:, :, i : i + 1].to(kind)) for i in range(64)
    ]
    times = in_turn({"add": lambda i: index.add(*tokens[i % 64])}, steps)["add"]
    return {"type": dtype, "tokens": steps, **spread(times), "mean": round(float(times.mean()), 1)}


def crossover(
    shape: Shape, dtype: str, dense: str, lengths: list[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Sparse steps, dense steps over the same pages, and torch's, at every length."""
    for n in track(lengths, f"lengths, {shape.name}"):
        layer = Layer(shape, n)
        runs = {
            "sparse": layer.sparse(dtype, BUDGET),
            "dense": layer.sparse(dtype, 1.0),
            "torch": layer.dense(dense),
        }
        times = in_turn(runs, repeats)
        yield {
            "keys": n,
            "microseconds": {name: spread(found) for name, found in times.items()},
            "sparse over dense": round(float(np.median(times["sparse"] / times["dense"])), 3),
            "sparse over torch": round(float(np.median(times["sparse"] / times["torch"])), 3),
        }


def machine(threads: int) -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "saapindex": saapindex.__version__,
        **{package: version(package) for package in ("numba", "numpy", "torch")},
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    table = Table(
        title=f"one step at {CONTEXT} keys, {BUDGET:.0%} of the bytes: microseconds, median (fastest)"
    )
    for column in ("layer", *TYPES, "torch", "times faster"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for case in result["steps"]:
        cells = [f"{x['median']:.0f} ({x['fastest']:.0f})" for x in case["microseconds"].values()]
        faster = ", ".join(f"{x['median of pairs']} ({x['fastest']})" for x in case["times faster"].values())
        table.add_row(case["shape"]["name"], *cells, faster)
    console.print(table)
    table = Table(title="length: microseconds, median (fastest)")
    for column in ("layer", "keys", "sparse", "dense", "torch"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, rows in result["crossover"].items():
        for row in rows:
            cells = [f"{x['median']:.0f} ({x['fastest']:.0f})" for x in row["microseconds"].values()]
            table.add_row(name, str(row["keys"]), *cells)
    console.print(table)
    console.print_json(json.dumps({"stages": result["stages"], "add": result["add"]}))


def main(
    threads: Annotated[int, typer.Option(help="For every method.")] = 2,
    repeats: Annotated[int, typer.Option(help="Steps of each method.")] = 40,
    longest: Annotated[int, typer.Option(help="Last length of the crossover.")] = LENGTHS[-1],
) -> None:
    """Measure, print and write down."""
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    result: dict[str, Any] = {"machine": machine(threads), "budget": BUDGET, "steps": []}
    result |= {"stages": {}, "add": {}, "crossover": {}}
    for shape in SHAPES:
        layer = Layer(shape, CONTEXT)
        dense = best_type(layer)
        result["steps"].append(against_dense(layer, dense, repeats))
        result["stages"][shape.name] = by_stage(layer, "float16", 5 * repeats)
        result["add"][shape.name] = adding(layer, "float16", 1024)
        write(result)
        del layer
        result["crossover"][shape.name] = rows = []
        for row in crossover(shape, "float16", dense, [n for n in LENGTHS if n <= longest], repeats):
            rows.append(row)
            write(result)
    show(result)


def write(result: dict[str, Any]) -> None:
    """Write down what has been measured so far."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attend.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
