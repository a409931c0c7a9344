"""Tables of pages for FlashInfer: by a stand-in that reads them as it documents, and by itself on a GPU."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import types

import numpy as np
import pytest

from saapindex.errors import InvalidInputError, MissingDependencyError

pytestmark = pytest.mark.torch
HOW = [{"budget": 1.0}, {"budget": 0.1}, {"budget": 0.4}, {"nprobe": 2}]
D = 64  # FlashInfer has kernels for 64, 128 and 256


class Wrapper:
    """Reads tables of pages as `flashinfer.BatchDecodeWithPagedKVCacheWrapper` documents them."""

    def __init__(self, space, layout="NHD", use_cuda_graph=False, **more):
        assert layout == "NHD"
        self.buffers = [
            more.get(f"paged_kv_{name}_buffer") for name in ("indptr", "indices", "last_page_len")
        ]
        self.graph = use_cuda_graph

    def plan(self, indptr, indices, last, q_heads, kv_heads, d, page_size, *, sm_scale, **types_):
        if self.graph:
            assert len(last) == len(self.buffers[2])
            assert len(indices) <= len(self.buffers[1])
        self.asked = (
            indptr.tolist(),
            indices.tolist(),
            last.tolist(),
            q_heads // kv_heads,
            page_size,
            sm_scale,
        )

    def run(self, q, cache, return_lse):
        import torch

        indptr, indices, last, g, size, scale = self.asked
        outs, lses = [], []
        for request, (start, end) in enumerate(itertools.pairwise(indptr)):
            n = (end - start - 1) * size + last[request] if end > start else 0
            k, v = (x[indices[start:end]].flatten(0, 1)[:n].repeat_interleave(g, 1) for x in cache)
            logits = scale * torch.einsum("hd,nhd->hn", q[request], k)
            outs.append(torch.einsum("hn,nhd->hd", logits.softmax(1), v))
            lses.append(logits.logsumexp(1) / math.log(2))
        return torch.stack(outs), torch.stack(lses)


def merge_state(v_a, s_a, v_b, s_b):
    import torch

    s = torch.logaddexp2(s_a, s_b)
    parts = [torch.exp2(x - s)[..., None] * v for v, x in ((v_a, s_a), (v_b, s_b))]
    return parts[0] + parts[1], s


@pytest.fixture(scope="module", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request, torch):
    """Device, precision and tolerance, and the adapter."""
    if request.param == "gpu":
        pytest.importorskip("flashinfer")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda", torch.float16, 4e-3, importlib.import_module("saapindex.adapters.flashinfer")
        return
    name = "saapindex.adapters.flashinfer"
    fake = types.ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper, fake.merge_state = Wrapper, merge_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", fake)
        patch.delitem(sys.modules, name, raising=False)
        yield "cpu", torch.float32, 1e-5, importlib.import_module(name)
    sys.modules.pop(name, None)


def paged(served, layout, size, order=None):
    """The cache of a runtime: pages of all sequences in any order, and tables of them."""
    rng, (batch, heads, n, d) = np.random.default_rng(5), served.k.shape
    if order is None:
        count = -(-n // size) + 1
        numbers = rng.permutation(batch * count + 3)[: batch * count].reshape(batch, count)
        shape = (
            (batch * count + 3, heads, size, d) if layout == "HND" else (batch * count + 3, size, heads, d)
        )
    else:
        count = order.shape[2] // size
        numbers = rng.permutation(batch * heads * count).reshape(batch, heads, count)
        shape = (batch * heads * count, size, d)
    pools = []
    for x in served.kv:
        pool = np.full(shape, 7.0, np.float32)  # what nobody should read
        if order is None:
            padded = np.pad(x, [(0, 0), (0, 0), (0, count * size - n), (0, 0)], constant_values=7.0)
            by_page = padded.reshape(batch, heads, count, size, d).transpose(0, 2, 1, 3, 4)
            pool[numbers] = by_page if layout == "HND" else by_page.swapaxes(2, 3)
        else:
            taken = np.take_along_axis(x, np.maximum(order, 0)[..., None], axis=2)
            pool[numbers] = np.where(order[..., None] < 0, 7.0, taken).reshape(batch, heads, count, size, d)
        pools.append(pool)
    return *pools, numbers


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("layout", "size"), [("HND", 16), ("NHD", 16), ("NHD", 1), ("HND", 1), ("lists", 16)]
)
@pytest.mark.parametrize("g", [4, 1])
def test_attends_to_what_was_selected(how, layout, size, g, where, serve, torch):
    device, dtype, tolerance, adapter = where
    served = serve((300, 70, 1), heads=2, g=g, d=D)
    selection = served.select(**how)
    order = served.index.list_order(size) if layout == "lists" else None
    k, v, tables = paged(served, layout, size, order)
    q, k, v = (torch.from_numpy(x).to(device, dtype) for x in (served.q, k, v))
    decode = adapter.PagedDecode(3, 2 * g, 2, D, size, layout=layout, dtype=dtype, device=device)
    decode.plan(selection, tables, order=order)
    out, lse = decode.run(q, k, v)
    known, known_lse = served.dense(selection, lse=True)
    np.testing.assert_allclose(out.float().cpu(), known, atol=tolerance)
    np.testing.assert_allclose(lse.cpu(), known_lse, atol=10 * tolerance)
    if how == {"budget": 1.0}:
        np.testing.assert_allclose(out.float().cpu(), served.dense(), atol=tolerance)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_in_a_graph(layout, where, serve, torch):
    """Planned anew between replays, over buffers that stay where they are."""
    device, dtype, tolerance, adapter = where
    served = serve((300, 70, 1), heads=2, g=4, d=D)
    k, v, tables = paged(served, layout, 16)
    q, k, v = (torch.from_numpy(x).to(device, dtype) for x in (served.q, k, v))
    how = {"layout": layout, "dtype": dtype, "device": device, "cuda_graph": True, "most": 320}
    decode = adapter.PagedDecode(3, 8, 2, D, 16, **how)

    def step():
        return decode.run(q, k, v)

    graph = None
    for budget in (1.0, 0.1, 0.4):
        selection = served.select(budget=budget)
        decode.plan(selection, tables)
        if device == "cuda" and graph is None:
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, _ = step()
        if graph is None:
            out, _ = step()
        else:
            graph.replay()
            torch.cuda.synchronize()
        np.testing.assert_allclose(out.float().cpu(), served.dense(selection), atol=tolerance)


def test_says_what_does_not_fit(where, serve):
    device, dtype, _, adapter = where
    served = serve((40, 30), heads=2, g=2, d=D)
    selection = served.select(budget=1.0)
    decode = adapter.PagedDecode(2, 4, 2, D, 16, dtype=dtype, device=device)
    with pytest.raises(InvalidInputError, match=r"tables have shape \(3, 5\) for a selection of \(2, 2\)"):
        decode.plan(selection, np.zeros((3, 5), np.int64))
    with pytest.raises(InvalidInputError, match="the cache has 32 columns, expected 40"):
        decode.plan(selection, np.zeros((2, 2), np.int64))
    with pytest.raises(InvalidInputError, match="q_heads is 5, expected a multiple of the 2 KV heads"):
        adapter.PagedDecode(2, 5, 2, D, 16, device=device)
    with pytest.raises(InvalidInputError, match="layout is 'DNH'"):
        adapter.PagedDecode(2, 4, 2, D, 16, layout="DNH", device=device)
    with pytest.raises(InvalidInputError, match="most is None"):
        adapter.PagedDecode(2, 4, 2, D, 16, cuda_graph=True, device=device)


def test_without_flashinfer_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.delitem(sys.modules, "saapindex.adapters.flashinfer", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'saapindex\[flashinfer\]'"):
        importlib.import_module("saapindex.adapters.flashinfer")
