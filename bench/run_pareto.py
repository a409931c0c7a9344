"""The commands of ``bench/run.py`` that compare whole libraries: ``pareto`` and ``training-queries``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import keys_read as reading
import pareto as bench
import pareto_data as sources
import pareto_jobs
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
    threads: Annotated[int, typer.Option(help="For every method.")] = 1,
    heads: Annotated[list[int], typer.Option(help="KV heads of each layer.")] = [0, 1, 2],  # noqa: B006
    together: Annotated[list[int], typer.Option(help="Heads searched in all contexts.")] = [0, 1, 2],  # noqa: B006
    keys: Annotated[int, typer.Option(help="Of the made-up data sets.")] = 200_000,
    queries: Annotated[int, typer.Option(help="Asked of each data set, at most.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Timings of each point; the median counts.")] = 5,
    single: Annotated[int, typer.Option(help="Queries that are timed one by one.")] = 100,
    targets: Annotated[list[float], typer.Option(help="Recalls to be reached.")] = list(bench.TARGETS),  # noqa: B006
    degrees: Annotated[list[int], typer.Option(help="M of the graphs.")] = [16, 32],  # noqa: B006
    lists: Annotated[list[int], typer.Option(help="Lists, below 100,000 keys.")] = [256, 512, 1024],  # noqa: B006
    many_lists: Annotated[list[int], typer.Option(help="The same, from 100,000 keys.")] = [512, 1024, 2048],  # noqa: B006
    many_degrees: Annotated[list[int], typer.Option(help="The same, from 100,000 keys; 0 for none.")] = [16],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Data sets at once, on processors of their own.")] = 1,
    limit: Annotated[float, typer.Option(help="Seconds after which what is not measured is left out.")] = 1e9,
    kinds: Annotated[list[str], typer.Option(help="Of data sets; all unless given.")] = [],  # noqa: B006
    groups: Annotated[list[str], typer.Option(help="Of methods, by name; all unless given.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="Of the files of results.")] = "pareto",
    only: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Recall against speed, keys read, build time and memory, beside Faiss, HNSW and others."""
    found = pareto_methods.installed()
    if unknown := [kind for kind in kinds if kind not in sources.KINDS]:
        raise typer.BadParameter(f"no kind of data set is {unknown[0]!r}: one of {', '.join(sources.KINDS)}")
    if unknown := [group for group in groups if group not in pareto_methods.GROUPS]:
        raise typer.BadParameter(f"no method is {unknown[0]!r}: one of {', '.join(pareto_methods.GROUPS)}")
    chosen = _datasets(traces, tuple(heads), tuple(together), keys, queries)
    makers = [make for kind, make in chosen if kind in (kinds or sources.KINDS)]
    if not makers:
        raise typer.BadParameter(f"{traces} holds no traces of {', '.join(kinds)}: see docs/search.md")
    parts = [RESULTS / "parts" / f"{name}-{number}.json" for number in range(len(makers))]
    parts[0].parent.mkdir(exist_ok=True)
    if only >= 0:
        use_threads(threads)
        data = makers[only]()
        small = len(data.keys) < 100_000
        nlists, ms = tuple(lists if small else many_lists), tuple(degrees if small else many_degrees)
        result = bench.measure(
            data,
            _methods(nlists, ms, threads, groups),
            repeats=repeats,
            single=single,
            targets=tuple(sorted(targets)),
            limit=limit / 2,
        )
        parts[only].write_text(json.dumps(result))
        return
    for absent in bench.missing(found):
        console.print(f"{absent} is not installed: pip install 'saapindex[bench]' compares it too")
    use_threads(threads)
    warm = sources.in_distribution(4096, 2048, 64, 64)  # kernels are compiled once, for all processes
    bench.measure(warm, _methods((16, 32), (8,), threads, groups), repeats=1, single=2)
    commands = [[*sys.argv, "--only", str(number)] for number in range(len(makers))]
    results = pareto_jobs.run(commands, parts, jobs, limit)
    save(
        name,
        {
            "machine": {**machine(threads), **found},
            "command": " ".join(["python", *sys.argv]),
            "missing": bench.missing(found),
            "summary": bench.summary(results),
            "data sets": results,
        },
    )
    bench.draw(results, RESULTS / f"{name}.png")
    for kind, part in bench.summary(results).items():
        console.print(_table(kind, part))
        console.print_json(json.dumps(part["ratios"]))


def _methods(
    nlists: tuple[int, ...], degrees: tuple[int, ...], threads: int, groups: list[str]
) -> list[pareto_methods.Method]:
    """Every method of `groups`, of all where none is given."""
    methods = pareto_methods.methods(nlists, degrees, threads)
    return [method for method in methods if method.group in (groups or pareto_methods.GROUPS)]


def _datasets(
    traces: Path, heads: tuple[int, ...], together: tuple[int, ...], keys: int, queries: int
) -> Iterator[tuple[str, Callable[[], sources.Dataset]]]:
    """Yield the kind of each data set and what makes it, the largest first, so that none is waited for."""
    one, all_, image, inside = sources.KINDS
    yield from ((all_, make) for make in sources.attention(traces, together, queries, together=True))
    yield image, partial(sources.text_to_image_like, keys, 20_000, queries)
    yield inside, partial(sources.in_distribution, keys, 20_000, queries)
    yield from ((one, make) for make in sources.attention(traces, heads, queries, together=False))


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
    for _, make in _datasets(traces, tuple(heads), tuple(heads), keys, queries):
        rows += reading.measure(make(), tuple(lists))
        save("keys-read", {"machine": machine(threads), "summary": reading.summary(rows), "rows": rows})
    means = reading.summary(rows)
    table = Table(*means[0], title="Keys read a query, geometric means")
    for row in means:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
