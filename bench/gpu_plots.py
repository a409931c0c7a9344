"""Draw what the benchmarks on a GPU found; needs no GPU itself.

::

    python bench/gpu_plots.py decode    # from bench/results/decode.json
    python bench/gpu_plots.py search    # from bench/results/cuda-ops.json

Each writes a picture next to the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import typer

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results"
GOALS = {(32_768, "5 %"): 2, (131_072, "5 %"): 6, (524_288, "5 %"): 12, (524_288, "2 %"): 20}
"""How many times as fast as dense attention a step of one sequence should be."""
WAYS = {
    "2 %": ("saapindex, 2 %", "C2", "-o"),
    "5 %": ("saapindex, 5 %", "C3", "-o"),
    "10 %": ("saapindex, 10 %", "C1", "-o"),
    "20 %": ("saapindex, 20 %", "C4", "-o"),
    "5 %, with codes": ("saapindex, 5 %, with codes", "C3", ":s"),
    "32 lists (the paper's step)": ("32 lists, as in the paper", "C5", "--^"),
}
DENSE = {"FlashAttention-2": ("FlashAttention-2, dense", "0.5"), "cuDNN": ("cuDNN, dense", "k")}
INDEXES = {
    "call us": ("saapindex, float16", "C3"),
    "Faiss GPU IVFFlat": ("Faiss GPU IVFFlat", "C0"),
    "Faiss GPU IVF SQfp16": ("Faiss GPU IVF, float16", "C9"),
}
Results = Annotated[Path, typer.Option(help="Folder of the results, and of the picture.")]


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


@app.command()
def decode(results: Results = RESULTS) -> None:
    """Time of a step against the length of the context, and how many times dense attention it is."""
    found = _read(results, "decode")
    steps = [step for step in found["steps"] if step["batch"] == 1]
    lengths = [step["context"] for step in steps]
    best = np.array([min(step["dense"].values()) for step in steps])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, (label, color) in DENSE.items():
        left.plot(lengths, [step["dense"][name] for step in steps], "-x", color=color, label=label)
    for name, (label, color, style) in WAYS.items():
        times = np.array([step["sparse"][name]["add and attend"] for step in steps])
        left.plot(lengths, times, style, color=color, label=label)
        right.plot(lengths, best / times, style, color=color, label=label)
    goals = [(n, times, WAYS[name][1]) for (n, name), times in GOALS.items()]
    right.scatter(
        [n for n, _, _ in goals],
        [times for _, times, _ in goals],
        marker="_",
        s=400,
        color=[color for _, _, color in goals],
        label="goals at 2 and 5 %",
        zorder=3,
    )
    right.axhline(1, color="k", linewidth=0.8)
    for axes, what in ((left, "microseconds a layer"), (right, "times as fast as the faster dense one")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=what)
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_yticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1000"])
    right.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    left.legend(fontsize=8)
    right.legend(*(part[-1:] for part in right.get_legend_handles_labels()), loc="upper left", fontsize=8)
    shape, device = found["shape"], found["machine"]["device"]
    figure.suptitle(
        f"A decode step, everything counted: {shape['q_heads']} query heads, {shape['kv_heads']} KV heads, "
        f"d = {shape['d']}, bfloat16, {device}",
        fontsize=11,
    )
    figure.savefig(results / "decode.png", dpi=110)
    typer.echo(results / "decode.png")


@app.command()
def search(results: Results = RESULTS) -> None:
    """Time of a call beside Faiss on the same GPU, by data, results and batch."""
    found = _read(results, "cuda-ops")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    for ax, data in zip(axes, dict.fromkeys(row["data"] for row in found["search"]), strict=True):
        rows = [row for row in found["search"] if row["data"] == data]
        for i, (key, (label, color)) in enumerate(INDEXES.items()):
            times = [row[key] if key == "call us" else row[key]["call us"] for row in rows]
            bars = ax.bar(np.arange(len(rows)) + 0.27 * (i - 1), times, 0.25, color=color, label=label)
            ax.bar_label(bars, [f"{time:.0f}" for time in times], fontsize=6.5)
        names = [f"k = {row['k']}\nbatch {row['batch']}" for row in rows]
        ax.set_xticks(range(len(rows)), names, fontsize=8)
        ax.set(yscale="log", title=f"{data}, {rows[0]['keys']:,} keys")
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(bottom=20)
    axes[0].set_yticks([20, 50, 100, 200, 500, 1000, 2000, 5000])
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[0].minorticks_off()
    axes[0].set_ylabel("microseconds a call, recall@10 of 0.9")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Searches from Python, queries on the device: {found['search machine']['device']}")
    figure.savefig(results / "cuda-search.png", dpi=110)
    typer.echo(results / "cuda-search.png")


if __name__ == "__main__":
    app()
