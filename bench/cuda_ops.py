"""Time the CUDA kernels of the index against what the device can do; writes ``bench/results/cuda-ops.json``.

::

    python bench/cuda_ops.py    # needs a CUDA device, CuPy and torch; --faiss COMMAND to compare with Faiss

COMMAND runs bench/faiss_gpu.py, in another environment if need be; --no-kernels times searches alone.

Every time is the median of replays of a CUDA graph, so that launches from Python do not count; the device
runs nothing else. A kernel's floors are the bytes that it must move at the bandwidth of a large copy, and its
multiply-adds at the rate of a large matrix product, both measured in the same run.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cupy
import numpy as np
import torch
import typer
from torch.utils.dlpack import from_dlpack

import saapindex as sx
from saapindex.backends import get_ops
from saapindex.backends.cuda.assign import assign_heads, prepare
from saapindex.devices import current
from saapindex.learn import read_trace

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parent.parent / "saapindex" / "data"
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
    return float(statistics.median(times))


def torch_microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of what torch does, replayed from a graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(statistics.median(times))


def ceilings() -> dict[str, float]:
    """Return what this device reaches: a large copy, and large matrix products."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    found = {"copy GB/s": 2 * x.nbytes / torch_microseconds(lambda: y.copy_(x)) / 1e3}
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * 8192**3 / torch_microseconds(partial(torch.matmul, a, b), 5) / 1e6
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
        took = microseconds(run)
        memory, arithmetic = moved / limits["copy GB/s"] / 1e3, flops / limits[f"{rate} TFLOP/s"] / 1e6
        floor = max(memory, arithmetic)
        row = {"kernel": name, "us": took, "GB/s": moved / took / 1e3, "TFLOP/s": flops / took / 1e6}
        rows.append(
            {**row, "memory floor us": memory, "arithmetic floor us": arithmetic, "share": floor / took}
        )
        print(f"{name:48s} {took:9.1f} us   floor {floor:8.1f}   {floor / took:5.2f}", flush=True)

    n, total = TOKENS, HEADS * TOKENS
    half_turns = [cupy.asarray(v) for v in (10000.0 ** -(np.arange(D // 2) / (D // 2)), np.ones(D // 2))]
    for dtype in ("bfloat16", "float32"):
        x, positions = stored((total, D), dtype), cupy.arange(total) % n
        add(
            f"rotate {dtype}",
            partial(ops.rotate, x, positions, half_turns[0], half_turns[1], False),
            2 * x.nbytes,
        )
    for d in (D, 64, 256):
        for dtype in ("bfloat16", "float16"):
            x = stored((HEADS, n, d), dtype)
            centroids = cupy.random.standard_normal((HEADS, NLIST, d), dtype=np.float32)
            bias = -(centroids**2).sum(axis=2) / 2
            ready = prepare(centroids, bias)
            moved, flops = x.nbytes + total * 12, 2 * 2 * total * NLIST * d
            name = f"assign {dtype}, d {d}, 8 heads of 128k"
            add(name, partial(assign_heads, x, ready), moved, flops, "float16")
        if d == D:
            one = x[0], centroids[0], bias[0]
            few = x[:, :256]
            flops = 4 * 2048 * NLIST * d
            name = "assign float16, 8 heads of 256"
            add(name, partial(assign_heads, few, ready), 2 * centroids.nbytes, flops, "float16")
            add("prepare 8 heads of 1024", partial(prepare, centroids, bias), 2 * centroids.nbytes)
            wide, flops = one[0].astype(np.float32), 3 * 2 * n * NLIST * d
            name = "assign float32, one head of 128k"
            add(name, partial(ops.assign, wide, one[1], one[2]), wide.nbytes, flops, "float16")
            labels, _ = ops.assign(*one)
            name = "accumulate float16, one head of 128k"
            add(name, partial(ops.accumulate, one[0], labels, NLIST), one[0].nbytes)
    code = fitted()
    residuals = cupy.random.standard_normal((HEADS, n, D), dtype=np.float32)
    coded = code.step.shape[1]
    name, flops = f"encode, 3 words, {coded} dimensions, 8 heads of 128k", 2 * total * D * coded
    add(name, partial(ops.encode, residuals, code), residuals.nbytes, flops)
    return rows


def fitted() -> Any:
    """Return codes of 3 words for the heads, on the device."""
    from saapindex.backends.paged import Code
    from saapindex.codes import fit_codes

    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((HEADS, 500, D)) * 0.98 ** np.arange(D)
    return Code._make(map(cupy.asarray, fit_codes(residuals, np.stack([np.eye(D)] * HEADS), 3).view))


def attention_like(n: int, d: int) -> tuple[Any, Any, Any]:
    """Return keys, and queries of another distribution to ask and to train with: topics in few directions."""
    q = 5120
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
    queries = (wanted + offset) @ mixing
    return keys, queries[:1024], queries[1024:]


def wall_microseconds(run: Callable[[], Any], repeats: int = 50) -> float:
    """Return the median time of a call from Python until its results are there."""
    times = []
    for _ in range(repeats + 5):
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        run()
        cupy.cuda.Device().synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times[5:])


def back_to_back(run: Callable[[], Any], calls: int = 50) -> float:
    """Return the time of each of many calls of which none waits for the one before."""
    run()
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() - begin) * 1e6 / calls


def least_nprobe(recall: Callable[[int], float], nlist: int) -> int:
    """Return the least number of lists that reaches a recall of 0.9."""
    tried = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
    return next((p for p in tried if recall(p) >= 0.9), nlist)


def brute_force(queries: Any, keys: Any, k: int) -> Any:
    """Return the best of all inner products, by a matrix product and torch's topk."""
    return (queries @ keys.T).topk(k)


def trace_head(test: Path, train: Path, head: int) -> tuple[Any, Any, Any]:
    """Return keys of one head of a trace, queries from beyond them, and queries of another context."""
    here, there = read_trace(test), read_trace(train)
    end = len(here.key_positions) * 7 // 8
    group = slice(head * here.group_size, (head + 1) * here.group_size)
    beyond = here.queries[group][:, here.query_positions >= end].reshape(-1, here.d)[:1024]
    parts = here.keys[head, :end], beyond, there.queries[group].reshape(-1, here.d)
    keys, queries, training = (cupy.asarray(part, np.float32) for part in parts)
    return keys, queries, training


def searches(
    name: str, keys: Any, queries: Any, training: Any, nlist: int, command: str
) -> list[dict[str, Any]]:
    """Time searches at recall@10 of 0.9 beside Faiss's IVF on the same device, and brute force."""
    n, d = keys.shape
    exact = cupy.from_dlpack(from_dlpack(queries @ keys.T).topk(10)[1])

    def recall(found: Any) -> float:
        return float((cupy.asarray(found)[:, :, None] == exact[:, None, :]).any(axis=2).mean())

    index = sx.IndexSAAP(d, nlist, dtype="float16", device="cuda")
    begin = time.perf_counter()
    index.train(keys.get(), xq_train=training.get())
    trained = time.perf_counter()
    index.add(keys.get())
    seconds = {"train s": trained - begin, "add s": time.perf_counter() - trained}
    index.nprobe = least_nprobe(
        lambda p: recall(index.search(queries, 10, params=sx.SearchParameters(nprobe=p))[1]), nlist
    )
    theirs = faiss_times(command, keys, queries, exact, nlist)
    half_keys, half_queries = from_dlpack(keys).half(), from_dlpack(queries).half()
    read = float(index.route(queries)[1].mean())
    routing = index._routing
    assert routing is not None
    table, bias = cupy.asarray(routing.table), cupy.asarray(routing.bias(index.params.rank))
    found = recall(index.search(queries, 10)[1])
    setting = {
        "data": name,
        "keys": n,
        "nlist": nlist,
        "nprobe": index.nprobe,
        "recall@10": found,
        "keys read": read,
        **seconds,
    }
    rows, ops = [], get_ops("cuda")
    for k, batch in itertools.product((10, 100), (1, 32, 1024)):
        part = cupy.ascontiguousarray(queries[:batch])
        replayed = microseconds(partial(index.search, part, k))
        routed = microseconds(partial(ops.route, part, table, bias, index.nprobe))
        brute = torch_microseconds(partial(brute_force, half_queries[:batch], half_keys, k))
        row: dict[str, Any] = {
            **setting,
            "k": k,
            "batch": batch,
            "call us": wall_microseconds(partial(index.search, part, k)),
            "back to back us": back_to_back(partial(index.search, part, k)),
            "kernels us": replayed,
            "of it routing us": routed,
            "scan GB/s": batch * read * d * 2 / max(replayed - routed, 1e-9) / 1e3,
            "brute force kernels us": brute,
            "times brute force": brute / replayed,
        }
        for kind, others in theirs.items():
            if not kind.startswith("Faiss"):
                row[f"Faiss {kind}"] = others
                continue
            at = f"{k} {batch}"
            best = min(others, key=lambda other: other["call us"][at])  # of the numbers of lists
            call, chained = best["call us"][at], min(other["back to back us"][at] for other in others)
            row[kind] = {
                **{name: best[name] for name in ("nlist", "nprobe", "recall@10")},
                "call us": call,
                "back to back us": chained,
                "times call": call / row["call us"],
                "times back to back": chained / row["back to back us"],
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def faiss_times(command: str, keys: Any, queries: Any, exact: Any, nlist: int) -> dict[str, Any]:
    """Return what ``bench/faiss_gpu.py`` finds for these keys; nothing without a command that runs it."""
    if not command:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        data, out = f"{folder}/data.npz", f"{folder}/out.json"
        np.savez(data, keys=keys.get(), queries=queries.get(), exact=exact.get(), nlist=nlist)
        subprocess.run([*shlex.split(command), data, out], check=True)
        found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


def main(
    test: Annotated[Path, typer.Option(help="A layer's trace, whose keys are searched.")] = DATA
    / "test.safetensors",
    train: Annotated[Path, typer.Option(help="The same layer in another context.")] = DATA
    / "train.safetensors",
    head: Annotated[int, typer.Option(help="KV head of the trace.")] = 0,
    faiss: Annotated[str, typer.Option(help="Command that runs bench/faiss_gpu.py.")] = "",
    operations: Annotated[bool, typer.Option("--kernels/--no-kernels", help="Time kernels too.")] = True,
    out: Path = RESULTS / "cuda-ops.json",
) -> None:
    """Time everything, print it and write it to OUT."""
    limits = ceilings()
    print(limits, flush=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    with current(0):
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cupy": cupy.__version__,
        }
        if operations:
            kept |= {**machine, "ceilings": limits, "kernels": kernels(limits)}
        result = {
            **kept,
            "search machine": machine,
            "search ceilings": limits,
            "search": [
                *searches("real attention", *trace_head(test, train, head), 512, faiss),
                *searches("attention-like", *attention_like(1_048_576, D), 2048, faiss),
            ],
        }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
