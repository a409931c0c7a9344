"""Training of an index: presets, what is said of thin data, and the positions it serves."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx
from saapindex.errors import PositionWarning, TrainingWarning

ROPE = sx.Rope(theta=1000.0, dim=16)


def test_reset_empties_and_training_starts_anew(make_index, blobs, queries, same):
    index = make_index()
    before = index.search(queries, 5)
    index.reset()
    assert (index.ntotal, index.is_trained) == (0, True)
    index.train(blobs(400, 16), xq_train=blobs(200, 16, seed=1))
    index.add(blobs(400, 16))
    same(index.search(queries, 5), before)


def test_the_seed_decides(make_index):
    centroids = [
        make_index(n=0, params=sx.IndexParameters(niter=3, seed=seed)).partition.centroids
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    assert (centroids[0] != centroids[2]).any()


@pytest.mark.parametrize("preset", ["best", "paper", "faiss-ivf"])
def test_presets(make_index, queries, preset):
    index = make_index(n=0, params=preset, rope=ROPE)
    assert index.params == sx.PRESETS[preset]
    assert index.partition.spherical == index.params.spherical
    assert index.is_trained == (preset != "paper")
    if preset == "paper":
        with pytest.raises(sx.NotTrainedError, match=r"'mlp' router is not trained.*train_router"):
            index.search(queries, 1)


def test_distances_ask_for_no_queries(make_index):
    index = make_index(metric_type=sx.METRIC_L2, params=sx.PRESETS["paper"].replace(router="mean"))
    assert not index.params.query_aware
    assert not index.params.spherical
    assert index.params.rank == "key"


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (None, "no training queries"),
        (0, "no training queries"),
        (20, "20 training queries for 16 dimensions"),
    ],
)
def test_thin_training_is_said(blobs, queries, message):
    index = sx.IndexSAAP(16, 4)
    xq = None if queries is None else blobs(queries, 16)
    with pytest.warns(TrainingWarning, match=message) as caught:
        index.train(blobs(100, 16), xq_train=xq)
    assert caught[0].filename == __file__
    assert index.is_trained


@pytest.mark.parametrize("params", ["faiss-ivf", sx.IndexParameters(query_aware=False)])
@pytest.mark.parametrize("count", [None, 0])
def test_no_queries_are_asked_for_where_none_are_used(blobs, params, count):
    index = sx.IndexSAAP(16, 4, params=params, rope=ROPE)
    index.train(blobs(100, 16), xq_train=None if count is None else blobs(count, 16))
    index.add(blobs(100, 16))
    index.search(blobs(1, 16), 1)


@pytest.mark.parametrize("view", ["rotated", "unrotated", "windowed"])
def test_default_positions_are_the_ids_and_the_end(blobs, queries, view, same):
    params = sx.IndexParameters(view=view, niter=2, cutoff=100.0)
    keys, xq = blobs(400, 16), blobs(200, 16, seed=1)
    answers = []
    for explicit in (False, True):
        index = sx.IndexSAAP(16, 8, params=params, rope=ROPE)
        at = (lambda first, n: {"positions": np.arange(first, first + n)}) if explicit else lambda *_: {}
        end = np.full(200, 400)
        index.train(keys, xq_train=xq, **at(0, 400), **({"positions_xq": end} if explicit else {}))
        index.add(keys[:300], **at(0, 300))
        index.add(keys[300:], **at(300, 100))
        where = {"positions": np.full(7, 400)} if explicit else {}
        answers.append([*index.search(queries, 5, **where), *index.route(queries, **where)])
        answers[-1] += index.range_search(queries, 2.0, **where)
    same(*answers)


def test_default_positions_of_given_ids_are_the_ids(blobs):
    index = sx.IndexSAAP(16, 8, params=sx.IndexParameters(niter=2, max_position=1000), rope=ROPE)
    index.train(blobs(400, 16), xq_train=blobs(200, 16, seed=1))
    index.add_with_ids(blobs(3, 16), [70, 30, 50])
    lists = index._state.lists
    np.testing.assert_array_equal(lists.positions[lists.rows()], lists.ids[lists.rows()])


def test_positions_past_the_range_are_said(blobs):
    index = sx.IndexSAAP(16, 8, params=sx.IndexParameters(niter=2), rope=ROPE)
    index.train(blobs(400, 16), xq_train=blobs(200, 16, seed=1))
    index.add(blobs(400, 16))
    index.search(blobs(1, 16), 1)
    with pytest.warns(PositionWarning, match=r"position 401 .* \(below 401\); train with max_position=402"):
        index.search(blobs(1, 16), 1, positions=[401])
    with pytest.warns(PositionWarning, match="position 9999 "):
        index.add(blobs(1, 16), positions=[9999])
    assert index.ntotal == 401
    with pytest.raises(PositionWarning):  # warnings are errors in these tests
        index.add(blobs(1, 16), positions=[9999])
    assert index.ntotal == 401


@pytest.mark.parametrize(
    "settings", [{"rope": None}, {"rope": ROPE, "params": sx.IndexParameters(view="unrotated")}]
)
def test_positions_without_a_range_are_not(make_index, blobs, settings):
    index = make_index(n=0, **settings)
    index.add(blobs(3, 16), positions=[10**6, 5, 5])
    index.search(blobs(1, 16), 1, positions=[10**9])


@pytest.mark.parametrize("view", ["rotated", "windowed"])
def test_keys_moved_to_random_positions_serve_long_contexts(view):
    """Trained on positions below 128 and served at 8,000."""
    rng = np.random.default_rng(0)
    rope, d = sx.Rope(theta=10_000.0, dim=32), 32
    centres = 2 * rng.standard_normal((12, d)) + 2 * rng.standard_normal(d)

    def sample(n, first):
        positions = rng.integers(first, first + n, n)
        keys = centres[rng.integers(12, size=n)] + 0.7 * rng.standard_normal((n, d))
        queries = centres[rng.integers(12, size=200)] + 0.7 * rng.standard_normal((200, d))
        at = np.full(200, first + n)
        keys, queries = keys.astype(np.float32), queries.astype(np.float32)
        return rope.rotate(keys, positions), positions, rope.rotate(queries, at), at

    keys, positions, queries, at = sample(2000, 8000)
    truth = np.argsort(-(queries @ keys.T), axis=1)[:, :10]

    def recall(augment, train):
        params = sx.IndexParameters(view=view, cutoff=500.0, augment=augment, max_position=10_001)
        index = sx.IndexSAAP(d, 64, params=params, rope=rope)
        index.train(train[0], xq_train=train[2], positions=train[1], positions_xq=train[3])
        index.add(keys, positions=positions)
        _, found = index.search(queries, 10, params=sx.SearchParameters(budget=0.1), positions=at)
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])

    short = sample(2000, 0)
    assert recall(1, short) > recall(0, short) + 0.15
