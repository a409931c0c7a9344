"""Selectors: the sets that Faiss makes of the same arguments, honoured inside the scan and in budgets."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saapindex as sx
from saapindex import selectors as ours

METRICS = st.sampled_from([sx.METRIC_INNER_PRODUCT, sx.METRIC_L2])
D, NLIST = 6, 5

leaves = st.one_of(
    st.tuples(st.integers(-3, 70), st.integers(-3, 70)).map(lambda ends: ("Range", *ends)),
    st.lists(st.integers(0, 99), max_size=30).map(lambda ids: ("Array", ids)),
    st.lists(st.integers(0, 99), max_size=30).map(lambda ids: ("Batch", ids)),
    st.lists(st.integers(0, 255), max_size=12).map(lambda bits: ("Bitmap", bits)),
    st.just(("All",)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda one: ("Not", one)),
        st.tuples(st.sampled_from(["And", "Or", "XOr"]), inner, inner),
    ),
    max_leaves=5,
)


def build(tree, module):
    """The selector that a tree of names and arguments says, by the classes of `module`."""
    name, *arguments = tree
    kind = getattr(module, f"IDSelector{name}")
    if name in ("Array", "Batch"):
        return kind(np.array(arguments[0], np.int64))
    if name == "Bitmap":
        return kind(np.array(arguments[0], np.uint8))
    if name in ("Not", "And", "Or", "XOr"):
        return kind(*(build(argument, module) for argument in arguments))
    return kind(*arguments)


@given(trees)
def test_members_are_those_of_faiss(tree):
    faiss = pytest.importorskip("faiss")
    ids = np.arange(0, 110)
    selector = build(tree, ours)
    theirs = build(tree, faiss)
    assert selector.members(ids).tolist() == [theirs.is_member(int(id)) for id in ids]
    assert [selector.is_member(int(id)) for id in ids[::9]] == selector.members(ids)[::9].tolist()


def whole(rng, n):
    return rng.integers(-3, 4, (n, D)).astype(np.float32)


def trained(backend, metric, text):
    return sx.clone_index(_trained(backend, metric, text))


@functools.cache
def _trained(backend, metric, text):
    rng = np.random.default_rng(0)
    params = sx.IndexParameters(niter=2, router="centroid")
    index = sx.index_factory(D, text, metric, params=params, backend=backend)
    index.train(whole(rng, 60), xq_train=whole(rng, 40))
    return index


LIMITS = [{"nprobe": 2}, {"nprobe": NLIST}, {"budget": 7}, {"budget": 0.3}, {"budget": 1.0}, {"top_p": 0.8}]


@pytest.mark.parametrize("text", ["SAAP5,Flat", "SAAP5,Bits2", "SAAP5,Bits4,RFlat"])
@settings(max_examples=30)
@given(
    limits=st.sampled_from(LIMITS),
    tree=trees,
    metric=METRICS,
    n=st.sampled_from([0, 1, 17, 100]),
    seed=st.integers(0, 999),
)
def test_a_search_among_some_keys_is_the_search_of_an_index_of_these_alone(
    backend, text, limits, tree, metric, n, seed
):
    if "top_p" in limits:
        metric = sx.METRIC_INNER_PRODUCT
    rng = np.random.default_rng(seed)
    keys, queries, selector = whole(rng, n), whole(rng, 5), build(tree, ours)
    mask = selector.members(np.arange(n))
    index, known = trained(backend, metric, text), trained(backend, metric, text)
    index.add(keys)
    if mask.any():
        known.add_with_ids(keys[mask], np.flatnonzero(mask))
    some, all_ = sx.SearchParameters(sel=selector, **limits), sx.SearchParameters(**limits)
    stats, known_stats = sx.SearchStatistics(), sx.SearchStatistics()
    found = index.search(queries, 9, params=some, stats=stats)
    expected = known.search(queries, 9, params=all_, stats=known_stats)
    if text == "SAAP5,Flat":
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
    else:  # of equal scores, which rows come first is not the same
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert stats == known_stats
    for ours_, theirs in zip(
        index.route(queries, params=some), known.route(queries, params=all_), strict=True
    ):
        np.testing.assert_array_equal(ours_, theirs)
    thresh = float(np.median(found[0][np.isfinite(found[0])])) if (found[1] >= 0).any() else 0.0
    within = index.range_search(queries, thresh, params=some)
    np.testing.assert_array_equal(within[0], known.range_search(queries, thresh, params=all_)[0])
    assert selector.members(within[2]).all()
    lists = index.route(queries, params=some)[0]
    budget = some if "budget" in limits else sx.SearchParameters(sel=selector)
    again = index.search_preassigned(queries, 9, lists, params=budget)
    np.testing.assert_array_equal(again[0], found[0])
    if "budget" not in limits:
        parts = index.range_search_preassigned(queries, thresh, lists, params=budget)
        np.testing.assert_array_equal(parts[0], within[0])


def test_a_selector_follows_the_index(make_index, blobs):
    """What it selects is kept only as long as the lists are the same."""
    index, odd = make_index(), ours.IDSelectorBitmap(np.arange(999) % 2 == 1)
    params = sx.SearchParameters(nprobe=8, sel=odd)
    for _ in range(2):
        ids = index.search(blobs(9, 16), 300, params=params)[1]
        assert (ids[ids >= 0] % 2 == 1).all()
        assert ((ids >= 0).sum(axis=1) == min(index.ntotal // 2, 300)).all()
        index.add(blobs(50, 16))
    index.remove_ids(odd)
    assert (index.search(blobs(9, 16), 3, params=params)[1] == -1).all()
    assert index.remove_ids(ours.IDSelectorRange(0, 100)) == 50


def test_faiss_searches_the_same(make_index, blobs):
    faiss = pytest.importorskip("faiss")
    index, queries = make_index(), blobs(9, 16, seed=2)
    flat = faiss.IndexFlatIP(16)
    flat.add(blobs(400, 16))
    window = faiss.SearchParameters(sel=faiss.IDSelectorRange(30, 90))
    params = sx.SearchParameters(nprobe=8, sel=ours.IDSelectorRange(30, 90))
    np.testing.assert_array_equal(
        index.search(queries, 9, params=params)[1], flat.search(queries, 9, params=window)[1]
    )


class Odd:
    """Anything with `members` will do."""

    def members(self, ids):
        return ids % 2 == 1


class Wrong:
    def members(self, ids):
        return ids


def test_selectors_of_ones_own(make_index, blobs):
    index = make_index()
    ids = index.search(blobs(9, 16), 5, params=sx.SearchParameters(nprobe=8, sel=Odd()))[1]
    assert (ids % 2 == 1).all()
    with pytest.raises(sx.InvalidInputError, match=r"sel\.members gave int64 of shape \(400,\)"):
        index.search(blobs(9, 16), 5, params=sx.SearchParameters(sel=Wrong()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sx.SearchParameters(sel=[1, 2]), "sel is a list, expected a selector"),
        (lambda: ours.IDSelectorRange(0.5, 2), "imin is 0.5"),
        (lambda: ours.IDSelectorArray([0.5]), "ids has dtype float64"),
        (lambda: ours.IDSelectorBitmap([1, 2]), "bitmap is int64"),
        (lambda: ours.IDSelectorNot(3), "sel is a int, expected an IDSelector"),
        (lambda: ours.IDSelectorAnd(ours.IDSelectorAll(), None), "rhs is a NoneType"),
    ],
)
def test_bad_selectors_are_refused(make, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        make()
