"""One self-contained HTML page of a report: the plot, and tables that sort by a click."""

from __future__ import annotations

import base64
import html
import importlib.resources
from string import Template

from saapindex.learn.evaluation.report import Report
from saapindex.learn.evaluation.tables import Cell, Table, format_cell, report_tables

__all__ = ["html_page"]


def html_page(report: Report, plot: bytes) -> str:
    """Return the page; `plot` is a PNG."""
    facts = {
        "test sequences": ", ".join(report.tests),
        "training sequences": ", ".join(report.trains) or "none",
        "protocol": ", ".join(f"{name} {value}" for name, value in vars(report.protocol).items()),
        "device": report.device,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        **{f"not run: {name}": reason for name, reason in report.skipped.items()},
    }
    template = importlib.resources.files("saapindex.learn.evaluation") / "page.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        facts="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()
        ),
        plot=base64.b64encode(plot).decode(),
        tables="\n".join(map(_table, report_tables(report))),
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join(
        f"<tr{' class=own' if row[0] == 'saapindex' else ''}>{''.join(map(_cell, row))}</tr>"
        for row in table.rows
    )
    caption = html.escape(table.title)
    return (
        f"<div class=wide><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    word = " class=word" if isinstance(cell, str) else ""
    value = "" if cell is None else html.escape(str(cell), quote=True)
    return f'<td{word} data-v="{value}">{html.escape(format_cell(cell))}</td>'
