"""With a budget of 1, generation through the index is that of the dense model, whichever way it goes."""

from __future__ import annotations

import contextlib

import pytest

pytestmark = pytest.mark.torch
NEW = 8


def generate(model, tokens, cache, **settings):
    """Tokens and logits of a generation; the dense model's own without a cache."""
    import torch

    from saapindex.adapters.transformers import sparse_attention

    torch.manual_seed(0)
    on = contextlib.nullcontext() if cache is None else sparse_attention(model)
    given = {} if cache is None else {"past_key_values": cache}
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    with on:
        out = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **given, **settings)
    return out.sequences, torch.stack(out.logits)


def same(model, tokens, cache, **settings):
    import torch

    ours, theirs = generate(model, tokens, cache, **settings), generate(model, tokens, None, **settings)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    return ours[0]


def in_lists(cache):
    return [int(cache.layers[number].index.list_sizes.sum()) for number in cache.served]


@pytest.fixture
def setting(family, tiny, new_cache, prompts):
    return tiny(family), new_cache(family, budget=1.0), prompts


def test_greedy(setting):
    model, cache, prompts = setting
    tokens = same(model, prompts(), cache)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    assert min(in_lists(cache)) > 0


def test_sampling(setting):
    model, cache, prompts = setting
    same(model, prompts(2), cache, do_sample=True, top_k=20, temperature=1.5)


def test_beam_search(setting):
    model, cache, prompts = setting
    same(model, prompts(2), cache, num_beams=3)
    assert cache.layers[cache.served[0]].index.batch == 6


def test_assisted_generation(setting, tiny):
    model, cache, prompts = setting
    assistant = tiny("Llama", seed=1, layers=1)
    same(model, prompts(), cache, assistant_model=assistant, max_new_tokens=16)


def test_left_padding(setting):
    import torch

    model, cache, prompts = setting
    lengths = torch.tensor([48, 31, 5])
    mask = (torch.arange(48) >= 48 - lengths[:, None]).long()
    same(model, prompts(3) * mask, cache, attention_mask=mask)
    index = cache.layers[cache.served[0]].index
    assert index.lengths.tolist() == (lengths + NEW - 1).tolist()


def test_chunked_prefill(setting):
    model, cache, prompts = setting
    same(model, prompts(2, 70), cache, prefill_chunk_size=20)


def test_several_turns(setting):
    import torch

    model, cache, prompts = setting
    tokens = prompts()
    for more in (40, 3, 50):  # dense, sparse and dense again
        tokens = same(model, tokens, cache)
        tokens = torch.cat([tokens, prompts(1, more, seed=more)], dim=1)
    same(model, tokens, cache)
    assert cache.layers[cache.served[0]].memory().used < 2 * 4 * 2 * 32 * 2 * tokens.shape[1]
