"""``saapindex train``: partitions and routers of all layers and heads of a model, from its traces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from saapindex.commands.capture import parse_layers
from saapindex.errors import InvalidInputError
from saapindex.learn.settings import TrainingSettings

__all__ = ["parse_settings", "train"]


def train(
    traces: Annotated[Path, typer.Argument(help="Folder of traces, from `saapindex capture`.")],
    out: Annotated[Path, typer.Option(help="The codebook to write.")],
    nlist: Annotated[
        str | None,
        typer.Option(help="Numbers of lists, such as 64,256. Default: 64,256,1024, as published 1024."),
    ] = None,
    view: Annotated[str, typer.Option(help="auto, rotated, unrotated or windowed.")] = "auto",
    max_position: Annotated[
        int | None, typer.Option(help="Longest context to be served; by default that of the traces.")
    ] = None,
    paper: Annotated[bool, typer.Option(help="Train SAAP as published instead.")] = False,
    layers: Annotated[str, typer.Option(help="Such as 4,11 or 0-29, or all.")] = "all",
    held_out: Annotated[
        str | None,
        typer.Option(help="Sequences to judge by: names, or how many of the last. Default: one in six."),
    ] = None,
    sequences: Annotated[str | None, typer.Option(help="Names of the sequences to use.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any field of TrainingSettings, such as hidden=512 or routers=mean,linear."
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for finished layers. Default: OUT.parts, until all are done.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; cuda by default, if there is one.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report to this file, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, not a table.")] = False,
) -> None:
    """Train the codebook of a model.

    Run again after an interruption, the same command goes on with the layers that are left, to the same
    result.
    """
    from saapindex.learn.report import TrainingReport
    from saapindex.learn.train import train as learn

    if not out.parent.is_dir():
        raise InvalidInputError(f"cannot write {out}: the folder {out.parent} does not exist")
    given: dict[str, Any] = parse_settings(set_ or ())
    if nlist is not None:
        given["nlist"] = [_integer("nlist", part) for part in nlist.split(",")]
    if not paper:
        given["view"] = view
    if max_position is not None:
        given["max_position"] = max_position
    settings = TrainingSettings.paper(**given) if paper else TrainingSettings(**given)
    wanted = parse_layers(layers)
    parts = checkpoints or out.with_name(out.name + ".parts")
    codebook = learn(
        traces,
        settings,
        held_out=int(held_out) if held_out and held_out.isdecimal() else _names(held_out),
        sequences=_names(sequences),
        layers=None if isinstance(wanted, str) else wanted,
        device=device,
        checkpoints=parts,
        show=not as_json,
    )
    codebook.save(out)
    if checkpoints is None:
        for path in parts.glob("layer-*.safetensors"):
            path.unlink()
        with contextlib.suppress(OSError):  # something else lies there
            parts.rmdir()
    measured = TrainingReport.from_dict(codebook.report)
    if report is not None:
        report.write_text(measured.to_json() + "\n", encoding="utf-8")
    if as_json:
        print(measured.to_json())
        return
    console = Console()
    console.print(measured.table())
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in measured.seconds.items())
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; {seconds}.", highlight=False, markup=False)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{name} is {text!r}, expected an integer") from None


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Read settings as they are typed, ``NAME=VALUE``, with commas between several values.

    Raises
    ------
    InvalidInputError
        If one has no ``=`` or names no field of `TrainingSettings`.

    Examples
    --------
    >>> parse_settings(["hidden=512", "routers=mean,linear", "max_position=null"])
    {'hidden': 512, 'routers': ['mean', 'linear'], 'max_position': None}
    """
    known = [field.name for field in fields(TrainingSettings)]
    lists = ("nlist", "cutoffs", "routers", "words")
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise InvalidInputError(
                f"{assignment!r} is no setting, expected NAME=VALUE with one of {', '.join(known)}"
            )
        values = [_value(part) for part in text.split(",")]
        settings[name] = values if name in lists else _value(text)
    return settings


def _value(text: str) -> Any:
    """Return the number, truth value or null that `text` is in JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
