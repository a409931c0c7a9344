"""What only a device has: its arrays and streams, types of 16 bits, sizes that need many thread blocks."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists, to_blocks
from saapindex.backends.cuda.assign import assign_heads, prepare
from saapindex.backends.cuda.finite import Finiteness
from saapindex.backends.cuda.module import kernel
from saapindex.backends.cuda.rope import rotate
from saapindex.devices import check_device, current, device_of
from saapindex.errors import InvalidInputError

pytestmark = pytest.mark.gpu
REFERENCE = get_ops("reference")
SEARCHES = ["assign", "range_scan", "route", "scan", "search"]
SIXTEEN = ["float16", "bfloat16"]


@pytest.fixture(scope="module")
def ops(cupy):
    return get_ops("cuda")


def rounded(x, dtype):
    """Return `x` as it is stored, and the float32 that it stands for."""
    if dtype == "float32":
        return x.astype(np.float32), x.astype(np.float32)
    if dtype == "float16":
        half = x.astype(np.float16)
        return half, half.astype(np.float32)
    bits = (x.astype(np.float32).view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def problem(n=300, d=24, nlist=9, q=7, p=4, seed=0):
    """Arguments of every search operation, in NumPy."""
    rng = np.random.default_rng(seed)
    x, centroids, queries = (rng.standard_normal((m, d), dtype=np.float32) for m in (n, nlist, q))
    bias = rng.standard_normal(nlist, dtype=np.float32)
    sizes = rng.integers(n // nlist, size=nlist)
    room = -(-sizes // LANES) * LANES
    offsets = np.cumsum(room) - room
    keys = rng.standard_normal((room.sum(), d), dtype=np.float32)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), offsets, sizes)
    probes = np.argsort(rng.random((q, nlist)), axis=1)[:, :p].copy()
    limits = rng.integers(n, size=q)
    return {
        "assign": (x, centroids, bias),
        "range_scan": (queries, lists, probes, limits, 0.5, False),
        "rotate": (x, np.arange(n), 0.1 ** np.arange(4.0), np.ones(4), False),
        "route": (queries, to_blocks(centroids), bias, p),
        "scan": (queries, lists, probes, limits, 5, False),
        "search": (queries, queries, to_blocks(centroids), bias, p, lists, 5, False),
    }


def moved(value, change):
    if isinstance(value, Lists):
        return Lists(*(moved(array, change) for array in value))
    return change(value) if isinstance(value, np.ndarray) else value


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("operation", [*SEARCHES, "rotate"])
def test_arrays_of_the_device_stay_there(cupy, ops, operation):
    arguments = problem()[operation]
    run = getattr(ops, operation)
    ours = flat(run(*(moved(value, cupy.asarray) for value in arguments)))
    for found, known in zip(ours, flat(run(*arguments)), strict=True):
        assert isinstance(found, cupy.ndarray)
        assert isinstance(known, np.ndarray)
        np.testing.assert_array_equal(found.get(), known)


@pytest.mark.parametrize("operation", [*SEARCHES, "rotate"])
@pytest.mark.parametrize("size", [{}, {"n": 9}, {"p": 1}, {"nlist": 1, "p": 1}, {"d": 65}])
def test_every_output_element_is_written(cupy, ops, monkeypatch, operation, size):
    arguments = [moved(value, cupy.asarray) for value in problem(**size)[operation]]
    known = flat(getattr(ops, operation)(*arguments))
    empty = cupy.empty

    def poisoned(shape, dtype=float, order="C"):
        out = empty(shape, dtype, order)
        out.fill(np.nan if out.dtype.kind == "f" else 99)
        return out

    monkeypatch.setattr(cupy, "empty", poisoned)
    for one, other in zip(flat(getattr(ops, operation)(*arguments)), known, strict=True):
        np.testing.assert_array_equal(one.get(), other.get())
        assert not cupy.isnan(one).any()


@pytest.mark.parametrize("dtype", [*SIXTEEN, "float32"])
@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "n", "nlist"), [(1, 1, 1), (2, 100, 17), (3, 1000, 600), (2, 70_000, 65)])
def test_tensor_cores_assign_as_float32_does(cupy, dtype, d, heads, n, nlist):
    rng = np.random.default_rng(d + n)
    scale = 10.0 ** rng.uniform(-3, 3, (heads, 1, 1))
    stored, x = rounded(rng.standard_normal((heads, n, d)) * scale + 0.5 * scale, dtype)
    centroids = (
        x[:, rng.integers(n, size=nlist)] + 0.3 * scale * rng.standard_normal((heads, nlist, d))
    ).astype(np.float32)
    bias = (-(centroids**2).sum(axis=2) / 2).astype(np.float32)
    labels, scores = assign_heads(cupy.asarray(stored), prepare(cupy.asarray(centroids), cupy.asarray(bias)))
    for h in range(heads):
        table = cupy.asarray(x[h], np.float64) @ cupy.asarray(centroids[h], np.float64).T + cupy.asarray(
            bias[h]
        )
        best, own = table.max(axis=1), cupy.take_along_axis(table, labels[h][:, None], axis=1)[:, 0]
        # Relative to the sums of magnitudes, as rounding is.
        size = cupy.abs(cupy.asarray(x[h], np.float64)) @ cupy.abs(cupy.asarray(centroids[h], np.float64)).T
        size = cupy.take_along_axis(size, labels[h][:, None], axis=1)[:, 0] + abs(bias[h]).max()
        assert float(((best - own) / size).max()) <= 1e-6
        assert float((abs(scores[h] - own) / size).max()) <= 1e-6


@pytest.mark.parametrize("dtype", [*SIXTEEN, "float32"])
@pytest.mark.parametrize("n", [70, 70_000])
def test_tensor_cores_give_ties_to_the_lowest(cupy, ops, dtype, n):
    rng = np.random.default_rng(0)
    stored, x = rounded(rng.integers(-2, 3, (n, 64)), dtype)
    centroids, bias = rng.integers(-2, 3, (100, 64)).astype(np.float32), np.zeros(100, np.float32)
    centroids[50:] = centroids[:50]
    labels, scores = ops.assign(cupy.asarray(stored), cupy.asarray(centroids), cupy.asarray(bias))
    known, known_scores = REFERENCE.assign(x, centroids, bias)
    np.testing.assert_array_equal(labels.get(), known)
    np.testing.assert_array_equal(scores.get(), known_scores)


@pytest.mark.parametrize("dtype", [*SIXTEEN, "float32"])
@pytest.mark.parametrize("d", [64, 65, 128])
def test_error_of_scores_is_near_that_of_float32(cupy, ops, dtype, d):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, d), dtype=np.float32)
    stored, x = (x, x) if dtype == "float32" else rounded(x, dtype)
    centroids, bias = rng.standard_normal((50, d), dtype=np.float32), np.zeros(50, np.float32)
    labels, scores = (part.get() for part in ops.assign(*map(cupy.asarray, (stored, centroids, bias))))
    truth = (x.astype(np.float64) * centroids[labels]).sum(axis=1)
    theirs = (cupy.asarray(x) @ cupy.asarray(centroids).T).get()[np.arange(1000), labels]
    assert np.abs(scores - truth).max() <= 2 * np.abs(theirs - truth).max()


def test_heads_and_rows_may_lie_apart(cupy):
    rng = np.random.default_rng(0)
    x = cupy.asarray(rng.standard_normal((200, 3, 64)).astype(np.float16))
    centroids, bias = (
        cupy.asarray(rng.standard_normal((3, 20, 64)), np.float32),
        cupy.zeros((3, 20), np.float32),
    )
    prepared = prepare(centroids, bias)
    apart, together = x.transpose(1, 0, 2), cupy.ascontiguousarray(x.transpose(1, 0, 2))
    assert not apart.flags.c_contiguous
    for one, other in zip(assign_heads(apart, prepared), assign_heads(together, prepared), strict=True):
        np.testing.assert_array_equal(one.get(), other.get())


@pytest.mark.parametrize("n", [1, 256, 257, 5000])
@pytest.mark.parametrize("spread", ["even", "one", "few"])
def test_sums_are_the_same_from_run_to_run_and_right(cupy, ops, n, spread):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 40), dtype=np.float32)
    labels = {"even": rng.integers(30, size=n), "one": np.full(n, 7), "few": rng.integers(3, size=n) * 9}[
        spread
    ]
    first, second = (ops.accumulate(cupy.asarray(x), cupy.asarray(labels), 30) for _ in range(2))
    known, counts = REFERENCE.accumulate(x, labels, 30)
    np.testing.assert_array_equal(first[0].get(), second[0].get())
    np.testing.assert_allclose(first[0].get(), known, atol=1e-10)
    np.testing.assert_array_equal(first[1].get(), counts)


@pytest.mark.parametrize("dtype", [*SIXTEEN, "float32"])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 7), (2, 3, 40_000, 24)])
@pytest.mark.parametrize("order", ["as it is", "transposed", "cut"])
def test_what_is_not_finite_is_found_anywhere(cupy, dtype, shape, order):
    rng = np.random.default_rng(0)
    stored, _ = rounded(rng.standard_normal(shape), dtype)
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, stored.size - 1, int(rng.integers(stored.size))):
            spoilt = stored.copy()
            spoilt.reshape(-1)[place] = rounded(np.array([bad]), dtype)[0][0]
            arrays = [cupy.asarray(x) for x in (stored, spoilt)]
            if order != "as it is":
                arrays = [x.swapaxes(0, -2) if order == "transposed" else x[..., 1:] for x in arrays]
            looks = Finiteness()
            for name, array in zip(("good", "bad"), arrays, strict=True):
                looks.look(name, array)
            cut = order == "cut" and place % shape[-1] == 0
            assert looks.bad() == ([] if cut else ["bad"])
            assert looks.bad() == []


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("interleaved", [False, True])
def test_16_bits_are_rotated_to_16_bits(cupy, dtype, interleaved):
    rng = np.random.default_rng(0)
    stored, x = rounded(rng.standard_normal((100, 70)), dtype)
    turn = (np.arange(100) * 999, 10000.0 ** -(np.arange(32) / 32), np.ones(32), interleaved)
    out = rotate(
        cupy.asarray(stored), *(cupy.asarray(v) if isinstance(v, np.ndarray) else v for v in turn)
    ).get()
    assert out.dtype == stored.dtype
    known = REFERENCE.rotate(x, *turn)
    found = out.astype(np.float32) if dtype == "float16" else (out.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(found, known, rtol=2.0 ** (-11 if dtype == "float16" else -8), atol=1e-4)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("k", [1, 10, 300, 2048, 3000])
@pytest.mark.parametrize("q", [1, 3, 400])
def test_long_lists_are_scanned_whole(cupy, ops, q, k, l2):
    """One list of most keys, many that are empty: blocks of threads look at what they have many times."""
    rng = np.random.default_rng(k)
    sizes = np.array([0, 9000, 1, 0, 16, 17, 0, 0, 300])
    room = -(-sizes // LANES) * LANES
    keys = rng.integers(-3, 4, (room.sum(), 9)).astype(np.float32)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), np.cumsum(room) - room, sizes)
    queries = rng.integers(-3, 4, (q, 9)).astype(np.float32)
    probes = np.argsort(rng.random((q, 9)), axis=1)
    limits = rng.integers(8000, 9500, q)
    found = ops.scan(queries, lists, probes, limits, k, l2)
    for i in range(0, q, 97):
        rows = slice(i, i + 1)
        known = REFERENCE.scan(queries[rows], lists, probes[rows], limits[rows], k, l2)
        for one, other in zip(found, known, strict=True):
            np.testing.assert_array_equal(one[rows], other)
    lims, scores, ids = ops.range_scan(queries[:1], lists, probes[:1], limits[:1], 5.0, l2)
    known = REFERENCE.range_scan(queries[:1], lists, probes[:1], limits[:1], 5.0, l2)
    for one, other in zip((lims, scores, ids), known, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("p", [1, 100, 4096, 4097, 6000])
def test_many_lists_are_put_in_order(cupy, ops, p):
    rng = np.random.default_rng(p)
    features, table = rng.integers(-2, 3, (5, 6)).astype(np.float32), rng.integers(-2, 3, (6000, 6))
    bias = np.where(rng.random(6000) < 0.2, -np.inf, 0).astype(np.float32)
    arguments = features, to_blocks(table.astype(np.float32)), bias, p
    for one, other in zip(ops.route(*arguments), REFERENCE.route(*arguments), strict=True):
        np.testing.assert_array_equal(one, other)


def test_searching_thousands_of_lists(cupy, ops):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 3, 5000)
    keys = rng.integers(-3, 4, (5000 * LANES, 8)).astype(np.float16)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), np.arange(5000) * LANES, sizes)
    queries, table = (rng.integers(-2, 3, (n, 8)).astype(np.float32) for n in (3, 5000))
    bias = np.where(sizes > 0, 0, -np.inf).astype(np.float32)
    for p in (1000, 5000):
        arguments = queries, queries, to_blocks(table), bias, p, lists, 20, False
        for one, other in zip(ops.search(*arguments), REFERENCE.search(*arguments), strict=True):
            np.testing.assert_array_equal(one, other)


# Devices and streams


def test_devices_have_names(cupy):
    assert check_device("cuda") == check_device(f"cuda:{cupy.cuda.Device().id}")
    assert device_of(cupy.zeros(1)) == cupy.cuda.Device().id
    for name in ("cuda:99", "cuda:x", "gpu", "cuda:-1"):
        with pytest.raises(InvalidInputError, match=f"device is '{name}'"):
            check_device(name)


@pytest.mark.torch
def test_a_graph_of_torch_holds_kernels(cupy, torch):
    """Kernels that are launched on torch's stream are captured, and replay on what their input then holds."""
    x, out = torch.randn(50, 16, device="cuda"), torch.zeros(50, 16, device="cuda")
    positions, turns, ones = cupy.arange(50), cupy.asarray(0.1 ** np.arange(8.0)), cupy.ones(8)
    views = [cupy.from_dlpack(tensor) for tensor in (x, out)]
    run = kernel("rope", "rotate", ELEMENT=2)
    sizes = np.int64(50), np.int32(16), np.int32(8), np.int32(0)

    def launch():
        with current(x):
            stream = cupy.cuda.get_current_stream()
            assert stream.ptr == torch.cuda.current_stream().cuda_stream
            run((2,), (256,), (views[0], np.int64(16), positions, turns, ones, views[1], *sizes))

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    known = REFERENCE.rotate(x.cpu().numpy(), np.arange(50), np.pi * turns.get(), np.ones(8), False)
    np.testing.assert_allclose(out.cpu().numpy(), known, atol=1e-5)


@pytest.mark.torch
def test_results_on_a_side_stream_are_ordered(cupy, torch, ops):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(5000, 64, device="cuda").half()
        with current(x):
            keys = cupy.from_dlpack(x)
            labels, _ = ops.assign(keys, keys[:100].astype(np.float32), cupy.zeros(100, np.float32))
            found = torch.from_dlpack(labels)
        known = (x @ x[:100].T).float().argmax(dim=1)
        agree = (found == known).float().mean()
    stream.synchronize()
    assert float(agree) > 0.98
