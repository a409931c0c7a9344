"""Selection on a CUDA device: what the host selects, without waiting, in a graph too."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.attention import AttendParameters, AttentionIndex
from saapindex.attention.streams import as_host
from saapindex.errors import InvalidInputError

pytestmark = pytest.mark.gpu
NAMES = ("ids", "lengths", "partitions", "window_start", "ends")
WAYS = [
    {"budget": 1.0},
    {"budget": 0.3},
    {"budget": 0.2, "policy": "union"},
    {"budget": 0.3, "refine": False},
    {"nprobe": 2},
    {"top_p": 0.6},
]


@pytest.fixture(scope="module", autouse=True)
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def pair(make_codebook, data):
    """Indexes on host and device, of two sequences of 500 keys, and keys and values of 150 more."""
    settings = {
        "window": 20,
        "sinks": 2,
        "flush": 16,
        "dense_below": 0,
        "adapt": 0,
        "dtype": "float32",
        "batch": 2,
        "backend": "reference",
        "params": AttendParameters(slopes=False, refine=True),
    }
    host = AttentionIndex(make_codebook(), **settings)
    device = AttentionIndex(make_codebook(), device="cuda", **settings)
    k, v = data(np.random.default_rng(1), 2, 650)
    for index in (host, device):
        index.add(k[:, :, :500], v[:, :, :500])
    return host, device, (k[:, :, 500:], v[:, :, 500:])


@pytest.fixture
def q():
    return np.random.default_rng(2).standard_normal((2, 6, 16)).astype(np.float32)


def numpy_of(array):
    return array.cpu().numpy() if hasattr(array, "cpu") else as_host(array)


def same(found, expected, share=0.0):
    """Padded rows hold what the host selects; all but a `share` of the keys, whose weights nearly tie."""
    arrays = [(numpy_of(getattr(found, name)), getattr(expected, name)) for name in NAMES]
    for name, (wide, want) in zip(NAMES, arrays, strict=True):
        assert wide.dtype == np.int64
        if name == "ids" and share:
            continue
        if wide.ndim == 3:
            assert (wide[:, :, want.shape[2] :] == -1).all(), name
            wide = wide[:, :, : want.shape[2]]
        np.testing.assert_array_equal(wide, want, name)
    ids, want = arrays[0]
    for one, other in zip(ids.reshape(4, -1), want.reshape(4, -1), strict=True):
        count = int((other >= 0).sum())
        assert (np.diff(one[:count]) > 0).all()
        assert (one[:count] >= 0).all()
        assert (one[count:] == -1).all()
        assert len(np.setdiff1d(one[:count], other)) <= share * count


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_is_what_the_host_selects(pair, q, cupy, torch, way):
    host, device, _ = pair
    params = AttendParameters(**{"slopes": False, "refine": True, **way})
    want = host.select(q, params=params)
    for asked in (q, cupy.asarray(q), torch.from_numpy(q).cuda()):
        found = device.select(asked, params=params)
        assert all(type(getattr(found, name)) is type(asked) for name in NAMES)
        same(found, want)
        same(device.select(asked, params=params), want)
    for form in (
        lambda x: x.csr(),
        lambda x: x.page_table(7),
        lambda x: (x.bool_mask(500), x.additive_mask(600)),
    ):
        for one, other in zip(form(found), form(want), strict=True):
            assert one.is_cuda
            np.testing.assert_array_equal(one.cpu(), other)


def test_takes_no_memory_where_arrays_are_given(pair, q, cupy, torch):
    host, device, _ = pair
    asked = torch.from_numpy(q).cuda()
    out = device.select(asked, budget=0.3)
    on_cupy = cupy.asarray(q)
    other = device.select(on_cupy, budget=0.3)

    class Count(cupy.cuda.MemoryHook):
        name, taken = "count", 0

        def malloc_preprocess(self, **_):
            self.taken += 1

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with Count() as count:
        again = device.select(asked, budget=0.3, out=out)
        device.select(on_cupy, budget=0.3, out=other)
    assert count.taken == 0
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert again.ids is out.ids
    same(again, host.select(q, budget=0.3))
    with pytest.raises(InvalidInputError, match=r"out.ids is torch.int64 of shape .*, expected int64 of"):
        device.select(asked, nprobe=2, out=out)
    with pytest.raises(InvalidInputError, match="out is given, expected None"):
        host.select(q, out=host.select(q))


@pytest.mark.parametrize("given", [True, False], ids=["arrays_given", "arrays_made"])
@pytest.mark.parametrize("way", [{"budget": 0.3}, {"nprobe": 2}, {"budget": 1.0}], ids=str)
def test_in_a_graph_while_the_context_grows(pair, torch, way, given):
    """Captured once, with the addition before it; replayed through flushes of the window."""
    host, device, (k, v) = pair
    device.reserve(k.shape[2] + 8)
    keys, values = (torch.zeros(2, 2, 1, 16, device="cuda") for _ in range(2))
    queries = torch.randn(2, 6, 16, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):  # kernels are compiled, and buffers made
        out = device.select(queries, **way)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.add(keys, values)
        found = device.select(queries, **way, out=out if given else None)
    starts = set()
    for i in range(k.shape[2]):
        one = k[:, :, i : i + 1], v[:, :, i : i + 1]
        keys.copy_(torch.from_numpy(one[0]))
        values.copy_(torch.from_numpy(one[1]))
        queries.normal_()
        graph.replay()
        host.add(*one)
        if i % 7 == 0:
            want = host.select(queries.cpu().numpy(), **way)
            same(found, want, share=0.02)
            starts.add(int(want.window_start[0]))
    assert len(starts) > 5
