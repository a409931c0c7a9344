"""The kernel that adds keys, emulated on the host, is the definition: the same lists, nearly all codes."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.attention import AttentionIndex, device_batch, fit_layer
from saapindex.attention.device_batch import DeviceBatch
from saapindex.attention.device_book import DeviceBook
from saapindex.attention.device_cut import near_places
from saapindex.attention.device_keeping import DeviceKeeping
from saapindex.attention.tensors import STORED
from saapindex.backends.cuda.append_state import STATES_MOST, flush_argument, shared_bytes
from saapindex.backends.paged import widened
from saapindex.lists.device_pool import DevicePool
from saapindex.rope import Rope


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulation = load(Path(__file__).parent / "emulation.py")
lists = load(Path(__file__).parents[1] / "same_lists.py")
ELEMENTS = {np.dtype(np.float16): 0, np.dtype(np.uint16): 1, np.dtype(np.float32): 2}


@pytest.fixture
def emulated(monkeypatch, tmp_path_factory):
    """Let batches on arrays of NumPy append by the kernel, on as many blocks as the fixture says."""
    grid = SimpleNamespace(blocks=3)

    @functools.cache
    def built(d, element, blocks):
        folder = tmp_path_factory.mktemp("append")
        return emulation.build(folder, "append", "State", D=d, ELEMENT=element, BLOCKS=blocks)

    def append_streams(made, d, dtype, *, many, stamps=None):
        sizes = (int(made[name][0]) for name in ("lists", "coded_dimensions", "batch"))
        blocks = 1 + bool(many and made["labels_in"][0])
        built(d, ELEMENTS[np.dtype(dtype)], blocks)(grid.blocks, 256, shared_bytes(d, *sizes), made)

    monkeypatch.setattr(device_batch, "append_streams", append_streams)
    return grid


def pair(dtype, batch, d, heads, nlist, words, view="rotated", **change):
    """An index on the host, the same on arrays that kernels read, and what draws keys for both."""
    rng = np.random.default_rng(0)
    centers = 1.5 * rng.standard_normal((heads, 12, d))

    def draw(n):
        k = centers[np.arange(heads)[:, None], rng.integers(0, 12, (batch, heads, n))]
        noise, v = rng.standard_normal((2, *k.shape))
        return (x.astype(np.float32) for x in (k + 0.5 * noise, v))

    rope = Rope(dim=d) if view != "rotated" else None
    queries = rng.standard_normal((heads, 200, d))
    how = {"words": words, "view": view, "rope": rope, "backend": "reference"}
    book = fit_layer(next(draw(600))[0], queries, nlist, **how)
    rules = {"window": 20, "sinks": 2, "flush": 16, "adapt": 0, "dense_below": 0, **change}
    index = AttentionIndex(book, batch=batch, dtype=dtype, backend="reference", **rules)
    pool = DevicePool(np, d, STORED[dtype], words)
    keeping = DeviceKeeping(DeviceBook(book, np), pool, dtype, *(rules[name] for name in rules), np)
    return index, DeviceBatch.empty(keeping, batch), draw


def same(host, device):
    lists.same_lists(host._batch, device.to_host(host._batch.keeping))


def known_labels(batch, keys, count, entering, most):
    """The lists of entering keys, (S, most), as a kernel before tells them on a device."""
    heads, labels = batch.keeping.heads, np.zeros((len(batch.streams.counts), most), np.int32)
    forms, bias = batch.keeping.book.forms[:2]
    for b in np.flatnonzero(entering).tolist():
        found = np.concatenate(batch._entering(b, keys, int(count[b]), int(entering[b])), axis=1)
        scores = np.einsum("hnd,hld->hnl", widened(found, np.float32), forms) + bias[:, None]
        labels[b * heads : (b + 1) * heads, : entering[b]] = scores.argmax(axis=2)
    return labels


def run(pair, counts):
    index, device, draw = pair
    for n in counts:
        k, v = draw(n)
        index.add(k, v)
        stored = (x.astype(STORED[index.dtype]) for x in (k, v))
        if index.dtype == "bfloat16":
            stored = (bfloat16(x) for x in (k, v))
        device.added(*stored)
        same(index, device)


def bfloat16(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("view", ["rotated", "windowed"])
def test_prompts_and_tokens(emulated, dtype, view):
    run(pair(dtype, 2, 16, 2, 6, 1, view), (1, 5, 90, 1, 40, *[1] * 20, 200))


@pytest.mark.parametrize(
    ("d", "words", "dtype"),
    [
        *((d, words, "float16") for d, words in ((8, 1), (24, 2), (64, 4), (128, 3), (160, 8), (256, 6))),
        *((d, 3, "float32") for d in (80, 128, 256)),
    ],
)
def test_sizes_of_heads(emulated, d, words, dtype):
    run(pair(dtype, 1, d, 1, 20, words), (300, 60))


def test_windows_of_all_layers(emulated, tmp_path):
    """A launch for several layers moves what is due before each adds its next token."""
    layers = [pair("float16", 2, 16, 2, 6, 1, dense_below=below) for below in (0, 100)]
    kernel = emulation.build(tmp_path, "append", "States", D=16, ELEMENT=0, BLOCKS=1, STATES=STATES_MOST)
    shared = shared_bytes(16, 6, int(layers[0][1]._argument()["coded_dimensions"][0]), 2)
    run(layers[0], (150,))
    run(layers[1], (60,))
    for _, device, _ in layers:
        device.reserve(50)
    moved = 0
    for _ in range(50):
        before = [device.streams.first.copy() for _, device, _ in layers]
        kernel(2, 256, shared, flush_argument([device._argument() for _, device, _ in layers]))
        moved += sum((a != d.streams.first).any() for a, (_, d, _) in zip(before, layers, strict=True))
        for index, device, draw in layers:
            k, v = draw(1)
            index.add(k, v)
            streams = device.streams
            for b, length in enumerate(streams.lengths.tolist()):
                place = near_places(streams, np.array([length]))[0]
                streams.near_keys[2 * b : 2 * b + 2, place] = k[b, :, 0].astype(np.float16)
                streams.near_values[2 * b : 2 * b + 2, place] = v[b, :, 0].astype(np.float16)
            streams.lengths[...] += 1
            device.forget_lengths()
            same(index, device)
    assert moved > 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lists_of_few_pages_that_double(emulated, dtype):
    """Each page of a list that gets a new anchor has a block, but if a fork holds one of them too."""
    emulated.blocks = 14
    index, device, draw = pair(dtype, 1, 16, 1, 8, 1)
    turns = [(index, device)]
    run((index, device, draw), (60,))
    for n in (40, 60, 90, 150, 200):
        for host, its in turns:
            run((host, its, draw), (n,))
        turns = [turns[0], (index.fork(), device.forked())]


@pytest.mark.parametrize("known", [False, True])
def test_many_keys_at_once(emulated, monkeypatch, known):
    if known:
        monkeypatch.setattr(DeviceBatch, "_labels", known_labels)
    run(pair("bfloat16", 1, 64, 2, 9, 3, flush=256), (2400, 300))
