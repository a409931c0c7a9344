"""Time Faiss's IVF indexes on a GPU, for `bench/cuda_ops.py`: Faiss's wheels may want another NumPy.

::

    python bench/faiss_gpu.py DATA.npz OUT.json    # written and read by bench/cuda_ops.py --faiss

DATA holds keys, queries, their exact ten best, and nlist.
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


def measured(index: Any, queries: Any, exact: Any, nlist: int) -> dict[str, Any]:
    """Return the least `nprobe` for a recall of 0.9, and the time of calls with it by k and batch."""

    def recall(nprobe: int) -> float:
        index.nprobe = nprobe
        found = index.search(queries, 10)[1]
        return float((found[:, :, None] == exact[:, None, :]).any(dim=2).float().mean())

    nprobe = next((p for p in TRIED if p <= nlist and recall(p) >= 0.9), nlist)
    reached = recall(nprobe)
    calls = {
        f"{k} {batch}": microseconds(lambda k=k, batch=batch: index.search(queries[:batch], k))  # type: ignore[misc]
        for k in (10, 100)
        for batch in (1, 32, 1024)
    }
    return {"nprobe": nprobe, "recall@10": reached, "call us": calls}


def main(data: str, out: str) -> None:
    """Measure both kinds of index, and write what was found."""
    arrays = np.load(data)
    keys, nlist = arrays["keys"], int(arrays["nlist"])
    queries, exact = (torch.from_numpy(arrays[name]).cuda() for name in ("queries", "exact"))
    d, metric = keys.shape[1], gpu.METRIC_INNER_PRODUCT
    resources = gpu.StandardGpuResources()
    makers = {
        "Faiss GPU IVFFlat": lambda: gpu.GpuIndexIVFFlat(resources, d, nlist, metric),
        "Faiss GPU IVF SQfp16": lambda: gpu.GpuIndexIVFScalarQuantizer(
            resources, d, nlist, gpu.ScalarQuantizer.QT_fp16, metric
        ),
    }
    found: dict[str, Any] = {"version": gpu.__version__}
    for name, make in makers.items():
        index = make()  # type: ignore[no-untyped-call]
        index.train(torch.from_numpy(keys).cuda())
        index.add(torch.from_numpy(keys).cuda())
        found[name] = measured(index, queries, exact, nlist)
        print(name, found[name], flush=True)
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
