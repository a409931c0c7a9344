"""How long it takes to train the codebook of a large model.

::

    python bench/train.py                 # Llama-3.1-8B's shape on a GPU
    python bench/train.py --cores         # one of its layers on the cores of this machine, from fewer samples

The tensors are made up: keys in clusters, turned by the model's rotary embedding, and queries that look for
them. All stages of a training run, views, partition, routers and codes; reading traces is left out. Writes
``bench/results/train.json`` (or ``train-cores.json``) and prints a table.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import saapindex
from saapindex import Rope
from saapindex.learn.contexts import Context
from saapindex.learn.head_views import HeadViews
from saapindex.learn.layer_job import LayerJob, run_stages
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.train import default_stages
from saapindex.partition import View
from saapindex.progress import track
from saapindex.rope import Llama3Scaling

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """What is trained on: heads, and per KV head the keys and queries of one sequence and of one held out."""

    layers: int
    kv_heads: int = 8
    group: int = 4
    d: int = 128
    keys: int = 262_144
    queries: int = 65_536
    held_out_keys: int = 65_536
    held_out_queries: int = 16_384
    clusters: int = 2048


ROPE = Rope(
    theta=500_000.0,
    dim=128,
    scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
)
LARGE = Shape(layers=32)
LARGE_SETTINGS = TrainingSettings(
    nlist=(1024,), routers=("centroid", "mean", "mean+linear", "mean+mlp"), max_queries=16_384, batch=512
)
SMALL = Shape(layers=1, keys=32_768, queries=4096, held_out_keys=8192, held_out_queries=1024, clusters=512)
SMALL_SETTINGS = replace(
    LARGE_SETTINGS, nlist=(128,), cutoffs=(1000.0,), max_points_per_centroid=128, batch=128, epochs=6
)


def context_of(
    shape: Shape, name: str, keys: int, queries: int, centres: torch.Tensor, seed: int, device: torch.device
) -> Context:
    """Make up a sequence: `queries` of each KV head, those of its query heads at the same positions."""
    draws = torch.Generator(device).manual_seed(seed)

    def drawn(count: int, spread: float) -> torch.Tensor:
        rows = torch.randint(shape.clusters, (shape.kv_heads, count), generator=draws, device=device)
        x = centres.gather(1, rows[..., None].expand(-1, -1, shape.d)).float()
        return x + spread * torch.randn(x.shape, generator=draws, device=device)

    turn = HeadViews.of([View("rotated", rope=ROPE)] * shape.kv_heads, ROPE, device)
    at = torch.arange(keys, device=device)
    m = queries // shape.group
    at_q = torch.linspace(keys // 8, keys - 1, m, device=device).long()
    k = turn.apply(drawn(keys, 1.0), torch.zeros_like(at), at)
    q = torch.stack(
        [turn.apply(drawn(m, 1.5), torch.zeros_like(at_q), at_q) for _ in range(shape.group)], dim=1
    )
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    return Context(name, k.to(half), q.to(half), at, at_q)


def train_layer(shape: Shape, settings: TrainingSettings, layer: int, device: torch.device) -> LayerJob:
    """Make up a layer and train it; the job has the seconds of every stage."""
    draws = torch.Generator(device).manual_seed(layer)
    centres = torch.randn((shape.kv_heads, shape.clusters, shape.d), generator=draws, device=device)
    train = context_of(shape, "train", shape.keys, shape.queries, centres, 2 * layer, device)
    held_out = context_of(
        shape, "held out", shape.held_out_keys, shape.held_out_queries, centres, 2 * layer + 1, device
    )
    job = LayerJob(
        layers=[layer],
        head_numbers=range(shape.kv_heads),
        train=[train],
        held_out=[held_out],
        rope=ROPE,
        scale=shape.d**-0.5,
        settings=settings,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    run_stages(job, default_stages())
    return job


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "saapindex": saapindex.__version__,
    }


def main(
    cores: Annotated[bool, typer.Option("--cores", help="One layer on the CPU, from fewer samples.")] = False,
    layers: Annotated[int | None, typer.Option(help="Layers to train; by default all.")] = None,
    device: Annotated[str, typer.Option(help="Such as cuda:1.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Where to write the figures.")] = None,
) -> None:
    """Train, and say how long each stage took."""
    if not cores and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here: give --cores to train one layer on the CPU")
    on = torch.device("cpu" if cores else device)
    shape, settings = (SMALL, SMALL_SETTINGS) if cores else (LARGE, LARGE_SETTINGS)
    shape = replace(shape, layers=layers or shape.layers)
    if on.type == "cuda":
        train_layer(replace(shape, keys=32_768, queries=4096), settings, 0, on)  # start-up is not training
        torch.cuda.reset_peak_memory_stats(on)
    seconds: list[dict[str, float]] = []
    begin = time.perf_counter()
    for layer in track(range(shape.layers), "training layers"):
        job = train_layer(shape, settings, layer, on)
        seconds.append(dict(job.seconds))
        recall = {rung: sum(part.recall[rung] for part in job.lists[settings.nlist[0]]) / job.heads
                  for rung in settings.routers}  # fmt: skip
    elapsed = time.perf_counter() - begin
    stages = {name: sum(layer[name] for layer in seconds) for name in seconds[0]}
    result = {
        "machine": machine(on),
        "shape": vars(shape),
        "settings": settings.to_dict(),
        "seconds by layer": seconds,
        "seconds by stage": stages,
        "seconds training": sum(stages.values()),
        "seconds with making the tensors": elapsed,
        "seconds a head": sum(stages.values()) / (shape.layers * shape.kv_heads),
        "peak memory GiB": torch.cuda.max_memory_allocated(on) / 2**30 if on.type == "cuda" else None,
        "recall of the last layer": recall,
    }
    path = out or RESULTS / ("train-cores.json" if cores else "train.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(
        title=f"{shape.layers} layers of {shape.kv_heads} KV heads, {shape.keys} keys and {shape.queries} "
        f"queries each, {settings.nlist[0]} lists: {machine(on)['device']}"
    )
    for column in ("stage", "seconds", "a layer", "a head"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, spent in [*stages.items(), ("all", sum(stages.values()))]:
        a_layer = spent / shape.layers
        table.add_row(name, f"{spent:.1f}", f"{a_layer:.2f}", f"{a_layer / shape.kv_heads:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
