"""``saapindex evaluate``: methods of sparse attention at equal bytes, on traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from saapindex.codebook import FORMAT
from saapindex.errors import InvalidInputError
from saapindex.files import read_header, write_whole

__all__ = ["evaluate"]

T = TypeVar("T")


def _numbers(text: str, name: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InvalidInputError(f"{name} is {text!r}, expected {what} with commas between") from error


def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CODEBOOK] TRACES...",
            help="A codebook, for the library's own method, and test traces, or folders of them.",
        ),
    ],
    train: Annotated[
        list[Path] | None,
        typer.Option(help="Training traces or folders, for methods that learn; repeatable."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between; default: all that can run.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Shares of the bytes.")] = "0.01,0.02,0.05,0.1,0.2",
    mode: Annotated[str, typer.Option(help="group, per_head or both.")] = "both",
    heads: Annotated[str | None, typer.Option(help="KV heads with commas between; default: all.")] = None,
    sinks: Annotated[int, typer.Option(help="First positions, always attended.")] = 1,
    window: Annotated[int, typer.Option(help="Recent positions, always attended.")] = 2047,
    span: Annotated[int, typer.Option(help="Queries come from this many last positions.")] = 2048,
    max_queries: Annotated[int, typer.Option(help="Queries a head, evenly spaced.")] = 128,
    tune: Annotated[bool, typer.Option(help="Choose settings on a held-out training sequence.")] = True,
    tune_layers: Annotated[
        str | None, typer.Option(help="Layers that choose settings, with commas between; default: all.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, pareto.png, report.html.")] = Path(
        "evaluation"
    ),
    per_head: Annotated[bool, typer.Option(help="Print the table of every head too.")] = False,
) -> None:
    """Compare methods of sparse attention with dense attention, at equal shares of the bytes read."""
    from saapindex.learn.evaluation import MODES, Protocol
    from saapindex.learn.evaluation import evaluate as run
    from saapindex.learn.evaluation.page import html_page
    from saapindex.learn.evaluation.plots import pareto_png
    from saapindex.learn.evaluation.tables import report_tables, rich_table

    codebooks = [path for path in paths if path.is_file() and read_header(path)[1]["format"] == FORMAT]
    if len(codebooks) > 1:
        raise InvalidInputError(f"{len(codebooks)} codebooks are given, expected one at most")
    traces = [path for path in paths if path not in codebooks]
    if mode not in (*MODES, "both"):
        raise InvalidInputError(f"mode is {mode!r}, expected 'group', 'per_head' or 'both'")
    report = run(
        traces,
        train or [],
        methods=None if methods is None else [name.strip() for name in methods.split(",")],
        codebook=codebooks[0] if codebooks else None,
        budgets=_numbers(budgets, "budgets", float),
        modes=[each for each in MODES if mode in (each, "both")],
        protocol=Protocol(sinks=sinks, window=window, span=span, max_queries=max_queries),
        heads=None if heads is None else _numbers(heads, "heads", int),
        tune=tune,
        tune_layers=None if tune_layers is None else _numbers(tune_layers, "tune_layers", int),
        device=device,
    )
    out.mkdir(parents=True, exist_ok=True)
    plot = pareto_png(report)
    report.write_json(out / "report.json")
    write_whole(out / "pareto.png", plot)
    write_whole(out / "report.html", html_page(report, plot).encode())
    console = Console()
    for table in report_tables(report, per_head=per_head):
        console.print(rich_table(table))
    for name, reason in report.skipped.items():
        console.print(f"Not run: {name}: {reason}", highlight=False)
    console.print(f"Written to {out}: report.json, pareto.png, report.html.", highlight=False)
