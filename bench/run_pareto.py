"""The commands of ``bench/run.py`` that compare whole libraries: ``pareto`` and ``training-queries``."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import keys_read as reading
import pareto as bench
import pareto_data as sources
import pareto_methods
import training_queries as shifted
import typer
from reporting import RESULTS, console, machine, save, use_threads
from rich.table import Table

app = typer.Typer()
Traces = Annotated[Path, typer.Option(help="Where saapindex capture wrote train/ and test/.")]


@app.command()
def pareto(
    traces: Traces = Path("traces"),
    threads: Annotated[int, typer.Option(help="For every method.")] = 2,
    heads: Annotated[list[int], typer.Option(help="KV heads of each layer.")] = [0, 1, 2],  # noqa: B006
    together: Annotated[list[int], typer.Option(help="Heads searched in all contexts.")] = [0, 1, 2],  # noqa: B006
    keys: Annotated[int, typer.Option(help="Of the made-up data sets.")] = 200_000,
    queries: Annotated[int, typer.Option(help="Asked of each data set, at most.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Timings of each point; the median counts.")] = 5,
    single: Annotated[int, typer.Option(help="Queries that are timed one by one.")] = 100,
    degrees: Annotated[list[int], typer.Option(help="M of the graphs.")] = [16, 32],  # noqa: B006
    lists: Annotated[list[int], typer.Option(help="Numbers of lists.")] = [256, 512, 1024],  # noqa: B006
) -> None:
    """Recall against speed, keys read, build time and memory, beside Faiss, HNSW and others."""
    use_threads(threads)
    found = pareto_methods.installed()
    for name in bench.missing(found):
        console.print(f"{name} is not installed: pip install 'saapindex[bench]' compares it too")
    chosen = list(pareto_methods.methods(tuple(lists), tuple(degrees), threads))
    warm = sources.in_distribution(4096, 2048, 64, 64)
    bench.measure(warm, list(pareto_methods.methods((16, 32), (8,), threads)), repeats=1, single=2)
    results = []
    for data in _datasets(traces, tuple(heads), tuple(together), keys, queries):
        results.append(bench.measure(data, chosen, repeats=repeats, single=single))
        summary = bench.summary(results)
        save(
            "pareto",
            {
                "machine": {**machine(threads), **found},
                "command": " ".join(["python", *sys.argv]),
                "missing": bench.missing(found),
                "summary": summary,
                "data sets": results,
            },
        )
        bench.draw(results, RESULTS / "pareto.png")
    for kind, part in bench.summary(results).items():
        console.print(_table(kind, part))
        console.print_json(json.dumps(part["ratios"]))


def _datasets(
    traces: Path, heads: tuple[int, ...], together: tuple[int, ...], keys: int, queries: int
) -> Iterator[sources.Dataset]:
    """Yield one data set of each kind in turn, so that a run that is cut short has some of each."""
    kinds = (
        sources.attention(traces, heads, queries, together=False),
        iter([sources.text_to_image_like(keys, 20_000, queries)]),
        iter([sources.in_distribution(keys, 20_000, queries)]),
        sources.attention(traces, together, queries, together=True),
    )
    for turn in itertools.zip_longest(*kinds):
        yield from (data for data in turn if data is not None)


def _table(kind: str, part: dict[str, Any]) -> Table:
    table = Table(title=f"{kind}: best point of recall@10 >= {bench.TARGET}, means over {part['data sets']}")
    columns = {
        "queries/s, batch": ("recall@10, queries/s, batch", 0),
        "one by one": ("recall@10, queries/s, batch 1", 0),
        "recall@100, batch": ("recall@100, queries/s, batch", 0),
        "keys read": ("keys read", 0),
        "build, s": ("build seconds", 2),
        "bytes a key": ("bytes a key", 0),
        "build and 10,000, s": (f"seconds for the build and {bench.SERVED} queries", 2),
    }
    table.add_column("index")
    for name in columns:
        table.add_column(name, justify="right")
    for group, row in part["groups"].items():
        cells = [row[key] for key, _ in columns.values()]
        digits = [digits for _, digits in columns.values()]
        table.add_row(
            group,
            *("-" if x is None else f"{x:.{n}f}" for x, n in zip(cells, digits, strict=True)),
        )
    return table


@app.command()
def training_queries(traces: Traces = Path("traces"), threads: int = 2, keys: int = 50_000) -> None:
    """How the gain depends on the number of training queries, and on their shift from the test queries."""
    use_threads(threads)
    result = {"machine": machine(threads), **shifted.measure(traces, keys)}
    save("training-queries", result)
    for title, rows in (("Number of training queries", result["number"]), ("Shift", result["shift"])):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))
        console.print(table)
    shifted.draw(result, RESULTS / "training-queries.png")


@app.command()
def keys_read(
    traces: Traces = Path("traces"),
    threads: int = 2,
    heads: Annotated[list[int], typer.Option(help="KV heads of each layer.")] = [0, 1, 2],  # noqa: B006
    keys: int = 50_000,
    queries: int = 500,
    lists: Annotated[list[int], typer.Option(help="Numbers of lists.")] = [256, 1024],  # noqa: B006
) -> None:
    """Keys that saapindex and Faiss IVFFlat must read for a recall: the speed-up without a clock."""
    use_threads(threads)
    rows = []
    for data in _datasets(traces, tuple(heads), tuple(heads), keys, queries):
        rows += reading.measure(data, tuple(lists))
        save("keys-read", {"machine": machine(threads), "summary": reading.summary(rows), "rows": rows})
    means = reading.summary(rows)
    table = Table(*means[0], title="Keys read a query, geometric means")
    for row in means:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
