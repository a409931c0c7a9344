"""Operating points: recall and cost are what a search gives, and a target is met with the fewest lists."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx


@pytest.fixture(scope="module")
def index(make_index):
    return make_index(nlist=40, n=2000)


@pytest.fixture(scope="module")
def many(blobs):
    return blobs(100, 16, seed=2)


def test_points_are_what_searches_give(index, many, blobs, exact):
    points = sx.ParameterSpace(index).explore(many, k=7, repeats=1)
    _, truth = exact(many, blobs(2000, 16), 7)
    assert [point.params.nprobe for point in points] == [1, 2, 4, 8, 16, 32, 40]
    assert points[-1].recall == 1
    for point in points:
        stats = sx.SearchStatistics()
        ids = index.search(many, 7, params=point.params, stats=stats)[1]
        known = np.mean([np.isin(a, b).mean() for a, b in zip(truth, ids, strict=True)])
        np.testing.assert_allclose(point.recall, known)
        assert (point.keys, point.nbytes) == (stats.ndis / 100, stats.nbytes / 100)
        assert point.seconds > 0


@pytest.mark.parametrize("target", [0.3, 0.8, 0.95, 1.0])
def test_a_target_is_met_with_the_fewest_lists(index, many, target):
    points = sx.ParameterSpace(index).explore(many, target=target, repeats=1)
    best = points.for_recall(target, cost="keys")
    assert best.recall >= target
    assert best.params.nprobe == 1 or any(
        point.params.nprobe == best.params.nprobe - 1 and point.recall < target for point in points
    )
    for cost in ("seconds", "keys", "nbytes"):
        optimal = points.optimal(cost)
        costs = [getattr(point, cost) for point in optimal]
        recalls = [point.recall for point in optimal]
        assert costs == sorted(costs)
        assert recalls == sorted({*recalls})
        assert not any(
            getattr(point, cost) < getattr(one, cost) and point.recall >= one.recall
            for point in points
            for one in optimal
        )


def test_codes_are_tuned_in_two_directions(make_index, many, blobs, exact):
    params = sx.IndexParameters(niter=3, bits=1, refine=True)
    index = make_index(nlist=8, n=1000, params=params)
    space = sx.ParameterSpace(index)
    space.add_range("k_factor", [20, 1])
    space.add_range("nprobe", [8])
    points = space.explore(many, repeats=1)
    assert [(p.params.nprobe, p.params.k_factor) for p in points] == [(8, 1), (8, 20)]
    assert points[0].recall < points[1].recall
    assert points.for_recall(1.5) is None
    codes = make_index(nlist=8, n=1000, params=sx.IndexParameters(niter=3, bits=4))
    with pytest.raises(sx.InvalidInputError, match="stores codes alone, expected gt"):
        sx.ParameterSpace(codes).explore(many)
    truth = exact(many, blobs(1000, 16), 10)[1]
    assert 0.8 < sx.ParameterSpace(codes).explore(many, truth, repeats=1)[-1].recall <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda space, x: space.explore(x[:0]), "xq holds no queries"),
        (lambda space, x: space.explore(x, k=0), "k is 0"),
        (lambda space, x: space.explore(x, np.zeros((100, 3), int)), r"gt has shape \(100, 3\)"),
        (lambda space, x: space.explore(x, target=0), "target is 0, expected a recall"),
        (lambda space, x: space.explore(x, repeats=0), "repeats is 0"),
        (lambda space, x: space.add_range("speed", [1]), "name is 'speed'"),
        (lambda space, x: space.add_range("k_factor", [1]), "name is 'k_factor', expected one of 'nprobe'"),
        (lambda space, x: space.add_range("nprobe", []), "values of nprobe are empty"),
        (lambda space, x: space.add_range("nprobe", [0]), "nprobe is 0"),
        (lambda space, x: space.explore(x, repeats=1).optimal("money"), "cost is 'money'"),
    ],
)
def test_bad_calls_are_refused(index, many, call, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        call(sx.ParameterSpace(index), many)
