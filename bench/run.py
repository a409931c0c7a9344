"""Benchmarks. Each command prints a table and writes ``bench/results/<command>.json`` and a picture.

::

    python bench/run.py same-lists --traces traces   # traces from: python bench/capture.py search ...
    python bench/run.py search --traces traces
    python bench/run.py stages --traces traces
    python bench/run.py pareto --traces pareto-traces   # captured by saapindex capture: see docs/search.md
    python bench/run.py training-queries --traces pareto-traces
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import run_pareto
import search as search_bench
import typer
from reporting import RESULTS, console, machine, save, use_threads
from rich.table import Table

from saapindex.learn import read_trace

Traces = Annotated[Path, typer.Option(help="Where bench/capture.py search wrote.")]
Threads = Annotated[int, typer.Option(help="For every method.")]
app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
app.add_typer(run_pareto.app)


def _heads(traces: Path) -> list[search_bench.Head]:
    heads = list(search_bench.heads(traces))
    if not heads:
        raise typer.BadParameter(f"{traces} holds no traces: run bench/capture.py search first")
    return heads


@app.command()
def same_lists(traces: Traces = Path("traces"), threads: Threads = 2) -> None:
    """Search and build with the very lists of a Faiss IVFFlat: only the code differs."""
    use_threads(threads)
    demo = search_bench.make_head(
        "shipped trace",
        read_trace(search_bench.DATA / "test.safetensors"),
        [read_trace(search_bench.DATA / "train.safetensors")],
        0,
    )
    heads = _heads(traces)
    cases = [
        search_bench.same_lists(demo, 256, (4, 16, 64)),
        search_bench.same_lists(heads[len(heads) // 2], 1024, (8, 32, 128)),
    ]
    save("same-lists", {"machine": machine(threads), "cases": cases})
    for case in cases:
        _print_same(case)


@app.command()
def search(traces: Traces = Path("traces"), threads: Threads = 2) -> None:
    """Queries per second beside the real Faiss at equal recall, on many attention heads."""
    use_threads(threads)
    equal = [search_bench.equal_recall(head) for head in _heads(traces)]
    summary = search_bench.summary(equal)
    save("search", {"machine": machine(threads), "equal recall": equal, "summary": summary})
    console.print(_equal_table(equal))
    console.print_json(json.dumps(summary))
    _draw(equal, RESULTS / "search.png")


@app.command()
def stages(traces: Traces = Path("traces")) -> None:
    """Where the time of a search goes: routing and scanning on one core."""
    heads = _heads(traces)
    cases = [search_bench.stages(heads[len(heads) // 2], 512, 28, dtype) for dtype in ("float32", "float16")]
    save("stages", {"machine": machine(1), "cases": cases})
    table = Table(title=f"{cases[0]['head']}, 512 lists, 28 visited: microseconds of one core a query")
    for name in ("keys", "keys read", "route", "scan", "search", "scan, GB/s"):
        table.add_column(name, justify="right")
    for case in cases:
        times = [f"{case['microseconds'][name]:.1f}" for name in ("route", "scan", "search")]
        table.add_row(case["dtype"], f"{case['keys']:.0f}", *times, f"{case['scan GB/s']:.1f}")
    console.print(table)


def _print_same(case: dict[str, Any]) -> None:
    build = case["build seconds"]
    table = Table(
        title=f"{case['head']}, {case['keys']} keys in the same {case['nlist']} lists: thousand queries/s",
        caption=f"build {build['saapindex']:.2f} s, {build['saapindex'] / build['faiss']:.2f} times Faiss's",
    )
    for name in ("nprobe", "keys read", "batch", "Faiss", "float32", "ratio", "float16", "ratio"):
        table.add_column(name, justify="right")
    for row in case["rows"]:
        for batch in ("batch 1", "batch 1000"):
            speed = row[batch]
            cells = [
                f"{row['nprobe']}",
                f"{row['keys']:.0f}",
                batch.split()[1],
                f"{speed['faiss'] / 1e3:.1f}",
            ]
            for dtype in ("float32", "float16"):
                cells += [f"{speed[dtype] / 1e3:.1f}", f"{speed[dtype] / speed['faiss']:.2f}"]
            table.add_row(*cells)
    console.print(table)


def _equal_table(equal: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"recall@10 of {search_bench.TARGET}: best setting of each, geometric mean over heads"
    )
    for name in ("method", "queries/s, batch 1000", "queries/s, batch 1", "keys read", "kB read"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in search_bench.CONTENDERS:
        best = []
        for result in equal:
            points = [point for point in result["points"] if point["method"] == method]
            if points:
                best.append(max(points, key=lambda point: point["batch 1000"]))
        if len(best) < len(equal):
            table.add_row(method, f"reached by {len(best)} of {len(equal)} heads")
            continue
        means = [
            np.exp(np.mean(np.log([p[key] for p in best])))
            for key in ("batch 1000", "batch 1", "keys", "bytes")
        ]
        table.add_row(
            method, f"{means[0]:.0f}", f"{means[1]:.0f}", f"{means[2]:.0f}", f"{means[3] / 1e3:.0f}"
        )
    return table


def _draw(equal: list[dict[str, Any]], path: Path) -> None:
    """Draw the best queries per second of each group, head by head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panel = figure.subplots()
    groups = ("Faiss, other contexts", "Faiss, these keys", "saapindex,")
    labels = ("Faiss IVFFlat, trained on other contexts", "Faiss IVFFlat, trained on these keys", "saapindex")
    for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
        heights = [
            max(p["batch 1000"] for p in result["points"] if p["method"].startswith(group)) / 1e3
            for result in equal
        ]
        panel.bar(
            np.arange(len(equal)) + 0.27 * (i - 1), heights, 0.27, label=label, color=("C7", "C0", "C3")[i]
        )
    panel.set_xticks(range(len(equal)), [result["head"].replace(" head ", "\nhead ") for result in equal])
    panel.set(
        ylabel="thousand queries per second", title="recall@10 of 0.9, batches of 1000, best setting of each"
    )
    panel.legend()
    panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    app()
