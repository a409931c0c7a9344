"""A small model's traces: clustered keys, and queries that look for clusters."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import saapindex as sx
from saapindex.learn.traces import Trace, write_trace

KV_HEADS, GROUP, D, N, M = 2, 3, 16, 400, 90


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On such small tensors threads wait for each other more than they work."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rope():
    return sx.Rope(theta=500.0, dim=D)


@pytest.fixture(scope="session")
def make_trace(rope):
    """`make_trace(seed, layer)`: clusters are those of the layer, what is drawn from them is the seed's."""

    def make(seed, layer=0, *, n=N, m=M, rope=rope, kv_heads=KV_HEADS, group=GROUP, d=D, info=()):
        centres = 3 * np.random.default_rng(layer).standard_normal((kv_heads, 12, d))
        rng = np.random.default_rng(100 + 17 * seed + layer)

        def drawn(heads, count, spread):
            rows = centres[heads, rng.integers(12, size=(len(heads), count)).T].transpose(1, 0, 2)
            return rows + spread * rng.standard_normal((len(heads), count, d))

        keys = drawn(np.arange(kv_heads), n, 1.0)
        queries = drawn(np.repeat(np.arange(kv_heads), group), m, 1.5)
        at = np.arange(n)
        at_q = np.sort(np.random.default_rng(seed).choice(np.arange(n // 3, n), m, replace=False))
        if rope is not None:
            keys = np.stack([rope.rotate(head, at) for head in keys])
            queries = np.stack([rope.rotate(head, at_q) for head in queries])
        about = {"model": "a/model", "weights": "f00d", "layer": layer, **dict(info)}
        values = rng.standard_normal((kv_heads, n, d)).astype(np.float16)
        return Trace(keys.astype(np.float16), values, queries.astype(np.float16), at, at_q, rope, about)

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory, make_trace):
    """Four sequences of layers 1 and 4."""
    root = tmp_path_factory.mktemp("traces")
    for seed in range(4):
        (root / f"text-{seed}").mkdir()
        for layer in (1, 4):
            write_trace(root / f"text-{seed}" / f"layer-{layer:02d}.safetensors", make_trace(seed, layer))
    return root


@pytest.fixture(scope="session")
def by_error():
    """Settings of a small training that judges by what the index returns."""
    from saapindex.learn.settings import TrainingSettings

    return TrainingSettings(
        nlist=6, cutoffs=(30.0,), niter=3, window=20, routers=("mean",), words=1, share=0.5, judge="error"
    )


@pytest.fixture(scope="session")
def codebook(folder, by_error):
    """What it trains."""
    from saapindex.learn.train import train

    return train(folder, by_error, held_out=2)
