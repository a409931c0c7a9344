"""A selection as FlexAttention's blocks, in the order of tokens and of lists."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.errors import InvalidInputError

pytestmark = [
    pytest.mark.torch,
    # torch's compiler, the first time that it is asked for
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HOW = [{"budget": 1.0}, {"budget": 0.1}, {"budget": 0.4}, {"nprobe": 2}]


@pytest.fixture(scope="module")
def flex(torch):
    return pytest.importorskip("saapindex.adapters.flex")


@pytest.fixture(scope="module")
def served(serve):
    return serve()


@pytest.fixture(scope="module")
def tensors(served, torch):
    return [torch.from_numpy(x) for x in (served.q, *served.kv)]


@pytest.mark.parametrize("how", HOW)
def test_in_the_order_of_tokens(how, served, tensors, flex):
    selection, n = served.select(**how), 300
    blocks = flex.block_mask(selection, n, 3, block_size=32)
    out = flex.attend(*tensors, blocks)
    np.testing.assert_allclose(out, served.dense(selection), atol=2e-6)
    mask = selection.bool_mask(n)
    np.testing.assert_array_equal(blocks.selected, mask.sum(2))
    np.testing.assert_array_equal(blocks.read, 32 * selection.page_table(32)[1])
    if how == {"budget": 1.0}:
        np.testing.assert_allclose(out, served.dense(), atol=2e-6)


@pytest.mark.parametrize("how", HOW)
def test_in_the_order_of_lists(how, served, tensors, flex):
    selection, order = served.select(**how), served.index.list_order(16)
    blocks = flex.block_mask(selection, order.shape[2], 3, order=order, block_size=16)
    q, k, v = tensors
    out = flex.attend(q, flex.in_order(k, order), flex.in_order(v, order), blocks)
    np.testing.assert_allclose(out, served.dense(selection), atol=2e-6)
    np.testing.assert_array_equal(blocks.selected, selection.bool_mask(300).sum(2))
    if how == {"nprobe": 2}:  # whole lists: nothing is read but them, to the end of their last blocks
        sizes, taken = served.index.list_sizes, selection.partitions
        for b, h in np.ndindex(3, 2):
            mine = sizes[b, h, taken[b, h][taken[b, h] >= 0]]
            near = int(blocks.selected[b, h]) - int(mine.sum())
            assert blocks.read[b, h] == sum(-(-x // 16) * 16 for x in (*mine, near))


def test_blocks_in_dense_form(served, flex):
    """Blocks hold every key selected, and whole ones are told apart."""
    blocks = flex.block_mask(served.select(budget=0.3), 300, 3, block_size=8)
    chosen = served.select(budget=0.3).bool_mask(304 - 4)
    padded = np.pad(chosen, [(0, 0), (0, 0), (0, 4)]).reshape(3, 2, 38, 8)
    np.testing.assert_array_equal(blocks.mask.to_dense()[:, :, 0], padded.any(3))
    np.testing.assert_array_equal(blocks.mask.full_kv_num_blocks[:, :, 0], padded.all(3).sum(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled(served, tensors, flex):
    selection = served.select(budget=0.3)
    blocks = flex.block_mask(selection, 300, 3)
    out = flex.attend(tensors[0][:, :, None], *tensors[1:], blocks, attention=flex.flex_attention)
    np.testing.assert_allclose(out[:, :, 0], served.dense(selection), atol=2e-6)


def test_says_what_does_not_fit(served, tensors, flex):
    selection, (q, k, v) = served.select(budget=0.3), tensors
    with pytest.raises(InvalidInputError, match="the cache has 299 columns, expected 300"):
        flex.block_mask(selection, 299, 3)
    with pytest.raises(InvalidInputError, match=r"order has shape \(3, 2, 5\), expected \(3, 2, 300\)"):
        flex.block_mask(selection, 300, 3, order=np.zeros((3, 2, 5), np.int64))
    with pytest.raises(InvalidInputError, match="order does not hold every key selected"):
        flex.block_mask(selection, 300, 3, order=np.zeros((3, 2, 300), np.int64))
    with pytest.raises(InvalidInputError, match="block_size is 0"):
        flex.block_mask(selection, 300, 3, block_size=0)
    blocks = flex.block_mask(selection, 300, 3)
    with pytest.raises(InvalidInputError, match="have 3 query heads a KV head and 299 columns, the blocks"):
        flex.attend(q, k[:, :, :-1], v[:, :, :-1], blocks)
    with pytest.raises(InvalidInputError, match=r"k has shape \(3, 300, 2, 16\)"):
        flex.attend(q, k.transpose(1, 2), v, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOW[::2])
@pytest.mark.parametrize("block_size", [128, 16])
def test_on_a_gpu(how, block_size, serve, flex, torch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    served = serve((300, 70, 1), g=4, d=64)
    selection, order = served.select(**how), served.index.list_order(block_size)
    q, k, v = (torch.from_numpy(x).cuda().half() for x in (served.q, *served.kv))
    blocks = flex.block_mask(selection, 300, 4, block_size=block_size, device="cuda")
    out = flex.attend(q, k, v, blocks)
    np.testing.assert_allclose(out.float().cpu(), served.dense(selection), atol=4e-3)
    how_read = {"order": order, "block_size": block_size, "device": "cuda"}
    blocks = flex.block_mask(selection, order.shape[2], 4, **how_read)
    out = flex.attend(q, flex.in_order(k, order), flex.in_order(v, order), blocks)
    np.testing.assert_allclose(out.float().cpu(), served.dense(selection), atol=4e-3)
