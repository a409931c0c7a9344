"""The benchmarks' simulation of published methods inside generation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("transformers")
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    try:
        import peers

        yield peers
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def read():
    """A tiny model, and a prompt that it read densely."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(3.0)
    tokens = torch.randint(3, 64, (1, 160))
    cache = DynamicCache(config=config)
    model(tokens[:, :120], past_key_values=cache)
    return model, tokens, cache


def follow(peers, read, method):
    import torch

    from saapindex.learn.layers import inspect_layers

    model, tokens, prompt = read
    parsed = peers.PeerMethod.parse(method)
    options = {"window": 20, "sinks": 1, "flush": 16, "make": parsed.maker(None, "cpu")}
    cache = peers.PeerCache(prompt, inspect_layers(model, 160).usable, **options).at(parsed.budget)
    with peers.peer_attention(model):
        parts = [model(part, past_key_values=cache).logits for part in tokens[:, 120:].split(8, dim=1)]
    return torch.cat(parts, dim=1), cache


def test_a_method_that_reads_all_keys_is_dense(peers, read):
    import torch

    model, tokens, prompt = read
    found, cache = follow(peers, read, "exact=1.0")
    torch.testing.assert_close(found, model(tokens).logits[:, 120:], rtol=1e-4, atol=1e-4)
    assert cache.share_read == pytest.approx(1)
    assert prompt.get_seq_length() == 120
    assert cache.layers[0].start > 120 - 20 - 16, "keys have left the window since"
    assert model.config._attn_implementation != peers.NAME


def test_a_method_reads_no_more_than_its_budget(peers, read):
    import torch

    dense = read[0](read[1]).logits[:, 120:]
    window, _ = follow(peers, read, "window=0.3")
    quest, cache = follow(peers, read, "quest=0.3,page=4,count_bounds=false")
    assert 0.2 < cache.share_read <= 0.3
    assert torch.norm(quest - dense) < torch.norm(window - dense)


def test_saap_comes_back_from_a_file(peers, tmp_path):
    import torch

    from saapindex.learn.peers.base import Context, Queries
    from saapindex.learn.peers.paper import SAAP

    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(300, 8, generator=draw)
    context = Context(keys, keys, torch.arange(300), None, 0.3, window=10)
    queries = Queries(torch.randn(2, 50, 8, generator=draw), torch.arange(250, 300))
    trained = SAAP(nlist=8, hidden=4, epochs=2)
    trained.fit([context], [queries])
    state = {f"1.0.{name}": tensor for name, tensor in trained.state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "saap.safetensors", {"settings": '{"nlist": 8, "hidden": 4}'})
    loaded = peers.load_saap(tmp_path, "cpu", {"count_router": False})[1, 0]
    for peer in (trained, loaded):
        peer.count_router = False
        peer.build(context)
    expected, found = (peer.read(queries, 40 * context.row) for peer in (trained, loaded))
    assert torch.equal(expected.keys, found.keys)


def test_a_first_look_at_whole_codes_is_the_index(peers):
    """Two looks are the index without slopes where the first is all; and never read more than they may."""
    import torch

    from saapindex.learn.peers.base import Context, Queries
    from saapindex.learn.peers.ladder import Ladder

    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(900, 64, generator=draw) for _ in range(2))
    context = Context(keys, values, torch.arange(900), None, 0.4, window=10)
    asked = Queries(torch.randn(3, 5, 64, generator=draw), torch.arange(900, 905))
    known = Ladder(nlist=8, scan_share=0.5, slopes=False)
    known.fit([context], [asked])
    budget = 0.3 * 900 * context.row

    def read(**settings):
        peer = peers.TwoLooks(scan_share=0.5, **settings).learned(known._learned)
        peer.build(context)
        return peer.read(asked, budget)

    known.build(context)
    expected, found = known.read(asked, budget), read(first=3)
    assert torch.equal(found.keys, expected.keys)
    torch.testing.assert_close(found.bytes, expected.bytes)
    torch.testing.assert_close(found.log_weights, expected.log_weights)
    fetched = {}
    for name, settings in {"sum": {}, "any": {"any_head": True}, "exact": {"exact": True}}.items():
        other = read(first=1, **settings)
        assert (other.bytes <= budget).all()
        logits = (asked.x @ keys.T) * context.scale
        best = logits.argmax(-1)  # of each head
        fetched[name] = other.keys[torch.arange(5), best].float().mean()
    assert fetched["exact"] >= fetched["any"] >= fetched["sum"]
    assert peers.PeerMethod.parse("looks=0.05,first=1,any_head=true").settings == {
        "first": 1,
        "any_head": True,
    }
