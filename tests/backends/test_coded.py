"""The scan of codes on every backend: what decoded keys score, holes, limits, lanes that may not be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, CodedLists, Lists, to_blocks
from saapindex.backends.cpu.coded import _groups
from saapindex.backends.cpu.coded_block import _WAYS, make_block_estimates
from saapindex.backends.cpu.machine import has
from saapindex.backends.reference.scan import read_rows
from saapindex.codes import fit_codes

REFERENCE = get_ops("reference")
CASES = {
    "q": st.sampled_from([0, 1, 3, 5]),
    "n": st.sampled_from([0, 1, 63, 200]),
    "d": st.sampled_from([1, 3, 64, 65]),
    "words": st.sampled_from([1, 2, 5]),
    "nlist": st.sampled_from([1, 2, 7]),
    "some": st.booleans(),
    "l2": st.booleans(),
    "seed": st.integers(0, 1000),
}


def make(q, n, d, words, nlist, some, l2, seed):
    """Queries, coded lists with holes, probes with -1 among them, limits, and the decoded keys by row."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(nlist, size=n))
    sizes = np.bincount(labels, minlength=nlist)
    room = -(-(sizes + rng.integers(LANES, size=nlist)) // LANES) * LANES
    offsets = np.cumsum(room) - room
    rows = np.concatenate([*(np.arange(a, a + b) for a, b in zip(offsets, sizes, strict=True))]).astype(int)
    total, anchors = room.sum(), rng.standard_normal((nlist, d)).astype(np.float32)
    residuals = (rng.standard_normal((n, d)) * 0.9 ** np.arange(d)).astype(np.float32)
    metric = np.eye(d) if l2 else np.diag(1.0 + np.arange(d))
    code = fit_codes(residuals[None] if n else np.ones((1, 1, d)), metric[None], words)
    found, exponents = code.encode(residuals[None], REFERENCE)
    parts = [
        rng.integers(1 << 32, size=(total // LANES, words, LANES), dtype=np.uint32),
        rng.integers(256, size=(total // LANES, 1, LANES), dtype=np.uint8),
        rng.standard_normal((total // LANES, int(l2), LANES)).astype(np.float32),
    ]
    parts[0][rows // LANES, :, rows % LANES] = found[0]
    parts[1][rows // LANES, 0, rows % LANES] = exponents[0]
    if l2:
        parts[2][rows // LANES, 0, rows % LANES] = (residuals**2).sum(axis=1)
    allowed = rng.integers(1 << 16, size=total // LANES).astype(np.uint16) if some else None
    lists = CodedLists(
        *parts,
        rng.permutation(total),
        offsets,
        sizes,
        anchors,
        anchors @ code.fields.inverse,
        code.fields,
        allowed,
    )
    decoded = np.full((total, d), np.nan)
    decoded[rows] = anchors[labels] + code.decode(found, exponents)[0] @ code.inverse[0].T
    lengths = np.full(total, np.nan)
    lengths[rows] = (residuals.astype(float) ** 2).sum(axis=1)
    anchor_of = np.full((total, d), np.nan)
    anchor_of[rows] = anchors[labels]
    probes = np.argsort(rng.random((q, nlist)), axis=1)
    probes[rng.random(probes.shape) < 0.2] = -1
    queries = rng.standard_normal((q, d)).astype(np.float32)
    return queries, lists, probes, rng.integers(n + 2, size=q), decoded, anchor_of, lengths


@given(**CASES)
def test_scores_are_those_of_decoded_keys_up_to_the_rounding_of_the_query(backend, **case):
    l2 = case["l2"]
    queries, lists, probes, limits, decoded, anchors, lengths = make(**case)
    scores, rows = get_ops(backend).scan_coded(queries, lists, probes, limits, 250, l2, True)
    for i, query in enumerate(queries.astype(float)):
        known, _ = read_rows(lists, probes[i], limits[i])
        assert sorted(rows[i][rows[i] >= 0]) == sorted(known)
        found = rows[i][: len(known)]
        if l2:
            cross = ((query - anchors[found]) * (decoded[found] - anchors[found])).sum(axis=1)
            exact = ((query - anchors[found]) ** 2).sum(axis=1) - 2 * cross + lengths[found]
        else:
            exact = decoded[found] @ query
        scale = np.linalg.norm(query) + np.linalg.norm(anchors[found], axis=1)
        reach = scale * (np.linalg.norm(decoded[found] - anchors[found], axis=1) + 1e-3)
        # Half of 1/127 of the largest element, over as many as there are.
        assert (np.abs(scores[i, : len(known)] - exact) <= 0.05 * reach * case["d"] ** 0.5 + 1e-4).all()
        assert (np.diff(scores[i, : len(known)]) * (1 if l2 else -1) >= 0).all()
        assert (scores[i, len(known) :] == (np.inf if l2 else -np.inf)).all()


@pytest.mark.parametrize("k", [1, 5, 250])
@pytest.mark.parametrize("as_rows", [False, True])
@given(**CASES)
def test_backends_agree(k, as_rows, **case):
    queries, *arguments = make(**case)[:4]
    found = get_ops("cpu").scan_coded(queries, *arguments, k, case["l2"], as_rows)
    known = REFERENCE.scan_coded(queries.astype(float), *arguments, k, case["l2"], as_rows)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(found[1] >= 0, known[1] >= 0)
    filled = known[1] >= 0
    # An element of the query on the edge of two integers may fall to either.
    np.testing.assert_allclose(found[0][filled], known[0][filled], rtol=0.02, atol=0.05)
    assert (found[0][~filled] == known[0][~filled]).all()


@given(radius=st.floats(-3, 3), **CASES)
def test_range_agrees_with_scan(backend, radius, **case):
    queries, *arguments = make(**case)[:4]
    l2, ops = case["l2"], get_ops(backend)
    lims, scores, ids = ops.range_scan_coded(queries, *arguments, radius, l2)
    best, found = ops.scan_coded(queries, *arguments, 250, l2, False)
    inside = (best < radius) if l2 else (best > radius)
    assert lims[0] == 0
    for i in range(len(queries)):
        part = slice(lims[i], lims[i + 1])
        assert sorted(ids[part]) == sorted(found[i][inside[i]])
        assert sorted(scores[part]) == sorted(best[i][inside[i]])


@given(words=st.sampled_from([1, 3]), norms=st.booleans(), seed=st.integers(0, 999))
def test_any_machine_gives_the_same_estimates(words, norms, seed):
    rng = np.random.default_rng(seed)
    groups = _groups(tuple(sorted(rng.choice([1, 2, 4], words).tolist(), reverse=True)))
    arguments = (
        rng.integers(-127, 128, 4 * len(groups)).astype(np.int8).view(np.int32),
        groups,
        rng.integers(1 << 32, size=(3, words, LANES), dtype=np.uint32),
        rng.integers(256, size=(3, 1, LANES), dtype=np.uint8),
        rng.standard_normal((3, int(norms), LANES)).astype(np.float32),
        rng.random(256).astype(np.float32),
        1,
        np.array([0.5, 0.01, 3.0, 0.0], np.float32),
    )
    scores = np.zeros((len(RUNS), LANES), np.float32)
    reached = [run(*arguments, out) for run, out in zip(RUNS, scores, strict=True)]
    assert (scores == scores[0]).all()
    assert {*reached} == {sum(1 << i for i, score in enumerate(scores[0]) if score >= 0)}


def _compiled(block_estimates):
    @njit
    def run(query, groups, words, exponents, norms, table, block, terms, out):
        return block_estimates(query, groups, words, exponents, norms, table, block, terms, out)

    return run


RUNS = [_compiled(make_block_estimates(way)) for way in (None, *_WAYS) if not way or has(way)]


@pytest.mark.parametrize("half", [False, True])
@given(q=st.sampled_from([0, 1, 5]), c=st.sampled_from([0, 1, 9]), l2=st.booleans(), seed=st.integers(0, 999))
def test_rescoring_is_exact(backend, half, q, c, l2, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-3, 4, (4, LANES, 7)).astype(np.float16 if half else np.float32)
    ids, rows = rng.permutation(64), rng.integers(-1, 64, (q, c))
    queries = rng.integers(-3, 4, (q, 7)).astype(np.float32)
    scores, found = get_ops(backend).rescore(queries, vectors, ids, rows, 4, l2)
    for i in range(q):
        keys = vectors.reshape(64, 7)[rows[i][rows[i] >= 0]].astype(float)
        losses = ((keys - queries[i]) ** 2).sum(axis=1) if l2 else -(keys @ queries[i])
        known = sorted(zip(losses, ids[rows[i][rows[i] >= 0]], strict=True))[:4]
        assert found[i].tolist() == [id for _, id in known] + [-1] * (4 - len(known))
        assert [s if l2 else -s for s in scores[i, : len(known)]] == [loss for loss, _ in known]


@pytest.mark.parametrize("half", [False, True])
@given(
    q=st.sampled_from([0, 1, 5]),
    k=st.sampled_from([1, 5, 99]),
    l2=st.booleans(),
    radius=st.integers(-5, 9),
    seed=st.integers(0, 999),
)
def test_only_lanes_that_are_allowed_are_read_and_counted(backend, half, q, k, l2, radius, seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(-3, 4, (6 * LANES, 5)).astype(np.float16 if half else np.float32)
    sizes, offsets = np.array([20, 0, 33, 3]), np.array([0, 0, 32, 80])
    allowed = rng.integers(1 << 16, size=6).astype(np.uint16)
    allowed[rng.random(6) < 0.3] = 0
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), offsets, sizes, allowed)
    queries = rng.integers(-3, 4, (q, 5)).astype(np.float32)
    probes = np.argsort(rng.random((q, 4)), axis=1)
    probes[rng.random(probes.shape) < 0.2] = -1
    limits = rng.integers(0, 60, q)
    scores, ids = get_ops(backend).scan(queries, lists, probes, limits, k, l2)
    lims, within, names = get_ops(backend).range_scan(queries, lists, probes, limits, radius, l2)
    for i in range(q):
        read = [r for j in probes[i] if j >= 0 for r in range(offsets[j], offsets[j] + sizes[j])]
        read = [r for r in read if allowed[r // LANES] >> (r % LANES) & 1][: limits[i]]
        there = keys[np.array(read, int)].astype(float)
        losses = ((there - queries[i]) ** 2).sum(axis=1) if l2 else -(there @ queries[i])
        known = sorted(zip(losses, lists.ids[np.array(read, int)], strict=True))
        assert ids[i].tolist() == [id for _, id in known][:k] + [-1] * (k - len(known))
        assert [s if l2 else -s for s in scores[i, : min(k, len(known))]] == [loss for loss, _ in known][:k]
        part, bound = slice(lims[i], lims[i + 1]), radius if l2 else -radius
        expected = sorted((loss, id) for loss, id in known if loss < bound)
        assert sorted(zip(within[part] if l2 else -within[part], names[part], strict=True)) == expected
