"""Attention on every backend, against torch's and against sums in double precision."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.attention_ops import AttentionOps
from saapindex.backends.cpu import functions, step
from saapindex.backends.paged import Reading, Scaling

SHAPES = {
    "d": st.sampled_from([3, 16, 63, 80]),
    "t": st.integers(1, 3),
    "g": st.sampled_from([1, 2, 3, 5]),
    "n": st.sampled_from([0, 1, 63, 100]),
    "sinks": st.sampled_from([0, 1, 17]),
    "recent": st.sampled_from([0, 1, 40]),
    "seed": st.integers(0, 99),
}
SCALINGS = st.sampled_from([Scaling(0.2), Scaling(1.0, 3.0), Scaling(20.0)])


def exact(queries, keys, values, seen, scaling):
    """Attention of (g, d) queries to the keys where `seen`, in float64: output, lse, largest logit."""
    logits = scaling.scale * queries.astype(np.float64) @ keys[seen].T.astype(np.float64)
    if scaling.softcap:
        logits = scaling.softcap * np.tanh(logits / scaling.softcap)
    if not logits.size:
        return np.zeros(queries.shape), np.full(len(queries), -np.inf), np.full(len(queries), -np.inf)
    peak = logits.max(axis=1)
    weights = np.exp(logits - peak[:, None])
    total = weights.sum(axis=1)
    return weights @ values[seen] / total[:, None], peak + np.log(total), peak


def close(found, known, scale=1.0):
    np.testing.assert_allclose(found, known, rtol=1e-4 * scale, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@given(scaling=SCALINGS, **SHAPES)
def test_rows_are_attended_exactly(backend, paged, dtype, d, t, g, n, sinks, recent, scaling, seed):
    made = paged(seed, d=d, n=n, sinks=sinks, recent=recent, dtype=dtype)
    queries = made.rng.standard_normal((4, t, g, d)).astype(np.float32)
    rows = np.full((4, t, 30), -1)
    places = np.full((4, t, 30), -1)
    for s in range(4):
        lists = made.lists.rows(s, made.lists.sizes[s])[0]
        everything = np.concatenate([made.near.rows(s)[0], lists])
        for i in range(t):
            chosen = made.rng.permutation(everything)[: made.rng.integers(0, 25)]
            where = np.sort(made.rng.choice(30, len(chosen), replace=False))
            rows[s, i, where] = chosen
            places[s, i, where] = made.pages.take("ids", chosen)
    out, lse, peaks = get_ops(backend).attend_rows(queries, rows, made.pages, scaling)
    assert {part.dtype for part in (out, lse, peaks)} == {np.dtype(np.float32)}
    for s, i in np.ndindex(4, t):
        seen = places[s, i][places[s, i] >= 0]
        known = exact(queries[s, i], made.keys[s], made.values[s], seen, scaling)
        for found, truth in zip((out, lse, peaks), known, strict=True):
            close(found[s, i], truth, max(1.0, scaling.scale))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@given(scaling=SCALINGS, **SHAPES)
def test_everything_before_a_position_is_attended(
    backend, paged, dtype, d, t, g, n, sinks, recent, scaling, seed
):
    made = paged(seed, d=d, n=n, sinks=sinks, recent=recent, dtype=dtype)
    queries = made.rng.standard_normal((4, t, g, d)).astype(np.float32)
    positions = made.rng.integers(-1, made.total + 1, (4, t))
    out, lse = get_ops(backend).attend_all(queries, positions, made.near, made.lists, made.pages, scaling)
    for s, i in np.ndindex(4, t):
        seen = np.arange(made.total) <= positions[s, i]
        known = exact(queries[s, i], made.keys[s], made.values[s], seen, scaling)
        close(out[s, i], known[0], max(1.0, scaling.scale))
        close(lse[s, i], known[1], max(1.0, scaling.scale))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize(("d", "n"), [(64, 1000), (63, 100), (128, 2000)])
def test_error_is_at_most_twice_that_of_torch(backend, torch, paged, dtype, d, n):
    made = paged(d=d, n=n, dtype=dtype, batch=1)
    queries = made.rng.standard_normal((2, 1, 3, d)).astype(np.float32)
    last = np.full((2, 1), made.total)
    scaling = Scaling(d**-0.5)
    found, lse = get_ops(backend).attend_all(queries, last, made.near, made.lists, made.pages, scaling)
    q, k, v = (torch.from_numpy(x) for x in (queries[:, 0], made.keys, made.values))
    theirs = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k[:, None], v[:, None])[:, :, 0]
    truth = [exact(queries[s, 0], made.keys[s], made.values[s], slice(None), scaling) for s in range(2)]
    outs, lses, _ = (np.stack(part) for part in zip(*truth, strict=True))
    assert np.abs(found[:, 0] - outs).max() <= 2 * np.abs(theirs.numpy() - outs).max()
    np.testing.assert_allclose(lse[:, 0], lses, rtol=2e-6)


@given(parts=st.integers(1, 4), shape=st.sampled_from([(), (3,), (2, 0), (2, 3)]), seed=st.integers(0, 99))
def test_merged_parts_are_the_whole(backend, parts, shape, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 5, parts)
    logits, values = rng.normal(0, 40, (*shape, sizes.sum())), rng.standard_normal((sizes.sum(), 6))
    outs, lses = [], []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        out, lse, _ = exact_logits(logits[..., end - size : end], values[end - size : end])
        outs.append(out)
        lses.append(lse)
    known, total, _ = exact_logits(logits, values)
    out, lse = get_ops(backend).merge(np.stack(outs).astype(np.float32), np.stack(lses).astype(np.float32))
    close(out, known)
    close(lse, total)


def exact_logits(logits, values):
    if not len(values):
        return np.zeros((*logits.shape[:-1], 6)), np.full(logits.shape[:-1], -np.inf), None
    flat = logits.reshape(-1, len(values))
    peak = flat.max(axis=1, initial=-np.inf)
    weights = np.exp(flat - peak[:, None])
    out = weights @ values / weights.sum(axis=1)[:, None]
    lse = peak + np.log(weights.sum(axis=1))
    return out.reshape(*logits.shape[:-1], 6), lse.reshape(logits.shape[:-1]), None


@given(
    g=st.sampled_from([1, 3]),
    nlist=st.sampled_from([1, 6]),
    bound=st.sampled_from([-2.0, 1.0, np.inf]),
    scale=st.sampled_from([0.25, 3.0]),
    words=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_the_rest_counts_by_bounded_estimates(backend, paged, g, nlist, bound, scale, words, seed):
    made = paged(seed, nlist=nlist, words=words)
    rng = made.rng
    queries = rng.standard_normal((4, 2, g, 16)).astype(np.float32)
    logits = rng.normal(0, 2, (4, 2, g, nlist)).astype(np.float32)
    rest = rng.integers(0, 3, (4, 2, nlist))
    labels = np.where(rng.random((4, 2, 7)) < 0.2, -1, rng.integers(0, nlist, (4, 2, 7)))
    rows = np.full(labels.shape, -1)
    for s, i in np.ndindex(4, 2):
        rows[s, i] = rng.choice(made.lists.rows(s, made.lists.sizes[s])[0], 7, replace=False)
    rows[labels < 0] = -1
    estimates = rng.normal(0, 2, (4, 2, g, 7)).astype(np.float32)
    estimates[rng.random(estimates.shape) < 0.2] = -np.inf
    bounds = np.full((4, 2, g), bound, np.float32)
    out, lse = get_ops(backend).estimate_rest(
        queries,
        logits,
        rest,
        estimates,
        rows,
        labels,
        bounds,
        made.lists,
        made.pages,
        made.code,
        Scaling(scale),
    )
    means = made.lists.means * made.lists.mean_scales[..., None].astype(np.float64)
    for s, i, h in np.ndindex(4, 2, g):
        weights = np.exp(np.minimum(logits[s, i, h], bound).astype(np.float64)) * rest[s, i]
        seen = labels[s, i] >= 0
        single = np.exp(np.minimum(estimates[s, i, h][seen], bound).astype(np.float64))
        u = queries[s, i, h] @ made.code.inverse[s % 2].astype(np.float64)
        words, exponents = (made.pages.take(name, rows[s, i][seen]) for name in ("codes", "exponents"))
        f = made.code.base[s % 2] * 2.0 ** ((exponents.astype(float) - 128) / 16)
        y = single @ made.transform.head(s % 2).decode(words[None], exponents[None])[0]
        for part, squares, share in (
            (weights, made.lists.spreads[s], made.code.spread),
            (single, f**2, made.code.distortion),
        ):
            lam = share[s % 2].astype(np.float64)
            cap = 3 / max(scale**2 / 2 * (u**2 @ lam), 1e-30)
            y += scale * lam * u * (part @ np.minimum(squares, cap))
        np.add.at(weights, labels[s, i][seen], single)
        total = weights.sum()
        known = weights @ means[s] + y @ made.lists.slopes[s]
        close(out[s, i, h], known / total if total else 0, max(1.0, scale))
        close(np.exp(lse[s, i, h]), total)


def made_reading(made, **settings):
    """A quarter of the keys by their codes, a few kept."""
    long = made.lists.sizes.sum(axis=1)
    return Reading(**{"scan": long // 2, "left": long * 20, "code_bytes": 9, "row_bytes": 128, **settings})


WAYS = [
    {},
    {"by_mass": True},
    {"refine": False},
    {"remainder": False},
    {"refine": False, "remainder": False},
    {"nprobe": 2},
    {"nprobe": 2, "refine": False, "by_mass": True},
    {"top_p": 0.6, "refine": False, "by_mass": True},
]


@pytest.mark.parametrize("policy", ["sum", "max", "union"])
@pytest.mark.parametrize("settings", WAYS)
@given(
    t=st.integers(1, 2),
    g=st.sampled_from([1, 3]),
    n=st.sampled_from([0, 63, 200]),
    dtype=st.sampled_from(["float16", "float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_backends_attend_alike(backend, paged, policy, settings, t, g, n, dtype, seed):
    """In one go, as by the operations one after the other in double precision."""
    made = paged(seed, n=n, dtype=dtype)
    queries = made.rng.standard_normal((4, t, g, 16)).astype(np.float32)
    positions = np.full((4, t), made.total - 1) - np.arange(t)[::-1]
    rest = (
        made.near,
        made.lists,
        made.pages,
        made.code,
        Scaling(0.25),
        made_reading(made, policy=policy, **settings),
    )
    found, lse = get_ops(backend).attend_lists(queries, positions, *rest)
    known, known_lse = get_ops("reference").attend_lists(queries.astype(np.float64), positions, *rest)
    assert (found.dtype, found.shape, lse.dtype, lse.shape) == (
        np.float32,
        (4, t, g, 16),
        np.float32,
        (4, t, g),
    )
    # Where two keys are nearly as good, either may be kept: one of many.
    np.testing.assert_allclose(lse, known_lse, atol=0.02)
    assert np.median(np.abs(found - known)) < 1e-4
    np.testing.assert_allclose(found, known, atol=0.05)


@pytest.mark.parametrize("policy", ["sum", "max", "union"])
@pytest.mark.parametrize("settings", WAYS)
@given(scaling=SCALINGS, span=st.sampled_from([3, 4]), words=st.sampled_from([1, 2]), **SHAPES)
def test_one_go_is_the_operations_one_after_the_other(
    backend, paged, policy, settings, scaling, span, words, d, t, g, n, sinks, recent, seed
):
    made = paged(seed, d=d, n=n, sinks=sinks, recent=recent, dtype="bfloat16", span=span, words=words)
    queries = made.rng.standard_normal((4, t, g, d)).astype(np.float32)
    positions = made.rng.integers(made.total - recent - 2, made.total + 1, (4, t))
    reading, ops = made_reading(made, policy=policy, **settings), get_ops(backend)
    arguments = (queries, positions, made.near, made.lists, made.pages, made.code, scaling, reading)
    for found, known in zip(
        ops.attend_lists(*arguments), AttentionOps.attend_lists(ops, *arguments), strict=True
    ):
        close(found, known, max(1.0, scaling.scale))


@pytest.mark.parametrize("settings", [*WAYS, None])
@given(scaling=SCALINGS, **SHAPES)
def test_keys_may_be_in_the_pages_of_a_runtime(
    backend, paged, settings, scaling, d, t, g, n, sinks, recent, seed
):
    made = paged(seed, d=d, n=n, sinks=sinks, recent=recent, dtype="bfloat16")
    queries = made.rng.standard_normal((4, t, g, d)).astype(np.float32)
    positions = made.rng.integers(made.total - recent - 2, made.total + 1, (4, t))
    reading, ops = None if settings is None else made_reading(made, **settings), get_ops(backend)
    before = queries, positions, made.near, made.lists, made.pages
    if reading is None:
        known = ops.attend_all(*before, scaling)
    else:
        known = ops.attend_lists(*before, made.code, scaling, reading)
    bare = made.near._replace(pages=np.empty((4, 0), np.int32))
    before = queries, positions, bare, made.lists, made.pages
    found = ops.attend_slots(*before, made.slots, made.code, scaling, reading)
    for one, other in zip(found, known, strict=True):
        close(one, other, max(1.0, scaling.scale))


def test_threads_and_rounds_change_nothing(monkeypatch, paged):
    made, ops, threads = paged(n=2000, nlist=16), get_ops("cpu"), numba.get_num_threads()
    queries = made.rng.standard_normal((4, 7, 3, 16)).astype(np.float32)
    positions = made.total - 7 + np.arange(7) + np.zeros((4, 1), np.int64)
    parts = made.near, made.lists, made.pages

    def answers():
        sparse = ops.attend_lists(queries, positions, *parts, made.code, Scaling(0.25), made_reading(made))
        return [*sparse, *ops.attend_all(queries, positions, *parts, Scaling(0.25))]

    before = answers()
    for rounds, count in ((1 << 26, 1), (1, threads), (1 << 20, threads)):
        monkeypatch.setattr(step, "ROUND_BYTES", rounds)
        numba.set_num_threads(count)
        try:
            for found, known in zip(answers(), before, strict=True):
                np.testing.assert_array_equal(found, known)
        finally:
            numba.set_num_threads(threads)


@given(x=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40))
def test_fast_functions_are_those_of_the_library(x):
    x = np.array(x, np.float32)
    found, exact = exponential(x), np.exp(np.minimum(x, 88).astype(np.float64))
    np.testing.assert_allclose(found, np.where(x > -87, exact, 0), rtol=3e-7)
    positive = found[found > 0]
    np.testing.assert_allclose(logarithm(positive), np.log(positive.astype(np.float64)), rtol=3e-7, atol=1e-7)
    assert exponential(np.array([-np.inf], np.float32)) == 0


@numba.njit
def exponential(x):
    return np.array([functions.exp(value) for value in x])


@numba.njit
def logarithm(x):
    return np.array([functions.log(value) for value in x])


def test_with_everything_kept_it_is_exact(backend, paged):
    made = paged(n=200, dtype="float16")
    queries = made.rng.standard_normal((4, 2, 3, 16)).astype(np.float32)
    positions = np.array([[made.total - 2, made.total - 1]] * 4)
    parts = made.near, made.lists, made.pages
    known = get_ops("reference").attend_all(queries.astype(np.float64), positions, *parts, Scaling(0.25))
    long = made.lists.sizes.sum(axis=1)
    for settings in ({}, {"refine": False}, {"nprobe": 5, "refine": False}, {"remainder": False}):
        reading = Reading(long, long * 1000, 9, 128, **settings)
        found = get_ops(backend).attend_lists(queries, positions, *parts, made.code, Scaling(0.25), reading)
        for ours, theirs in zip(found, known, strict=True):
            close(ours, theirs)


def test_the_remainder_helps_and_refinement_helps_more(backend, paged):
    made = paged(n=2000, d=16, nlist=16, dtype="float16", words=3)
    queries = 3 * made.rng.standard_normal((4, 20, 3, 16)).astype(np.float32)
    positions = np.full((4, 20), made.total)
    parts = made.near, made.lists, made.pages
    truth, _ = get_ops("reference").attend_all(queries.astype(np.float64), positions, *parts, Scaling(0.25))

    def error(**settings):
        found, _ = get_ops(backend).attend_lists(
            queries, positions, *parts, made.code, Scaling(0.25), made_reading(made, **settings)
        )
        return np.linalg.norm(found - truth, axis=-1).mean()

    plain = made.lists.sizes.sum(axis=1) * 20 // 128
    assert error() < error(remainder=False)
    assert error() < error(refine=False, scan=plain) < error(refine=False, remainder=False, scan=plain)


def test_no_keys_at_all(backend, paged):
    made = paged(n=0, sinks=0, recent=0)
    queries, positions = np.ones((4, 2, 3, 16), np.float32), np.zeros((4, 2), np.int64)
    parts, ops = (made.near, made.lists, made.pages), get_ops(backend)
    for out, lse in (
        ops.attend_all(queries, positions, *parts, Scaling(1.0)),
        ops.attend_lists(queries, positions, *parts, made.code, Scaling(1.0), made_reading(made)),
    ):
        assert not out.any()
        assert np.isneginf(lse).all()
