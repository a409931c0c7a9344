"""Bad arguments are refused by name, with what was expected, and leave the index as it was."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx
from saapindex.partition import LinearRouter

X = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k is 0, expected at least 1"),
        (-1, "k is -1, expected at least 1"),
        (2.0, "k is 2.0, expected an integer of at least 1"),
        ("2", "k is '2', expected an integer"),
        (None, "k is None, expected an integer"),
        (True, "k is True, expected an integer"),
        (np.array([1, 2]), "k is array"),
    ],
)
def test_k(unchanged, k, message):
    for call in (
        lambda: unchanged.search(X, k),
        lambda: unchanged.assign(X, k),
        lambda: unchanged.search_preassigned(X, k, np.zeros((5, 1), int)),
    ):
        with pytest.raises(sx.InvalidInputError, match=message):
            call()


@pytest.mark.parametrize("thresh", [np.nan, np.inf, -np.inf, 1e300, "1", None, X[0, :2], 1j])
def test_thresholds(unchanged, thresh):
    with pytest.raises(sx.InvalidInputError, match=r"thresh is .*, expected a finite float32 number"):
        unchanged.range_search(X, thresh)


@pytest.mark.parametrize("params", [{"nprobe": 3}, 3, "best", sx.IndexParameters()])
def test_search_parameters_of_another_kind(unchanged, params):
    for call in (
        lambda: unchanged.search(X, 1, params=params),
        lambda: unchanged.range_search(X, 1.0, params=params),
        lambda: unchanged.route(X, params=params),
        lambda: unchanged.search_preassigned(X, 1, np.zeros((5, 1), int), params=params),
    ):
        with pytest.raises(sx.InvalidInputError, match=r"params is a \w+, expected SearchParameters"):
            call()


@pytest.mark.parametrize("given", [{"top_p": 0.5}, {"rank": "mass"}])
def test_masses_of_distances(make_index, given):
    index = make_index(metric_type=sx.METRIC_L2)
    with pytest.raises(sx.InvalidInputError, match="need an inner product, but metric_type is METRIC_L2"):
        index.search(X, 1, params=sx.SearchParameters(**given))


@pytest.mark.parametrize("nprobe", [0, -1, 1.5, None, "all"])
def test_nprobe(unchanged, nprobe):
    with pytest.raises(sx.InvalidInputError, match="nprobe is"):
        unchanged.nprobe = nprobe


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.reconstruct(400), "id 400 is not in the index"),
        (lambda index: index.reconstruct(-1), "id -1 is not in the index"),
        (lambda index: index.reconstruct("a"), "keys has dtype <U1, expected integers"),
        (lambda index: index.reconstruct(1.0), "keys has dtype float64"),
        (lambda index: index.reconstruct_n(390, 20), "id 400 is not in the index"),
        (lambda index: index.reconstruct_n(0, 10**15), "1000000000000000 ids .* the index holds 400 keys"),
        (lambda index: index.reconstruct_n(-1), "n0 is -1, expected at least 0"),
        (lambda index: index.reconstruct_n(0, 2.0), "ni is 2.0, expected an integer"),
        (lambda index: index.reconstruct_batch([[1, 2]]), r"keys has shape \(1, 2\), expected \(2,\)"),
        (lambda index: index.remove_ids([1.0]), "ids has dtype float64"),
        (lambda index: index.remove_ids(3), r"ids has shape \(\), expected \(1,\)"),
        (lambda index: index.adapt(0), "niter is 0, expected at least 1"),
        (lambda index: index.train(X), r"holds 400 keys .* call reset\(\) before training"),
    ],
)
def test_other_calls(unchanged, call, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        call(unchanged)


def test_too_few_training_keys():
    index = sx.IndexSAAP(16, 6)
    with pytest.raises(sx.InvalidInputError, match="5 training keys for 6 lists, expected at least as many"):
        index.train(X, xq_train=X)
    assert not index.is_trained


@pytest.mark.parametrize(
    "call",
    [
        lambda index: index.add(X),
        lambda index: index.add_with_ids(X, range(5)),
        lambda index: index.search(X, 1),
        lambda index: index.search_preassigned(X, 1, np.zeros((5, 1), int)),
        lambda index: index.range_search(X, 1.0),
        lambda index: index.route(X),
        lambda index: index.assign(X),
        lambda index: index.adapt(),
        lambda index: index.partition,
        lambda index: index.router,
    ],
)
def test_before_training(call):
    index = sx.IndexSAAP(16, 4)
    with pytest.raises(
        sx.NotTrainedError, match=r"not trained: call train\(x, xq_train=queries\) first"
    ) as caught:
        call(index)
    assert isinstance(caught.value, RuntimeError)
    assert (index.ntotal, index.is_trained) == (0, False)


def test_adapting_nothing_or_a_learned_router(make_index):
    with pytest.raises(sx.InvalidInputError, match="holds no keys to adapt to: call add first"):
        make_index(n=0).adapt()
    index = make_index()
    index.router = LinearRouter(np.ones((8, 16)), np.ones(8))
    with pytest.raises(sx.InvalidInputError, match="'linear' router was learned for this partition"):
        index.adapt()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d": 0}, "d is 0, expected at least 1"),
        ({"d": 1.5}, "d is 1.5, expected an integer"),
        ({"nlist": 0}, "nlist is 0"),
        ({"nlist": "8"}, "nlist is '8'"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"metric_type": 5}, "metric_type is 5, expected METRIC_INNER_PRODUCT or METRIC_L2"),
        ({"metric_type": "ip"}, "metric_type is 'ip'"),
        ({"params": "fastest"}, "preset is 'fastest', expected one of 'best', 'faiss-ivf', 'paper'"),
        ({"params": None}, "params is a NoneType, expected IndexParameters or the name of a preset"),
        ({"params": sx.SearchParameters()}, "params is a SearchParameters"),
        ({"backend": "gpu"}, "backend is 'gpu', expected 'reference', 'cpu' or 'cuda'"),
        ({"rope": {"dim": 8}}, "rope is a dict, expected a Rope or None"),
        ({"rope": sx.Rope(dim=18)}, "rope rotates 18 dimensions, expected at most d = 16"),
        ({"dtype": "int8"}, "dtype is 'int8', expected 'float32' or 'float16'"),
    ],
)
def test_construction(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        sx.IndexSAAP(**{"d": 16, "nlist": 8, **settings})
    assert isinstance(caught.value, sx.InvalidInputError)


def test_learned_routers_need_an_inner_product(make_index):
    message = r"router predicts attention mass, so it needs METRIC_INNER_PRODUCT"
    with pytest.raises(sx.InvalidInputError, match=message):
        sx.IndexSAAP(4, 2, sx.METRIC_L2, params=sx.IndexParameters(router="linear"))
    index = make_index(metric_type=sx.METRIC_L2)
    with pytest.raises(sx.InvalidInputError, match=message):
        index.router = LinearRouter(np.zeros((8, 16), np.float32), np.zeros(8, np.float32))
    assert index.router.name == "mean"


def test_two_metrics_exclude_each_other():
    with pytest.raises(sx.InvalidInputError, match="spherical and query_aware are given together"):
        sx.IndexParameters(spherical=True)
