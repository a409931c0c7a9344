"""Time the state of an attention index on a CUDA device: building it, a step that adds a token, and a flush.

::

    python bench/cuda_state.py    # writes bench/results/cuda-state.json

Keys of an imbalanced mixture, about as uneven as those of real contexts: lists of the largest hundredth are
several times the even size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

from saapindex.attention import AttentionIndex, LayerCodebook
from saapindex.attention.device_batch import DeviceBatch
from saapindex.backends.cuda.append import append_streams
from saapindex.backends.cuda.append_state import AppendSpace, with_keys
from saapindex.codes import fit_codes

RESULTS = Path(__file__).parent / "results" / "cuda-state.json"
HEADS, D, NLIST, TOKENS, FLUSH = 8, 128, 1024, 131_072, 256


def codebook() -> LayerCodebook:
    """Return a codebook of random centroids, whose keys lie around them."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((HEADS, NLIST, D)).astype(np.float32)
    residuals = 0.7 * rng.standard_normal((HEADS, 2000, D))
    metric = np.stack([np.eye(D)] * HEADS)
    return LayerCodebook(
        centroids=centroids, code=fit_codes(residuals, metric, 3), scale=D**-0.5, metric=metric
    )


def keys_of(book: LayerCodebook, n: int, dtype: str, seed: int) -> Any:
    """Return keys on the device, (1, H, n, d)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = torch.randn(HEADS, NLIST, generator=generator, device="cuda").exp()
    labels = torch.multinomial(weights, n, replacement=True, generator=generator)
    centers = torch.from_numpy(book.centroids).cuda()
    x = torch.stack([centers[h, labels[h]] for h in range(HEADS)])
    x += 0.7 * torch.randn(x.shape, generator=generator, device="cuda")
    return x[None].to(getattr(torch, dtype))


def elapsed(run: Any) -> float:
    """Return the microseconds that `run` takes on the device."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def median(run: Any, times: int, before: Any = None) -> float:
    """Return the median time of `run` in microseconds, by events."""
    found = []
    for _ in range(times + 2):
        if before:
            before()
        found.append(elapsed(run))
    return float(np.median(found[2:]))


def stamped(batch: DeviceBatch, keys: Any, values: Any, *, many: bool) -> list[float]:
    """Append once, and return the microseconds of each phase of the kernel."""
    stamps = cupy.zeros(6, np.int64)
    made = with_keys(batch._argument(), keys, values)
    append_streams(made, D, batch.streams.keys.dtype, many=many, stamps=stamps)
    batch._known = None
    return [float(x) for x in np.round(np.diff(stamps.get()) / 1e3, 1)]


def prefill(book: LayerCodebook, dtype: str) -> dict[str, Any]:
    """Time the building of an index from a prompt."""
    k, v = keys_of(book, TOKENS, dtype, 1), keys_of(book, TOKENS, dtype, 2)
    found: dict[str, Any] = {}
    for adapt in (0, 3):
        index = AttentionIndex(book, dtype=dtype, adapt=adapt, device="cuda")
        stream: Any = torch.cuda.Stream
        with torch.cuda.stream(stream()):
            found["milliseconds" if not adapt else "milliseconds with 3 Lloyd steps"] = (
                median(lambda index=index: index.add(k, v), 7 if not adapt else 3, index.reset) / 1e3
            )
    batch: Any = index._batch
    keys = cupy.asarray(k.view(torch.int16)).view(np.uint16) if dtype == "bfloat16" else cupy.asarray(k)
    book_on_device = batch.keeping.book
    index.reset()
    batch._make_room(np.array([TOKENS]))
    most = TOKENS - index.window // 16 * 16 - 16
    space = AppendSpace.empty(batch.streams, TOKENS, cupy, batch._counters)
    labels = cupy.zeros((HEADS, TOKENS), np.int32)
    labels[:, :most] = batch.keeping.book.assign(keys[0, :, 1 : most + 1])
    stamps = cupy.zeros(6, np.int64)
    vs = cupy.asarray(v.view(torch.int16)).view(np.uint16) if dtype == "bfloat16" else cupy.asarray(v)
    made = with_keys(batch._arguments(space), keys, vs, None, labels)
    append_streams(made, D, keys.dtype, many=True, stamps=stamps)
    phases = np.round(np.diff(stamps.get()) / 1e3, 1).tolist()
    found["microseconds of the kernel: none, sort, keys and anchors, values and codes, end"] = phases
    batch._known = None
    found["of which assignment"] = median(lambda: book_on_device.assign(keys[0]), 7) / 1e3
    sizes = np.sort(index.list_sizes.reshape(-1))[::-1]
    found["largest list over mean"] = float(sizes[0] / sizes.mean())
    found["bytes"] = 2 * HEADS * TOKENS * D * k.element_size()
    wrong = _wrong_lists(index, keys[0])
    found["share of keys in another list than float32 says"] = wrong
    return found


def _wrong_lists(index: AttentionIndex, keys: Any) -> float:
    """Compare lists with those of a plain product of matrices."""
    streams, wrong = index._batch.streams, 0  # type: ignore[union-attr]
    forms, bias = (index._batch._forms or index._batch.keeping.book.forms)[:2]  # type: ignore[union-attr]
    for h in range(HEADS):
        count = int(streams.counts[h])
        pages, lanes = streams.pages[h, :count], streams.labels[h, :count] & 31
        slot, lane = cupy.nonzero(cupy.arange(16) < lanes[:, None])
        ids, owner = streams.ids[pages[slot], lane], (streams.labels[h, :count] >> 5)[slot]
        x = keys[h]
        if x.dtype == np.uint16:
            x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        labels = (x.astype(np.float32) @ forms[h].T + bias[h]).argmax(axis=1)
        wrong += int((labels[ids] != owner).sum())
    return wrong / (HEADS * TOKENS)


def steps(book: LayerCodebook, dtype: str, context: int) -> dict[str, Any]:
    """Time single tokens in a graph, and flushes."""
    k, v = keys_of(book, context, dtype, 1), keys_of(book, context, dtype, 2)
    more, values = keys_of(book, 4096, dtype, 3), keys_of(book, 4096, dtype, 4)
    index = AttentionIndex(book, dtype=dtype, adapt=0, device="cuda", flush=FLUSH)
    index.add(k, v)
    index.reserve(16_384)
    new = [torch.empty(1, HEADS, 1, D, dtype=more.dtype, device="cuda") for _ in range(2)]
    graph, large = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    index.add(*new)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        index.add(*new)
    rows = [x[:, :, :FLUSH].contiguous() for x in (more, values)]
    with torch.cuda.graph(large):
        index.add(*rows)
    times = []
    for i in range(2 * FLUSH + 40):
        for target, source in zip(new, (more, values), strict=True):
            target.copy_(source[:, :, i : i + 1])
        times.append(elapsed(graph.replay))
    nothing = torch.cuda.CUDAGraph()
    with torch.cuda.graph(nothing):
        new[0].add_(0)
    empty = [elapsed(nothing.replay) for _ in range(200)]
    streams: Any = index._batch.streams  # type: ignore[union-attr]
    flushes, coded = [], streams.coded.copy()
    for i in range(4096 // FLUSH):
        for target, source in zip(rows, (more, values), strict=True):
            target.copy_(source[:, :, FLUSH * i : FLUSH * (i + 1)])
        flushes.append(elapsed(large.replay))
    renewed = float((coded != streams.coded).sum()) / len(flushes)
    pieces = [[x[:, :, FLUSH * i : FLUSH * (i + 1)].contiguous() for x in (more, values)] for i in range(8)]
    several = torch.cuda.CUDAGraph()
    with torch.cuda.graph(several):
        for piece in pieces:
            index.add(*piece)
    in_a_row = [elapsed(several.replay) / len(pieces) for _ in range(4)]
    pairs = torch.cuda.CUDAGraph()
    with torch.cuda.graph(pairs):
        for _ in range(20):
            index.add(*new)
    single = median(pairs.replay, 3) / 20
    batch: Any = index._batch
    kinds = np.uint16 if dtype == "bfloat16" else None
    arrays = [cupy.asarray(x.view(torch.int16)).view(kinds) if kinds else cupy.asarray(x) for x in rows]
    phases = [stamped(batch, *arrays, many=many) for many in (False, True) for _ in range(3)]
    times.sort()
    return {
        "lengths": index.lengths.tolist(),
        "token, one of 20 in a graph": single,
        "token, a graph of one (median)": float(np.median(times)),
        "another kernel in a graph of one": float(np.median(empty)),
        "token with a flush of 256": times[-2:],
        "256 tokens with a flush of 256": [round(x, 1) for x in sorted(flushes)],
        "256 tokens with a flush of 256, one of 8 in a graph": [round(x, 1) for x in sorted(in_a_row)],
        "lists coded anew in a flush (mean)": renewed,
        "phases (assign, sort, keys and codes, values and lists coded anew, end)": phases,
    }


def main() -> None:
    """Time everything and write the results."""
    book = codebook()
    dtypes = sys.argv[1:] or ["bfloat16", "float16", "float32"]
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    found: dict[str, Any] = {
        "machine": {
            "device": properties["name"].decode(),
            "cupy": cupy.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "setting": {"kv_heads": HEADS, "d": D, "nlist": NLIST, "tokens": TOKENS, "flush": FLUSH},
        "prefill": {},
        "steps (microseconds)": {},
    }
    for dtype in dtypes:
        found["prefill"][dtype] = prefill(book, dtype)
        print(dtype, json.dumps(found["prefill"][dtype], indent=1), flush=True)
    for dtype in dtypes:
        found["steps (microseconds)"][dtype] = steps(book, dtype, TOKENS)
        print(dtype, json.dumps(found["steps (microseconds)"][dtype], indent=1), flush=True)
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found |= {name: earlier[name] for name in ("before", "tried") if name in earlier}  # of other versions
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
