"""Which lists are visited and which keys kept, on every backend: known by hand, and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.paged import Reading, Scaling

POLICIES = ["sum", "max", "union"]


def reading(scan=0, streams=1, **settings):
    full = np.full(streams, scan)
    return Reading(**{"scan": full, "left": full, "code_bytes": 9, "row_bytes": 64, **settings})


def logsumexp(x, axis):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x.astype(np.float64)).sum(axis))


@given(
    d=st.sampled_from([3, 16, 63]),
    t=st.integers(1, 2),
    g=st.sampled_from([1, 3, 5]),
    scale=st.sampled_from([0.2, 3.0]),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_lists_are_ranked_by_anchor_and_spread(backend, paged, d, t, g, scale, softcap, seed):
    made = paged(seed, d=d, nlist=6)
    lists, code = made.lists, made.code
    queries = made.rng.standard_normal((4, t, g, d)).astype(np.float32)
    logits, norms = get_ops(backend).rank_lists(queries, lists, code, Scaling(scale, softcap))
    assert (logits.dtype, logits.shape, norms.shape) == (np.float32, (4, t, g, 6), (4, t, g))
    for s in range(4):
        q = queries[s].astype(np.float64)
        anchors = lists.anchors[s] * lists.anchor_scales[s][:, None].astype(np.float64)
        variance = (q @ code.inverse[s % 2]) ** 2 @ code.spread[s % 2]
        known = scale * q @ anchors.T + np.minimum(scale**2 / 2 * variance[..., None] * lists.spreads[s], 3)
        known = softcap * np.tanh(known / softcap) if softcap else known
        filled = lists.sizes[s] > 0
        np.testing.assert_allclose(logits[s][..., filled], known[..., filled], rtol=1e-4, atol=1e-4)
        assert np.isneginf(logits[s][..., ~filled]).all()
        total = logsumexp(known[..., filled] + np.log(lists.sizes[s][filled]), -1)
        np.testing.assert_allclose(norms[s], total, rtol=1e-4, atol=1e-4)


def test_no_keys_at_all(backend, paged):
    made = paged(n=0)
    queries = np.ones((4, 1, 2, 16), np.float32)
    ops = get_ops(backend)
    logits, norms = ops.rank_lists(queries, made.lists, made.code, Scaling(1.0))
    assert np.isneginf(logits).all()
    assert np.isneginf(norms).all()
    for settings in ({}, {"refine": False}, {"nprobe": 2}, {"top_p": 0.5}):
        assert not ops.select_lists(logits, norms, made.lists.sizes, reading(9, 4, **settings)).any()


# One stream, one token, two heads: the first likes lists 0 and 1, the second list 3. Norms are zero.
LOGITS = np.log(np.array([[[[8, 4, 1, 1, 0], [1, 2, 2, 6, 0]]]], np.float32) + np.float32(1e-30))
LOGITS[..., 4] = -np.inf
NORMS = np.zeros((1, 1, 2), np.float32)
SIZES = np.array([[10, 20, 5, 10, 0]])


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        (
            {"scan": 30},
            [10, 0, 0, 10, 0],
        ),  # sums are 9, 6, 3, 7: then list 1 does not fit, and nothing after it
        ({"scan": 40}, [10, 20, 0, 10, 0]),
        ({"scan": 45}, [10, 20, 5, 10, 0]),
        ({"scan": 999}, [10, 20, 5, 10, 0]),
        ({"scan": 9}, [0, 0, 0, 0, 0]),
        ({"scan": 30, "refine": False}, [10, 10, 0, 10, 0]),
        ({"scan": 9, "refine": False}, [9, 0, 0, 0, 0]),
        ({"scan": 30, "policy": "max", "refine": False}, [10, 10, 0, 10, 0]),
        ({"scan": 30, "policy": "union"}, [10, 0, 0, 10, 0]),
        ({"scan": 30, "policy": "union", "refine": False}, [10, 5, 0, 10, 0]),
        ({"scan": 30, "by_mass": True, "refine": False}, [10, 20, 0, 0, 0]),  # 90, 120, 15, 70
        ({"nprobe": 1}, [10, 0, 0, 0, 0]),
        ({"nprobe": 2}, [10, 0, 0, 10, 0]),
        ({"nprobe": 2, "by_mass": True}, [10, 20, 0, 0, 0]),
        ({"nprobe": 99}, [10, 20, 5, 10, 0]),
        ({"nprobe": 1, "policy": "union"}, [10, 0, 0, 10, 0]),
        ({"top_p": 0.3, "by_mass": True}, [0, 20, 0, 0, 0]),  # of 295
        ({"top_p": 0.7, "by_mass": True}, [10, 20, 0, 0, 0]),
        ({"top_p": 0.72, "by_mass": True}, [10, 20, 0, 10, 0]),
        ({"top_p": 1.0, "by_mass": True}, [10, 20, 5, 10, 0]),
    ],
)
def test_lists_are_visited_in_order_until_the_limit(backend, settings, taken):
    found = get_ops(backend).select_lists(LOGITS, NORMS, SIZES, reading(**settings))
    assert found.tolist() == [[taken]]
    assert found.dtype == np.int64


def test_equal_lists_are_visited_by_number(backend):
    logits = np.zeros((1, 1, 1, 4), np.float32)
    sizes = np.full((1, 4), 3)
    found = get_ops(backend).select_lists(logits, np.zeros((1, 1, 1), np.float32), sizes, reading(7))
    assert found.tolist() == [[[3, 3, 0, 0]]]


@given(
    policy=st.sampled_from(POLICIES),
    refine=st.booleans(),
    by_mass=st.booleans(),
    nlist=st.sampled_from([1, 7, 100]),
    g=st.sampled_from([1, 3]),
    share=st.floats(0, 1.2),
    seed=st.integers(0, 99),
)
def test_backends_visit_the_same_within_the_limit(backend, policy, refine, by_mass, nlist, g, share, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 40, (2, nlist)) * rng.integers(0, 2, (2, nlist))
    logits = np.where(sizes[:, None, None] > 0, rng.standard_normal((2, 3, g, nlist)), -np.inf)
    logits = logits.astype(np.float32)
    norms = rng.standard_normal((2, 3, g)).astype(np.float32)
    limit = (share * sizes.sum(axis=1)).astype(np.int64)
    wanted = reading(policy=policy, refine=refine, by_mass=by_mass)._replace(scan=limit)
    found = get_ops(backend).select_lists(logits, norms, sizes, wanted)
    known = get_ops("reference").select_lists(
        logits.astype(np.float64), norms.astype(np.float64), sizes, wanted
    )
    np.testing.assert_array_equal(found, known)
    assert (found.sum(axis=2) <= limit[:, None]).all()
    assert ((found >= 0) & (found <= sizes[:, None])).all()
    if refine:
        assert np.isin(found, [0, *sizes.reshape(-1)]).all()
    elif policy != "union":
        assert (found.sum(axis=2) == np.minimum(limit, sizes.sum(axis=1))[:, None]).all()


@pytest.mark.parametrize("policy", POLICIES)
@given(
    n=st.sampled_from([0, 1, 63, 500]),
    g=st.sampled_from([1, 2, 3]),
    share=st.floats(0, 1.5),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_best_keys_are_kept(backend, policy, n, g, share, whole, seed):
    """Whole numbers make ties many: then the lower id is kept."""
    rng = np.random.default_rng(seed)
    estimates = rng.standard_normal((2, 2, g, n))
    estimates = np.repeat(np.rint(estimates[:, :, :1]), g, axis=2) if whole else estimates
    estimates[:, :, :, n - n // 4 :] = -np.inf  # padding
    estimates = estimates.astype(np.float32)
    norms = np.zeros((2, 2, g), np.float32) if whole else rng.standard_normal((2, 2, g)).astype(np.float32)
    ids = np.stack([[rng.permutation(10 * n)[:n] for _ in range(2)] for _ in range(2)])
    ids[:, :, n - n // 4 :] = -1
    limits = rng.integers(0, round(share * n) + 1, (2, 2))
    kept = get_ops(backend).select_keys(estimates, norms, ids, limits, policy)
    assert (kept.dtype, kept.shape) == (np.bool_, ids.shape)
    weights = estimates.astype(np.float64) - norms[..., None]
    for s, i in np.ndindex(2, 2):
        rankers = {"sum": logsumexp(weights[s, i], 0)[None], "max": weights[s, i].max(0)[None]}
        wanted = set()
        for score in rankers.get(policy, weights[s, i]):
            order = sorted(range(n - n // 4), key=lambda place: (-score[place].round(9), ids[s, i, place]))
            wanted |= {*order[: limits[s, i] // (g if policy == "union" else 1)]}
        assert {*np.flatnonzero(kept[s, i])} == wanted


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_far_apart_and_scores_all_equal_are_told_apart_by_id(backend, policy):
    """Where no histogram is fine enough."""
    n = 300
    ids = np.random.default_rng(0).permutation(n)[None, None]
    for spread in (0.0, 1e-6, 1e4, 1e30):
        estimates = np.float32(spread) * (np.arange(n) // 100).astype(np.float32)[None, None, None]
        kept = get_ops(backend).select_keys(
            estimates, np.zeros((1, 1, 1), np.float32), ids, np.array([[150]]), policy
        )
        order = np.lexsort((ids[0, 0], -estimates[0, 0, 0]))
        assert {*np.flatnonzero(kept)} == {*order[:150]}


def test_bytes_left_by_the_scan_go_to_keys():
    wanted = reading(streams=2, left=np.array([1000, 50]), code_bytes=10, row_bytes=100)
    assert wanted.keep(np.array([[0, 31], [5, 9]])).tolist() == [[10, 6], [0, 0]]
