"""Time a decode step of sparse attention on a CUDA device, next to dense attention.

::

    python bench/decode.py    # Llama-3.1-8B's shape; writes bench/results/decode.json

One layer, one token: an `AttentionIndex` adds it and attends, several of them one after another in a CUDA
graph, so that each step finds its keys in memory and not in a cache; one launch sees to the windows of all.
Dense attention is torch's SDPA in the same run. Keys are made up: an imbalanced mixture, lists as uneven as
those of real contexts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cupy
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from saapindex.attention import AttendParameters, AttentionIndex, LayerCodebook, flush_layers
from saapindex.backends.cuda.attend import attend_streams
from saapindex.backends.cuda.whole import shape_of
from saapindex.codes import fit_codes
from saapindex.params import default_nlist

RESULTS = Path(__file__).parent / "results" / "decode.json"
HEADS, GROUP, D, WINDOW = 8, 4, 128, 2047
WORDS = 6
"""Words of a code: 1.5 bits a dimension, as for smaller heads."""
CASES = {
    (1, 4096): 32,
    (1, 8192): 32,
    (1, 16_384): 32,
    (1, 32_768): 32,
    (1, 131_072): 32,
    (1, 524_288): 20,
    (8, 131_072): 8,
}
"""How many layers follow one another, for each batch and context."""
WAYS = {
    "5 %": AttendParameters(budget=0.05),
    "2 %": AttendParameters(budget=0.02),
    "10 %": AttendParameters(budget=0.1),
    "20 %": AttendParameters(budget=0.2),
    "5 %, with codes": AttendParameters(budget=0.05, refine=True, scan_share=0.3),
    "2 %, with codes": AttendParameters(budget=0.02, refine=True, scan_share=0.3),
    "32 lists (the paper's step)": AttendParameters(nprobe=32, remainder=False),
}
"""The first ones are what the default rule takes on a device with clusters: whole lists and a remainder."""
# What ends at each clock of a block: with codes one stage after another; where whole lists are read, two
# kinds of warps work at the same time.
STAGES = (
    "route",
    "near keys",
    "prepare",
    "select lists",
    "scan codes",
    "meet",
    "cut",
    "kept keys",
    "remainder",
    "reduce",
    "merge",
)
WHOLE_STAGES = (
    "begin",
    "ask for what choosing needs",
    "route",
    "norms",
    "select lists",
    "deal out pages",
    "near keys fetched",
    "near keys",
    "pages",
    "largest logit",
    "remainder",
    "merge",
)


def codebook(n: int) -> LayerCodebook:
    """Return a codebook of random centroids, whose keys lie around them."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((HEADS, default_nlist(n), D)).astype(np.float32)
    metric = np.stack([np.eye(D)] * HEADS)
    code = fit_codes(0.7 * rng.standard_normal((HEADS, 2000, D)), metric, WORDS)
    return LayerCodebook(centroids=centroids, code=code, scale=D**-0.5, metric=metric)


def drawn(book: LayerCodebook, batch: int, n: int, seed: int) -> torch.Tensor:
    """Return keys or values on the device, bfloat16 (batch, H, n, d)."""
    draws = torch.Generator("cuda").manual_seed(seed)
    centers = torch.from_numpy(book.centroids).cuda()
    x = torch.empty(batch, HEADS, n, D, dtype=torch.bfloat16, device="cuda")
    for b in range(batch):
        for h in range(HEADS):
            weights = torch.randn(book.nlist, generator=draws, device="cuda").exp()
            labels = torch.multinomial(weights, n, replacement=True, generator=draws)
            noise = torch.randn(n, D, generator=draws, device="cuda")
            x[b, h] = (centers[h, labels] + 0.7 * noise).bfloat16()
    return x


def microseconds(run: Callable[[], object], times: int = 20) -> float:
    """Return the median time of `run` replayed as a graph."""
    kind: Any = torch.cuda.Stream
    stream = kind()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    event: Any = torch.cuda.Event
    found = []
    for _ in range(times + 3):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return float(np.median(found[3:]))


def bandwidth() -> float:
    """Return the GB/s of a large copy, bytes read and written."""
    one = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    return 2**31 / microseconds(lambda: other.copy_(one)) / 1e3


def dense(batch: int, n: int, layers: int) -> dict[str, float]:
    """Return the time of a layer of dense attention, for each implementation."""
    k, v = (
        [torch.randn(batch, HEADS, n, D, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        for _ in range(2)
    )
    q = torch.randn(batch, HEADS * GROUP, 1, D, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name, kind in (
        ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):

        def run(kind: Any = kind) -> None:
            with sdpa_kernel(kind):
                for key, value in zip(k, v, strict=True):
                    torch.nn.functional.scaled_dot_product_attention(q, key, value, enable_gqa=True)

        found[name] = microseconds(run) / layers
    return found


def touched(index: AttentionIndex, params: AttendParameters, n: int) -> float:
    """Return the bytes that a step reads: of lists what the budget says, and the near keys."""
    row = 2 * D * 2
    near = index.batch * HEADS * (WINDOW + index.sinks + 16) * row
    if params.budget is None:
        sizes = index.list_sizes.reshape(-1, index.codebook.nlist)
        visited = np.sort(sizes, axis=1)[:, ::-1][:, : params.nprobe].sum()
        return near + float(visited) * row + sizes.size * D
    return near + params.budget * index.batch * HEADS * n * row


def stages(indexes: list[AttentionIndex], q: torch.Tensor, params: AttendParameters) -> dict[str, float]:
    """Return the microseconds of each stage of the kernel, the median over its blocks; where whole lists are
    read, at which of its own microseconds each ends.
    """
    device_attend: Any = importlib.import_module("saapindex.attention.device_attend")
    stamps: list[Any] = []

    whole = not params.reads_codes(default=False)

    def stamped(*args: Any, **rest: Any) -> None:
        q, streams, limits, space = args[0], args[1], args[4], args[5]
        shape = shape_of(limits, streams, q.shape[2], q.shape[1], 0)
        blocks = shape.cluster if shape else space.blocks
        stamps.append(cupy.zeros((q.shape[0] * q.shape[1] * blocks, 12), np.int64))
        attend_streams(*args, **rest, stamps=stamps[-1])

    device_attend.attend_streams = stamped
    try:
        for _ in range(2):
            for index in indexes:
                index.attend(q, params=params)
    finally:
        device_attend.attend_streams = attend_streams
    clock = cupy.cuda.runtime.getDeviceProperties(0)["clockRate"] / 1e3
    clocks = stamps[-1].get().astype(np.float64) / clock
    if whole:
        at = np.median(clocks - clocks[:, :1], axis=0).round(2)
        return {name: float(x) for name, x in zip(WHOLE_STAGES, at, strict=True)}
    between = np.diff(clocks, axis=1)
    return {name: float(x) for name, x in zip(STAGES, np.median(between, axis=0).round(2), strict=True)}


def sparse(batch: int, n: int, layers: int) -> dict[str, dict[str, Any]]:
    """Return times of a layer of sparse attention, for each way."""
    book = codebook(n)
    indexes = []
    k, v = (drawn(book, batch, n, seed) for seed in range(2))
    for _ in range(layers):
        index = AttentionIndex(book, batch=batch, window=WINDOW, dtype="bfloat16", adapt=0, device="cuda")
        index.add(k, v)
        index.reserve(4096)
        indexes.append(index)
    q = 1.5 * torch.randn(batch, HEADS * GROUP, D, device="cuda", dtype=torch.bfloat16)
    del k, v
    new = torch.randn(batch, HEADS, 1, D, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name, params in WAYS.items():

        def attend(params: AttendParameters = params) -> None:
            for index in indexes:
                index.attend(q, params=params)

        def step(params: AttendParameters = params) -> None:
            flush_layers(indexes)
            for index in indexes:
                index.attend(q, k=new, v=new, params=params)

        only = microseconds(attend) / layers
        whole = microseconds(step) / layers
        size = touched(indexes[0], params, n)
        found[name] = {
            "attend": only,
            "add and attend": whole,
            "bytes": size,
            "GB/s": size / whole / 1e3,
            "stages": stages(indexes, q, params),
        }
    return found


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    only: Annotated[str, typer.Option(help="Batch and context, as 1x131072; all by default.")] = "",
) -> None:
    """Time everything, print a table, write the results."""
    copy, console = bandwidth(), Console(width=120)
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    machine = {
        "device": properties["name"].decode(),
        "cupy": cupy.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy GB/s": copy,
    }
    shape = {"q_heads": HEADS * GROUP, "kv_heads": HEADS, "d": D, "words": WORDS, "window": WINDOW}
    rows = []
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    tried = {"tried": earlier["tried"]} if "tried" in earlier else {}  # of other versions
    table = Table("batch", "context", "what", "us", "times dense", "GB/s", "of copy")
    for (batch, n), layers in CASES.items():
        if only and only != f"{batch}x{n}":
            continue
        there = dense(batch, n, layers)
        torch.cuda.empty_cache()
        best = min(there.values())
        for name, time in there.items():
            table.add_row(str(batch), str(n), name, f"{time:.1f}", f"{best / time:.2f}", "", "")
        ways = sparse(batch, n, layers)
        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
        for name, way in ways.items():
            time = way["add and attend"]
            table.add_row(
                str(batch),
                str(n),
                name,
                f"{time:.1f}",
                f"{best / time:.2f}",
                f"{way['GB/s']:.0f}",
                f"{way['GB/s'] / copy:.2f}",
            )
        rows.append({"batch": batch, "context": n, "layers": layers, "dense": there, "sparse": ways})
        found = {"machine": machine, "shape": shape, "steps": rows, **tried}
        out.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"{batch} x {n}: done")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
