"""Learned routers: the mass they are trained on, and that they learn it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx
from saapindex.learn import attention_mass, train_router
from saapindex.partition import LinearRouter, MLPRouter

D, NLIST, N = 8, 10, 500


@given(
    q=st.sampled_from([0, 1, 7]),
    n=st.sampled_from([0, 1, 40]),
    nlist=st.integers(1, 6),
    window=st.integers(0, 60),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 100),
)
def test_attention_mass_is_that_of_softmax(q, n, nlist, window, scale, seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.standard_normal((q, D)), rng.standard_normal((n, D))
    at_q, at, labels = rng.integers(80, size=q), rng.integers(40, size=n), rng.integers(nlist, size=n)
    mass, sizes = attention_mass(
        queries.astype(np.float32),
        at_q,
        keys.astype(np.float32),
        at,
        labels,
        nlist,
        scale=scale,
        window=window,
    )
    assert (mass.dtype, mass.shape, sizes.dtype) == (np.float32, (q, nlist), np.int64)
    for i in range(q):
        seen = at < at_q[i] - window
        weights = np.exp(scale * (keys[seen] @ queries[i] - (keys[seen] @ queries[i]).max(initial=-99)))
        expected = np.bincount(labels[seen], weights, nlist) / max(weights.sum(), 1e-30)
        np.testing.assert_allclose(mass[i], expected, atol=2e-5)
        np.testing.assert_array_equal(sizes[i], np.bincount(labels[seen], minlength=nlist))


def test_blocks_of_queries_do_not_show(monkeypatch, blobs):
    arguments = blobs(50, D), np.full(50, 99), blobs(90, D), np.arange(90), np.arange(90) % 7, 7
    whole = attention_mass(*arguments, scale=1.0, window=5)
    monkeypatch.setattr("saapindex.learn.routers._CHUNK", 8)
    for part, other in zip(attention_mass(*arguments, scale=1.0, window=5), whole, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-6)


def problem(params="best", seed=0, rope=None):
    """A trained index, its keys, and queries that look at keys in a way that the centroids do not tell."""
    rng = np.random.default_rng(seed)
    keys, queries = rng.standard_normal((N, D)), 3 * rng.standard_normal((1200, D))
    index = sx.IndexSAAP(D, NLIST, params=params, rope=rope)
    index.train(keys, xq_train=queries)
    index.add(keys)
    return index, keys, queries


def mass_found(index, keys, queries, nprobe=2):
    """Mean share of the attention in the lists that are visited first."""
    labels = index.partition.assign(keys.astype(np.float32), index.ops)
    at = np.full(len(queries), len(keys))
    mass, _ = attention_mass(
        queries.astype(np.float32), at, keys.astype(np.float32), np.arange(len(keys)), labels, NLIST,
        scale=index.scale, window=0,
    )  # fmt: skip
    lists, _ = index.route(queries, params=sx.SearchParameters(nprobe=nprobe))
    return np.take_along_axis(mass, lists, axis=1).sum(axis=1).mean()


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("predicts", ["key", "mass"])
def test_a_trained_router_beats_chance(torch, kind, predicts):
    index, keys, queries = problem(sx.IndexParameters(rank=predicts, niter=3))
    rng = np.random.default_rng(1)
    index.router = LinearRouter(rng.standard_normal((NLIST, D)), np.zeros(NLIST), predicts)
    chance = mass_found(index, keys, queries[1000:])
    loss = train_router(index, keys, queries[:1000], kind=kind, epochs=20, hidden=32, window=0)
    assert 0 < loss < np.log(NLIST)
    assert isinstance(index.router, MLPRouter if kind == "mlp" else LinearRouter)
    assert index.params.router == index.router.name == kind
    assert index.router.predicts == predicts
    assert mass_found(index, keys, queries[1000:]) > 1.5 * chance


@pytest.mark.torch
def test_the_paper_asks_for_an_mlp_on_unrotated_queries(torch):
    rope = sx.Rope(theta=100.0, dim=D)
    index = sx.IndexSAAP(D, NLIST, params="paper", rope=rope)
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((N, D)), rng.standard_normal((200, D))
    index.train(keys)
    with pytest.raises(sx.NotTrainedError, match="train_router"):
        index.add(keys)
    train_router(index, keys, queries, epochs=2, hidden=7)
    assert isinstance(index.router, MLPRouter)
    assert index.router.predicts == "mass"
    assert index.router.hidden.shape == (7, D)
    index.add(keys)
    assert index.search(queries[:2], 3)[1].shape == (2, 3)


@pytest.mark.torch
def test_the_weights_kept_are_those_of_the_loss(torch):
    index, keys, queries = problem()
    at = np.sort(np.random.default_rng(0).integers(N, 2 * N, len(queries)))
    loss = train_router(index, keys, queries, positions_xq=at, window=0, kind="linear", epochs=3)
    late = at > np.quantile(at, 0.9)
    labels = index.partition.assign(keys.astype(np.float32), index.ops)
    mass, sizes = attention_mass(
        queries[late].astype(np.float32), at[late], keys.astype(np.float32), np.arange(N), labels, NLIST,
        scale=index.scale, window=0,
    )  # fmt: skip
    logits = queries[late] @ index.router.weight.T + index.router.offset(NLIST) + np.log(sizes)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert -(mass * logits).sum(axis=1).mean() == pytest.approx(loss, rel=1e-4)


@pytest.mark.torch
def test_a_seed_decides_and_the_callers_random_numbers_go_on(torch):
    weights, drawn = [], []
    for seed in (1, 1, 2):
        index, keys, queries = problem()
        torch.manual_seed(0)
        train_router(index, keys, queries[:100], seed=seed, epochs=2)
        weights.append(index.router.weight)
        drawn.append(float(torch.rand(1)))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.torch
@pytest.mark.parametrize("count", [2, 3, 9, 11])
def test_few_queries_hold_one_out(torch, count):
    index, keys, queries = problem()
    assert np.isfinite(train_router(index, keys, queries[:count], epochs=2))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.ones((5, D + 1))}, r"keys has shape \(5, 9\), expected \(n, 8\)"),
        ({"queries": np.full((5, D), np.nan)}, "queries holds NaN"),
        ({"positions": [1, 2]}, r"positions has shape \(2,\)"),
        ({"positions": np.arange(N) - 1}, "positions holds -1"),
        ({"positions_xq": np.arange(1200) - 1}, "positions_xq holds -1"),
        ({"positions_xq": np.zeros(1200, int)}, "no query sees keys more than 2047 positions back"),
        ({"queries": np.ones((1, D))}, "no query sees keys"),
        ({"kind": "oracle"}, "kind is 'oracle', expected one of 'linear', 'mlp'"),
        ({"predicts": "size"}, "predicts is 'size', expected one of 'key', 'mass'"),
        ({"window": -1}, "window is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"patience": 1.5}, "patience is 1.5"),
    ],
)
def test_bad_input_changes_nothing(torch, change, message):
    index, keys, queries = problem()
    before = index.router
    with pytest.raises(sx.InvalidInputError, match=message):
        train_router(index, **{"keys": keys, "queries": queries, "epochs": 1, **change})
    assert index.router is before


@pytest.mark.torch
def test_an_untrained_index_has_no_router_to_train(torch):
    with pytest.raises(sx.NotTrainedError, match="call train"):
        train_router(sx.IndexSAAP(D, 4), np.ones((5, D)), np.ones((5, D)))


def test_torch_is_named_where_it_is_missing(monkeypatch):
    index, keys, queries = problem()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        sx.MissingDependencyError, match=r"'torch'.*pip install 'saapindex\[learn\]'"
    ) as caught:
        train_router(index, keys, queries)
    assert isinstance(caught.value, ImportError)
