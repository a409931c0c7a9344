"""The short way through `search` answers what the general way does, and keeps out of what it cannot do."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import saapindex as sx
from saapindex import selectors

D = 16


def make(metric=sx.METRIC_INNER_PRODUCT, dtype="float32", **changes):
    rng = np.random.default_rng(0)
    keys, queries = (rng.standard_normal((n, D), dtype=np.float32) for n in (900, 200))
    index = sx.IndexSAAP(D, 24, metric, dtype=dtype, nprobe=5, params=sx.IndexParameters(**changes))
    index.train(keys, xq_train=queries)
    index.add(keys)
    return index, queries


def one_by_one(index, queries, k=7, **options):
    parts = [index.search(queries[i : i + 1], k, **options) for i in range(len(queries))]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("metric", [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("nprobe", [None, 1, 100])
def test_one_by_one_is_bit_for_bit_the_batch(metric, dtype, nprobe):
    index, queries = make(metric, dtype)
    params = sx.SearchParameters(nprobe=nprobe)
    assert_same(one_by_one(index, queries, params=params), index.search(queries, 7, params=params))
    assert index._short.run is not None


def test_follows_what_the_index_becomes():
    index, queries = make()
    before = one_by_one(index, queries)
    more = 5 * np.random.default_rng(1).standard_normal((300, D), dtype=np.float32)
    index.add(more)
    assert_same(one_by_one(index, queries), index.search(queries, 7))
    assert (one_by_one(index, queries)[1] != before[1]).any()
    index.remove_ids(np.arange(900, 1200))
    assert_same(one_by_one(index, queries), before)
    index.adapt()
    index.nprobe = 3
    assert_same(one_by_one(index, queries), index.search(queries, 7))
    index.reset()
    assert index._short is None  # and so nothing holds on to the keys
    assert (one_by_one(index, queries)[1] == -1).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, sx.clone_index, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_reads_its_own_keys(copied):
    index, queries = make()
    before = one_by_one(index, queries)
    other = copied(index)
    assert other._short is None
    index.reset()
    assert_same(one_by_one(other, queries), before)


def test_what_is_not_plain_goes_the_general_way():
    index, queries = make()
    query = queries[:1]
    for params in (
        sx.SearchParameters(budget=50),
        sx.SearchParameters(top_p=0.5),
        sx.SearchParameters(rank="mass"),
        sx.SearchParameters(sel=selectors.IDSelectorRange(0, 100)),
    ):
        assert_same(
            one_by_one(index, queries[:9], params=params), index.search(queries[:9], 7, params=params)
        )
    assert_same(index.search(query.astype(np.float64), 7), index.search(query, 7))
    frozen = query.copy()
    frozen.flags.writeable = False
    assert_same(index.search(frozen, 7), index.search(query, 7))
    assert_same(index.search(np.repeat(query, 2, axis=1)[:, ::2], 7), index.search(query, 7))
    for bad, k in ((query * np.nan, 7), (query, 0), (query, 1.5), (query[:, 1:], 7), (query[0], 7)):
        with pytest.raises(sx.InvalidInputError):
            index.search(bad, k)
    with pytest.raises(sx.InvalidInputError, match="params"):
        index.search(query, 7, params={"nprobe": 3})


def test_codes_and_rotary_views_have_no_short_way():
    index, queries = make(bits=2, refine=True)
    index.search(queries[:1], 3)
    assert index._short.run is None
    rope = sx.Rope(theta=10_000.0, dim=D)
    index = sx.IndexSAAP(D, 8, rope=rope, params=sx.IndexParameters(view="unrotated"))
    index.train(queries, xq_train=queries)
    index.add(queries)
    index.search(queries[:1], 3)
    assert index._short.run is None
