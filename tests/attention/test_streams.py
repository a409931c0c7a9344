"""Sequences as streams of a device, and back."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.attention.streams import from_streams, to_streams

SETTINGS = {"window": 31, "sinks": 2, "dense_below": 64, "dtype": "float32"}


@pytest.fixture
def cut(make, data):
    """An index of three sequences of different lengths, two of which share pages."""
    rng = np.random.default_rng(0)
    index = make(2, **SETTINGS)
    index.add(*data(rng, 2, 700), lengths=[700, 150])
    index.reorder([0, 1, 0])
    for n in (40, 1, 1, 30):
        index.add(*data(rng, 3, n))
    index.truncate([650, 230, 500])
    return index


def same_lists(one, other):
    """Both batches hold the same keys in the same lists, with the same statistics."""
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.first, other.first)
    for a, b in zip(one.sequences, other.sequences, strict=True):
        for x, y in zip(a.content(one.keeping), b.content(other.keeping), strict=True):
            np.testing.assert_array_equal(x, y)
        for name in ("sizes", "coded", "anchors", "anchor_scales", "sums", "means", "mean_scales", "squares"):
            np.testing.assert_array_equal(getattr(a.lists, name), getattr(b.lists, name), name)
        rows = [t.lists.rows(np.zeros_like(t.lists.sizes), t.lists.sizes) for t in (a, b)]
        for name in ("ids", "codes", "exponents"):
            x, y = (c.keeping.pool.pages.take(name, r) for c, r in zip((one, other), rows, strict=True))
            np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("fill", [0, 255])
def test_there_and_back(cut, make, fill):
    streams = to_streams(cut._batch, fill=fill, pages=100, pool=900)
    assert streams.pages.shape[1] >= 100
    assert len(streams.keys) >= 900
    empty = make(**SETTINGS)._start("float32")
    same_lists(cut._batch, from_streams(streams, empty.keeping))


def test_pages_rise_and_are_full_but_the_last(cut):
    streams = to_streams(cut._batch)
    for s, count in enumerate(streams.counts):
        label, lanes = streams.labels[s, :count] >> 5, streams.labels[s, :count] & 31
        for j, size in enumerate(streams.sizes[s]):
            slots = np.flatnonzero(label == j)
            np.testing.assert_array_equal(streams.orders[s, slots], np.arange(len(slots)))
            np.testing.assert_array_equal(streams.before[s, slots], [-1, *slots[:-1]][: len(slots)])
            assert streams.last[s, j] == (slots[-1] if len(slots) else -1)
            assert lanes[slots].sum() == size
            assert (lanes[slots[:-1]] == 16).all()
            ids = np.concatenate([streams.ids[streams.pages[s, i], : lanes[i]] for i in slots] or [[]])
            assert (np.diff(ids) > 0).all()


def test_full_pages_are_shared_and_others_are_not(cut):
    streams = to_streams(cut._batch)
    valid = np.arange(streams.pages.shape[1]) < streams.counts[:, None]
    place, holders = np.unique(streams.pages[valid], return_counts=True)
    assert (holders > 1).any()
    lanes = streams.labels[valid] & 31
    assert (lanes[np.isin(streams.pages[valid], place[holders > 1])] == 16).all()


def test_an_empty_batch(make):
    index = make(2)
    streams = to_streams(index._start("float16"))
    assert streams.counts.tolist() == [0] * 4
    assert streams.lengths.tolist() == [0, 0]
    assert from_streams(streams, index._start("float16").keeping).lengths.tolist() == [0, 0]
