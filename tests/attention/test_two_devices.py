"""Indexes on two CUDA devices in one process, in turn: each is what it is on the host."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx
from saapindex.attention import AttendParameters, AttentionIndex

pytestmark = pytest.mark.gpu
SMALL = {"window": 20, "sinks": 1, "flush": 16, "dense_below": 0, "adapt": 0, "backend": "reference"}


@pytest.fixture(scope="module", autouse=True)
def devices():
    cupy = pytest.importorskip("cupy")
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip(f"needs two CUDA devices, there is {count}")
    return ["cuda:0", "cuda:1"]


def test_attention_in_turn(devices, make_codebook, data, torch):
    how = {**SMALL, "dtype": "float32", "batch": 2, "params": AttendParameters(slopes=False, refine=True)}
    host = AttentionIndex(make_codebook(), **how)
    there = [AttentionIndex(make_codebook(), device=device, **how) for device in devices]
    rng = np.random.default_rng(0)
    for n in (300, 1, 1, 40, 200, *[1] * 20):
        k, v = data(rng, 2, n)
        q = rng.standard_normal((2, 6, 16)).astype(np.float32)
        host.add(k, v)
        for index, device in zip(there, devices, strict=True):
            index.add(*(torch.from_numpy(x).to(device) for x in (k, v)))
        found = []
        for index, device in zip(there, devices, strict=True):
            asked = torch.from_numpy(q).to(device)
            found.append((*index.attend(asked, budget=0.3), index.select(asked, budget=0.3)))
        out, lse = host.attend(q, budget=0.3)
        selection = host.select(q, budget=0.3)
        for (here, log, chosen), device in zip(found, devices, strict=True):
            assert {str(x.device) for x in (here, log, chosen.ids, chosen.lengths)} == {device}
            np.testing.assert_allclose(here.cpu(), out, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(log.cpu(), lse, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(chosen.lengths.cpu(), selection.lengths)
            for one, other in zip(chosen.csr(), selection.csr(), strict=True):
                assert (one.cpu().numpy() != other).mean() <= 0.02 if len(other) else True
    for index in there:
        np.testing.assert_array_equal(index.list_sizes, host.list_sizes)
        for one, other in zip(index.reconstruct(1), host.reconstruct(1), strict=True):
            np.testing.assert_array_equal(one.get(), other)


def test_search_in_turn(devices):
    rng = np.random.default_rng(0)
    keys, queries = (rng.integers(-3, 4, (n, 16)).astype(np.float32) for n in (800, 64))
    host = sx.IndexSAAP(16, 12, nprobe=4, params=sx.IndexParameters(niter=2))
    host.train(keys[:400], xq_train=queries)
    there = [host.to(device) for device in devices]
    for start in range(0, 800, 100):
        for index in (host, *there):
            index.add(keys[start : start + 100])
        known = host.search(queries, 10)
        for index in there:
            for one, other in zip(index.search(queries, 10), known, strict=True):
                np.testing.assert_array_equal(one, other)
