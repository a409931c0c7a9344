"""``saapindex info``: say what a file holds, or a folder of traces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from saapindex.files import read_header
from saapindex.learn.traces import find_traces, read_trace_header

__all__ = ["describe", "info"]

_UNSHOWN = {"format", "version", "checksum", "row_checksums", "tensors"}


def info(
    path: Annotated[Path, typer.Argument(help="A trace, an index, a codebook, or a folder of traces.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a file holds, or which traces are in a folder."""
    described = describe(path)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        _show(path, described, Console())


def describe(path: str | Path) -> dict[str, Any]:
    """Return what the file at `path` says of itself, or the traces in a folder.

    Parameters
    ----------
    path
        Any file of this library, or a folder in which `find_traces` finds traces.

    Returns
    -------
    dict
        Of a file: its header, with ``tensors``, dtype and shape by name, and ``nbytes``. Of a folder:
        ``format``, and ``sequences`` by name, each with its ``layers``, ``nbytes``, and the ``info`` of its
        first trace. JSON can hold it.

    Raises
    ------
    FileFormatError
        If the file is no whole file of this library.
    InvalidInputError
        If the folder holds no traces.
    OSError
        If it cannot be read at all.

    Examples
    --------
    >>> from importlib.resources import files
    >>> described = describe(str(files("saapindex") / "data" / "test.safetensors"))
    >>> described["format"], described["info"]["layer"], described["tensors"]["keys"]
    ('saapindex.trace', 12, ['F16', [1, 8192, 64]])
    """
    path = Path(path)
    if path.is_dir():
        sequences = {
            name: {
                "layers": list(layers),
                "nbytes": sum(file.stat().st_size for file in layers.values()),
                "info": dict(read_trace_header(next(iter(layers.values()))).info),
            }
            for name, layers in find_traces(path).items()
        }
        return {"format": "folder of saapindex.trace", "sequences": sequences}
    tensors, header = read_header(path)
    for checksums in ("row_checksums", "tensor_checksums"):
        header.pop(checksums, None)
    return {**header, "tensors": tensors, "nbytes": path.stat().st_size}


def _show(path: Path, described: Mapping[str, Any], console: Console) -> None:
    if "sequences" in described:
        _show_folder(path, described["sequences"], console)
        return
    facts = Table(
        show_header=False, title=f"{path.name}: {described['format']}, version {described['version']}"
    )
    for name, value in _flat({name: value for name, value in described.items() if name not in _UNSHOWN}):
        facts.add_row(name, f"{value / 1e6:.1f} MB" if name == "nbytes" else value_text(value))
    tensors = Table("tensor", "dtype", "shape")
    for name, (dtype, shape) in described["tensors"].items():
        tensors.add_row(name, dtype, " x ".join(map(str, shape)))
    console.print(facts)
    console.print(tensors)


def _show_folder(path: Path, sequences: Mapping[str, Any], console: Console) -> None:
    table = Table("sequence", "model", "text", title=f"Traces in {path}")
    for column in ("tokens", "layers", "MB"):
        table.add_column(column, justify="right")
    for name, sequence in sequences.items():
        about = sequence["info"]
        cells = (value_text(about.get(field)) for field in ("model", "text", "context"))
        table.add_row(name, *cells, ranges(sequence["layers"]), f"{sequence['nbytes'] / 1e6:.1f}")
    console.print(table)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested dicts, their names joined by dots."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows.extend(_flat(value, f"{prefix}{name}."))
        else:
            rows.append((prefix + name, value))
    return rows


def value_text(value: Any) -> str:
    """Return a header's value as people read it.

    Examples
    --------
    >>> value_text(None), value_text([0, 1, 2, 5]), value_text(0.125)
    ('-', '0-2, 5', '0.125')
    """
    if value is None:
        return "-"
    if isinstance(value, list):
        whole = value and all(type(part) is int for part in value) and sorted(set(value)) == value
        return ranges(value) if whole else ", ".join(map(value_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def ranges(numbers: list[int]) -> str:
    """Return rising numbers, neighbours drawn together.

    Examples
    --------
    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
