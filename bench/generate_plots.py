"""Join what runs of ``bench/generate.py`` found, and draw it.

::

    python bench/generate_plots.py perplexity bench/results/part-*.json
    python bench/generate_plots.py retrieval bench/results/part-*.json
    python bench/generate_plots.py codebooks retrieval-of-one.json retrieval-of-another.json
    python bench/generate_plots.py views codebook.safetensors

Writes ``bench/results/generate-<command>.json``, the first two a ``.png`` too. Runs may differ in texts,
questions or methods; of what several have found about the same thing, the first counts. ``codebooks`` sums up
what retrieval found with each codebook; ``views`` the errors that ``judge=error`` chose views by.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer

from saapindex.attention import AttendParameters
from saapindex.codebook import Codebook

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
DEFAULT_SHARE = AttendParameters().scan_share
TARGETS = {0.02: 0.02, 0.05: 0.005}
"""Perplexity above dense that is aimed at, by share of bytes."""
LABELS = {
    "codes": ("saapindex, codes in all layers", "C3", "o"),
    "saapindex": ("saapindex, default of the device", "C4", "h"),
    "lists": ("saapindex, whole lists", "C7", "P"),
    "evenly": ("saapindex, codes, bytes split evenly", "C5", "p"),
    "ladder": ("saapindex, simulated", "C1", "v"),
    "looks": ("two looks, simulated", "C6", "<"),
    "quest=": ("Quest, bounds counted", "C0", "s"),
    "quest=uncounted": ("Quest, pages of 16, bounds not counted", "C9", "D"),
    "saap=": ("SAAP (paper), classifier counted", "C2", "^"),
    "saap=uncounted": ("SAAP (paper), 1024 lists, classifier not counted", "C8", ">"),
    "exact=": ("dense attention in float32", "k", "+"),
    "window=": ("sinks and window alone", "0.5", "x"),
}

Parts = Annotated[list[Path], typer.Argument(help="Files of runs.", exists=True)]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def family(name: str, methods: dict[str, Any]) -> tuple[str, float]:
    """Return the key of a method in `LABELS`, and its budget."""
    method = methods[name]
    kind = method.get("name")
    if kind is None:
        ways = {True: "codes", False: "lists", None: "saapindex"}
        return "evenly" if method.get("by_head") is False else ways[method.get("refine")], method["budget"]
    if kind in ("ladder", "looks"):
        return kind, method["budget"]
    uncounted = False in (method["settings"].get(name) for name in ("count_bounds", "count_router"))
    return f"{kind}={'uncounted' if uncounted else ''}", method["budget"]


def joined(parts: list[Path], rows: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the runs' descriptions, and their rows with what each found about the same thing together."""
    runs: list[dict[str, Any]] = []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    methods: dict[str, Any] = {}
    for path in parts:
        run = json.loads(path.read_text())
        for row in run.pop(rows):
            key = tuple(row[name] for name in keys)
            at = found.setdefault(key, {**{name: row[name] for name in keys}, "found": {}})
            at["found"] |= {name: one for name, one in row["found"].items() if name not in at["found"]}
        methods |= run.pop("methods")
        if run not in runs:
            runs.append(run)
    return {"runs": runs, "methods": methods, rows: [found[key] for key in sorted(found)]}


def write(out: Path, name: str, content: dict[str, Any]) -> None:
    """Write a result."""
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


@app.command()
def perplexity(parts: Parts, out: Out = RESULTS) -> None:
    """Draw how far the predictions are from those of dense attention, against the bytes that are read."""
    content = joined(parts, "texts", ("text",))
    texts = content["texts"]
    points: dict[str, dict[float, list[dict[str, float]]]] = {}
    for text in texts:
        for name, one in text["found"].items():
            if name != DENSE:
                kind, budget = family(name, content["methods"])
                points.setdefault(kind, {}).setdefault(budget, []).append(one)
    measures = ("kl", "above_dense")
    content["means"] = {
        kind: {
            str(budget): {name: statistics.mean(one[name] for one in ones) for name in measures}
            for budget, ones in sorted(budgets.items())
        }
        for kind, budgets in points.items()
    }
    write(out, "generate-perplexity", content)
    floor = points.pop("exact=", {})
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for kind in (kind for kind in LABELS if kind in points):
        label, colour, marker = LABELS[kind]
        fewest = min(map(len, points[kind].values()))
        if fewest < len(texts):
            label = f"{label} ({fewest} of the texts)"
        for axis, name, factor in zip(axes, measures, (1, 100), strict=True):
            lists = {b: [factor * one[name] for one in ones] for b, ones in sorted(points[kind].items())}
            means = [statistics.mean(values) for values in lists.values()]
            axis.plot([100 * b for b in lists], means, color=colour, marker=marker, label=label)
            for budget, values in lists.items():
                axis.scatter([100 * budget] * len(values), values, color=colour, s=8, alpha=0.6)
    for ones in floor.values():
        mean = statistics.mean(one["kl"] for one in ones)
        axes[0].axhline(mean, color="k", ls=":", label="dense attention, rounded otherwise")
    for number, (budget, limit) in enumerate(TARGETS.items()):
        ends = [100 * budget * 0.93, 100 * budget * 1.07]
        axes[1].plot(ends, [100 * limit] * 2, "k-", lw=2, label="_" if number else "target")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL divergence from dense attention, nats a token")
    axes[1].set_yscale("symlog", linthresh=1)
    axes[1].axhline(0, color="0.7", lw=0.8)
    axes[1].set_ylabel("perplexity above that of dense attention, %")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks([2, 5], ["2 %", "5 %"])
        axis.set_xlim(1.7, 5.9)
        axis.minorticks_off()
        axis.set_xlabel("bytes of the long-range keys and values that a step may read")
    run = content["runs"][0]
    figure.suptitle(f"{run['model']} at {run['context']} tokens, {len(texts)} texts (dots) and their mean")
    handles = [axis.get_legend_handles_labels() for axis in axes]
    named = {label: handle for pair in handles for handle, label in zip(*pair, strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(out / "generate-perplexity.png", dpi=150)


@app.command()
def retrieval(parts: Parts, out: Out = RESULTS) -> None:
    """Draw how often each method answers right, and where."""
    content = joined(parts, "questions", ("task", "length", "depth", "seed"))
    questions = content["questions"]
    groups = sorted({(row["task"], row["length"]) for row in questions})
    names = [DENSE, *content["methods"]]
    right = {name: [_right(questions, group, name) for group in groups] for name in names}
    content["right"] = [
        {"task": task, "length": length, **{name: counts[at] for name, counts in right.items()}}
        for at, (task, length) in enumerate(groups)
    ]
    write(out, "generate-retrieval", content)

    def title(name: str) -> str:
        if name == DENSE:
            return "dense attention"
        kind, budget = family(name, content["methods"])
        share = content["methods"][name].get("scan_share", DEFAULT_SHARE)
        more = "" if share == DEFAULT_SHARE else f", {100 * share:g} % of it on codes"
        return f"{LABELS[kind][0]}, {100 * budget:g} %{more}"

    size = (1.3 * len(groups) + 4, 0.42 * len(right) + 1.4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    table = [[r["log_probability"] if r["asked"] else math.nan for r in row] for row in right.values()]
    image = axes.imshow(table, cmap="RdYlGn", vmin=-25, vmax=0, aspect="auto", alpha=0.7)
    for y, row in enumerate(right.values()):
        for x, one in enumerate(row):
            said = f"{one['right']}/{one['asked']}   {one['log_probability']:.1f}" if one["asked"] else ""
            axes.text(x, y, said, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(groups)), [f"{task}\n{length // 1000}k tokens" for task, length in groups])
    axes.set_yticks(range(len(right)), [title(name) for name in right])
    axes.set_title("Right answers, and the mean log-probability of the right one", fontsize=10)
    figure.colorbar(image, label="log-probability")
    figure.savefig(out / "generate-retrieval.png", dpi=150)


@app.command()
def codebooks(parts: Parts, out: Out = RESULTS) -> None:
    """Count right answers of the index in runs that differ in the codebook."""
    rows = []
    for path in parts:
        run = json.loads(path.read_text())
        questions, methods = run.pop("questions"), run.pop("methods")
        groups = sorted({(row["task"], row["length"]) for row in questions})
        rows += [
            {
                "codebook": path.stem,
                "task": group[0],
                "length": group[1],
                **{name: _right(questions, group, name) for name in (DENSE, *methods)},
            }
            for group in groups
        ]
        described = run
    write(out, "generate-codebooks", {"run": described, "rows": rows})


@app.command()
def views(codebook: Annotated[Path, typer.Argument(exists=True)], out: Out = RESULTS) -> None:
    """Sum up the held-out errors of all views and of those that were chosen."""
    report = Codebook.load(codebook).report
    errors: dict[str, dict[str, list[float]]] = {"all queries": {}, "lookups": {}}
    for head in report["heads"]:
        tried = {**head["errors"], "chosen": head["errors"][head["view"]]}
        for view, by_sequence in tried.items():
            for name, error in by_sequence.items():
                kind = "lookups" if name.endswith(", lookups") else "all queries"
                errors[kind].setdefault(view, []).append(error)
    content = {
        "held_out": report["held_out"],
        "share": report["share"],
        "heads": dict(Counter(head["view"] for head in report["heads"])),
        "errors": {
            kind: {
                view: {
                    "mean": statistics.mean(found),
                    "geometric_mean": statistics.geometric_mean(found),
                    "measured": len(found),
                }
                for view, found in by_view.items()
            }
            for kind, by_view in errors.items()
        },
    }
    write(out, "generate-views", content)


def _right(questions: list[dict[str, Any]], group: tuple[str, int], name: str) -> dict[str, Any]:
    """Count the answers of a method that are right, of those that were asked."""
    said = [
        row["found"][name]
        for row in questions
        if (row["task"], row["length"]) == group and name in row["found"]
    ]
    likely = statistics.mean(one["log_probability"] for one in said) if said else 0.0
    return {"right": sum(one["right"] for one in said), "asked": len(said), "log_probability": likely}


if __name__ == "__main__":
    app()
