"""What the commands of `fidelity.py` share: which traces there are, and where results go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from saapindex.learn.evaluation import Protocol, Record, summarise
from saapindex.learn.evaluation.report import device_name, versions

RESULTS = Path(__file__).parent / "results"
LAYERS = tuple(range(1, 30, 3))
"""Ten layers of three KV heads each."""
ALL = ",".join(map(str, LAYERS))
FEW = "4,13,25"
"""Layers on which settings are compared."""
SHORT, LONG, YOUNG = 32768, 131072, 8192
CONTEXTS = {
    "train": SHORT,
    "valid": SHORT,
    "test": SHORT,
    "shift": SHORT,
    "train-long": LONG,
    "test-long": LONG,
}
"""Tokens of a sequence of each part of the texts."""
FEW_QUERIES = Protocol(max_queries=64)
BUDGETS = (0.02, 0.05, 0.1)
WHOLE_BUDGETS = (0.02, 0.05, 0.1, 0.15, 0.2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Traces = Annotated[Path, typer.Option(help="Folder of the traces.")]
Layers = Annotated[str, typer.Option(help="Numbers of layers with commas between.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def numbers(text: str) -> list[int]:
    """Read numbers with commas between."""
    return [int(part) for part in text.split(",")]


def files(traces: Path, part: str, layers: Iterable[int]) -> list[Path]:
    """Return the traces of one part, sequence by sequence."""
    return [
        path for layer in layers for path in sorted((traces / part).glob(f"*/layer-{layer:02d}.safetensors"))
    ]


def write(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a result with device and versions."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {**content, "device": device_name(torch.device(DEVICE)), "versions": versions()}
    (out / name).write_text(json.dumps(whole, indent=1) + "\n")


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of a result as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)


def means(records: Iterable[Record], *by: str) -> list[dict[str, Any]]:
    """Return mean error, recall and bytes of records that agree in some fields."""
    rows = []
    for summary in summarise(records, *by):
        part = dict(zip(by, summary.key, strict=True))
        more = {name: getattr(summary, name) for name in ("error", "error_p90", "mass", "recall_10", "bytes")}
        rows.append({**part, **more, "heads": summary.count})
    return rows


def held_out(traces: Path) -> list[str]:
    """Return the names of the sequences that training holds out."""
    kernel = ("dev-tools", "hwmon")
    return sorted(path.name for path in (traces / "train").iterdir() if path.name.startswith(kernel))


def split(traces: Path, layers: Iterable[int]) -> tuple[list[Path], list[Path]]:
    """Return traces to train on, and those held out."""
    kept = set(held_out(traces))
    found = files(traces, "train", layers)
    return [p for p in found if p.parent.name not in kept], [p for p in found if p.parent.name in kept]
