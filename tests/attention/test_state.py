"""Adding, taking back, forking and reordering: shared pages, memory, and failures that change nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from saapindex.attention import AttendParameters, AttentionIndex


def answers(index, seed=0):
    q = np.random.default_rng(seed).standard_normal((index.batch, 6, 16)).astype(np.float32)
    return [*index.attend(q, budget=1.0), *index.attend(q, budget=0.4), index.select(q, budget=0.4).ids]


def same(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def alike(one, other):
    """Equal up to the order of sums: of dense attention and its log-sum-exp."""
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def used(index):
    return index._batch.keeping.pool.used


def add(index, keys, values, first, last):
    index.add(keys[:, :, first:last], values[:, :, first:last])


def test_truncation_within_the_window_undoes_an_addition(filled):
    index, keys, values = filled
    before, tables = answers(index), [s.lists for s in index._batch.sequences]
    for m in (1, 3, 5):
        add(index, keys, values, 300, 300 + m)
        index.truncate(300)
        same(answers(index), before)
    assert [s.lists for s in index._batch.sequences] == tables


@pytest.mark.parametrize("n", [0, 1, 2, 20, 37, 38, 150, 261, 299, 300, 999])
def test_truncation_to_any_length(filled, dense, n):
    index, keys, values = filled
    index.truncate(n)
    kept = min(n, 300)
    assert index.lengths.tolist() == [kept] * 2
    model = dense(2)
    for b in range(2):
        model.add(b, keys[b, :, :kept], values[b, :, :kept])
    q = np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)
    out, _ = index.attend(q, budget=1.0)
    start = index.select(q).window_start[0]
    assert start == 1 or kept - start >= index.window
    assert index.list_sizes.sum() == 4 * (start - 1)
    for b in range(2):
        np.testing.assert_allclose(out[b], model.attend(b, q[b], kept)[0], rtol=1e-3, atol=1e-4)
    # And it goes on from there, as one that never held more.
    add(index, keys, values, kept, 500)
    fresh = copy_of(index)
    add(fresh, keys, values, 0, 500)
    alike(answers(index), answers(fresh))


def copy_of(index):
    """An empty index like this one."""
    return AttentionIndex(
        index.codebook, batch=index.batch, window=20, sinks=1, flush=16, dense_below=index.dense_below,
        backend=index.ops.name,
    )  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 30, 300])
def test_what_was_added_comes_back(filled, make, n):
    index, keys, values = filled
    index.truncate([300, n])
    for b, length in enumerate([300, n]):
        for found, known in zip(index.reconstruct(b), (keys, values), strict=True):
            np.testing.assert_array_equal(found, known[b, :, :length])
    assert [x.shape for x in make(dtype="bfloat16").reconstruct()] == [(2, 0, 16)] * 2
    assert make(dtype="bfloat16").reconstruct()[0].dtype == np.uint16


def test_truncation_of_one_sequence_or_to_lengths_of_their_own(filled):
    index, _, _ = filled
    index.truncate([290, 100])
    assert index.lengths.tolist() == [290, 100]
    index.truncate(50, sequence=0)
    assert index.lengths.tolist() == [50, 100]
    index.truncate(70)
    assert index.lengths.tolist() == [50, 70]


def test_below_the_dense_length_everything_comes_back(make, data):
    index = make(dense_below=200)
    keys, values = data(np.random.default_rng(0), 1, 300)
    index.add(keys, values)
    assert index.list_sizes.any()
    index.truncate(190)  # not at once: a few tokens around the limit must not move everything each time
    assert index.list_sizes.any()
    index.truncate(150)
    assert not index.list_sizes.any()


def test_forks_go_their_own_ways(filled, dense):
    """Through the recent pages and the lists, where both go on in pages that they share."""
    index, keys, values = filled
    before, pages = answers(index), used(index)
    fork = index.fork()
    other = fork.fork([1, 0, 1])
    assert used(index) == pages
    same(answers(fork), before)
    # Different keys, in batches that enter the lists.
    for i, branch in enumerate((index, fork)):
        for first in range(300, 460, 20):
            add(branch, keys[:, :, i * 160 :], values[:, :, i * 160 :], first, first + 20)
    for i, branch in enumerate((index, fork)):
        fresh = copy_of(index)
        add(fresh, keys, values, 0, 300)
        add(fresh, keys[:, :, i * 160 :], values[:, :, i * 160 :], 300, 460)
        alike(answers(branch), answers(fresh))
    other.reorder([1, 0])
    same(answers(other), before)
    index.reset()
    fork.reset()
    assert used(other) == pages


def test_beams_share_what_they_have_in_common(filled):
    index, keys, values = filled
    index.reorder([0])
    alone = used(index)
    index.reorder([0, 0, 0, 0])
    assert used(index) == alone
    tokens = [np.repeat(x[:1, :, 300:], 4, axis=0) for x in (keys, values)]
    for step in range(100):
        index.add(tokens[0][:, :, step : step + 1], tokens[1][:, :, step : step + 1])
        index.reorder([0, 0, 1, 2])
    # What was not written to is still shared: 4 sequences are far from 4 times the pages.
    assert used(index) < 2 * alone
    before = answers(index)
    index.reorder([3, 2, 1, 0])
    index.reorder([3, 2, 1, 0])
    same(answers(index), before)
    index.reorder([2])
    assert index.batch == 1


def test_a_copy_is_a_fork(filled):
    index, keys, values = filled
    before = answers(index)
    for other in (copy.copy(index), copy.deepcopy(index)):
        add(other, keys, values, 300, 400)
        assert other.lengths.tolist() == [400, 400]
    same(answers(index), before)


def test_pages_are_given_back(filled):
    index, keys, values = filled
    pool = index._batch.keeping.pool
    pages = pool.used
    for _ in range(3):
        add(index, keys, values, 300, 800)
        assert pool.used > pages
        index.truncate(300)
    assert pool.used <= pages + 4 * (6 + 2)  # a page may be less full, of each list and run
    index.truncate(0)
    assert pool.used == 0
    index.reset()
    assert index.lengths.tolist() == [0, 0]
    assert index.nbytes == 0


def test_lists_stay_whole_when_they_are_cut_and_filled_again(filled):
    index, keys, values = filled
    rng = np.random.default_rng(0)
    length = 300
    for _ in range(30):
        cut = int(rng.integers(0, length + 1))
        index.truncate(cut)
        length = min(800, cut + int(rng.integers(0, 200)))
        add(index, keys, values, cut, length)
    fresh = copy_of(index)
    add(fresh, keys, values, 0, length)
    alike(answers(index), answers(fresh))
    for sequence in index._batch.sequences:
        table, pool = sequence.lists, index._batch.keeping.pool
        rows = table.rows(np.zeros_like(table.sizes), table.sizes)
        lists = np.repeat(np.arange(len(table.sizes)), table.sizes)
        member = lists == np.arange(len(table.sizes))[:, None]
        np.testing.assert_allclose(table.sums, member @ pool.pages.take("values", rows), atol=1e-3)
        means = table.means * table.mean_scales[:, None]
        exact = table.sums / np.maximum(table.sizes, 1)[:, None]
        np.testing.assert_allclose(means, exact, atol=np.abs(exact).max() / 200)


def test_anchors_follow_their_lists(make, data):
    """A list is coded anew when it has doubled: its anchor is the mean of at least half of its keys."""
    index = make(adapt=0)
    keys, values = data(np.random.default_rng(0), 1, 600)
    keys[:, :, 300:] += 0.5
    for first in range(0, 600, 30):
        add(index, keys, values, first, first + 30)
        table = index._batch.sequences[0].lists
        assert (2 * table.coded[table.sizes > 0] > table.sizes[table.sizes > 0]).all()
    pool, filled = index._batch.keeping.pool, table.sizes > 0
    rows = table.rows(np.zeros_like(table.sizes), table.coded)
    lists = np.repeat(np.arange(len(table.sizes)), table.coded)
    member = lists == np.arange(len(table.sizes))[:, None]
    means = member @ pool.pages.take("keys", rows) / np.maximum(table.coded, 1)[:, None]
    found = table.anchors * table.anchor_scales[:, None]
    np.testing.assert_allclose(found[filled], means[filled], atol=np.abs(means).max() / 200)


def test_a_prefill_adapts_the_centroids(make, data):
    keys, values = data(np.random.default_rng(0), 1, 600)
    keys += 2  # a context unlike those of training
    plain, adapted = make(adapt=0), make(adapt=5)
    for index in (plain, adapted):
        index.add(keys, values)
    spread = [index.list_sizes.max() / index.list_sizes.mean() for index in (plain, adapted)]
    assert spread[1] < spread[0]
    assert plain._batch.sequences[0].lists.centroids is None
    index = make(adapt=5)
    index.add(keys[:, :, :60], values[:, :, :60])  # too few to learn from
    assert index._batch.sequences[0].lists.centroids is None


def test_slopes_are_fitted_again_when_the_keys_have_doubled(make, data):
    index = make(adapt=0)
    keys, values = data(np.random.default_rng(0), 1, 1200)
    values += keys @ np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    fits = set()
    for first in range(0, 1200, 60):
        add(index, keys, values, first, first + 60)
        table = index._batch.sequences[0].lists
        count = int(table.sizes.sum()) // 2
        assert count < 2 * table.fitted or not count
        assert bool(table.slopes.any()) == (table.fitted >= 16 * index.codebook.code.coded.max())
        fits.add(table.fitted)
    assert 3 <= len(fits) <= 8
    kept = table.slopes
    index.truncate(700)
    assert index._batch.sequences[0].lists.slopes is kept


def test_values_that_go_with_keys_are_expected(make, data, monkeypatch):
    """With slopes, attention to a part of the keys is closer to dense attention."""
    keys, values = data(np.random.default_rng(0), 1, 1200)
    values = values + 2 * keys @ np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    q = 2 * np.random.default_rng(2).standard_normal((1, 6, 40, 16)).astype(np.float32)
    errors = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(
                "saapindex.attention.table.fit_slopes", lambda y, v: np.zeros((y.shape[1], v.shape[1]))
            )
        index = make(adapt=0)
        index.add(keys, values)
        dense, _ = index.attend(q, budget=1.0)
        for ways in ({}, {"refine": False}):
            found, _ = index.attend(q, params=AttendParameters(budget=0.15, **ways))
            errors.append(np.linalg.norm(found - dense, axis=-1).mean())
    assert errors[0] < 0.9 * errors[2]
    assert errors[1] < 0.9 * errors[3]


@pytest.mark.parametrize("heads", [1, 3])
def test_memory_is_little_more_than_plain_keys_and_values(make_codebook, heads):
    """At 32k keys of 64 dimensions in half precision, with 128 lists."""
    rng = np.random.default_rng(0)
    codebook = make_codebook(nlist=128, words=3, heads=heads, d=64)
    index = AttentionIndex(codebook, dtype="float16", adapt=1)
    assert index.memory().overhead == np.inf
    keys = rng.standard_normal((1, heads, 32_768, 64), dtype=np.float32).astype(np.float16)
    index.add(keys[:, :, :-700], keys[:, :, :-700])
    for first in range(32_068, 32_768, 100):
        index.add(keys[:, :, first : first + 100], keys[:, :, first : first + 100])
    memory = index.memory()
    assert memory.plain == 32_768 * heads * 64 * 2 * 2
    assert memory.total == index.nbytes == memory.pages + memory.statistics
    assert memory.used <= memory.pages
    assert 1 < memory.overhead <= 1.25
    pair = index.fork([0, 0])
    assert pair.memory().overhead <= 0.63
