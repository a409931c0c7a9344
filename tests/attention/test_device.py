"""Sequences on a CUDA device are what they are on the host."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saapindex.attention import AttendParameters, AttentionIndex, flush_layers
from saapindex.attention.streams import as_host
from saapindex.errors import DeviceMemoryError, InvalidInputError

SPEC = importlib.util.spec_from_file_location("same_lists", Path(__file__).parents[1] / "same_lists.py")
lists = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lists)

pytestmark = pytest.mark.gpu
SMALL = {
    "window": 20,
    "sinks": 1,
    "flush": 16,
    "dense_below": 0,
    "backend": "reference",
    "params": AttendParameters(slopes=False, refine=True),
}
"""Codes are read on the host and on a device; by default, some devices do without."""


@pytest.fixture(scope="module", autouse=True)
def cupy():
    return pytest.importorskip("cupy")


def same(host, device):
    """Both indexes hold the same keys in the same lists, with the same statistics."""
    one, other = host._batch, device.to("cpu")._batch
    np.testing.assert_array_equal(one.lengths, device.lengths)
    np.testing.assert_array_equal(one.first, other.first)
    for b, a in enumerate(one.sequences):
        for x, z in zip(a.content(one.keeping), device.reconstruct(b), strict=True):
            np.testing.assert_array_equal(x, as_host(z))
    lists.same_lists(one, other)


def whole(device):
    """The tables and the pool agree with each other."""
    batches = [index._batch for index in device]
    pool = batches[0].keeping.pool
    gc.collect()
    pool.settle()
    held = np.zeros(len(pool), np.int64)
    for streams in (batch.streams for batch in batches):
        pages, labels, orders, before, last = (
            as_host(getattr(streams, name)) for name in ("pages", "labels", "orders", "before", "last")
        )
        for s, count in enumerate(as_host(streams.counts).tolist()):
            np.add.at(held, pages[s, :count], 1)
            for j in range(last.shape[1]):
                slots = np.flatnonzero(labels[s, :count] >> 5 == j)
                np.testing.assert_array_equal(orders[s, slots], np.arange(len(slots)))
                np.testing.assert_array_equal(before[s, slots], [-1, *slots][: len(slots)])
                assert last[s, j] == (slots[-1] if len(slots) else -1)
    np.testing.assert_array_equal(held, as_host(pool.holders))


def pair(codebook, dtype="float32", batch=1, **change):
    settings_ = {**SMALL, "dtype": dtype, "batch": batch, **change}
    return AttentionIndex(codebook, **settings_), AttentionIndex(codebook, device="cuda", **settings_)


def torch_bits(torch, x):
    return torch.from_numpy(x).cuda().to(torch.bfloat16)


class TestSteps:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("view", ["rotated", "unrotated", "windowed"])
    def test_prompt_and_tokens(self, make_codebook, data, cupy, view, dtype):
        host, device = pair(make_codebook(view), dtype, 2, dense_below=100, adapt=0, sinks=2)
        rng = np.random.default_rng(0)
        for n in (1, 5, 90, 1, 1, 40, 300, *[1] * 40, 17, 500):
            k, v = data(rng, 2, n)
            host.add(k, v)
            device.add(cupy.asarray(k), cupy.asarray(v)) if n % 2 else device.add(k, v)
            same(host, device)
        whole([device])

    def test_large_and_uneven_lists(self, make_codebook, data):
        host, device = pair(make_codebook(nlist=3, words=4, heads=3, d=64), "float16", flush=256)
        rng = np.random.default_rng(0)
        for n in (9000, 300, 20_000, 1):
            k, v = data(rng, 1, n, 3, 64)
            host.add(k, v)
            device.add(k, v)
        same(host, device)
        whole([device])

    @pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_head_sizes(self, make_codebook, data, d, dtype):
        host, device = pair(make_codebook(nlist=20, words=3, d=d), dtype)
        rng = np.random.default_rng(3)  # no key has two lists whose scores are the same but for rounding
        for n in (300, 1, 300, 50):
            k, v = data(rng, 1, n, 2, d)
            host.add(k, v)
            device.add(k, v)
        same(host, device)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("forked", [False, True], ids=["alone", "forked"])
    def test_lists_of_few_pages_that_double(self, make_codebook, data, forked, dtype):
        """Each page of a list that gets a new anchor has a block, but if a fork holds one of them too."""
        host, device = pair(make_codebook(nlist=20, d=64, words=3), dtype, adapt=0)
        rng, forks = np.random.default_rng(3), []
        for n in (100, 60, 90, 150, 200, 400):
            for one, other in [(host, device), *forks]:
                k, v = data(rng, 1, n, 2, 64)
                one.add(k, v)
                other.add(k, v)
                same(one, other)
            if forked:
                forks = [(host.fork(), device.fork())]
        del other
        whole([device, *(index for _, index in forks)])

    def test_adapted_centroids(self, make_codebook, data):
        host, device = pair(make_codebook(), adapt=3, batch=2)
        for n, lengths in ((800, [800, 40]), (200, [200, 200]), (64, [3, 64])):
            k, v = data(np.random.default_rng(n), 2, n)
            host.add(k, v, lengths=lengths)
            device.add(k, v, lengths=lengths)
        same(host, device)

    def test_nothing_unwritten_is_read(self, make_codebook, data, cupy, monkeypatch):
        empty = cupy.empty

        def poisoned(*args, **kwargs):
            array = empty(*args, **kwargs)
            array.view(np.uint8).fill(255) if array.size else None
            return array

        monkeypatch.setattr(cupy, "empty", poisoned)
        host, device = pair(make_codebook(), "float16")
        for n in (300, 1, 90, 900):
            k, v = data(np.random.default_rng(n), 1, n)
            host.add(k, v)
            device.add(k, v)
        same(host, device)
        q = np.random.default_rng(0).standard_normal((1, 6, 16)).astype(np.float32)
        for budget in (0.3, 1.0):
            assert np.isfinite(device.attend(q, budget=budget)[0]).all()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "one", "one", "mask", "cut", "cut back", "fork", "reorder", "drop"]),
        st.integers(0, 2**32 - 1),
    ),
    min_size=3,
    max_size=14,
)


def operate(pairs, op, seed, data):
    """Do the same to an index on the host and to one on the device."""
    rng = np.random.default_rng(seed)
    i = int(rng.integers(len(pairs)))
    host, device = pairs[i]
    if op in ("add", "one", "mask"):
        n = 1 if op == "one" else int(rng.integers(1, 200))
        k, v = data(rng, host.batch, n)
        how = {"mask": rng.random((host.batch, n)) < 0.7} if op == "mask" else {}
        for index in (host, device):
            index.add(k, v, **how)
    elif op in ("cut", "cut back"):
        near = np.maximum(0, host.lengths - rng.integers(0, 60, size=host.batch))
        wanted = near if op == "cut" else rng.integers(0, host.lengths + 1)
        for index in (host, device):
            index.truncate(wanted)
    elif op == "fork" and len(pairs) < 3:
        numbers = rng.integers(host.batch, size=int(rng.integers(1, 4)))
        pairs.append((host.fork(numbers), device.fork(numbers)))
    elif op == "reorder":
        numbers = rng.integers(host.batch, size=int(rng.integers(1, 4)))
        for index in (host, device):
            index.reorder(numbers)
    elif op == "drop" and len(pairs) > 1:
        pairs.pop(i)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(
    operations=OPERATIONS,
    window=st.integers(0, 40),
    flush=st.integers(1, 40),
    below=st.sampled_from([0, 100]),
)
@settings(max_examples=12, deadline=None)
def test_any_operations(make_codebook, data, dtype, operations, window, flush, below):
    host, device = pair(make_codebook(), dtype, 2, window=window, flush=flush, dense_below=below, adapt=2)
    pairs = [(host, device)]
    operate(pairs, "add", 0, data)
    for op, seed in operations:
        operate(pairs, op, seed, data)
    for host, device in pairs:
        same(host, device)
    whole([device for _, device in pairs])


class TestGraphs:
    """A step is captured once and replayed through several flushes."""

    STEPS = 150

    @pytest.mark.parametrize("how", ["add", "with the step", "flushed before"])
    @pytest.mark.parametrize("refine", [True, False], ids=["codes", "whole_lists"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_torch(self, make_codebook, data, torch, dtype, refine, how):
        params = AttendParameters(slopes=False, refine=refine)
        host, device = pair(make_codebook(), dtype, 2, adapt=0, sinks=3, params=params)
        k, v = data(np.random.default_rng(1), 2, 500 + self.STEPS)
        for index in (host, device):
            index.add(k[:, :, :500], v[:, :, :500])
        device.reserve(self.STEPS + 8)
        kind = getattr(torch, dtype)
        keys, values, queries = (
            torch.zeros(2, h, n, 16, dtype=kind, device="cuda") for h, n in ((2, 1), (2, 1), (6, 1))
        )
        q = torch.randn(2, 6, 16, device="cuda").to(kind)
        queries = queries[:, :, 0]
        queries.copy_(q)
        eager = device.fork()
        eager.reserve(self.STEPS)
        stream = torch.cuda.Stream()
        other = device.fork()
        other.reserve(self.STEPS + 8)
        with torch.cuda.stream(stream):  # buffers are made outside of the capture
            device.attend(queries, budget=0.3)
            other.attend(queries, budget=0.3)
            flush_layers([device, other])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if how == "add":
                device.add(keys, values)
                out, lse = device.attend(queries, budget=0.3)
            else:
                if how == "flushed before":
                    flush_layers([device, other])
                    other.attend(queries, k=keys, v=values, budget=0.3)
                out, lse = device.attend(queries, k=keys, v=values, budget=0.3)
        for i in range(500, 500 + self.STEPS):
            key, value = (torch.from_numpy(x[:, :, i : i + 1]).cuda().to(kind) for x in (k, v))
            keys.copy_(key)
            values.copy_(value)
            graph.replay()
            there, there_lse = eager.attend(queries, k=key, v=value, budget=0.3)
            host.add(k[:, :, i : i + 1], v[:, :, i : i + 1])
            if i % 30 == 0:
                torch.testing.assert_close(out, there, rtol=2e-2, atol=2e-2)
                torch.testing.assert_close(lse, there_lse, rtol=1e-3, atol=1e-3)
                here, _ = host.attend(queries.float().cpu().numpy(), budget=0.3)
                np.testing.assert_allclose(out.float().cpu().numpy(), here, rtol=5e-2, atol=5e-2)
        torch.cuda.synchronize()
        assert device.list_sizes.sum() > 500
        same(host, device)
        same(host, eager)
        if how == "flushed before":
            same(host, other)
        whole([device, eager, other])

    def test_cupy(self, make_codebook, data, cupy):
        host, device = pair(make_codebook(), "float16", adapt=0)
        k, v = data(np.random.default_rng(1), 1, 300 + self.STEPS)
        host.add(k[:, :, :300], v[:, :, :300])
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:  # which does not wait for the default one
            device.add(k[:, :, :300], v[:, :, :300])
            device.reserve(self.STEPS)
            keys, values = (cupy.zeros((1, 2, 1, 16), np.float16) for _ in range(2))
            stream.synchronize()
            stream.begin_capture()
            device.add(keys, values)
            graph = stream.end_capture()
            for i in range(300, 300 + self.STEPS):
                keys[...], values[...] = (cupy.asarray(x[:, :, i : i + 1].astype(np.float16)) for x in (k, v))
                graph.launch()
            stream.synchronize()
            host.add(k[:, :, 300:301], v[:, :, 300:301])
            for i in range(301, 300 + self.STEPS):
                host.add(k[:, :, i : i + 1], v[:, :, i : i + 1])
            same(host, device)
            whole([device])

    def test_capture_needs_room(self, make_codebook, cupy):
        _, device = pair(make_codebook(), "float16")
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            keys = cupy.zeros((1, 2, 1, 16), np.float16)
            device.add(keys, keys)
            stream.synchronize()
            stream.begin_capture()
            with pytest.raises(InvalidInputError, match=r"call reserve\(tokens\)"):
                device.add(keys, keys)
            stream.end_capture()
        assert device.lengths.tolist() == [1]

    def test_going_past_what_was_reserved_is_said(self, make_codebook, data, cupy):
        _, device = pair(make_codebook(), "float16", adapt=0)
        k, v = data(np.random.default_rng(1), 1, 300)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            device.add(k, v)
            device.reserve(16)
            keys = cupy.asarray(k[:, :, :1].astype(np.float16))
            stream.synchronize()
            stream.begin_capture()
            device.add(keys, keys)
            graph = stream.end_capture()
            for _ in range(5000):
                graph.launch()
            with pytest.raises(DeviceMemoryError, match="reserve"):
                _ = device.lengths
            assert 300 < device.lengths[0] < 5300
            whole([device])
            device.add(k, v)  # and goes on with what it has
            assert device.reconstruct()[0].shape[1] == device.lengths[0]

    def test_a_graph_of_arrays_that_moved_does_nothing(self, make_codebook, data, cupy):
        host, device = pair(make_codebook(), "float16", adapt=0)
        k, v = data(np.random.default_rng(1), 1, 2000)
        host.add(k[:, :, :300], v[:, :, :300])
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            device.add(k[:, :, :300], v[:, :, :300])
            device.reserve(16)
            keys = cupy.asarray(k[:, :, :1].astype(np.float16))
            stream.synchronize()
            stream.begin_capture()
            device.add(keys, keys)
            graph = stream.end_capture()
            for index in (host, device):
                index.add(k, v)
            graph.launch()
            with pytest.raises(DeviceMemoryError, match="have moved"):
                _ = device.lengths
            same(host, device)


class TestBoundary:
    def test_attention_is_that_of_the_host(self, make_codebook, data, torch, cupy):
        host, device = pair(make_codebook(), "float32", 2)
        k, v = data(np.random.default_rng(1), 2, 700)
        for index in (host, device):
            index.add(k, v, lengths=[700, 300])
        rng = np.random.default_rng(2)
        for shape in ((2, 6, 16), (2, 6, 3, 16)):
            q = rng.standard_normal(shape).astype(np.float32)
            # By default hosts read codes, and some devices do not.
            ways = [{"budget": 1.0}]
            for refine in (True, False):
                params = (
                    AttendParameters(budget=0.3, refine=refine, slopes=False),
                    AttendParameters(nprobe=2, refine=refine, slopes=False),
                )
                ways += [{"params": one, "near": near} for one in params for near in (True, False)]
            for how in ways:
                want, want_lse = host.attend(q, **how)
                for asked in (q, cupy.asarray(q), torch.from_numpy(q).cuda()):
                    out, lse = device.attend(asked, **how)
                    assert type(out) is type(asked)
                    out, lse = (
                        x.cpu().numpy() if isinstance(x, torch.Tensor) else as_host(x) for x in (out, lse)
                    )
                    np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-3)
                    np.testing.assert_allclose(lse, want_lse, rtol=1e-3, atol=1e-3)

    def test_learned_sinks(self, make_codebook, data, torch):
        host, device = pair(make_codebook(), "float32", sink_logits=np.linspace(-1, 2, 6))
        k, v = data(np.random.default_rng(1), 1, 400)
        q = np.random.default_rng(2).standard_normal((1, 6, 16)).astype(np.float32)
        for index in (host, device):
            index.add(k, v)
        out, lse = device.attend(torch.from_numpy(q).cuda(), budget=1.0)
        want, want_lse = host.attend(q, budget=1.0)
        np.testing.assert_allclose(out.cpu(), want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(lse.cpu(), want_lse, rtol=1e-3, atol=1e-3)

    def test_to_another_device_and_back(self, make_codebook, data, tmp_path):
        host, _ = pair(make_codebook(), "float16", 2, adapt=2)
        k, v = data(np.random.default_rng(1), 2, 700)
        host.add(k, v)
        host.reorder([0, 1, 0])
        device = host.to("cuda")
        assert device.device == "cuda:0"
        assert host.device == "cpu"
        k, v = data(np.random.default_rng(2), 3, 90)
        for index in (host, device):
            index.add(k, v)
            index.truncate([760, 790, 600])
        same(host, device)
        device.save(tmp_path / "index")
        again = AttentionIndex.load(tmp_path / "index", host.codebook, backend="reference", device="cuda")
        same(host, again)
        memory = device.memory()
        assert memory.used <= memory.pages
        assert memory.plain == host.memory().plain
        device.reset()
        assert device.lengths.tolist() == [0, 0, 0]
        for index in (host, device):
            index.reset()
            index.add(k, v)
        same(host, device)
        whole([device])

    def test_too_little_memory_changes_nothing(self, make_codebook, data, cupy):
        host, device = pair(make_codebook(), "float32")
        k, v = data(np.random.default_rng(1), 1, 300)
        for index in (host, device):
            index.add(k, v)
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        k, v = data(np.random.default_rng(1), 1, 200_000)
        k, v = cupy.asarray(k), cupy.asarray(v)
        pool.set_limit(size=pool.total_bytes() + (8 << 20))
        try:
            with pytest.raises(DeviceMemoryError, match="pages of"):
                device.add(k, v)
        finally:
            pool.set_limit(size=0)
        same(host, device)

    def test_bad_input(self, make_codebook, torch):
        _, device = pair(make_codebook(), "float16")
        with pytest.raises(InvalidInputError, match="k has shape"):
            device.add(torch.zeros(1, 3, 2, 16, device="cuda"), torch.zeros(1, 3, 2, 16, device="cuda"))
        bad = torch.full((1, 2, 2, 16), float("nan"), device="cuda")
        with pytest.raises(InvalidInputError, match="k holds NaN"):
            device.add(bad, bad)
        with pytest.raises(InvalidInputError, match="device is 'gpu'"):
            device.to("gpu")
        assert device.lengths.tolist() == [0]
