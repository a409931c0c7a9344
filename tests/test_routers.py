"""Routers: what they predict, how it ranks lists, and which lists are then visited."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx
from saapindex.backends import get_ops
from saapindex.backends.base import to_blocks
from saapindex.errors import FileFormatError
from saapindex.index.probing import choose_lists
from saapindex.index.state import Routing
from saapindex.partition import CentroidRouter, LinearRouter, MeanRouter, MLPRouter
from saapindex.partition.routers import make_router, router_from_tensors

RNG = np.random.default_rng(0)
WEIGHTS = {
    "linear": {"weight": RNG.standard_normal((8, 16)), "offset": RNG.standard_normal(8)},
    "mlp": {
        "hidden": RNG.standard_normal((5, 16)),
        "hidden_offset": RNG.standard_normal(5),
        "weight": RNG.standard_normal((8, 5)),
        "offset": RNG.standard_normal(8),
    },
}
LEARNED = {"linear": LinearRouter, "mlp": MLPRouter}
ROUTERS = {
    "centroid": lambda: CentroidRouter(0.25),
    "mean": lambda: MeanRouter(0.25),
    "linear": lambda: LinearRouter(**WEIGHTS["linear"]),
    "mlp": lambda: MLPRouter(**WEIGHTS["mlp"]),
}


def scores(index, queries):
    """What the router of an index says of each list, by its definition."""
    router, state = index.router, index._state
    table = router.table(index.partition, state.sums, index.list_sizes)
    return router.features(queries) @ table.T


def test_centroid_and_mean_predict_the_logit_of_the_list(make_index, blobs):
    index, queries = make_index(), blobs(5, 16, seed=2)
    index.router = CentroidRouter(index.scale)
    np.testing.assert_allclose(scores(index, queries), queries @ index.partition.centroids.T / 4, atol=1e-5)
    index.router = MeanRouter(index.scale)
    keys = blobs(400, 16)
    labels = index.partition.assign(keys, index.ops)
    means = np.array([keys[labels == j].mean(axis=0) for j in range(8)])
    np.testing.assert_allclose(scores(index, queries), queries @ means.T / 4, atol=1e-5)


def test_means_follow_what_is_added_and_removed(make_index, blobs):
    index = make_index(n=0)
    keys = blobs(400, 16)
    np.testing.assert_allclose(scores(index, keys[:2]), keys[:2] @ index.partition.centroids.T / 4, atol=1e-5)
    index.add(keys[:300])
    index.add(keys[300:])
    index.remove_ids(np.arange(0, 400, 3))
    kept = np.arange(400) % 3 > 0
    labels = index.partition.assign(keys, index.ops)
    means = np.array([keys[kept & (labels == j)].mean(axis=0) for j in range(8)])
    np.testing.assert_allclose(scores(index, keys[:2]), keys[:2] @ means.T / 4, atol=1e-5)


def test_mlp_is_two_layers(make_index, blobs):
    index, queries = make_index(), blobs(5, 16)
    index.router = MLPRouter(**WEIGHTS["mlp"])
    weights = WEIGHTS["mlp"]
    hidden = np.maximum(queries @ weights["hidden"].T + weights["hidden_offset"], 0)
    np.testing.assert_allclose(scores(index, queries), hidden @ weights["weight"].T, atol=1e-4)


@pytest.mark.parametrize("predicts", ["key", "mass"])
@pytest.mark.parametrize("rank", ["key", "mass"])
def test_bias_turns_one_prediction_into_the_other(predicts, rank):
    counts = np.array([0, 1, 2, 100])
    offset = np.array([5, 1, 2, 3], np.float32)
    bias = LinearRouter(np.zeros((4, 2)), offset, predicts).bias(counts, rank)
    sign = (rank == "mass") - (predicts == "mass")
    assert bias.dtype == np.float32
    assert bias[0] == -np.inf
    np.testing.assert_allclose(bias[1:], offset[1:] + sign * np.log(counts[1:]), rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_rebuilt_from_its_tensors(name):
    router = ROUTERS[name]()
    again = router_from_tensors(name, 0.25, router.predicts, router.tensors())
    assert type(again) is type(router)
    assert again.predicts == router.predicts
    assert {*again.tensors()} == {*router.tensors()}
    for tensor in router.tensors():
        np.testing.assert_array_equal(again.tensors()[tensor], router.tensors()[tensor])


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("oracle", {}),
        ("linear", {}),
        ("linear", {"weight": np.ones((3, 2))}),
        ("linear", {**WEIGHTS["linear"], "more": np.ones(2)}),
        ("mlp", WEIGHTS["linear"]),
    ],
)
def test_other_tensors_are_refused(name, tensors):
    with pytest.raises(FileFormatError, match=name):
        router_from_tensors(name, 1.0, "key", tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"weight": np.ones(8)}, r"weight is float64 of shape \(8,\), expected finite floats"),
        ("linear", {"weight": np.full((8, 16), np.nan)}, "weight is .* expected finite"),
        ("linear", {"weight": np.ones((8, 16), int)}, "weight is int64"),
        ("linear", {"weight": [["a"]]}, "weight is <U1"),
        ("linear", {"offset": np.ones(7)}, r"offset is .*\(7,\), expected finite floats of shape \(8,\)"),
        ("mlp", {"weight": np.ones((8, 6))}, r"weight is .*\(8, 6\)"),
        ("mlp", {"hidden_offset": np.full(5, np.inf)}, "hidden_offset is"),
    ],
)
def test_weights_refused(name, change, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        LEARNED[name](**{**WEIGHTS[name], **change})


def test_only_untrained_routers_are_made_by_name():
    assert make_router("mean", 1.0).name == "mean"
    assert make_router("centroid", 1.0).name == "centroid"
    assert make_router("linear", 1.0) is None
    assert make_router("mlp", 1.0) is None


@pytest.mark.parametrize("name", ROUTERS)
def test_any_router_fits_an_index(make_index, blobs, exact, name):
    index, queries = make_index(), blobs(9, 16, seed=2)
    index.router = ROUTERS[name]()
    assert index.params.router == index.router.name == name
    _, ids = index.search(queries, 5, params=sx.SearchParameters(nprobe=8))
    np.testing.assert_array_equal(ids, exact(queries, blobs(400, 16), 5)[1])


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (LinearRouter(np.ones((7, 16)), np.ones(7)), r"table of shape \(7, 16\), expected \(8, 16\)"),
        (LinearRouter(np.ones((8, 15)), np.ones(8)), r"table of shape \(8, 15\), expected \(8, 16\)"),
        (MLPRouter(np.ones((5, 15)), np.ones(5), np.ones((8, 5)), np.ones(8)), "queries of dimension 16"),
        (
            MLPRouter(np.ones((5, 16)), np.ones(5), np.ones((9, 5)), np.ones(9)),
            r"\(9, 5\), expected \(8, 5\)",
        ),
    ],
)
def test_routers_of_another_size_are_refused(make_index, router, message):
    index = make_index()
    with pytest.raises(sx.InvalidInputError, match=message):
        index.router = router
    assert index.router.name == index.params.router == "mean"


def visits(scores, sizes, backend="cpu", rank="key", **given):
    """What three queries visit, whose scores of each list are given."""
    routing = Routing(CentroidRouter(1.0), to_blocks(scores.T), np.zeros(len(sizes), np.float32), sizes)
    params = sx.SearchParameters(**given)
    return choose_lists(np.eye(3, dtype=np.float32), routing, rank, 1, params, get_ops(backend))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    budget=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_a_budget_is_read_to_the_key(backend, sizes, budget, seed):
    sizes = np.array(sizes)
    scores = np.random.default_rng(seed).standard_normal((3, len(sizes))).astype(np.float32)
    probes = visits(scores, sizes, backend, budget=budget)
    assert probes.keys_read(sizes).tolist() == [min(budget, sizes.sum())] * 3
    for row, lists in zip(scores, probes.lists, strict=True):
        visited = lists[lists >= 0]
        assert (sizes[visited] > 0).all()
        assert visited.tolist() == [j for j in np.argsort(-row) if sizes[j]][: len(visited)]


@pytest.mark.parametrize("rank", ["key", "mass"])
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    top_p=st.floats(0.01, 1),
    spread=st.sampled_from([0.1, 1, 30, 1000]),
    seed=st.integers(0, 99),
)
def test_top_p_visits_the_fewest_lists_that_hold_the_mass(rank, sizes, top_p, spread, seed):
    sizes = np.array(sizes)
    scores = (spread * np.random.default_rng(seed).standard_normal((3, len(sizes)))).astype(np.float32)
    probes = visits(scores, sizes, rank=rank, top_p=top_p)
    with np.errstate(divide="ignore"):
        logs = scores.astype(np.float64) + np.log(sizes)
    masses = np.exp(logs - logs.max(axis=1, keepdims=True, initial=-1e9))
    for mass, by_key, lists in zip(masses, scores, probes.lists, strict=True):
        visited = lists[lists >= 0]
        assert (sizes[visited] > 0).all()
        ranked = np.argsort(-mass if rank == "mass" else -by_key, kind="stable")
        top = mass[[j for j in ranked if sizes[j]]][: len(visited)]
        np.testing.assert_allclose(mass[visited], top, rtol=1e-3, atol=1e-30)
        share = np.cumsum(mass[visited]) / max(mass.sum(), 1e-300)
        if len(visited):
            assert share[-1] >= top_p - 1e-6
        assert (share[:-1] < top_p + 1e-6).all()


def test_top_p_of_one_visits_lists_whose_mass_is_nothing(backend):
    scores = np.tile(np.array([0, -500, -50], np.float32), (3, 1))
    assert visits(scores, np.ones(3, int), backend, top_p=1.0).lists.tolist() == [[0, 2, 1]] * 3
