"""Pareto plots: quality against bytes, one line for each method."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from saapindex.errors import MissingDependencyError
from saapindex.learn.evaluation.report import Report
from saapindex.learn.evaluation.summary import Summary, summarise
from saapindex.learn.evaluation.tables import MODE_TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pareto_figure", "pareto_png"]

_LEAST = 1e-3  # what is missed is drawn down to this
_FIXED: dict[str, dict[str, Any]] = {
    "saapindex": {"color": "#d00000", "linewidth": 3.0, "marker": "o", "zorder": 5},
    "exact": {"color": "black", "linestyle": "--", "marker": None, "linewidth": 2.0, "zorder": 4},
    "random": {"color": "0.65", "linestyle": ":", "marker": None},
}
_COLORS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#bcbd22",
    "#17becf",
    "#4b5d8a",
    "#006d5b",
)
_MARKERS = "osD^vP*Xhd"


def pareto_figure(report: Report) -> Figure:
    """Draw error, attention mass missed and top-10 keys missed against the share of bytes read.

    All axes are logarithmic and lower is better in each. Points that read more than their budget are left
    out: a line begins where its method begins to work. A grey line marks attention to the window alone.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "drawing the curves", "demo") from error
    height = 4.6 * len(report.modes) + 0.3
    figure = Figure(figsize=(16, height), layout="constrained")
    panels = figure.subplots(len(report.modes), 3, squeeze=False, sharex=True)
    styles = _styles(report)
    for row, mode in zip(panels, report.modes, strict=True):
        lines = _lines(report, mode)
        names = ("error  ‖o - o_dense‖ / ‖o_dense‖", "attention mass missed", "top-10 keys missed")
        for panel, name, number in zip(row, names, range(3), strict=True):
            for method, points in lines.items():
                values = [_value(point, number) for point in points]
                reads = [100 * point.bytes for point in points]
                if method == "window":
                    if number == 0:
                        panel.axhline(values[0], color="0.6", linewidth=1)
                        panel.annotate(
                            "window only", (0.99, values[0]), xycoords=("axes fraction", "data"), ha="right",
                            va="bottom", fontsize=8, color="0.4",
                        )  # fmt: skip
                    continue
                panel.plot(reads, values, label=method, **styles[method])
            panel.set(xscale="log", yscale="log", title=name)
            ticks = [100 * budget for budget in report.budgets]
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.25)
        row[0].set_ylabel(MODE_TITLES[mode])
        handles = dict(zip(*reversed(row[0].get_legend_handles_labels()), strict=True))
        row[2].legend(
            handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
        )
    for panel in panels[-1]:
        panel.set_xlabel("bytes read, % of the long-range keys and values")
    return figure


def pareto_png(report: Report, *, dpi: int = 110) -> bytes:
    """Return `pareto_figure` as a PNG."""
    buffer = io.BytesIO()
    pareto_figure(report).savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _value(point: Summary, number: int) -> float:
    return (point.error, max(1 - point.mass, _LEAST), max(1 - point.recall_10, _LEAST))[number]


def _lines(report: Report, mode: str) -> dict[str, list[Summary]]:
    """Points of each method by rising bytes; methods in falling order of their last error, as the eye meets
    them.
    """
    lines: dict[str, list[Summary]] = {}
    records = [record for record in report.records if record.mode == mode]
    for summary in summarise(records, "method", "budget"):
        if summary.within:
            lines.setdefault(summary.key[0], []).append(summary)
    ordered = sorted(lines.items(), key=lambda item: -item[1][-1].error)
    return {name: sorted(points, key=lambda point: point.bytes) for name, points in ordered}


def _styles(report: Report) -> dict[str, dict[str, Any]]:
    others = sorted(set(report.methods) - set(_FIXED))
    plain = {
        name: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(others)
    }
    return {name: {"markersize": 5, "linewidth": 1.6, **style} for name, style in {**plain, **_FIXED}.items()}
