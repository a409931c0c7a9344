"""Time the CUDA kernels of the index against what the device can do; writes ``bench/results/cuda-ops.json``.

::

    python bench/cuda_ops.py            # needs a CUDA device, CuPy and torch; three minutes

Every time is the median of replays of a CUDA graph, so that launches from Python do not count; the device
runs nothing else. A kernel's floors are the bytes that it must move at the bandwidth of a large copy, and its
multiply-adds at the rate of a large matrix product, both measured in the same run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch
import typer

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists
from saapindex.backends.cuda.assign import assign_heads, prepare
from saapindex.devices import current

RESULTS = Path(__file__).parent / "results"
HEADS, TOKENS, D, NLIST = 8, 131_072, 128, 1024


def microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of `run` on the device, replayed from a graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(3):  # compiles, and fills the pool that the graph takes its memory from
            run()
        stream.synchronize()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        graph.launch()
        times = []
        for _ in range(repeats):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return statistics.median(times)


def torch_microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of what torch does, replayed from a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Return what this device reaches: a large copy, and large matrix products."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    found = {"copy GB/s": 2 * x.nbytes / torch_microseconds(lambda: y.copy_(x)) / 1e3}
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * 8192**3 / torch_microseconds(lambda a=a, b=b: a @ b, 5) / 1e6
    return found


def stored(shape: tuple[int, ...], dtype: str) -> Any:
    """Return random keys as they are stored."""
    x = cupy.random.standard_normal(shape, dtype=np.float32)
    x += cupy.random.standard_normal(shape[-1], dtype=np.float32)
    if dtype == "bfloat16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def kernels(limits: dict[str, float]) -> list[dict[str, Any]]:
    """Time every operation at the sizes of a prefill."""
    ops, rows = get_ops("cuda"), []

    def add(name: str, run: Callable[[], Any], moved: float, flops: float = 0, rate: str = "float32") -> None:
        time = microseconds(run)
        memory, arithmetic = moved / limits["copy GB/s"] / 1e3, flops / limits[f"{rate} TFLOP/s"] / 1e6
        floor = max(memory, arithmetic)
        row = {"kernel": name, "us": time, "GB/s": moved / time / 1e3, "TFLOP/s": flops / time / 1e6}
        rows.append(
            {**row, "memory floor us": memory, "arithmetic floor us": arithmetic, "share": floor / time}
        )
        print(f"{name:48s} {time:9.1f} us   floor {floor:8.1f}   {floor / time:5.2f}", flush=True)

    n, total = TOKENS, HEADS * TOKENS
    half_turns = [cupy.asarray(v) for v in (10000.0 ** -(np.arange(D // 2) / (D // 2)), np.ones(D // 2))]
    for dtype in ("bfloat16", "float32"):
        x, positions = stored((total, D), dtype), cupy.arange(total) % n
        add(f"rotate {dtype}", lambda x=x, p=positions: ops.rotate(x, p, *half_turns, False), 2 * x.nbytes)
    for d in (D, 64, 256):
        for dtype in ("bfloat16", "float16"):
            x = stored((HEADS, n, d), dtype)
            centroids = cupy.random.standard_normal((HEADS, NLIST, d), dtype=np.float32)
            bias = -(centroids**2).sum(axis=2) / 2
            ready = prepare(centroids, bias)
            moved, flops = x.nbytes + total * 12, 2 * 2 * total * NLIST * d
            name = f"assign {dtype}, d {d}, 8 heads of 128k"
            add(name, lambda x=x, r=ready: assign_heads(x, r), moved, flops, "float16")
        if d == D:
            one = x[0], centroids[0], bias[0]
            few = x[:, :256]
            flops = 4 * 2048 * NLIST * d
            name = "assign float16, 8 heads of 256"
            add(name, lambda x=few, r=ready: assign_heads(x, r), 2 * centroids.nbytes, flops, "float16")
            add("prepare 8 heads of 1024", lambda c=centroids, b=bias: prepare(c, b), 2 * centroids.nbytes)
            wide, flops = one[0].astype(np.float32), 2 * n * NLIST * d
            name = "assign float32, one head of 128k"
            add(name, lambda x=wide, o=one: ops.assign(x, *o[1:]), wide.nbytes, flops)
            labels, _ = ops.assign(*one)
            name = "accumulate float16, one head of 128k"
            add(name, lambda x=one[0], c=labels: ops.accumulate(x, c, NLIST), one[0].nbytes)
    code = fitted()
    residuals = cupy.random.standard_normal((HEADS, n, D), dtype=np.float32)
    coded = code.step.shape[1]
    name, flops = f"encode, 3 words, {coded} dimensions, 8 heads of 128k", 2 * total * D * coded
    add(name, lambda: ops.encode(residuals, code), residuals.nbytes, flops)
    return rows


def fitted() -> Any:
    """Return codes of 3 words for the heads, on the device."""
    from saapindex.backends.paged import Code
    from saapindex.codes import fit_codes

    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((HEADS, 500, D)) * 0.98 ** np.arange(D)
    return Code._make(map(cupy.asarray, fit_codes(residuals, np.stack([np.eye(D)] * HEADS), 3).view))


def attention_like(n: int, q: int, d: int) -> tuple[Any, Any]:
    """Return keys and queries of different distributions: topics in a few strong directions; float32."""
    rng = cupy.random.RandomState(0)
    scale = (cupy.arange(1, d + 1, dtype=np.float32) ** -0.5) * 3
    mixing = cupy.linalg.qr(rng.standard_normal((d, d), dtype=np.float32))[0]
    topics = rng.standard_normal((4000, d), dtype=np.float32) * scale
    own = rng.randint(0, 4000, n)
    keys = (topics[own] + 0.6 * scale * rng.standard_normal((n, d), dtype=np.float32)) @ mixing
    offset = 2 * rng.standard_normal(d, dtype=np.float32) * scale
    wanted = 0.7 * topics[rng.randint(0, 4000, q)] + 0.5 * scale * rng.standard_normal(
        (q, d), dtype=np.float32
    )
    return keys, (wanted + offset) @ mixing


def lists_of(keys: Any, nlist: int) -> tuple[Lists, Any, Any]:
    """Partition keys by k-means; return lists in float16, the means as blocks, and the sizes."""
    ops = get_ops("cuda")
    n, d = keys.shape
    centroids = keys[cupy.random.permutation(n)[:nlist]]
    for _ in range(8):
        labels, _ = ops.assign(keys, centroids, -(centroids**2).sum(axis=1) / 2)
        sums, counts = ops.accumulate(keys, labels, nlist)
        centroids = cupy.where(
            counts[:, None] > 0, sums / cupy.maximum(counts, 1)[:, None], centroids
        ).astype(np.float32)
    labels, _ = ops.assign(keys, centroids, -(centroids**2).sum(axis=1) / 2)
    sums, counts = ops.accumulate(keys, labels, nlist)
    room = -(-counts // LANES) * LANES
    offsets = cupy.cumsum(room) - room
    order = cupy.argsort(labels)
    rank = cupy.arange(n) - (cupy.cumsum(counts) - counts)[labels[order]]
    rows = offsets[labels[order]] + rank
    total = int(room.sum())
    flat, ids = cupy.zeros((total, d), np.float16), cupy.zeros(total, np.int64)
    flat[rows], ids[rows] = keys[order].astype(np.float16), order
    vectors = cupy.ascontiguousarray(flat.reshape(-1, LANES, d).transpose(0, 2, 1))
    means = (sums / cupy.maximum(counts, 1)[:, None]).astype(np.float32)
    padded = cupy.zeros((-(-nlist // LANES) * LANES, d), np.float32)
    padded[:nlist] = means
    table = cupy.ascontiguousarray(padded.reshape(-1, LANES, d).transpose(0, 2, 1))
    return Lists(vectors, ids, offsets, counts), table, cupy.where(counts > 0, 0, -np.inf).astype(np.float32)


def searches(n: int, nlist: int) -> list[dict[str, Any]]:
    """Time `search` at recall@10 of 0.9 beside brute force: a float16 matrix product and torch's topk."""
    ops, rows = get_ops("cuda"), []
    keys, queries = attention_like(n, 1024, D)
    lists, table, bias = lists_of(keys, nlist)
    exact = cupy.from_dlpack(torch.from_dlpack(queries @ keys.T).topk(10)[1])

    def recall(p: int) -> float:
        _, found = ops.search(queries, queries, table, bias, p, lists, 10, False)
        return float((found[:, :, None] == exact[:, None, :]).any(axis=2).mean())

    tried = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, nlist)
    nprobe = next((p for p in tried if recall(p) >= 0.9), nlist)
    half_keys, half_queries = torch.from_dlpack(keys).half(), torch.from_dlpack(queries).half()
    read = float(lists.sizes[ops.route(queries, table, bias, nprobe)[0]].sum(axis=1).mean())
    setting = {"keys": n, "nlist": nlist, "nprobe": nprobe, "recall@10": recall(nprobe), "keys read": read}
    for k in (10, 100):
        for batch in (1, 32, 1024):
            part = cupy.ascontiguousarray(queries[:batch])
            ours = microseconds(lambda p=part, k=k: ops.search(p, p, table, bias, nprobe, lists, k, False))
            routing = microseconds(lambda p=part: ops.route(p, table, bias, nprobe))
            theirs = torch_microseconds(lambda b=batch, k=k: (half_queries[:b] @ half_keys.T).topk(k))
            times = {"search us": ours, "of it routing us": routing, "brute force us": theirs}
            speed = batch * read * D * 2 / max(ours - routing, 1e-9) / 1e3
            rows.append(
                {**setting, "k": k, "batch": batch, **times, "times": theirs / ours, "scan GB/s": speed}
            )
            print(rows[-1], flush=True)
    return rows


def main(out: Path = RESULTS / "cuda-ops.json") -> None:
    """Time everything, print it and write it to OUT."""
    limits = ceilings()
    print(limits, flush=True)
    with current(0):
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cupy": cupy.__version__,
            "ceilings": limits,
            "kernels": kernels(limits),
            "search": [*searches(131_072, 512), *searches(1_048_576, 2048)],
        }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
