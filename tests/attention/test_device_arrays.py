"""What a batch on a device does without kernels, on arrays of NumPy."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.attention import device_tensors
from saapindex.attention.device_batch import DeviceBatch
from saapindex.attention.device_book import DeviceBook
from saapindex.attention.device_keeping import DeviceKeeping
from saapindex.attention.tensors import STORED
from saapindex.backends import get_ops
from saapindex.lists.device_pool import DevicePool

STATISTICS = ("sizes", "coded", "anchors", "anchor_scales", "sums", "means", "mean_scales", "squares")


def on_device(index):
    """The batch of an index as a device would hold it."""
    book = index.codebook
    pool = DevicePool(np, book.d, STORED[index.dtype], book.code.words)
    rules = index.window, index.sinks, index.flush, index.adapt, index.dense_below
    return DeviceBatch.of(DeviceKeeping(DeviceBook(book, np), pool, index.dtype, *rules, np), index._batch)


def same(host, device):
    one, other = host._batch, device.to_host(host._batch.keeping)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.first, other.first)
    for b, (a, c) in enumerate(zip(one.sequences, other.sequences, strict=True)):
        for x, y, z in zip(a.content(one.keeping), c.content(other.keeping), device.content(b), strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, z)
        for name in STATISTICS:
            np.testing.assert_allclose(
                getattr(a.lists, name), getattr(c.lists, name), rtol=1e-6, err_msg=name
            )


def whole(*batches):
    """No page is lost, and none is held twice by one."""
    pool = batches[0].keeping.pool
    gc.collect()
    pool.settle()
    held = np.zeros(len(pool), np.int64)
    for streams in (batch.streams for batch in batches):
        for s, count in enumerate(streams.counts):
            np.add.at(held, streams.pages[s, :count], 1)
    np.testing.assert_array_equal(held, pool.holders)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def index(request, make, data):
    index = make(3, dtype=request.param, adapt=2, sinks=2)
    index.add(*data(np.random.default_rng(0), 3, 600), lengths=[600, 150, 10])
    return index


def test_there_and_back(index):
    device = on_device(index)
    same(index, device)
    whole(device)
    np.testing.assert_array_equal(device.list_sizes, index.list_sizes)
    assert device.memory().plain == index.memory().plain


@pytest.mark.parametrize(
    "lengths", [[600, 150, 10], [590, 140, 3], [570, 20, 1], [300, 1, 10], [40, 0, 0], [0, 0, 0]]
)
def test_cuts(index, lengths):
    device = on_device(index)
    index.truncate(lengths)
    same(index, device.truncated(np.array(lengths)))
    whole(device)


def test_forks_share_full_pages_and_are_independent(index):
    device = on_device(index)
    before = device.keeping.pool.used
    fork, other = index.fork([0, 0, 1]), device.forked(np.array([0, 0, 1]))
    same(fork, other)
    whole(device, other)
    assert device.keeping.pool.used < 2 * before
    other.truncated(np.array([333, 600, 77]))
    fork.truncate([333, 600, 77])
    same(fork, other)
    same(index, device)
    whole(device, other)
    del other
    whole(device)
    assert device.keeping.pool.used == before


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 0], [1], [0, 1, 2, 2]])
def test_reordering(index, order):
    device = on_device(index)
    arrays = device.streams
    index.reorder(order)
    device = device.reordered(np.array(order))
    if len(order) == 3:  # a graph goes on with the same arrays
        names = "pages", "sizes", "near_keys"
        assert all(getattr(arrays, name) is getattr(device.streams, name) for name in names)
    del arrays
    same(index, device)
    whole(device)


def test_cleared(index):
    device = on_device(index)
    device.cleared()
    assert device.lengths.tolist() == [0, 0, 0]
    assert not device.list_sizes.any()
    whole(device)


def test_the_pool_keeps_what_it_holds_when_it_grows():
    pool = DevicePool(np, 8, np.float16, 2)
    first = pool.take(3)
    pool.arrays["ids"][first] = 7
    more = pool.take(50)
    assert len(np.union1d(first, more)) == 53
    assert (pool.arrays["ids"][first] == 7).all()
    pool.drop(first)
    pool.settle()
    assert pool.used == 50


@pytest.mark.parametrize("view", ["rotated", "unrotated", "windowed"])
def test_centroids_are_fitted_as_on_the_host(make_codebook, data, view):
    codebook = make_codebook(view)
    keys = data(np.random.default_rng(3), 1, 700)[0][0]
    ops = get_ops("reference")
    want = codebook.adapt(codebook.view(keys, np.arange(5, 705), ops), 3, ops)
    np.testing.assert_allclose(DeviceBook(codebook, np).adapt(keys, 5, 3), want, rtol=1e-4, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_viewed_where_they_are(monkeypatch, torch, dtype):
    """With strides of any kind, and the tensor kept as long as the view is."""

    def view(shape, kind, memory, strides):
        (place, extent, owner, _), offset = memory
        assert offset == 0
        assert owner.data_ptr() == place
        part = (ctypes.c_char * extent).from_address(place) if extent else b""
        return np.ndarray(shape, kind, part, 0, strides)

    class Array:
        __new__ = staticmethod(lambda cls, *given: view(*given))

    cuda = SimpleNamespace(UnownedMemory=lambda *given: given, MemoryPointer=lambda *given: given)
    monkeypatch.setattr(device_tensors, "get_cupy", lambda: SimpleNamespace(ndarray=Array, cuda=cuda))
    x = torch.arange(120).reshape(2, 5, 12).to(getattr(torch, dtype))
    views = x, x.transpose(0, 2)[3:], x[:, ::2, 1::3], x[:, :1].expand(2, 7, 12), x[:0], x[1, 2, 3]
    for tensor in views:
        found = device_tensors.raw(tensor)
        bits = found.astype(np.uint32) << 16 if dtype == "bfloat16" else found
        known = tensor.float().numpy()
        np.testing.assert_array_equal(bits.view(np.float32) if dtype == "bfloat16" else bits, known)
