"""Time Faiss's IVF indexes on a GPU, for `bench/cuda_ops.py`: Faiss's wheels may want another NumPy and CUDA.

::

    python bench/faiss_gpu.py DATA.npz OUT.json    # written and read by bench/cuda_ops.py --faiss

DATA holds keys, queries, their exact ten best, and nlist, of which Faiss also takes half and twice as many.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import faiss.contrib.torch_utils
import numpy as np
import torch

gpu: Any = faiss
TRIED = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)


def microseconds(run: Callable[[], Any], repeats: int = 50) -> float:
    """Return the median time of a call from Python until its results are there."""
    times = []
    for _ in range(repeats + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return float(statistics.median(times[5:]))


def back_to_back(run: Callable[[], Any], calls: int = 50) -> float:
    """Return the time of each of many calls of which none waits for the one before."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6 / calls


def measured(index: Any, queries: Any, exact: Any, nlist: int) -> dict[str, Any]:
    """Return the least `nprobe` for a recall of 0.9, and the time of calls with it by k and batch."""

    def recall(nprobe: int) -> float:
        index.nprobe = nprobe
        found = index.search(queries, 10)[1]
        return float((found[:, :, None] == exact[:, None, :]).any(dim=2).float().mean())

    nprobe = next((p for p in TRIED if p <= nlist and recall(p) >= 0.9), nlist)
    reached = recall(nprobe)
    found: dict[str, Any] = {"nlist": nlist, "nprobe": nprobe, "recall@10": reached}
    for name, clock in (("call us", microseconds), ("back to back us", back_to_back)):
        found[name] = {
            f"{k} {batch}": clock(lambda k=k, batch=batch: index.search(queries[:batch], k))  # type: ignore[misc]
            for k in (10, 100)
            for batch in (1, 32, 1024)
        }
    return found


def main(data: str, out: str) -> None:
    """Measure both kinds of index, and write what was found."""
    arrays = np.load(data)
    keys, nlist = arrays["keys"], int(arrays["nlist"])
    queries, exact = (torch.from_numpy(arrays[name]).cuda() for name in ("queries", "exact"))
    d, metric = keys.shape[1], gpu.METRIC_INNER_PRODUCT
    resources = gpu.StandardGpuResources()
    makers = {
        "Faiss GPU IVFFlat": lambda lists: gpu.GpuIndexIVFFlat(resources, d, lists, metric),
        "Faiss GPU IVF SQfp16": lambda lists: gpu.GpuIndexIVFScalarQuantizer(
            resources, d, lists, gpu.ScalarQuantizer.QT_fp16, metric
        ),
    }
    found: dict[str, Any] = {"version": gpu.__version__, "numpy": np.__version__}
    held = torch.from_numpy(keys).cuda()
    for name, make in makers.items():
        found[name] = []
        for lists in (nlist // 2, nlist, 2 * nlist):
            index = make(lists)  # type: ignore[no-untyped-call]
            index.train(held)
            index.add(held)
            found[name].append(measured(index, queries, exact, lists))
            print(name, found[name][-1], flush=True)
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
