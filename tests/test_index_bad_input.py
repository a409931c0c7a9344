"""Every bad argument is refused by name, with what was expected, and leaves the index as it was."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx

X = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
NAN = np.where(X[2, 3] == X, np.nan, X)
FULL = sx.SearchParameters(nprobe=8)


@pytest.fixture(scope="module")
def index(make_index):
    return make_index(rope=sx.Rope(dim=16), params=sx.IndexParameters(max_position=10_000, niter=2))


@pytest.fixture
def unchanged(index):
    """An index that must be the same afterwards."""

    def snapshot():
        answer = index.search(X, 9, params=FULL)
        return (
            index.ntotal,
            index.params,
            index.nprobe,
            index.list_sizes.tolist(),
            *map(np.ndarray.tolist, answer),
        )

    before = snapshot()
    yield index
    assert snapshot() == before


ARRAYS = [
    (X[:, :15], r"has shape \(5, 15\), expected \(n, 16\)"),
    (X[0], r"has shape \(16,\), expected \(n, 16\)"),
    (X[None], r"has shape \(1, 5, 16\), expected \(n, 16\)"),
    (NAN, "holds NaN or infinity, expected finite values"),
    (NAN.astype(np.float16), "holds NaN or infinity"),
    (np.where(np.isnan(NAN), -np.inf, X), "holds NaN or infinity"),
    (X.astype(np.float64) * 1e300, "holds NaN or infinity"),
    (
        X.astype(np.int32),
        r"has dtype int32, expected a floating one: convert it with \w+.astype\('float32'\)",
    ),
    (X.astype(complex), "has dtype complex128, expected a floating one"),
    (X > 0, "has dtype bool, expected a floating one"),
    (X.astype(object), "has dtype object, expected a floating one"),
    (X.astype(str), "has dtype <U"),
    ([[1.0, 2.0], [1.0]], "is a list that is no array"),
    ({"a": 1}, "has dtype object"),
    (None, "has dtype object"),
]
VERBS = {
    "x:add": lambda index, x: index.add(x),
    "x:add_with_ids": lambda index, x: index.add_with_ids(x, np.arange(900, 905)),
    "x:search": lambda index, x: index.search(x, 3),
    "x:assign": lambda index, x: index.assign(x),
    "x:range_search": lambda index, x: index.range_search(x, 1.0),
    "x:route": lambda index, x: index.route(x),
    "x:search_preassigned": lambda index, x: index.search_preassigned(x, 3, np.zeros((5, 1), int)),
}


@pytest.mark.parametrize(("x", "message"), ARRAYS)
@pytest.mark.parametrize("verb", VERBS)
def test_vectors(unchanged, verb, x, message):
    with pytest.raises(sx.InvalidInputError, match=f"^{verb.partition(':')[0]} {message}"):
        VERBS[verb](unchanged, x)


@pytest.mark.parametrize(("x", "message"), ARRAYS[:-1])
@pytest.mark.parametrize("name", ["x", "xq_train"])
def test_training_vectors(make_index, name, x, message):
    index = make_index(n=0)
    before = index.partition
    with pytest.raises(sx.InvalidInputError, match=f"^{name} {message}"):
        index.train(**{"x": np.tile(X, (4, 1)), name: x})
    assert index.partition is before


@pytest.mark.torch
@pytest.mark.parametrize("verb", VERBS)
def test_tensors_elsewhere(torch, unchanged, verb):
    with pytest.raises(sx.InvalidInputError, match=r"^x is on meta, expected a CPU tensor: x\.cpu\(\)"):
        VERBS[verb](unchanged, torch.ones(5, 16, device="meta"))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.arange(4), r"has shape \(4,\), expected \(5,\)"),
        (np.arange(5)[:, None], r"has shape \(5, 1\), expected \(5,\)"),
        (7, r"has shape \(\), expected \(5,\)"),
        (np.arange(5) - 1, "holds -1, expected at least 0"),
        (np.arange(5.0), "has dtype float64, expected integers"),
        (np.arange(5) > 2, "has dtype bool, expected integers"),
        (np.arange(5).astype(str), "has dtype <U"),
        (np.arange(5).astype(object), "has dtype object"),
        ([[1], [1, 2]], "is a list that is no array"),
        (np.full(5, 2**63, np.uint64), "holds 9223372036854775808, expected at most"),
    ],
)
def test_positions(unchanged, make_index, positions, message):
    calls = {
        "positions": [
            lambda at: unchanged.add(X, positions=at),
            lambda at: unchanged.add_with_ids(X, np.arange(900, 905), positions=at),
            lambda at: unchanged.search(X, 1, positions=at),
            lambda at: unchanged.range_search(X, 1.0, positions=at),
            lambda at: unchanged.route(X, positions=at),
            lambda at: sx.IndexSAAP(16, 2).train(X, xq_train=X, positions=at),
        ],
        "positions_xq": [lambda at: sx.IndexSAAP(16, 2).train(X, xq_train=X, positions_xq=at)],
    }
    for name, group in calls.items():
        for call in group:
            with pytest.raises(sx.InvalidInputError, match=f"^{name} {message}"):
                call(positions)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([900, 901, 900, 902, 903], "id 900 is given twice, expected distinct ids"),
        ([900, 901, 902, 7, 903], "id 7 is in the index already, expected new ids"),
        ([900, 901, 902, -3, 903], "ids holds -3, expected at least 0"),
        ([900, 901], r"ids has shape \(2,\), expected \(5,\)"),
        ([0.5] * 5, "ids has dtype float64, expected integers"),
        ([2**62, 1000, 1001, 1002, 1003], "ids reach 4611686018427387904, expected less than"),
    ],
)
def test_ids(unchanged, ids, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        unchanged.add_with_ids(X, ids)


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


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (np.zeros((4, 2), int), r"Iq has shape \(4, 2\), expected \(5, 2\)"),
        (np.zeros(5, int), r"Iq has shape \(5,\), expected \(5, 5\)"),
        (3, r"Iq has shape \(\)"),
        (np.zeros((5, 2)), "Iq has dtype float64, expected integers"),
        (np.full((5, 2), 8), "Iq holds lists from 8 to 8, expected -1 to 7"),
        (np.full((5, 2), -2), "Iq holds lists from -2 to -2, expected -1 to 7"),
    ],
)
def test_preassigned_lists(unchanged, lists, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        unchanged.search_preassigned(X, 3, lists)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"D": np.empty((5, 4), np.float32)}, r"D has shape \(5, 4\), expected \(5, 3\)"),
        ({"D": np.empty((5, 3))}, "D is float64, expected a buffer of float32"),
        ({"I": np.empty((5, 3), np.int32)}, "I is int32, expected a buffer of int64"),
        ({"I": np.empty((3, 5), np.int64).T}, "I is read-only or not C-contiguous"),
        ({"I": [[0] * 3] * 5}, "I is a list"),
    ],
)
def test_buffers(unchanged, buffers, message):
    for call in (
        lambda: unchanged.search(X, 3, **buffers),
        lambda: unchanged.search_preassigned(X, 3, np.zeros((5, 1), int), **buffers),
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
    from saapindex.partition import LinearRouter

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
        ({"backend": "cuda"}, "backend is 'cuda', expected 'reference' or 'cpu'"),
        ({"rope": {"dim": 8}}, "rope is a dict, expected a Rope or None"),
        ({"rope": sx.Rope(dim=18)}, "rope rotates 18 dimensions, expected at most d = 16"),
        ({"dtype": "int8"}, "dtype is 'int8', expected 'float32' or 'float16'"),
    ],
)
def test_construction(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        sx.IndexSAAP(**{"d": 16, "nlist": 8, **settings})
    assert isinstance(caught.value, sx.InvalidInputError)


def test_keys_too_large_for_half_precision(make_index):
    index = make_index(n=0, dtype="float16")
    with pytest.raises(sx.InvalidInputError, match=r"x holds .*, expected at most .* float16"):
        index.add(1e6 * X)
    assert index.ntotal == 0
