"""``saapindex capture``: let a model read texts, and write what its attention sees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from saapindex.errors import InvalidInputError

if TYPE_CHECKING:
    from saapindex.learn.capture import CaptureReport

__all__ = ["capture", "parse_layers", "parse_rope_scaling"]


def capture(
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, or a GGUF file.")],
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")],
    out: Annotated[Path, typer.Option(help="Folder for the traces.")],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILES", help="More texts, as after --text.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file (.gz is unpacked), or a folder of text files, which is one text."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Such as 4,11 or 0-29, or all of full attention.")] = "all",
    queries: Annotated[
        str,
        typer.Option(
            help="Positions that keep their queries, or all. 512 of them lie in the last 2048 positions."
        ),
    ] = "4096",
    sequences: Annotated[int, typer.Option(help="Sequences to take from each text, if it holds them.")] = 1,
    dtype: Annotated[str, typer.Option(help="Storage: float16 or bfloat16.")] = "float16",
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="Beyond the model's own context: none, ntk, yarn, linear, or JSON as in rope_parameters."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; cuda by default, if there is one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling of queries.")] = 0,
    copies: Annotated[
        bool,
        typer.Option(
            "--copies", help="Repeat passages of each sequence in its second half, so that lookups are seen."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Let a model read texts, and write the keys, values and queries of its attention.

    Files are OUT/TEXT-SEQUENCE/layer-04.safetensors. Run again, the same command goes on where it was
    interrupted.
    """
    from saapindex.learn import capture as learn

    report = learn.capture(
        model,
        [*(text or []), *(more or [])],
        context=context,
        out=out,
        layers=parse_layers(layers),
        queries=int(queries) if queries.isdecimal() else queries,
        sequences=sequences,
        dtype=dtype,
        rope_scaling=parse_rope_scaling(rope_scaling),
        device=device,
        seed=seed,
        copies=copies,
        show=not as_json,
    )
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report, Console())


def parse_layers(text: str) -> str | list[int]:
    """Read layers as they are typed.

    Raises
    ------
    InvalidInputError
        If they are not numbers, ranges or ``all``.

    Examples
    --------
    >>> parse_layers("0-2,11")
    [0, 1, 2, 11]
    """
    if text == "all":
        return text
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise InvalidInputError(
                f"layers is {text!r}, expected numbers and ranges such as 4,11 or 0-29, or all"
            )
        layers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return layers


def parse_rope_scaling(text: str | None) -> str | dict[str, Any] | None:
    """Read a RoPE scaling as it is typed: a name, or a JSON object.

    Raises
    ------
    InvalidInputError
        If it starts like an object and is none.

    Examples
    --------
    >>> parse_rope_scaling('{"rope_type": "linear", "factor": 2}')
    {'rope_type': 'linear', 'factor': 2}
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        parsed: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"rope_scaling is {text!r}, which is no JSON: {error}") from error
    return parsed


def _show(report: CaptureReport, console: Console) -> None:
    table = Table("sequence", title=f"Traces in {report.out}")
    for column in ("layers written", "there already", "MB", "seconds"):
        table.add_column(column, justify="right")
    for sequence in report.sequences:
        table.add_row(
            sequence.name,
            str(len(sequence.written)),
            str(len(sequence.present)),
            f"{sequence.nbytes / 1e6:.1f}",
            f"{sequence.seconds:.1f}",
        )
    console.print(table)
    info = report.info
    console.print(
        f"{info['model']}, {len(report.layers)} of {info['layers']} layers, {info['context']} tokens, "
        f"queries: {info['queries']}, {info['dtype']}: "
        f"{report.nbytes / 1e6:.1f} MB in {report.seconds:.0f} s.",
        highlight=False,
        markup=False,
    )
    reasons: dict[str, list[int]] = {}
    for layer, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(layer)
    for reason, numbers in reasons.items():
        console.print(f"Left out ({reason}): layers {', '.join(map(str, numbers))}.", highlight=False)
    for name, count in report.short.items():
        console.print(f"The text {name} holds {count} sequences only.", highlight=False)
