"""Search in one pass is routing and then a scan, on every backend."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists, to_blocks


@given(
    q=st.sampled_from([0, 1, 3, 4, 63]),
    h=st.sampled_from([1, 5]),
    d=st.sampled_from([1, 3, 64, 65]),
    nlist=st.sampled_from([1, 2, 17]),
    share=st.floats(0, 1),
    k=st.sampled_from([1, 5, 120]),
    half=st.booleans(),
    l2=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(q=9, h=1, d=1, nlist=17, share=1, k=120, half=False, l2=True, seed=0)
def test_search_is_route_and_then_scan(backend, q, h, d, nlist, share, k, half, l2, seed):
    rng = np.random.default_rng(seed)
    features, queries, table, bias = (
        rng.integers(-2, 3, shape).astype(np.float32) for shape in ((q, h), (q, d), (nlist, h), (nlist,))
    )
    sizes = rng.integers(40, size=nlist) * rng.integers(2, size=nlist)
    bias[sizes == 0] = -np.inf
    room = -(-sizes // LANES) * LANES
    keys = rng.integers(-2, 3, (room.sum(), d)).astype(np.float16 if half else np.float32)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), np.cumsum(room) - room, sizes)
    p = max(1, round(share * nlist))
    wide = np.repeat(queries, 2, axis=1)[:, ::2]
    found = get_ops(backend).search(features, wide, to_blocks(table), bias, p, lists, k, l2)
    reference = get_ops("reference")
    probes, _ = reference.route(features, to_blocks(table), bias, p)
    known = reference.scan(queries, lists, probes, np.full(q, len(keys)), k, l2)
    for ours, theirs in zip(found, known, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@given(
    q=st.integers(1, 9),
    d=st.sampled_from([1, 3, 64, 65]),
    nlist=st.sampled_from([1, 2, 17]),
    k=st.sampled_from([1, 5, 120]),
    half=st.booleans(),
    l2=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_prepared_search_is_search(backend, q, d, nlist, k, half, l2, seed):
    rng = np.random.default_rng(seed)
    queries, table, bias = (
        rng.integers(-2, 3, shape).astype(np.float32) for shape in ((q, d), (nlist, d), (nlist,))
    )
    sizes = rng.integers(40, size=nlist)
    room = -(-sizes // LANES) * LANES
    keys = rng.integers(-2, 3, (room.sum(), d)).astype(np.float16 if half else np.float32)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), np.cumsum(room) - room, sizes)
    ops, p = get_ops(backend), max(1, nlist // 2)
    run = ops.prepare(to_blocks(table), bias, lists, l2)
    if run is None:
        assert backend != "cpu"
        return
    found, known = run(queries, p, k), ops.search(queries, queries, to_blocks(table), bias, p, lists, k, l2)
    for ours, theirs in zip(found, known, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    queries[-1, -1] = np.inf if l2 else np.nan
    assert run(queries, p, k) is None
