"""Paged lists made by hand, for the operations that read them."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.backends import get_ops
from saapindex.backends.base import LANES
from saapindex.backends.paged import Near, PagedLists, Pages, Slots
from saapindex.codes import fit_codes, quantise_rows
from saapindex.lists.paged import PagePool

STORED = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def as_stored(x, dtype):
    """Round to the type of storage; bfloat16 by cutting its bits off."""
    if dtype == "bfloat16":
        return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(STORED[dtype])


def as_floats(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


@functools.cache
def fitted(heads, d, words):
    """Codes of heads that differ in the widths of their fields, and in how many dimensions these reach."""
    rng = np.random.default_rng(0)
    metric = np.stack([np.diag(rng.uniform(0.5, 2, d)) for _ in range(heads)])
    decay = np.array([0.7, 0.99])[np.arange(heads) % 2, None, None]
    return fit_codes(rng.standard_normal((heads, 400, d)) * decay ** np.arange(d), metric, words)


def poison(pool):
    """Make what is undefined as bad as it can be."""
    for page, lanes in enumerate(pool.filled):
        chunk, place = divmod(page, pool.span)
        free = slice(lanes, None)
        for name in ("keys", "values"):
            array = getattr(pool.pages, name)[chunk]
            array[place, free] = 0x7FC0 if array.dtype == np.uint16 else np.nan
        pool.pages.codes[chunk][place, :, free] = 0xFFFFFFFF
        pool.pages.exponents[chunk][place, free] = 255
        pool.pages.ids[chunk][place, free] = -7


def in_a_runtime(keys, values, heads):
    """The same keys, (S, n, d), in any slots of the pages of a runtime."""
    rng, (streams, n, d) = np.random.default_rng(0), keys.shape
    batch = streams // heads
    count = -(-n // LANES) * batch + 2
    order = rng.permutation(count * LANES)
    tables = tuple(order[b * n : (b + 1) * n].copy() for b in range(batch))
    held = [np.zeros((count, heads, LANES, d), keys.dtype) for _ in range(2)]
    for b, table in enumerate(tables):
        for array, x in zip(held, (keys, values), strict=True):
            array[table // LANES, :, table % LANES] = x[b * heads : (b + 1) * heads].swapaxes(0, 1)
    columns = {
        "keys": held[0].reshape(-1, LANES, d),
        "values": held[1].reshape(-1, LANES, d),
        "codes": np.empty((0, 1, LANES), np.uint32),
        "exponents": np.empty((0, LANES), np.uint8),
        "ids": np.empty((0, LANES), np.int32),
    }
    addresses = np.array([[array.ctypes.data] for array in columns.values()], np.int64)
    pages = Pages(
        **{name: (array,) for name, array in columns.items()}, addresses=addresses, span=count * heads
    )
    return Slots(tables, pages, heads, LANES, heads * LANES, LANES, 1)


@pytest.fixture(scope="session")
def paged():
    """Everything that the kernels read, of random keys whose pages lie scattered, with what it was made of.

    Lanes that nothing was written to hold NaN, huge numbers and all bits set.

    `paged(seed, heads, batch, n, d, nlist, dtype, words, sinks, recent)`
    """

    def make(
        seed=0, heads=2, batch=2, n=150, d=16, nlist=5, dtype="float32", words=2, sinks=1, recent=20, span=3
    ):
        rng = np.random.default_rng(seed)
        streams, skew = heads * batch, 0.7 ** np.arange(d)
        code = fitted(heads, d, words)
        pool = PagePool(d, STORED[dtype], words, span)
        total = sinks + n + recent
        centers = rng.standard_normal((nlist, d))
        labels = rng.integers(nlist, size=(streams, n)) * rng.integers(2, size=(streams, n))
        keys = rng.standard_normal((streams, total, d)) * skew
        keys[:, sinks : sinks + n] += centers[labels]
        keys, values = as_stored(keys, dtype), as_stored(rng.standard_normal((streams, total, d)), dtype)
        sizes = np.stack([np.bincount(label, minlength=nlist) for label in labels]).astype(np.int64)
        counts = -(-sizes // LANES)
        held = pool.allocate((int(counts.sum()),))
        scattered = rng.permutation(held.pages)
        starts = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)
        member = (labels[:, None] == np.arange(nlist)[:, None]) / np.maximum(sizes, 1)[..., None]
        (anchors, anchor_scales), (means, mean_scales) = (
            quantise_rows(member @ as_floats(x[:, sinks : sinks + n])) for x in (keys, values)
        )
        lists = PagedLists(
            anchors,
            anchor_scales,
            means,
            mean_scales,
            rng.uniform(0, 2, (streams, nlist)).astype(np.float32),
            0.3 * rng.standard_normal((streams, code.step.shape[1], d)).astype(np.float32),
            sizes,
            starts,
            scattered,
        )
        ids = np.arange(sinks, sinks + n)
        for s in range(streams):
            rows, label = lists.rows(s, sizes[s])
            order = np.argsort(labels[s], kind="stable")
            members = order + sinks
            residuals = as_floats(keys[s, members]) - anchors[s, label] * anchor_scales[s, label, None]
            coded = get_ops("reference").encode(residuals[None].astype(np.float32), code.view.head(s % heads))
            pool.write(rows, keys[s, members], values[s, members], ids[order], *(part[0] for part in coded))
        near_pages = pool.allocate((streams, -(-sinks // LANES) + -(-recent // LANES)))
        near = Near(
            near_pages.pages,
            -(-sinks // LANES),
            np.full(streams, sinks),
            np.full(streams, sinks + n),
            np.full(streams, recent),
        )
        for s in range(streams):
            rows, positions = near.rows(s)
            pool.write(rows, keys[s, positions], values[s, positions], positions)
        poison(pool)
        return SimpleNamespace(
            pool=pool,
            pages=pool.pages,
            slots=in_a_runtime(keys, values, heads),
            lists=lists,
            near=near,
            code=code.view,
            transform=code,
            keys=as_floats(keys),
            values=as_floats(values),
            labels=labels,
            heads=heads,
            total=total,
            sinks=sinks,
            rng=rng,
            held=(held, near_pages),
        )

    return make
