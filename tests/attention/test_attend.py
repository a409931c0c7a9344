"""`attend`: dense where it should be, close where it may not be, and what every option does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.attention import AttendParameters, AttentionIndex, merge
from saapindex.errors import InvalidInputError

EVERYTHING = [{"budget": 1.0}, {"nprobe": 6}, {"top_p": 1.0}]


@pytest.fixture(scope="module")
def filled(make, data):
    """Two sequences of 400 keys, and what they hold: do not change them."""
    index = make(2, dtype="float32")
    keys, values = data(np.random.default_rng(0), 2, 400)
    index.add(keys, values)
    return index, keys, values


@pytest.fixture(scope="module")
def model(filled, dense):
    return model_of(dense, *filled[1:])


def model_of(dense, keys, values, **settings):
    model = dense(len(keys), **settings)
    for b in range(len(keys)):
        model.add(b, keys[b].astype(np.float64), values[b].astype(np.float64))
    return model


def ask(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, known, tolerance=2e-4):
    np.testing.assert_allclose(np.asarray(found, np.float64), known, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("read", EVERYTHING)
def test_with_everything_read_it_is_dense(filled, model, read):
    q = ask(2, 6, 16)
    out, lse = filled[0].attend(q, **read)
    for b in range(2):
        known, known_lse = model.attend(b, q[b], 399)
        close(out[b], known)
        close(lse[b], known_lse)


@pytest.mark.parametrize("read", [*EVERYTHING, {"budget": 0.3}])
@pytest.mark.parametrize("t", [1, 2, 5])
def test_the_last_tokens_see_up_to_themselves(filled, model, t, read):
    q = ask(2, 6, t, 16)
    out, lse = filled[0].attend(q, **read)
    assert (out.shape, lse.shape) == ((2, 6, t, 16), (2, 6, t))
    exact = read != {"budget": 0.3}
    for b, i in np.ndindex(2, t):
        known, known_lse = model.attend(b, q[b, :, i], 400 - t + i)
        close(out[b, :, i], known, 2e-4 if exact else 0.7)
        close(lse[b, :, i], known_lse, 2e-4 if exact else 0.2)


def test_more_budget_is_closer(filled, model):
    q = ask(20, 2, 6, 16)
    truth = np.array([[model.attend(b, x[b], 399)[0] for b in range(2)] for x in q])

    def error(**how):
        found = np.array([filled[0].attend(x, params=AttendParameters(**how))[0] for x in q])
        return np.linalg.norm(found - truth, axis=-1).mean()

    assert error(budget=0.9) < error(budget=0.6) < error(budget=0.4)
    assert error(budget=0.5) < error(budget=0.5, remainder=False)
    assert error(nprobe=3) < error(nprobe=3, remainder=False)
    assert error(nprobe=4) < error(nprobe=2) < error(nprobe=1)


def test_a_budget_below_the_statistics_reads_nothing_else(filled):
    q = ask(2, 6, 16)
    selection = filled[0].select(q, budget=1e-6)
    assert not selection.lengths.any()
    assert not selection.partitions.shape[2]
    assert np.isfinite(filled[0].attend(q, budget=1e-6)[0]).all()


@pytest.mark.parametrize("policy", ["sum", "max", "union"])
@pytest.mark.parametrize("how", [{}, {"refine": False}, {"rank": "mass"}, {"remainder": False}])
def test_every_way_of_choosing_is_better_than_none(filled, model, policy, how):
    q = ask(2, 6, 16)
    truth = np.stack([model.attend(b, q[b], 399)[0] for b in range(2)])
    near_alone, _ = filled[0].attend(q, params=AttendParameters(budget=1e-9, remainder=False))
    budget = 0.95 if policy == "union" else 0.6  # of which each head has a third
    out, _ = filled[0].attend(q, params=AttendParameters(budget=budget, policy=policy, **how))
    assert np.linalg.norm(out - truth) < 0.8 * np.linalg.norm(near_alone - truth)


def test_what_is_attended_to_is_what_is_selected(filled, model):
    """Without the remainder, `attend` is exact attention to the selection, sinks and window."""
    index, q = filled[0], ask(2, 6, 16)
    for how in ({"budget": 0.5}, {"nprobe": 2}, {"top_p": 0.6}, {"budget": 0.4, "refine": False}):
        params = AttendParameters(remainder=False, **how)
        mask = index.select(q, params=params).bool_mask(400)
        out, lse = index.attend(q, params=params)
        for b in range(2):
            known, known_lse = model.attend(b, q[b], 399, seen=mask[b])
            close(out[b], known)
            close(lse[b], known_lse)


def test_codes_and_keys_stay_within_the_budget(filled):
    """Statistics, codes of the visited lists, keys and values: all of it."""
    index = filled[0]
    for budget in (0.4, 0.6, 0.9):
        selection = index.select(ask(2, 6, 16), budget=budget)
        sizes, long = index.list_sizes, index.list_sizes.sum(axis=2)
        for b, h in np.ndindex(2, 2):
            visited = selection.partitions[b, h][selection.partitions[b, h] >= 0]
            read = 6 * (2 * 16 + 8) + 2 * (16 + 4) * index.codebook.code.coded[h]
            read += sizes[b, h, visited].sum() * 5 + selection.lengths[b, h] * 2 * 16 * 4
            assert read <= budget * long[b, h] * 2 * 16 * 4
            assert read >= (budget - 0.02) * long[b, h] * 2 * 16 * 4


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_twice_that_of_torch(torch, make, dense, data, dtype):
    kind = getattr(torch, dtype)
    k, v = (torch.from_numpy(x).to(kind) for x in data(np.random.default_rng(0), 2, 500))
    q = torch.from_numpy(ask(2, 6, 16)).to(kind)
    index = make(2)
    index.add(k, v)
    assert index.dtype == dtype
    out, lse = index.attend(q, budget=1.0)
    assert (out.dtype, lse.dtype, out.shape, lse.shape) == (kind, torch.float32, q.shape, q.shape[:2])
    theirs = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    model = model_of(dense, k.float().numpy(), v.float().numpy())
    truth = np.stack([model.attend(b, q[b].float().numpy(), 499)[0] for b in range(2)])
    ours, theirs = (np.abs(x.float().numpy() - truth).max() for x in (out, theirs))
    assert ours <= 2 * theirs + 1e-7


@pytest.mark.torch
def test_torch_and_numpy_give_the_same(torch, make, data):
    keys, values = data(np.random.default_rng(0), 1, 300)
    q, index, other = ask(1, 6, 16), make(), make()
    index.add(keys, values)
    strided = torch.from_numpy(keys.transpose(0, 2, 1, 3).copy()).transpose(1, 2)
    other.add(strided, torch.from_numpy(values))
    theirs, known = other.attend(torch.from_numpy(q), budget=0.5), index.attend(q, budget=0.5)
    for one, two in zip(theirs, known, strict=True):
        np.testing.assert_array_equal(one.numpy(), two)
    selection = other.select(torch.from_numpy(q), budget=0.5)
    assert isinstance(selection.ids, torch.Tensor)
    for part in (*selection.csr(), *selection.page_table(16), selection.bool_mask(300)):
        assert isinstance(part, torch.Tensor)
    np.testing.assert_array_equal(selection.ids.numpy(), index.select(q, budget=0.5).ids)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keys_are_kept_in_the_type_asked_for(make, data, dense, dtype):
    keys, values = data(np.random.default_rng(0), 1, 300)
    index, q = make(dtype=dtype), ask(1, 6, 16)
    index.add(keys.astype(np.float64), values)
    out, _ = index.attend(q, budget=1.0)
    precision = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]
    close(out[0], model_of(dense, keys, values).attend(0, q[0], 299)[0], precision)
    assert out.dtype == np.float32
    assert index.attend(q.astype(np.float16))[0].dtype == np.float16


@pytest.mark.parametrize(
    "settings", [{"softcap": 4.0}, {"scale": 0.6}, {"sink_logits": [0.5, 3, -2, 40, 0, 1]}]
)
@pytest.mark.parametrize("read", [*EVERYTHING, {"budget": 0.5}])
def test_logits_are_those_of_the_model(make, data, dense, settings, read):
    keys, values = data(np.random.default_rng(0), 1, 300)
    index, q = make(**settings), ask(1, 6, 16)
    index.add(keys, values)
    known = {"sinks" if name == "sink_logits" else name: value for name, value in settings.items()}
    exact, exact_lse = model_of(dense, keys, values, **known).attend(0, q[0], 299)
    out, lse = index.attend(q, **read)
    close(out[0], exact, 2e-4 if read != {"budget": 0.5} else 0.6)
    close(lse[0], exact_lse, 2e-4 if read != {"budget": 0.5} else 0.2)


def test_the_codebook_knows_the_softcap(make_codebook, data):
    index = AttentionIndex(make_codebook(softcap=4.0), backend="reference")
    assert index.softcap == 4.0
    assert AttentionIndex(make_codebook(softcap=4.0), softcap=9, backend="reference").softcap == 9.0


@pytest.mark.parametrize("view", ["unrotated", "windowed"])
def test_views_only_decide_the_lists(make, data, dense, view):
    keys, values = data(np.random.default_rng(0), 1, 300)
    index, q = make(view=view), ask(1, 6, 16)
    index.add(keys, values)
    close(index.attend(q, budget=1.0)[0][0], model_of(dense, keys, values).attend(0, q[0], 299)[0])
    plain = make()
    plain.add(keys, values)
    assert (index.list_sizes != plain.list_sizes).any()


@pytest.mark.parametrize("read", [{"budget": 0.5}, {"budget": 1.0}, {"nprobe": 2}])
def test_another_runtime_may_own_the_window(filled, model, read):
    index, q = filled[0], ask(2, 6, 16)
    far, far_lse = index.attend(q, near=False, params=AttendParameters(remainder=False, **read))
    start, sinks = index.select(q).window_start, index.sinks
    near = np.arange(400) < sinks
    parts = []
    for b in range(2):
        seen = np.broadcast_to(near | (np.arange(400) >= start[b]), (2, 400))
        parts.append(model.attend(b, q[b], 399, seen=seen))
    outs, lses = (np.stack(part).astype(np.float32) for part in zip(*parts, strict=True))
    out, lse = merge([far, outs], [far_lse, lses])
    whole, whole_lse = index.attend(q, params=AttendParameters(remainder=False, **read))
    close(out, whole)
    close(lse, whole_lse)


def test_an_earlier_position_is_dense_and_sees_no_further(filled, model):
    q, at = ask(2, 6, 3, 16), np.array([[5, 100, -1], [398, 0, 399]])
    out, lse = filled[0].attend(q, positions=at, budget=0.3)
    for b, i in np.ndindex(2, 3):
        known, known_lse = model.attend(b, q[b, :, i], at[b, i])
        close(out[b, :, i], known)
        close(lse[b, :, i], known_lse)
    assert not out[0, :, 2].any()
    assert np.isneginf(lse[0, :, 2]).all()


def test_an_empty_index_attends_to_nothing(make):
    index, q = make(2), ask(2, 6, 16)
    out, lse = index.attend(q)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert index.select(q).ids.shape == (2, 2, 0)
    with_sinks = make(2, sink_logits=np.arange(6.0))
    out, lse = with_sinks.attend(q)
    assert not out.any()
    assert lse.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_short_context_is_dense_by_itself(make, data, dense):
    keys, values = data(np.random.default_rng(0), 1, 300)
    index, q = make(dense_below=250), ask(1, 6, 16)
    for n in range(0, 240, 60):
        index.add(keys[:, :, n : n + 60], values[:, :, n : n + 60])
        known = model_of(dense, keys[:, :, : n + 60], values[:, :, : n + 60]).attend(0, q[0], n + 60)
        close(index.attend(q, budget=0.01)[0][0], known[0])
        assert not index.list_sizes.any()
    index.add(keys[:, :, 240:], values[:, :, 240:])
    assert index.list_sizes.sum() == 2 * index.select(q, budget=1.0).lengths[0, 0] > 400


@given(
    lengths=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    t=st.integers(1, 60),
    budget=st.sampled_from([1.0, 0.5]),
)
def test_sequences_of_different_lengths_with_padding_on_the_left(make, data, dense, lengths, t, budget):
    """As one by one; rows of padding see nothing."""
    keys, values = data(np.random.default_rng(0), 3, 60)
    index, q = make(3), ask(3, 6, t, 16)
    index.add(keys, values, lengths=lengths)
    assert index.lengths.tolist() == lengths
    out, lse = index.attend(q, budget=budget)
    masked = make(3)
    masked.add(keys, values, mask=np.arange(60) >= 60 - np.array(lengths)[:, None])
    np.testing.assert_array_equal(masked.attend(q, budget=budget)[0], out)
    for b, n in enumerate(lengths):
        model = model_of(dense, keys[b : b + 1, :, 60 - n :], values[b : b + 1, :, 60 - n :])
        for i in range(0, t, 7):
            known, known_lse = model.attend(0, q[b, :, i], n - t + i)
            close(out[b, :, i], known, 2e-4 if budget == 1 or n < 53 else 0.7)
            if n - t + i < 0:
                assert not out[b, :, i].any()
                assert np.isneginf(lse[b, :, i]).all()
            elif budget == 1:
                close(lse[b, :, i], known_lse)


def test_tokens_one_by_one_are_a_prompt_at_once(make, data):
    """Up to where keys enter the lists, which is in batches."""
    keys, values = data(np.random.default_rng(0), 2, 150)
    q = ask(2, 6, 16)
    whole, stepped, mixed = make(2, adapt=0), make(2, adapt=0), make(2, adapt=0)
    whole.add(keys, values)
    for i in range(150):
        stepped.add(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    for part in np.split(np.arange(150), [1, 40, 41, 99]):
        mixed.add(keys[:, :, part], values[:, :, part])
    for other in (stepped, mixed):
        for one, two in zip(other.attend(q, budget=1.0), whole.attend(q, budget=1.0), strict=True):
            close(one, two)
        assert (other.list_sizes <= whole.list_sizes + 16).all()


@pytest.mark.parametrize("t", [1, 3])
def test_keys_can_be_added_with_the_queries(make, data, t):
    one, other = make(2, dtype="float32"), make(2, dtype="float32")
    keys, values = data(np.random.default_rng(0), 2, 400)
    for i in range(0, 300, 100):
        k, v = (x[:, :, i : i + (100 if i else t)] for x in (keys, values))
        q = ask(2, 6, k.shape[2], 16)
        one.add(k, v)
        for found, known in zip(other.attend(q, k=k, v=v), one.attend(q), strict=True):
            np.testing.assert_array_equal(found, known)
    assert other.lengths.tolist() == [200 + t] * 2


def test_bad_queries_add_nothing(make, data):
    index = make(2, dtype="float32")
    keys, values = data(np.random.default_rng(0), 2, 9)
    index.add(keys, values)
    q = ask(2, 6, 16)
    for wrong, named in (
        ({"q": ask(2, 5, 16)}, "5 query heads"),
        ({"q": np.full_like(q, np.nan)}, "q holds"),
        ({"v": None}, "v is None"),
        ({"v": values[:, :, :1, :8]}, "v has shape"),
        ({"positions": np.zeros((2, 3), int)}, "positions"),
        ({"budget": 2.0}, "budget"),
    ):
        given = {"q": q, "k": keys[:, :, :1], "v": values[:, :, :1], **wrong}
        with pytest.raises(InvalidInputError, match=named):
            index.attend(**given)
        assert index.lengths.tolist() == [9, 9]


def test_merge_takes_any_shape_and_precision():
    outs, lses = ask(3, 2, 5, 4), ask(3, 2, 5, seed=1)
    known = np.exp(lses - np.logaddexp.reduce(lses))[..., None] * outs
    out, lse = merge(list(outs.astype(np.float16)), list(lses))
    close(out, known.sum(0), 2e-3)
    close(lse, np.logaddexp.reduce(lses))
    assert out.dtype == np.float16
    with pytest.raises(ValueError, match="2 outputs and 1 lses"):
        merge([outs[0], outs[1]], [lses[0]])
    with pytest.raises(ValueError, match=r"outs\[1\] has shape"):
        merge([outs[0], outs[1][:1]], [lses[0], lses[1]])
    with pytest.raises(ValueError, match=r"lses\[0\] is float32 of shape \(2,\), expected numbers"):
        merge([outs[0]], [lses[0, :, 0]])


def test_without_slopes_values_are_those_of_lists(make_codebook, data):
    rng = np.random.default_rng(0)
    k, v = data(rng, 1, 600)
    q = rng.standard_normal((1, 6, 16)).astype(np.float32)
    found = {}
    for backend in ("reference", "cpu"):
        index = AttentionIndex(make_codebook(), window=20, flush=16, dense_below=0, backend=backend)
        index.add(k, v)
        for slopes in (None, True, False):
            params = AttendParameters(budget=0.3, slopes=slopes)
            found[backend, slopes], _ = index.attend(q, params=params)
        np.testing.assert_array_equal(found[backend, None], found[backend, True])
        assert not np.allclose(found[backend, False], found[backend, True], atol=1e-4)
    np.testing.assert_allclose(found["reference", False], found["cpu", False], rtol=1e-3, atol=1e-4)
    assert AttendParameters(slopes=False) != AttendParameters()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_slopes_are_left_out_where_bytes_are_scarce(backend, make_codebook, data):
    """Each sequence decides for itself, and what its matrix takes goes to codes and keys instead."""
    rng = np.random.default_rng(0)
    k, v = data(rng, 2, 900)
    q = rng.standard_normal((2, 6, 16)).astype(np.float32)
    index = AttentionIndex(make_codebook(), batch=2, window=20, flush=16, dense_below=0, backend=backend)
    index.add(k, v, lengths=[900, 300])
    matrix, row = (16 + 4) * index.codebook.code.coded.max(), 2 * 16 * 4
    budget = float(20 * matrix / row / (900 + 300))  # more than ten matrices of one, fewer of the other
    found = {}
    for slopes in (None, True, False):
        found[slopes], _ = index.attend(q, params=AttendParameters(budget=budget, slopes=slopes))
    np.testing.assert_array_equal(found[None][0], found[True][0])
    np.testing.assert_array_equal(found[None][1], found[False][1])
    assert not np.array_equal(found[True], found[None])
    assert not np.array_equal(found[False], found[None])
