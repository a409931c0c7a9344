"""What a model tells of its layers, and that watching them changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.errors import InvalidInputError
from saapindex.learn.attention_hook import sliding_attention, watched
from saapindex.learn.capture import capture_tokens
from saapindex.learn.layers import inspect_layers
from saapindex.learn.models import decoder_of
from saapindex.rope import Rope

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.torch
CONTEXT = 100


def attention(trace):
    """What attention returns: (q_heads, m, d), by the formula, in float64."""
    keys, values, queries = (
        getattr(trace, name).astype(np.float64) for name in ("keys", "values", "queries")
    )
    keys, values = (np.repeat(part, trace.group_size, axis=0) for part in (keys, values))
    logits = queries @ keys.swapaxes(1, 2) * trace.scale
    if trace.softcap:
        logits = trace.softcap * np.tanh(logits / trace.softcap)
    logits[:, trace.query_positions[:, None] < trace.key_positions] = -np.inf
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True) @ values


def test_a_trace_gives_what_the_layer_returned(family, device, tiny, tokens, families):
    model = tiny(family).to(device)
    found = inspect_layers(model, CONTEXT)
    assert sorted([*found.usable, *found.left_out]) == [0, 1, 2]
    assert set(found.left_out) == ({0, 2} if "layer_types" in families[family] else set())
    returned = {}
    for number, layer in enumerate(decoder_of(model).layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, arguments, number=number: returned.update({number: arguments[0][0].cpu().numpy()})
        )
    at = np.arange(0, CONTEXT, 3)
    with torch.no_grad():
        decoder_of(model)(torch.tensor([tokens], device=device))
    outputs = dict(returned)  # what follows calls the hooks again
    traces = capture_tokens(model, tokens, layers=found.usable, query_positions=at)
    for number, trace in traces.items():
        expected = outputs[number].reshape(CONTEXT, -1, trace.d).swapaxes(0, 1)[:, at]
        error = np.linalg.norm(attention(trace) - expected) / np.linalg.norm(expected)
        assert error < 0.01, (number, error)  # of float16


def test_without_its_rotation_a_key_does_not_depend_on_its_position(family, tiny, tokens):
    model, ids = tiny(family), tokens
    layer = next(iter(inspect_layers(model, CONTEXT).usable))
    # One layer deep, a key is a function of its token and position alone.
    decoder_of(model).layers[0] = decoder_of(model).layers[layer]
    decoder_of(model).layers[0].self_attn.layer_idx = 0
    decoder_of(model).config.layer_types = ["full_attention"] * 3
    model.config.num_hidden_layers = 1
    ids[50], ids[99] = ids[4], ids[4]
    (trace,) = capture_tokens(model, ids, layers=[0], query_positions=np.arange(CONTEXT)).values()
    if trace.rope is None:
        np.testing.assert_allclose(trace.keys[:, 99], trace.keys[:, 4], atol=1e-2)
        return
    for part in (*trace.keys, *trace.queries):
        undone = trace.rope.unrotate(part, np.arange(CONTEXT))[[4, 50, 99]]
        length = np.linalg.norm(undone[0])
        assert np.linalg.norm(undone - undone[0], axis=1).max() < 0.01 * length
        assert np.linalg.norm(part[[50, 99]] - part[4], axis=1).min() > 0.1 * length


def test_ropes_are_those_of_the_layers(tiny, families):
    ropes = {family: inspect_layers(tiny(family), CONTEXT).usable for family in families}
    assert ropes["Gemma3 Text"][1].rope == Rope(theta=1e6, dim=16)  # that of local layers has theta 1e4
    assert [ropes["SmolLM3"][number].rope is None for number in range(3)] == [False, True, False]
    assert ropes["Glm4"][0].rope == Rope(theta=1e4, dim=8, layout="interleaved")
    long, short = ropes["Phi3 long"][0].rope, inspect_layers(tiny("Phi3 long"), 64).usable[0].rope
    np.testing.assert_allclose(long.frequencies * 2, short.frequencies)
    assert ropes["Gemma2"][1].softcap == 2.0


def test_a_rotation_that_the_config_does_not_tell_is_refused(tiny):
    model = tiny("Llama")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 123.0}
    with pytest.raises(InvalidInputError, match=r"layer 0: the keys are not rotated as the config says"):
        inspect_layers(model, CONTEXT)


@pytest.mark.parametrize("family", ["Llama", "Gemma3 Text", "Gemma2"])
def test_logits_are_the_same_to_the_bit(family, tiny, tokens):
    model, ids = tiny(family), torch.tensor([tokens])
    kind = model.config._attn_implementation
    with torch.no_grad():
        before = model(ids).logits
        with watched(decoder_of(model), lambda call: None):
            during = model(ids).logits
        capture_tokens(model, tokens, layers=[1], query_positions=np.arange(3))
        after = model(ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert model.config._attn_implementation == kind


def test_attention_is_put_back_after_an_error(model, tokens):
    def fail(call):
        raise KeyError(call.layer)

    with pytest.raises(KeyError), watched(decoder_of(model.model), fail):
        model.model(torch.tensor([tokens]))
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [1, 24, 63, 500])
def test_a_sliding_window_in_blocks(window, device, monkeypatch, tiny, tokens):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, CONTEXT, 16, generator=generator).to(device)
    k, v = (torch.randn(1, 2, CONTEXT, 16, generator=generator).to(device) for _ in range(2))
    age = torch.arange(CONTEXT)[:, None] - torch.arange(CONTEXT)
    mask = ((age >= 0) & (age < window)).to(device)
    whole = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
    )
    blocks = sliding_attention(q, k, v, scale=0.3, window=window, block=17)
    torch.testing.assert_close(blocks, whole.transpose(1, 2))
    # And in a model, past the length up to which it is a mask.
    local, ids = (
        tiny("Gemma3 Text", sliding_window=window).to(device),
        torch.tensor([tokens], device=device),
    )
    with torch.no_grad():
        expected = local(ids).logits
        monkeypatch.setattr("saapindex.learn.attention_hook.LONGEST_MASK", 30)
        with watched(decoder_of(local), lambda call: None):
            torch.testing.assert_close(local(ids).logits, expected, rtol=1e-3, atol=1e-3)
