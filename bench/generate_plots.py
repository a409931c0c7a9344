"""Join what runs of ``bench/generate.py`` found, and draw it.

::

    python bench/generate_plots.py perplexity bench/results/part-*.json
    python bench/generate_plots.py retrieval bench/results/part-*.json

Writes ``bench/results/generate-<command>.json`` and ``.png``. Runs may differ in texts, questions or methods;
of what several have found about the same thing, the first counts.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
TARGETS = {0.02: 0.02, 0.05: 0.005}
"""Perplexity above dense that is aimed at, by share of bytes."""
LABELS = {
    "saapindex": ("saapindex", "C3", "o"),
    "ladder": ("saapindex, simulated", "C1", "v"),
    "quest=": ("Quest, bounds counted", "C0", "s"),
    "quest=uncounted": ("Quest, pages of 16, bounds not counted", "C9", "D"),
    "saap=": ("SAAP (paper), classifier counted", "C2", "^"),
    "saap=uncounted": ("SAAP (paper), 1024 lists, classifier not counted", "C8", ">"),
    "window=": ("sinks and window alone", "0.5", "x"),
}

Parts = Annotated[list[Path], typer.Argument(help="Files of runs.", exists=True)]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def family(name: str, methods: dict[str, Any]) -> tuple[str, float]:
    """Return the key of a method in `LABELS`, and its budget."""
    method = methods[name]
    kind = method.get("name")
    if kind is None:
        return "saapindex", method["budget"]
    if kind == "ladder":
        return "ladder", method["budget"]
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
    """Draw by how much perplexity grows, against the bytes that are read."""
    content = joined(parts, "texts", ("text",))
    texts = content["texts"]
    lines: dict[str, dict[float, list[float]]] = {}
    for text in texts:
        for name, one in text["found"].items():
            if name != DENSE:
                kind, budget = family(name, content["methods"])
                lines.setdefault(kind, {}).setdefault(budget, []).append(one["above_dense"])
    content["mean_above_dense"] = {
        kind: {str(budget): statistics.mean(values) for budget, values in sorted(points.items())}
        for kind, points in lines.items()
    }
    write(out, "generate-perplexity", content)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind in LABELS:
        if kind not in lines:
            continue
        label, colour, marker = LABELS[kind]
        budgets = sorted(lines[kind])
        means = [100 * statistics.mean(lines[kind][budget]) for budget in budgets]
        axes.plot([100 * b for b in budgets], means, color=colour, marker=marker, label=label)
        for budget in budgets:
            spread = [100 * value for value in lines[kind][budget]]
            axes.scatter([100 * budget] * len(spread), spread, color=colour, s=8, alpha=0.6)
    for number, (budget, limit) in enumerate(TARGETS.items()):
        label = "_" if number else "target"
        axes.plot([100 * budget * 0.93, 100 * budget * 1.07], [100 * limit] * 2, "k_-", lw=2, label=label)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xscale("log")
    axes.set_xticks([2, 5], ["2 %", "5 %"])
    axes.minorticks_off()
    axes.axhline(0, color="0.7", lw=0.8)
    axes.set_xlabel("bytes of the long-range keys and values that a step reads")
    axes.set_ylabel("perplexity above dense attention, %")
    axes.set_title(
        f"{content['runs'][0]['model']} at {content['runs'][0]['context']} tokens, {len(texts)} texts"
    )
    axes.legend(fontsize=8)
    figure.savefig(out / "generate-perplexity.png", dpi=150)


@app.command()
def retrieval(parts: Parts, out: Out = RESULTS) -> None:
    """Draw how often each method answers right, and where."""
    content = joined(parts, "questions", ("task", "length", "depth", "seed"))
    questions = content["questions"]
    groups = sorted({(row["task"], row["length"]) for row in questions})
    names = [DENSE, *content["methods"]]
    right = {
        name: [
            statistics.mean(
                row["found"][name]["right"] for row in questions if (row["task"], row["length"]) == group
            )
            for group in groups
        ]
        for name in names
        if all(name in row["found"] for row in questions)
    }
    content["right"] = [
        {"task": task, "length": length, **{name: shares[at] for name, shares in right.items()}}
        for at, (task, length) in enumerate(groups)
    ]
    write(out, "generate-retrieval", content)

    def title(name: str) -> str:
        if name == DENSE:
            return "dense attention"
        kind, budget = family(name, content["methods"])
        return f"{LABELS[kind][0]}, {100 * budget:g} %"

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(right) + 1.8), layout="constrained")
    table = list(right.values())
    axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.7)
    for y, shares in enumerate(table):
        for x, share in enumerate(shares):
            axes.text(x, y, f"{100 * share:.0f} %", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(groups)), [f"{task}\n{length // 1000}k" for task, length in groups])
    axes.set_yticks(range(len(right)), [title(name) for name in right])
    count = sum((row["task"], row["length"]) == groups[0] for row in questions)
    axes.set_title(f"Answers that are right, of {count} each")
    figure.savefig(out / "generate-retrieval.png", dpi=150)


if __name__ == "__main__":
    app()
