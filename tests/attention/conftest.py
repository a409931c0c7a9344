"""Codebooks, keys and a dense model for the tests of the attention index."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from saapindex.attention import AttentionIndex, LayerCodebook, fit_layer
from saapindex.rope import Rope

D, HEADS, GROUP, NLIST = 16, 2, 3, 6


@functools.cache
def clusters(d, heads):
    rng = np.random.default_rng(7)
    return rng.standard_normal((heads, 12, d)), 0.8 ** np.arange(d)


def draw(rng, batch, n, heads=HEADS, d=D):
    """Clustered keys with directions of different weight, and values that go with the clusters."""
    centers, skew = clusters(d, heads)
    label = rng.integers(12, size=(batch, heads, n))
    head = np.arange(heads)[:, None]
    keys = 2 * centers[head, label] + rng.standard_normal((batch, heads, n, d)) * skew
    values = centers[head, (label + 3) % 12] + 0.5 * rng.standard_normal((batch, heads, n, d))
    return keys.astype(np.float32), values.astype(np.float32)


@functools.cache
def codebook_of(view="rotated", nlist=NLIST, words=1, softcap=None, heads=HEADS, d=D):
    rng = np.random.default_rng(1)
    keys, _ = draw(rng, 1, 600, heads, d)
    queries = rng.standard_normal((heads * GROUP, 200, d))
    rope = Rope(dim=d) if view != "rotated" else None
    how = {"view": view, "rope": rope, "softcap": softcap, "backend": "reference"}
    return fit_layer(keys[0], queries, nlist, words=words, niter=3, **how)


class Dense:
    """What the index should be: all keys of each sequence, attended to in float64."""

    def __init__(self, batch, heads=HEADS, d=D, scale=None, softcap=None, sinks=None):
        self.keys = [np.empty((heads, 0, d)) for _ in range(batch)]
        self.values = [np.empty((heads, 0, d)) for _ in range(batch)]
        self.scale, self.softcap, self.sinks = scale or d**-0.5, softcap, sinks

    @property
    def lengths(self):
        return [keys.shape[1] for keys in self.keys]

    def add(self, b, keys, values):
        self.keys[b] = np.concatenate([self.keys[b], keys], axis=1)
        self.values[b] = np.concatenate([self.values[b], values], axis=1)

    def cut(self, b, n):
        self.keys[b], self.values[b] = self.keys[b][:, :n], self.values[b][:, :n]

    def reorder(self, order):
        self.keys, self.values = [self.keys[i] for i in order], [self.values[i] for i in order]

    def attend(self, b, queries, last, seen=None):
        """Attention of one token, (q_heads, d), to keys up to `last`, or to those of a mask (heads, n)."""
        heads, n, d = self.keys[b].shape
        grouped = np.asarray(queries, np.float64).reshape(heads, -1, d)
        logits = self.scale * np.einsum("hgd,hnd->hgn", grouped, self.keys[b])
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        allowed = np.arange(n) <= last if seen is None else seen[:, None]
        logits = np.where(allowed, logits, -np.inf)
        if self.sinks is not None:
            logits = np.concatenate([logits, np.asarray(self.sinks, float).reshape(heads, -1, 1)], axis=2)
        values = np.pad(self.values[b], [(0, 0), (0, logits.shape[2] - n), (0, 0)])
        peak = logits.max(axis=2, initial=-np.inf)
        weights = np.exp(logits - np.where(np.isfinite(peak), peak, 0)[..., None])
        total = weights.sum(axis=2)
        out = np.einsum("hgn,hnd->hgd", weights, values) / np.where(total > 0, total, 1)[..., None]
        with np.errstate(divide="ignore"):
            lse = np.log(total) + np.where(np.isfinite(peak), peak, 0)
        return out.reshape(-1, d), lse.reshape(-1)


@pytest.fixture(scope="session")
def dense():
    return Dense


@pytest.fixture(scope="session")
def data():
    """Keys and values: `data(rng, batch, n)`."""
    return draw


@pytest.fixture(scope="session")
def codebook() -> LayerCodebook:
    return codebook_of()


@pytest.fixture(scope="session")
def make_codebook():
    return codebook_of


@pytest.fixture(scope="session")
def make():
    """A small index: `make(batch=1, view="rotated", ...)`."""

    def index(batch=1, view="rotated", **settings):
        small = {"window": 20, "sinks": 1, "flush": 16, "dense_below": 0, "backend": "reference"}
        return AttentionIndex(codebook_of(view), batch=batch, **{**small, **settings})

    return index


@pytest.fixture
def filled(make, data):
    """An index of two sequences, and keys and values, of which it holds the first 300."""
    index = make(2, dtype="float32")
    keys, values = data(np.random.default_rng(0), 2, 800)
    index.add(keys[:, :, :300], values[:, :, :300])
    return index, keys, values
