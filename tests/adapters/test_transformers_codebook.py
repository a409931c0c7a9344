"""Which codebooks a cache takes, which layers it serves, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saapindex.codebook import Codebook, CodebookLayer
from saapindex.errors import CodebookMismatchError, InvalidInputError
from saapindex.partition import View
from saapindex.rope import Rope

pytestmark = pytest.mark.torch


@pytest.fixture
def stored(model, codebook):
    """`stored(**changes)`: the tiny codebook as training writes it, in two partitions."""

    def make(layers=(0, 1), codes=(4, 7), **changes):
        parts = {}
        for number in layers:
            parts_of = {nlist: codebook("Llama", nlist)[number % 2] for nlist in (4, 7)}
            settings = {
                "views": [View(rope=Rope(dim=8))] * 2,
                "centroids": {nlist: part.centroids for nlist, part in parts_of.items()},
                "q_heads": 4,
                "scale": 8**-0.5,
                "metric": parts_of[4].metric.astype(np.float32),
                "extra": {
                    f"codes.{nlist}.{name}": tensor
                    for nlist in codes
                    for name, tensor in parts_of[nlist].code.tensors().items()
                },
            }
            parts[number] = CodebookLayer(number, **{**settings, **changes})
        return Codebook(parts, model_id="tiny", weights_hash="abc")

    return make


@pytest.fixture
def cache_of(model):
    def make(codebook, config=None, **settings):
        from saapindex.adapters.transformers import SaapCache

        return SaapCache(
            codebook, config or model.config, **{"dense_below": 0, "backend": "reference", **settings}
        )

    return make


def generate(model, cache, prompts, n=48):
    from saapindex.adapters.transformers import sparse_attention

    with sparse_attention(model):
        return model.generate(prompts(1, n), past_key_values=cache, max_new_tokens=4, do_sample=False)


def test_a_codebook_from_a_file(model, stored, cache_of, prompts, tmp_path):
    import torch

    stored().save(tmp_path / "codebook.safetensors")
    cache = cache_of(Codebook.load(tmp_path / "codebook.safetensors"), budget=1.0, weights_hash="abc")
    expected = model.generate(prompts(1, 48), max_new_tokens=4, do_sample=False)
    assert torch.equal(generate(model, cache, prompts), expected)
    assert cache.served == (0, 1)


@pytest.mark.parametrize(("n", "nlist", "expected"), [(100, None, 4), (400, None, 4), (100, 7, 7)])
def test_the_partition_follows_the_context(n, nlist, expected, model, stored, cache_of, prompts):
    cache = cache_of(stored(), nlist=nlist)
    generate(model, cache, prompts, n)
    assert cache.layers[1].index.codebook.nlist == expected


def test_partitions_of_long_contexts(stored):
    from saapindex.adapters._codebook import layer_of

    found = [layer_of(stored(), 0, context).nlist for context in (1, 512, 1024, 10**6)]
    assert found == [4, 4, 7, 7]


def test_layers_without_a_codebook_stay_dense(model, stored, cache_of, prompts):
    from transformers.cache_utils import DynamicLayer

    cache = cache_of(stored(layers=(1,)))
    generate(model, cache, prompts)
    assert cache.served == (1,)
    assert type(cache.layers[0]) is DynamicLayer
    assert cache.layers[0].keys.shape[2] == cache.get_seq_length() == 51


def test_sliding_layers_are_left_alone(new_cache, tiny, codebook, cache_of):
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = new_cache("Gemma3 Text")
    assert cache.served == (1,)
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    local = tiny("Mistral", sliding_window=16).config
    with pytest.raises(CodebookMismatchError, match="none of them is one of full attention"):
        cache_of(codebook("Llama"), local)


def test_sink_logits_take_part(tiny, prompts, new_cache, cache_of):
    """GPT-OSS learns a logit for each query head that takes a share of its softmax."""
    import torch

    from saapindex.attention import fit_layer

    settings = {
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    model = tiny("GptOss", **settings)
    sample = np.random.default_rng(0).standard_normal((4, 60, 8))
    book = {1: fit_layer(sample[:2], sample, 4, words=1, backend="reference")}
    cache = cache_of(book, model.config, budget=1.0, window=8)
    expected = model.generate(prompts(1, 48), max_new_tokens=4, do_sample=False)
    assert torch.equal(generate(model, cache, prompts), expected)
    assert cache.layers[1].index.sink_logits is not None


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"layers": (0, 5)}, {}, "has layers .*5.* but the model has 2 layers"),
        ({"views": [View(rope=Rope(dim=8, theta=5e5))] * 2}, {}, "layer 0: rope is .*10000.*500000"),
        ({"q_heads": 6}, {}, "layer 0: q_heads is 4, trained for 6"),
        ({"codes": ()}, {}, "layer 0 of the codebook has no codes for 4 lists"),
        ({}, {"nlist": 5}, "partitions into 4, 7 lists, expected one into 5"),
        ({}, {"weights_hash": "xyz"}, "weights_hash is 'xyz', trained for 'abc'"),
        ({}, {"model_id": "other"}, "model_id is 'other', trained for 'tiny'"),
    ],
)
def test_a_codebook_of_another_model_is_refused(changes, settings, message, stored, cache_of):
    with pytest.raises(CodebookMismatchError, match=message):
        cache_of(stored(**changes), **settings)


def test_other_heads_are_refused(tiny, codebook, cache_of):
    with pytest.raises(CodebookMismatchError, match=r"for 2 KV heads of 8 .* the model has 4 of 8"):
        cache_of(codebook("Llama"), tiny("Llama", num_key_value_heads=4).config)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_another_scale_is_refused_in_the_first_step(name, model, codebook, cache_of, prompts):
    book = {number: dataclasses.replace(part, **{name: 2.0}) for number, part in codebook("Llama").items()}
    cache = cache_of(book)
    with pytest.raises(CodebookMismatchError, match=f"layer 0: {name} of the logits is .*, trained for 2.0"):
        generate(model, cache, prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 0.1, "params": object()}, "budget and params are given together"),
        ({"params": 0.1}, "params is a float"),
        ({"window": -1}, "window"),
        ({"max_decode": 0}, "max_decode"),
        ({"flush": 0}, "flush"),
        ({"config": {"hidden_size": 32}}, "config is a dict, expected model.config"),
        ({"codebook": {}}, "none|layers"),
        ({"codebook": {0: "x"}}, "codebook is a dict, expected a Codebook"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_bad_settings(settings, message, codebook, cache_of):
    with pytest.raises((InvalidInputError, CodebookMismatchError), match=message):
        cache_of(**{"codebook": codebook("Llama"), **settings})


def test_a_copy_of_the_config_is_refused(model, codebook, cache_of, prompts):
    import copy

    cache = cache_of(codebook("Llama"), copy.deepcopy(model.config))
    with pytest.raises(InvalidInputError, match="another config than the model's"):
        generate(model, cache, prompts)


def test_masks_that_the_index_cannot_follow(model, new_cache, prompts):
    import torch

    from saapindex.adapters.transformers import sparse_attention

    tokens, cache, start = prompts(1, 53), new_cache(), torch.ones(1, 53, dtype=torch.long)
    start[0, :4] = 0
    tree = torch.ones(1, 1, 3, 53, dtype=torch.bool).tril(50)
    tree[..., 2, 51] = False
    with torch.no_grad(), sparse_attention(model):
        model(tokens[:, :49], past_key_values=cache, attention_mask=start[:, :49])
        model(tokens[:, 49:50], past_key_values=cache, attention_mask=start[:, :50])
        for mask, message in ((None, "shows other tokens"), (tree, "not causal"), (tree.float(), "float32")):
            with pytest.raises(InvalidInputError, match=message):
                model(tokens[:, 50:], past_key_values=cache, attention_mask=mask)
            cache.crop(50)
        assert (
            model(tokens[:, 50:51], past_key_values=cache, attention_mask=start[:, :51])
            .logits.isfinite()
            .all()
        )


def test_keys_that_lost_their_cache_are_refused(model, new_cache, prompts):
    import torch

    from saapindex.adapters.transformers import attention

    query, meta = torch.ones(1, 4, 1, 8), torch.empty(1, 2, 9, 8, device="meta")
    with pytest.raises(InvalidInputError, match="Linear changes what its cache returns"):
        attention(torch.nn.Linear(1, 1), query, meta, meta, None)


def test_models_without_the_interface_are_refused(torch):
    from types import SimpleNamespace

    from saapindex.adapters.transformers import sparse_attention

    decoder = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="eager"), set_attn_implementation=lambda name: None
    )
    with (
        pytest.raises(InvalidInputError, match="does not call its attention through"),
        sparse_attention(SimpleNamespace(get_decoder=lambda: decoder)),
    ):
        pass
