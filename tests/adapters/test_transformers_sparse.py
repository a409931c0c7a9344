"""At small budgets: what a step attends to, and that the cache keeps its promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from saapindex.attention import AttendParameters
from saapindex.errors import InvalidInputError

pytestmark = pytest.mark.torch


def read(model, tokens, cache, *, chunk=None, sparse=True, **more):
    """Logits of all tokens, read `chunk` at a time."""
    import contextlib

    import torch

    from saapindex.adapters.transformers import sparse_attention

    parts = tokens.split(chunk or tokens.shape[1], dim=1)
    with torch.no_grad(), sparse_attention(model) if sparse else contextlib.nullcontext():
        return torch.cat([model(part, past_key_values=cache, **more).logits for part in parts], dim=1)


def dense(model, tokens):
    return read(model, tokens, None, sparse=False)


def close(ours, theirs):
    import torch

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def torch_close(ours, theirs):
    import torch

    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams", "assisted", "padded"])
def test_generates_at_a_small_budget(how, family, tiny, new_cache, prompts):
    import torch

    from saapindex.adapters.transformers import sparse_attention

    model, cache, tokens = tiny(family), new_cache(family, budget=0.1), prompts(1 + (how == "padded"), 80)
    mask = torch.ones_like(tokens)
    mask[1:, :30] = 0
    settings = {
        "greedy": {},
        "sampled": {"do_sample": True},
        "beams": {"num_beams": 2},
        "assisted": {"prompt_lookup_num_tokens": 3},
        "padded": {},
    }[how]
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": mask, **settings}
    with sparse_attention(model):
        out = model.generate(
            tokens, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **settings
        )
    assert torch.isfinite(torch.stack(out.logits)).all()


@pytest.mark.parametrize(
    "params",
    [
        AttendParameters(nprobe=1, remainder=False),
        AttendParameters(budget=0.4, refine=False, remainder=False),
        AttendParameters(budget=0.7, remainder=False, policy="max"),
    ],
)
def test_a_step_is_dense_attention_on_what_was_selected(params, model, new_cache, prompts):
    import torch
    import transformers
    from torch.nn.functional import scaled_dot_product_attention

    from saapindex.adapters import transformers as adapter

    cache, kept = new_cache(params=params), []

    def compared(module, query, key, value, mask, **options):
        layer = cache.layers[module.layer_idx]
        out = adapter.attention(module, query, key, value, mask, **options)[0]
        if key.is_meta:
            selection = layer.index.select(query[:, :, 0], params=params)
            seen = selection.bool_mask(layer.get_seq_length()).repeat_interleave(2, dim=1)
            kept.append(selection.lengths.tolist())
            k, v = (x.repeat_interleave(2, dim=1) for x in layer._whole(layer.index))
            expected = scaled_dot_product_attention(query, k, v, seen[:, :, None], scale=options["scaling"])
            torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
        return out, None

    tokens = prompts(2, 100)
    read(model, tokens[:, :96], cache)
    transformers.AttentionInterface.register(adapter.NAME, compared)
    try:
        found = read(model, tokens[:, 96:], cache, chunk=1)
    finally:
        transformers.AttentionInterface.register(adapter.NAME, adapter.attention)
    assert len(kept) == 8
    assert 0 < np.mean(kept) < 64
    assert not torch.allclose(found, dense(model, tokens)[:, 96:], atol=1e-3)


def test_several_tokens_at_once_are_as_good_as_one_by_one(model, new_cache, prompts):
    tokens, caches = prompts(2, 97), [new_cache(budget=0.3) for _ in range(2)]
    for cache in caches:
        read(model, tokens[:, :91], cache)
        read(model, tokens[:, 91:92], cache)
    before = caches[0].layers[0].index.list_sizes.sum()
    together, single = (
        read(model, tokens[:, 92:], cache, chunk=chunk) for cache, chunk in zip(caches, (5, 1), strict=True)
    )
    assert caches[0].layers[0].index.list_sizes.sum() == before > 0
    close(together, single)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_keys_come_back_as_they_were(kind, model, new_cache, prompts):
    """Switched off, the model goes on with dense attention to what the index holds."""
    import torch
    from transformers.cache_utils import DynamicCache

    narrow = copy.deepcopy(model).to(getattr(torch, kind))
    cache, plain, tokens = new_cache(), DynamicCache(), prompts(2, 70)
    cache.layers[0].shared.config = narrow.config
    for given, sparse in ((cache, True), (plain, False)):
        read(narrow, tokens[:, :60], given, sparse=sparse)
        read(narrow, tokens[:, 60:], given, chunk=1, sparse=sparse)
    layer = cache.layers[0]
    assert (len(layer.keys), layer.index.dtype) == (0, kind)
    for ours, theirs in zip(
        layer._whole(layer.index), (plain.layers[0].keys, plain.layers[0].values), strict=True
    ):
        assert torch.equal(ours, theirs)  # those of the first layer do not depend on attention
    more = prompts(2, 3, seed=1)
    assert torch.isfinite(read(narrow, more, cache, chunk=1, sparse=False)).all()


def test_switched_off_between_steps(model, new_cache, prompts):
    tokens, cache = prompts(2, 70), new_cache(budget=1.0)
    parts = [
        (tokens[:, :50], True),
        (tokens[:, 50:54], True),
        (tokens[:, 54:60], False),
        (tokens[:, 60:], True),
    ]
    for part, sparse in parts:
        found = read(model, part, cache, chunk=len(part[0]) if part.shape[1] < 50 else None, sparse=sparse)
    close(found, dense(model, tokens)[:, 60:])


def test_a_switch_in_the_config(model, new_cache, prompts):
    """What the context manager does can be done for good."""
    import torch

    from saapindex.adapters.transformers import NAME

    before, cache, tokens = model.config._attn_implementation, new_cache(budget=1.0), prompts()
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation(NAME)
    try:
        found = model.generate(tokens, past_key_values=cache, max_new_tokens=3, do_sample=False)
    finally:
        model.set_attn_implementation(before)
    assert torch.equal(found, expected)
    assert cache.layers[0].index.lengths.tolist() == [50]


def test_a_padded_batch_over_two_turns(tiny, new_cache, prompts):
    """Padding of the second turn lies in the middle of the sequences."""
    import torch

    for family in ("Llama", "Gemma3 Text"):
        model, cache = tiny(family), new_cache(family, budget=1.0)
        tokens, mask = prompts(2, 90), torch.ones(2, 90, dtype=torch.long)
        mask[0, :20], mask[1, 50:58], mask[0, 70:72] = 0, 0, 0
        at = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(tokens, attention_mask=mask, position_ids=at).logits
        found = []
        for first, last in ((0, 45), (45, 46), (46, 48), (48, 86), (86, 87), (87, 90)):
            given = {"attention_mask": mask[:, :last], "position_ids": at[:, first:last]}
            found.append(read(model, tokens[:, first:last], cache, **given))
        real = mask.bool()
        close(torch.cat(found, dim=1)[real], expected[real])


def test_new_tokens_that_are_padding(model, new_cache, prompts):
    import torch

    tokens, mask, cache = prompts(2, 66), torch.ones(2, 66, dtype=torch.long), new_cache(budget=1.0)
    mask[0, 60:63], mask[1, 60] = 0, 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=at).logits
    read(model, tokens[:, :60], cache)
    found = read(model, tokens[:, 60:], cache, attention_mask=mask, position_ids=at[:, 60:])
    real = mask[:, 60:].bool()
    close(found[real], expected[:, 60:][real])
    assert cache.layers[0].index.lengths.tolist() == [63, 65]


def test_a_copy_shares_its_past_and_goes_its_own_way(model, new_cache, prompts):
    start, ends = prompts(1, 60), [prompts(1, 12, seed=seed) for seed in (1, 2)]
    cache = new_cache(budget=1.0)
    read(model, start, cache)
    read(model, ends[0][:, :1], cache)
    cache.crop(-1)
    before = cache.memory().used
    copies = [copy.deepcopy(cache) for _ in ends]
    assert copies[0].layers[0].shared is cache.layers[0].shared
    for twin, end in zip(copies, ends, strict=True):
        import torch

        tokens = torch.cat([start, end], dim=1)
        close(read(model, end, twin, chunk=1), dense(model, tokens)[:, 60:])
    assert cache.get_seq_length() == 60
    assert cache.memory().used < 2.2 * before


def test_a_copy_may_read_more(model, new_cache, prompts):
    tokens, cache = prompts(1, 64), new_cache(params=AttendParameters(nprobe=1, remainder=False))
    read(model, tokens[:, :60], cache)
    twin = copy.deepcopy(cache)
    twin.params = twin.params.replace(budget=1.0)
    assert (cache.params.nprobe, twin.params.budget) == (1, 1.0)
    expected = dense(model, tokens)[:, 60:]
    close(read(model, tokens[:, 60:], twin), expected)
    assert (read(model, tokens[:, 60:], cache) - expected).abs().max() > 1e-3
    with pytest.raises(InvalidInputError, match="params is a float, expected AttendParameters"):
        twin.params = 0.1
    assert twin.params.budget == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_an_index_on_a_device_is_that_of_the_host(budget, tiny, new_cache, prompts, cupy):
    tokens, found = prompts(1, 80).to("cuda"), {}
    params = AttendParameters(budget=budget, slopes=False, refine=True)
    model = tiny("Qwen3").to("cuda")
    try:
        for device in ("cpu", "cuda"):
            cache = new_cache("Qwen3", params=params, device=device)
            read(model, tokens[:, :70], cache)
            sparse = read(model, tokens[:, 70:], copy.deepcopy(cache), chunk=5)
            found[device] = sparse, read(model, tokens[:, 70:], cache, sparse=False)
    finally:
        model.to("cpu")
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch_close(one, other)


@pytest.mark.gpu
def test_padding_beams_and_turns_on_a_device(tiny, new_cache, prompts, cupy):
    import torch

    tokens, mask, found = prompts(2, 80).to("cuda"), torch.ones(2, 80, dtype=torch.long), {}
    mask[1, :20] = 0
    at, mask = (mask.cumsum(1) - 1).clamp(min=0).cuda(), mask.cuda()
    model = tiny("Qwen3").to("cuda")
    try:
        for device in ("cpu", "cuda"):
            cache = new_cache("Qwen3", budget=1.0, device=device)

            def step(first, last, cache=cache):
                given = {"attention_mask": mask[:, :last], "position_ids": at[:, first:last]}
                return read(model, tokens[:, first:last], cache, **given)

            found[device] = [step(0, 60), step(60, 61), step(61, 64)]
            cache.reorder_cache(torch.tensor([0, 0], device="cuda"))
            cache.crop(-2)
            mask[1], at[1] = mask[0], at[0]
            found[device].append(step(62, 80))
            mask[1, :20], at[1] = 0, (at[0] - 20).clamp(min=0)
    finally:
        model.to("cpu")
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch_close(one, other)


@pytest.mark.parametrize("left", [-3, -30, 40, 12, 70, -100, 0])
def test_crop(left, model, new_cache, prompts):
    import torch

    tokens, more, cache = prompts(2, 64), prompts(2, 6, seed=3), new_cache(budget=1.0)
    read(model, tokens[:, :60], cache)
    read(model, tokens[:, 60:], cache, chunk=1)
    cache.crop(left)
    kept = min(left, 64) if left > 0 else max(64 + left, 0)
    assert cache.get_seq_length() == kept
    expected = dense(model, torch.cat([tokens[:, :kept], more], dim=1))[:, kept:]
    close(read(model, more, cache, chunk=1), expected)


def test_crop_of_tokens_that_wait_and_of_padding(model, new_cache, prompts):
    import torch

    tokens, mask, cache = prompts(2, 110), torch.ones(2, 110, dtype=torch.long), new_cache(budget=1.0)
    mask[1, :9] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)

    def step(first, last):
        given = {"attention_mask": mask[:, :last], "position_ids": at[:, first:last]}
        return read(model, tokens[:, first:last], cache, **given)

    for first, last in ((0, 50), (50, 51), (51, 90)):
        step(first, last)
    cache.crop(-39 - 11)
    with torch.no_grad():
        expected = model(tokens[:, :44], attention_mask=mask[:, :44], position_ids=at[:, :44]).logits
    close(step(40, 44), expected[:, 40:])
    cache.crop(5)  # all that is left of the second sequence is padding
    step(5, 40)
    close(step(40, 44), expected[:, 40:])


def test_sequences_are_repeated_and_chosen(model, new_cache, prompts):
    import torch

    tokens, cache = prompts(2, 64), new_cache(budget=1.0)
    read(model, tokens[:, :60], cache)
    cache.batch_repeat_interleave(2)
    four = tokens.repeat_interleave(2, dim=0)
    read(model, four[:, 60:61], cache)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    rows = four[[0, 2, 3]][[2, 0, 0]]
    close(read(model, rows[:, 61:], cache, chunk=1), dense(model, rows)[:, 61:])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(read(model, tokens, cache, chunk=32), dense(model, tokens))


def test_keys_are_held_once(model, new_cache, prompts):
    tokens, cache = prompts(1, 400), new_cache(budget=0.2)
    read(model, tokens[:, :390], cache)
    plain = 2 * 2 * 8 * 4 * 2  # K and V, heads, dimensions, bytes, layers
    assert cache.memory().total == cache.memory().plain == 390 * plain
    read(model, tokens[:, 390:], cache, chunk=1)
    assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in cache.layers)
    held = cache.memory()
    assert held.plain == 400 * plain
    # Pages of 16 keys of so few dimensions are mostly codes and ids, and lists mostly one half-empty page.
    assert held.used < 2.5 * held.plain


def test_short_contexts_stay_in_tensors(model, new_cache, prompts):
    tokens, cache = prompts(1, 40), new_cache(dense_below=35)
    read(model, tokens[:, :20], cache)
    close(read(model, tokens[:, 20:34], cache, chunk=1), dense(model, tokens)[:, 20:34])
    assert cache.layers[0].index is None
    read(model, tokens[:, 34:], cache, chunk=1)
    assert cache.layers[0].index.lengths.tolist() == [40]


def test_what_is_longer_than_max_decode_is_dense(model, new_cache, prompts):
    tokens, cache = (
        prompts(1, 80),
        new_cache(params=AttendParameters(nprobe=1, remainder=False), max_decode=4),
    )
    read(model, tokens[:, :60], cache)
    close(read(model, tokens[:, 60:65], cache), dense(model, tokens)[:, 60:65])
    sparse = read(model, tokens[:, 65:69], cache)
    assert (sparse - dense(model, tokens)[:, 65:69]).abs().max() > 1e-3


def test_without_our_cache_the_model_is_what_it_was(family, tiny, prompts):
    from saapindex.adapters.transformers import NAME, sparse_attention

    model, tokens = tiny(family), prompts(2, 20)
    before, expected = model.config._attn_implementation, dense(model, tokens)
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    with sparse_attention(model), sparse_attention(model):
        assert model.config._attn_implementation == NAME
        close(dense(model, tokens), expected)
        close(model.generate(tokens, max_new_tokens=3, do_sample=False), generated)
    assert model.config._attn_implementation == before
