"""The command line: ``saapindex demo | capture | train | evaluate | info``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import saapindex
from saapindex.commands.capture import capture
from saapindex.commands.evaluate import evaluate
from saapindex.commands.info import info
from saapindex.commands.train import train
from saapindex.errors import SaapIndexError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A vector-search index for LLM attention.")
for command in (capture, train, evaluate, info):
    app.command()(command)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to draw the curves.")] = Path("saapindex-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    retrain: Annotated[bool, typer.Option(help="Train the paper's classifier anew (needs torch).")] = False,
) -> None:
    """Compare IndexSAAP with Faiss IVF and exact search on one head of a real model."""
    from saapindex import demo as demonstration

    start = time.perf_counter()
    rows, setting = demonstration.run(retrain=retrain, show=not as_json)
    demonstration.draw(rows, out)
    seconds = time.perf_counter() - start
    if as_json:
        result = {
            "version": saapindex.__version__,
            **setting,
            "rows": [row.to_dict() for row in rows],
            "seconds": seconds,
            "picture": str(out),
        }
        print(json.dumps(result, indent=1))
        return
    console = Console()
    console.print(
        "[bold]{model}, layer {layer}, KV head {kv_head}[/]: {keys} keys, {queries} queries, {nlist} lists\n"
        "trained on {train_text}, tested on {test_text}".format(**setting),
        highlight=False,
    )
    for quality, title in enumerate(("recall@10", "attention mass found")):
        table = Table("share of keys read", title=title)
        for share in demonstration.BUDGETS:
            table.add_column(f"{100 * share:g} %", justify="right")
        for row in rows:
            cells = (f"{row.curve.at(share)[quality]:.3f}" for share in demonstration.BUDGETS)
            table.add_row(row.name, *cells)
        console.print(table)
    console.print(f"Drawn as {out}, in {seconds:.0f} s.")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; an error of the library or of the system ends it with one clear line."""
    try:
        return app(args=arguments, prog_name="saapindex")
    except (SaapIndexError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
