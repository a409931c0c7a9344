"""Arrays of any framework, width and layout go into an index, and buffers are filled."""

from __future__ import annotations

import numpy as np
import pytest

import saapindex as sx

FULL = sx.SearchParameters(nprobe=8)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_any_width_of_float(make_index, blobs, dtype, same):
    keys, queries = (blobs(n, 16).astype(dtype) for n in (400, 9))
    answers = []
    for cast in (dtype, np.float32):
        index = make_index(n=0)
        index.add(keys.astype(cast))
        answers.append(index.search(queries.astype(cast), 5, params=FULL))
    same(*answers)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_in_torch_out(torch, make_index, queries, dtype, same):
    index = make_index()
    tensors = torch.from_numpy(queries).to(getattr(torch, dtype))
    arrays = tensors.float().numpy()
    index.add(tensors)
    index.remove_ids(torch.arange(400, 404))
    np.testing.assert_array_equal(index.reconstruct(404), arrays[4])
    for call in (
        lambda x: index.search(x, 5),
        lambda x: index.search(x, 5, positions=(torch if x is tensors else np).arange(7)),
        lambda x: index.search_preassigned(x, 5, torch.zeros(7, 2, dtype=torch.int32)),
        lambda x: index.range_search(x, 1.0),
        lambda x: index.route(x),
        lambda x: (index.assign(x, 3),),
    ):
        answer = call(tensors)
        assert all(isinstance(part, torch.Tensor) for part in answer)
        same([part.numpy() for part in answer], call(arrays))


@pytest.mark.torch
def test_tensors_that_need_gradients(torch, index, queries):
    x = torch.from_numpy(queries).requires_grad_()
    scores, _ = index.search(x, 2)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    "lay", [np.asfortranarray, lambda x: np.repeat(x, 2, axis=0)[::2], lambda x: x.tolist()]
)
def test_any_layout(make_index, blobs, queries, lay, same):
    index = make_index(n=0)
    index.add(lay(blobs(400, 16)))
    same(index.search(lay(queries), 5), make_index().search(queries, 5))


def test_read_only_arrays(make_index, blobs, queries, same):
    keys, queries, ids = blobs(400, 16), queries.copy(), np.arange(400)
    for array in (keys, queries, ids):
        array.flags.writeable = False
    index = make_index(n=0)
    index.add_with_ids(keys, ids, positions=ids)
    same(index.search(queries, 5), make_index().search(queries, 5))


def test_what_was_added_is_copied(make_index, blobs):
    index, keys = make_index(n=0), blobs(10, 16)
    index.add(keys)
    before = keys.copy()
    keys[:] = 0
    np.testing.assert_array_equal(index.reconstruct_n(), before)
    index.reconstruct_n()[:] = 0
    index.list_sizes[:] = 0
    np.testing.assert_array_equal(index.reconstruct_n(), before)


def test_buffers_are_written_and_returned(index, queries, same):
    scores, ids = np.empty((7, 5), np.float32), np.empty((7, 5), np.int64)
    answer = index.search(queries, 5, D=scores, I=ids)
    assert answer[0] is scores
    assert answer[1] is ids
    same(answer, index.search(queries, 5))
    lists, _ = index.route(queries)
    ids[:] = 0
    assert index.search_preassigned(queries, 5, lists, I=ids)[1] is ids
    np.testing.assert_array_equal(ids, answer[1])
    ids = np.zeros((7, 5), np.int64)
    assert index.assign(queries, 5, labels=ids) is ids
    np.testing.assert_array_equal(ids, index.assign(queries, 5))
    assert index.assign(queries).shape == (7, 1)


@pytest.mark.torch
def test_tensors_as_buffers(torch, index, queries):
    ids = torch.zeros(7, 5, dtype=torch.int64)
    scores, found = index.search(queries, 5, I=ids)
    assert isinstance(scores, np.ndarray)
    assert found is ids
    np.testing.assert_array_equal(ids, index.search(queries, 5)[1])


def test_keys_can_be_held_in_half_precision(make_index, blobs, queries, exact):
    half, single = make_index(dtype="float16"), make_index()
    keys = blobs(400, 16).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(half.reconstruct_n(), keys)
    scores, ids = half.search(queries, 5, params=FULL)
    truth, rows = exact(queries, keys, 5)
    np.testing.assert_array_equal(ids, rows)
    np.testing.assert_allclose(scores, truth, rtol=1e-5)
    assert half.nbytes < 0.75 * single.nbytes
