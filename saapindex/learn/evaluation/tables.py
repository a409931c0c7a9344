"""Tables of a report, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from saapindex.learn.evaluation.measures import Mode, Record
from saapindex.learn.evaluation.report import Report
from saapindex.learn.evaluation.summary import Summary, summarise

if TYPE_CHECKING:
    import rich.table

__all__ = ["Cell", "Table", "format_cell", "report_tables", "rich_table"]

Cell: TypeAlias = str | float | None

MODE_TITLES: dict[Mode, str] = {
    "group": "heads of a group select together",
    "per_head": "every head selects alone",
}


@dataclass(frozen=True)
class Table:
    """A table: numbers stay numbers, so that a page can sort them; None is what could not be measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def format_cell(cell: Cell) -> str:
    """Return a cell as text.

    Examples
    --------
    >>> format_cell(0.012345), format_cell(1.0), format_cell(None), format_cell("quest")
    ('0.0123', '1.00', '-', 'quest')
    """
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:#.3g}" if abs(cell) >= 1e-4 else f"{cell:.0g}"


def report_tables(report: Report, *, per_head: bool = True) -> list[Table]:
    """Return, for each mode, errors, statistics at one budget, settings, and errors by layer and by head.

    Methods come in rising order of their error at that budget, those that cannot keep to it last.
    """
    tables = []
    for mode in report.modes:
        records = [record for record in report.records if record.mode == mode]
        order = _order(records, report)
        title = MODE_TITLES[mode]
        tables += [make(records, report, order, title) for make in (_budgets, _details, _choices)]
        main = [record for record in records if record.budget == report.main_budget]
        tables.append(_by_layer(main, report, order, title))
        if per_head:
            tables.append(_by_head(main, report, order, title))
    return tables


def rich_table(table: Table) -> rich.table.Table:
    """Return `table` for a rich console.

    Examples
    --------
    >>> rich_table(Table("errors", ["method", "error"], [["quest", 0.1]])).row_count
    1
    """
    import rich.box
    import rich.table

    result = rich.table.Table(title=table.title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(table.columns):
        words = all(isinstance(row[i], str) for row in table.rows)
        result.add_column(column, justify="left" if words else "right", no_wrap=i == 0, overflow="fold")
    for row in table.rows:
        result.add_row(*map(format_cell, row))
    return result


def _order(records: Sequence[Record], report: Report) -> list[str]:
    main = {
        summary.key[0]: (not summary.within, summary.error)
        for summary in summarise(records, "method", "budget")
        if summary.key[1] == report.main_budget
    }
    return sorted(main, key=lambda name: main[name])


def _error(summary: Summary | None) -> float | None:
    return summary.error if summary is not None and summary.within else None


def _percent(budget: float) -> str:
    return f"{100 * budget:g} %"


def _budgets(records: Sequence[Record], report: Report, order: Sequence[str], title: str) -> Table:
    found = {summary.key: summary for summary in summarise(records, "method", "budget")}
    rows = [[name, *(_error(found.get((name, budget))) for budget in report.budgets)] for name in order]
    return Table(
        f"Mean error by share of the bytes, {title}",
        ["method", *map(_percent, report.budgets)],
        rows,
    )


def _details(records: Sequence[Record], report: Report, order: Sequence[str], title: str) -> Table:
    found = {
        summary.key[0]: summary
        for summary in summarise(records, "method", "budget")
        if summary.key[1] == report.main_budget
    }
    rows: list[list[Cell]] = []
    for name in order:
        one = found[name]
        quality: list[Cell] = [None] * 7
        if one.within:
            quality = [one.error, one.error_median, one.error_p90, one.error_worst]
            quality += [one.mass, one.recall_10, one.recall_100]
        rows.append([name, *quality, one.bytes, one.keys])
    return Table(
        f"At {_percent(report.main_budget)} of the bytes, {title}",
        ["method", "error", "median", "p90", "worst", "mass", "top 10", "top 100", "bytes", "keys"],
        rows,
    )


def _choices(records: Sequence[Record], report: Report, order: Sequence[str], title: str) -> Table:
    found = {summary.key: summary for summary in summarise(records, "method", "budget")}
    rows = [
        [
            name,
            *(found[name, budget].setting or "-" for budget in report.budgets),
            found[name, report.main_budget].worst,
        ]
        for name in order
    ]
    return Table(
        f"Settings by share of the bytes, and where the error is worst, {title}",
        ["method", *map(_percent, report.budgets), "worst"],
        rows,
    )


def _by_layer(records: Sequence[Record], report: Report, order: Sequence[str], title: str) -> Table:
    found = {summary.key: summary for summary in summarise(records, "method", "layer")}
    layers = sorted({record.layer for record in records})
    rows = [[name, *(_error(found.get((name, layer))) for layer in layers)] for name in order]
    return Table(
        f"Mean error by layer at {_percent(report.main_budget)} of the bytes, {title}",
        ["method", *(f"layer {layer}" for layer in layers)],
        rows,
    )


def _by_head(records: Sequence[Record], report: Report, order: Sequence[str], title: str) -> Table:
    found = {summary.key: summary for summary in summarise(records, "method", "layer", "q_head")}
    places = sorted({(record.layer, record.q_head, record.kv_head) for record in records})
    rows: list[list[Cell]] = [
        [f"{layer}.{kv}.{q}", *(_error(found.get((name, layer, q))) for name in order)]
        for layer, q, kv in places
    ]
    return Table(
        f"Mean error by layer.KV head.query head at {_percent(report.main_budget)} of the bytes, {title}",
        ["head", *order],
        rows,
    )
