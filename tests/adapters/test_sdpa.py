"""A selection handed to torch's SDPA, against dense attention over the same keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.attention import Selection
from saapindex.errors import InvalidInputError

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def served(serve):
    return serve()


@pytest.fixture
def sdpa(torch):
    from saapindex.adapters import sdpa

    return sdpa


@pytest.mark.parametrize("how", [{"budget": 1.0}, {"budget": 0.1}, {"budget": 0.4}, {"nprobe": 2}])
@pytest.mark.parametrize("g", [1, 4])
def test_attends_to_what_was_selected(how, g, serve, sdpa):
    served = serve(g=g)
    selection = served.select(**how)
    out = sdpa.attend(served.q, *served.kv, selection)
    np.testing.assert_allclose(out, served.dense(selection), atol=2e-6)
    if how == {"budget": 1.0}:
        np.testing.assert_allclose(out, served.dense(), atol=2e-6)


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    window=st.sampled_from([0, 1, 20]),
    sinks=st.sampled_from([0, 1, 5, 17]),
    budget=st.floats(0.01, 1),
)
def test_any_lengths_windows_and_sinks(lengths, window, sinks, budget, serve):
    from saapindex.adapters import sdpa

    served = serve(lengths, window=window, sinks=sinks)
    selection = served.select(budget=budget)
    np.testing.assert_allclose(
        sdpa.attend(served.q, *served.kv, selection), served.dense(selection), atol=5e-6
    )
    mask = sdpa.attention_mask(selection, max(lengths), 6)
    np.testing.assert_array_equal(mask[:, ::3, 0].numpy(), selection.bool_mask(max(lengths)))


def test_masks_of_a_dense_cache(served, sdpa, torch):
    selection = served.select(budget=0.3)
    q, k, v = (torch.from_numpy(x) for x in (served.q[:, :, None], *served.kv))
    for dtype in (torch.bool, torch.float32):
        mask = sdpa.attention_mask(selection, k.shape[2], q.shape[1], dtype=dtype)
        assert mask.dtype == dtype
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        np.testing.assert_allclose(out[:, :, 0], served.dense(selection), atol=2e-6)
    far = sdpa.attention_mask(selection, k.shape[2], q.shape[1], near=False)
    np.testing.assert_array_equal(far[:, ::3, 0].numpy(), selection.bool_mask(k.shape[2], near=False))


def test_sequences_padded_on_the_left(served, sdpa):
    selection, n = served.select(budget=0.3), served.k.shape[2]
    offsets = n - np.array(served.lengths)
    shifted = [
        np.stack([np.roll(x[b], offset, axis=1) for b, offset in enumerate(offsets)]) for x in served.kv
    ]
    out = sdpa.attend(served.q, *shifted, selection, offsets=offsets)
    np.testing.assert_allclose(out, served.dense(selection), atol=2e-6)
    mask = sdpa.attention_mask(selection, n, 6, offsets=offsets)
    np.testing.assert_array_equal(mask[:, ::3, 0].numpy(), selection.bool_mask(n, offsets=offsets))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions_of_torch(dtype, served, sdpa, torch):
    x = [torch.from_numpy(part).to(getattr(torch, dtype)) for part in (served.q, *served.kv)]
    selection = served.select(budget=0.3)
    out = sdpa.attend(*x, selection)
    assert (out.dtype, out.shape) == (x[0].dtype, x[0].shape)
    np.testing.assert_allclose(out.double(), served.dense(selection), atol=0.05)
    assert sdpa.attend(x[0][:, :, None], *x[1:], selection).shape == (*out.shape[:2], 1, out.shape[2])


def test_read_only_arrays_and_a_sequence_without_keys(served, sdpa):
    selection = served.select(budget=0.3)
    frozen = [part.copy() for part in (served.q, *served.kv)]
    for part in frozen:
        part.flags.writeable = False
    np.testing.assert_allclose(sdpa.attend(*frozen, selection), served.dense(selection), atol=2e-6)
    ids = np.array([[[1]], [[-1]]])
    nothing = Selection(ids, (ids >= 0).sum(2), ids, 1, np.array([2, 1]), np.array([3, 0]))
    q, k = np.ones((2, 2, 4)), np.ones((2, 1, 5, 4))
    assert sdpa.attend(q, k, k, nothing)[:, :, 0].tolist() == [[1, 1], [0, 0]]


def test_says_what_does_not_fit(served, sdpa, torch):
    selection, q, (k, v) = served.select(budget=0.3), served.q, served.kv
    for given_, message in (
        ((q[:2], k, v), r"q has shape \(2, 6, 16\), expected \(3, a multiple of 2 heads, d\)"),
        ((q[:, :, None].repeat(2, 2), k, v), "a selection is for the newest token"),
        ((q, k.swapaxes(1, 2), v), r"k has shape \(3, 300, 2, 16\).*k.transpose\(1, 2\) for \(batch, n"),
        ((q, k, v[:, :, :-1]), "k has 300 columns and v 299"),
        ((q, k, v.astype(np.float64)), "v is torch.float64 on cpu, expected torch.float32"),
        ((q, k[:, :, :-1], v[:, :, :-1]), "the cache has 299 columns, expected 300"),
        ((q, k, "v"), "v is a str that is no array"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sdpa.attend(*given_, selection)
    with pytest.raises(InvalidInputError, match="q_heads is 5, expected a multiple of the 2 KV heads"):
        sdpa.attention_mask(selection, 300, 5)
    with pytest.raises(InvalidInputError, match=r"dtype is torch.int64, expected torch.bool"):
        sdpa.attention_mask(selection, 300, 6, dtype=torch.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_on_a_gpu(budget, served, sdpa, torch):
    """The selection may be on the CPU or on the GPU; keys, queries and result are on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    selection = served.select(budget=budget)
    names = ("ids", "lengths", "partitions", "window_start", "ends")
    there = Selection(
        **{name: torch.as_tensor(getattr(selection, name)).cuda() for name in names}, sinks=selection.sinks
    )
    q, k, v = (torch.from_numpy(x).cuda() for x in (served.q, *served.kv))
    for chosen in (selection, there):
        out = sdpa.attend(q, k, v, chosen)
        np.testing.assert_allclose(out.cpu(), served.dense(selection), atol=1e-3)
        mask = sdpa.attention_mask(chosen, 300, 6, device="cuda")
        np.testing.assert_array_equal(mask[:, ::3, 0].cpu().numpy(), selection.bool_mask(300))


@pytest.mark.gpu
def test_selected_on_a_gpu(served, sdpa, torch):
    """Rows of a selection that was made there are wider than what is selected."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("cupy")
    q, k, v = (torch.from_numpy(x).cuda() for x in (served.q, *served.kv))
    selection = served.index.to("cuda").select(q, nprobe=2)
    assert selection.ids.shape[2] > int(selection.lengths.max())
    out = sdpa.attend(q, k, v, selection)
    np.testing.assert_allclose(out.cpu(), served.dense(served.select(nprobe=2)), atol=1e-3)
    mask = sdpa.attention_mask(selection, 300, 6)
    np.testing.assert_array_equal(mask[:, ::3, 0].cpu().numpy(), selection.bool_mask(300).cpu().numpy())


@pytest.mark.parametrize("standard", [True, False])
def test_arrays_of_any_framework(standard, served, sdpa, monkeypatch):
    """Told by DLPack alone; results come back through the namespace or the package of the array."""
    import sys
    import types

    class Array:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **how):
            return self.x.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    package = types.ModuleType("arrays")
    package.from_dlpack = lambda x: Array(np.from_dlpack(x))
    if standard:
        Array.__array_namespace__ = lambda self: package
    else:
        Array.__module__ = "arrays.core"
        monkeypatch.setitem(sys.modules, "arrays", package)
    selection = served.select(budget=0.3)
    out = sdpa.attend(*(Array(x) for x in (served.q, *served.kv)), selection)
    assert isinstance(out, Array)
    np.testing.assert_allclose(out.x, served.dense(selection), atol=2e-6)


@pytest.mark.gpu
def test_arrays_of_cupy(served, sdpa):
    cupy = pytest.importorskip("cupy")
    selection = served.select(budget=0.3)
    out = sdpa.attend(*(cupy.asarray(x) for x in (served.q, *served.kv)), selection)
    assert isinstance(out, cupy.ndarray)
    np.testing.assert_allclose(out.get(), served.dense(selection), atol=1e-3)
