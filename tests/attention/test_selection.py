"""A selection in every form, known by hand, and as `select` gives it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.attention import AttendParameters, Selection
from saapindex.errors import InvalidInputError


@pytest.fixture(scope="module")
def known():
    """Two sequences of 14 and 9 keys, two heads; one sink; windows from 12 and from 7 on."""
    ids = np.array([[[3, 5, 9], [4, -1, -1]], [[-1, -1, -1], [1, 2, -1]]])
    partitions = np.array([[[0, 2], [1, -1]], [[-1, -1], [0, 3]]])
    return Selection(ids, (ids >= 0).sum(2), partitions, 1, np.array([12, 7]), np.array([14, 9]))


def test_rows_of_a_sparse_matrix(known):
    indptr, indices = known.csr()
    assert indptr.tolist() == [0, 3, 4, 4, 6]
    assert indices.tolist() == [3, 5, 9, 4, 1, 2]


def test_masks(known):
    rows = ["10010100010011", "10001000000011", "10000001100000", "11100001100000"]
    mask = known.bool_mask(14)
    assert ["".join(map(str, row)) for row in mask.reshape(4, 14).astype(int)] == rows
    far = known.bool_mask(16, near=False).reshape(4, 16)
    assert [np.flatnonzero(row).tolist() for row in far] == [[3, 5, 9], [4], [], [1, 2]]
    additive = known.additive_mask(14)
    assert additive.dtype == np.float32
    np.testing.assert_array_equal(additive, np.where(mask, 0, -np.inf))


def test_a_mask_for_sequences_padded_on_the_left(known):
    mask = known.bool_mask(14, offsets=[0, 5])
    np.testing.assert_array_equal(mask[0], known.bool_mask(14)[0])
    np.testing.assert_array_equal(mask[1, :, 5:], known.bool_mask(14)[1, :, :9])
    assert not mask[1, :, :5].any()
    with pytest.raises(InvalidInputError, match="n is 13, expected at least 14 columns"):
        known.bool_mask(13)
    with pytest.raises(InvalidInputError, match="n is 14, expected at least 15 columns"):
        known.bool_mask(14, offsets=[0, 6])


def test_page_tables(known):
    table, lengths = known.page_table(4)
    assert table.tolist() == [[[0, 1, 2, 3], [0, 1, 3, -1]], [[0, 1, 2, -1], [0, 1, 2, -1]]]
    assert lengths.tolist() == [[4, 3], [3, 3]]
    table, lengths = known.page_table(4, near=False)
    assert table.tolist() == [[[0, 1, 2], [1, -1, -1]], [[-1, -1, -1], [0, -1, -1]]]
    assert lengths.tolist() == [[3, 1], [0, 1]]
    assert known.page_table(1)[1].sum() == known.bool_mask(14).sum()
    assert known.page_table(100)[0].tolist() == [[[0], [0]], [[0], [0]]]
    with pytest.raises(InvalidInputError, match="page_size is 0, expected at least 1"):
        known.page_table(0)


@given(budget=st.floats(0.01, 1), policy=st.sampled_from(["sum", "max", "union"]), size=st.integers(1, 40))
def test_forms_agree(index_of_two, budget, policy, size):
    index, q = index_of_two
    selection = index.select(q, params=AttendParameters(budget=budget, policy=policy))
    mask = selection.bool_mask(400)
    assert selection.ids.dtype == np.int64
    assert mask[1, :, 150:].sum() == 0
    table, lengths = selection.page_table(size)
    for b, h in np.ndindex(2, 2):
        ids = selection.ids[b, h, : selection.lengths[b, h]]
        np.testing.assert_array_equal(np.flatnonzero(selection.bool_mask(400, near=False)[b, h]), ids)
        pages = np.unique(np.flatnonzero(mask[b, h]) // size)
        np.testing.assert_array_equal(table[b, h, : lengths[b, h]], pages)
        assert (table[b, h, lengths[b, h] :] == -1).all()


@pytest.fixture(scope="module")
def index_of_two(make, data):
    """Sequences of 400 and 150 keys."""
    index, (keys, values) = make(2), data(np.random.default_rng(0), 2, 400)
    index.add(keys, values, lengths=[400, 150])
    return index, np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)


def test_probed_lists_are_selected_whole(index_of_two):
    index, q = index_of_two
    selection = index.select(q, nprobe=2)
    assert selection.partitions.shape == (2, 2, 2)
    for b, h in np.ndindex(2, 2):
        assert selection.lengths[b, h] == index.list_sizes[b, h, selection.partitions[b, h]].sum()
    everything = index.select(q, budget=1.0)
    assert everything.lengths[:, 0].tolist() == (everything.window_start - 1).tolist()


def test_more_mass_takes_more_lists(index_of_two):
    index, q = index_of_two
    counts = [(index.select(q, top_p=p).partitions >= 0).sum() for p in (0.2, 0.6, 0.95, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == (index.list_sizes > 0).sum()


def test_selected_keys_are_heavy(make, data, dense):
    """At a third of the bytes the kept keys carry most of what lists hold."""
    index, (keys, values) = make(1, window=0, sinks=0), data(np.random.default_rng(0), 1, 400)
    index.add(keys, values)
    q = 2 * np.random.default_rng(0).standard_normal((1, 6, 16)).astype(np.float32)
    selection = index.select(q, budget=0.35)
    chosen = selection.bool_mask(400, near=False)
    weights = np.exp(np.einsum("hgd,hnd->hgn", q[0].reshape(2, 3, 16), keys[0]) / 4)
    weights = (weights / weights.sum(2, keepdims=True)).mean(1)[:, : selection.window_start[0]]
    share = (weights * chosen[0, :, : weights.shape[1]]).sum(1) / weights.sum(1)
    kept = selection.lengths[0] / weights.shape[1]
    assert (share > 2.2 * kept).all()


@pytest.mark.parametrize("size", [1, 16, 30])
def test_the_order_of_lists(index_of_two, make, size):
    """Every position once; lists begin at pages; a list's keys are those that probing it selects."""
    index, q = index_of_two
    order, far = index.list_order(size), index.list_order(size, near=False)
    assert order.shape[2] % size == far.shape[2] % size == 0
    start = index.select(q).window_start
    for b, h in np.ndindex(2, 2):
        assert np.sort(order[b, h][order[b, h] >= 0]).tolist() == list(range(index.lengths[b]))
        assert np.sort(far[b, h][far[b, h] >= 0]).tolist() == list(range(1, start[b]))
        begins = np.cumsum([0, *-(-index.list_sizes[b, h] // size) * size])
        for first, count in zip(begins, index.list_sizes[b, h], strict=False):
            assert (np.diff(order[b, h, first : first + count]) > 0).all()
        near = order[b, h, begins[-1] :]
        assert near[near >= 0].tolist() == [0, *range(start[b], index.lengths[b])]
    assert make(3).list_order(size).shape == (3, 2, 0)
    with pytest.raises(InvalidInputError, match="page_size is 0, expected at least 1"):
        index.list_order(0)
