"""vLLM's blocks: rows that are written are found, and dense attention over them is attention."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

BLOCKS, HEADS, SIZE, D = 9, 2, 32, 16


@pytest.fixture
def blocks(torch):
    """Blocks of a layer, alone or beside those of another layer."""

    def make(dtype, apart=False):
        pool = torch.zeros(BLOCKS, 2, HEADS, SIZE, 2 * D, dtype=dtype)
        return pool[:, 1] if apart else torch.zeros(BLOCKS, HEADS, SIZE, 2 * D, dtype=dtype)

    return make


@pytest.fixture
def written(torch, blocks):
    """Blocks, slots in any order, and what was written there."""
    from saapindex.adapters._vllm_cache import write_rows

    def make(n=200, dtype=torch.float32, apart=False):
        rng = np.random.default_rng(0)
        cache, slots = blocks(dtype, apart), rng.permutation(BLOCKS * SIZE)[:n]
        k, v = (torch.from_numpy(rng.standard_normal((n + 3, HEADS, D), dtype=np.float32)) for _ in range(2))
        given = slots.copy()
        given[5] = -1
        write_rows(cache, torch.from_numpy(given), k, v)  # more keys than slots, as of a padded step
        write_rows(cache, torch.from_numpy(slots[5:6]), k[5:6], v[5:6])
        return cache, slots, k[:n], v[:n]

    return make


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_where_the_index_reads_them(written, torch, dtype, apart):
    from saapindex.adapters._vllm_cache import parts
    from saapindex.attention import PagedCache

    cache, slots, k, v = written(dtype=getattr(torch, dtype), apart=apart)
    paged = PagedCache(*parts(cache))
    for field, x in (("keys", k), ("values", v)):
        found = paged.take(field, slots[:, None], np.arange(HEADS))
        known = x.to(cache.dtype)
        known = known.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else known.numpy()
        np.testing.assert_array_equal(found, known)


@pytest.mark.parametrize("m", [1, 2, 30, 200])
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("many", [1, 512], ids=["repeated", "grouped"])
def test_dense_attention(written, torch, monkeypatch, m, window, many):
    from saapindex.adapters import _vllm_cache

    monkeypatch.setattr(_vllm_cache, "_MANY", many)
    cache, slots, k, v = written()
    n, group = len(slots), 3
    q = torch.randn(m, HEADS * group, D, generator=torch.Generator().manual_seed(0))
    out = _vllm_cache.attend_densely(q, cache, slots, 0.3, window)
    at, position = torch.arange(n), torch.arange(n - m, n)[:, None]
    seen = (at <= position) & ((at > position - window) | (window <= 0))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = 0.3 * torch.einsum("mhd,nhd->hmn", q, keys)
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=2)
    torch.testing.assert_close(out, torch.einsum("hmn,nhd->mhd", weights, values), rtol=1e-4, atol=1e-5)


BOUND = """
import os
from saapindex.adapters._vllm_threads import share_cores
from saapindex.backends.cpu import helpers

own = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(own)})
count = share_cores()
assert os.sched_getaffinity(0) == {min(own)}
if count > 1:
    assert all(len(helper.cores) > 1 for helper in helpers._team.helpers)
"""


def test_helpers_are_not_bound_to_the_core_of_their_starter(torch):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    # Threads stay where they are, so they are those of a process of its own.
    subprocess.run([sys.executable, "-c", BOUND], check=True)
