"""Tiny models with random weights, each with a codebook that was fitted to what its attention sees."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
    "Gemma3 Text": {**_MIXED, "query_pre_attn_scalar": 24},
    "Gemma2": {**_MIXED, "attn_logit_softcapping": 2.0},
}
SMALL = {"window": 8, "sinks": 2, "flush": 4, "dense_below": 0, "backend": "reference"}
"""Settings under which keys of tiny contexts enter lists."""


def make_model(family, seed=0, layers=2, **settings):
    if settings:
        return _make_model(family, seed, layers, settings)
    return _shared_model(family, seed, layers)


@functools.cache
def _shared_model(family, seed, layers):
    return _make_model(family, seed, layers, {})


def _make_model(family, seed, layers, settings):
    import torch
    import transformers

    name = family.split(" ")[0]
    config = getattr(transformers, name + ("TextConfig" if "Text" in family else "Config"))
    own = FAMILIES.get(family, {})
    config = config(**copy.deepcopy({**_COMMON, **own, "num_hidden_layers": layers, **settings}))
    torch.manual_seed(seed)
    model = getattr(transformers, name + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than usual, so that attention is not uniform
            parameter.mul_(3.0)
    return model.eval()


@functools.cache
def make_codebook(family, nlist=4):
    """A `LayerCodebook` for each layer of full attention."""
    from saapindex.attention import fit_layer
    from saapindex.learn.capture import capture_tokens
    from saapindex.learn.layers import inspect_layers

    model, n = make_model(family), 120
    tokens = np.random.default_rng(1).integers(3, 64, n).tolist()
    usable = inspect_layers(model, n).usable
    traces = capture_tokens(model, tokens, layers=list(usable), query_positions=np.arange(60, n))
    return {
        number: fit_layer(
            trace.keys.astype(np.float32), trace.queries.astype(np.float32), nlist, words=1, niter=3,
            scale=usable[number].scale, softcap=usable[number].softcap, backend="reference",
        )
        for number, trace in traces.items()
    }  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tiny(torch):
    """`tiny(family, seed=0, layers=2, **config)`: a model with random weights."""
    pytest.importorskip("transformers")
    return make_model


@pytest.fixture
def model(tiny):
    return tiny("Llama")


@pytest.fixture
def codebook(tiny):
    """`codebook(family, nlist=4)`."""
    return make_codebook


@pytest.fixture
def new_cache(torch):
    """`new_cache(family="Llama", **settings)`: an empty cache for the model of a family."""
    pytest.importorskip("transformers")
    from saapindex.adapters.transformers import SaapCache

    def make(family="Llama", **settings):
        return SaapCache(make_codebook(family), make_model(family).config, **{**SMALL, **settings})

    return make


@pytest.fixture
def prompts(torch):
    """`prompts(batch, n)`: random tokens."""

    def make(batch=1, n=48, seed=0):
        return torch.from_numpy(np.random.default_rng(seed).integers(3, 64, (batch, n)))

    return make


class Served:
    """An index of sequences of different lengths, the same keys in a plain cache, and queries."""

    def __init__(self, lengths=(300, 70, 1), heads=2, g=3, d=16, seed=0, **settings):
        from saapindex.attention import AttentionIndex, fit_layer

        rng = np.random.default_rng(seed)
        self.lengths, n, batch = lengths, max(lengths), len(lengths)
        centers = 2 * rng.standard_normal((heads, 9, d))

        def clustered(batch, n):
            label = rng.integers(9, size=(batch, heads, n))
            return centers[np.arange(heads)[:, None], label] + rng.standard_normal((batch, heads, n, d))

        self.k = clustered(batch, n).astype(np.float32)
        self.v = rng.standard_normal((batch, heads, n, d), dtype=np.float32)
        self.q = rng.standard_normal((batch, heads * g, d), dtype=np.float32)
        sample = rng.standard_normal((heads * g, 60, d))
        self.codebook = fit_layer(clustered(1, 200)[0], sample, 6, words=1, niter=2, backend="reference")
        settings = {**SMALL, "dtype": "float32", **settings}
        self.index = AttentionIndex(self.codebook, batch=batch, **settings)
        # Sequences stand on the left of a plain cache, and on the right of what is added.
        shifted = [np.stack([np.roll(x[b], n - m, axis=1) for b, m in enumerate(lengths)]) for x in self.kv]
        self.index.add(*shifted, lengths=lengths)

    @property
    def kv(self):
        return self.k, self.v

    def select(self, **how):
        return self.index.select(self.q, **how)

    def dense(self, selection=None, *, near=True, lse=False):
        """Masked dense attention of torch, in float64: all keys, or those of a selection."""
        import torch

        batch, heads, n, d = self.k.shape
        mask = np.broadcast_to((np.arange(n) < np.array(self.lengths)[:, None])[:, None], (batch, heads, n))
        if selection is not None:
            mask = selection.bool_mask(n, near=near)
        q, k, v = (torch.from_numpy(x).double() for x in (self.q, self.k, self.v))
        logits = q.reshape(batch, heads, -1, d) @ k.transpose(2, 3) * d**-0.5
        logits = logits.masked_fill(~torch.from_numpy(np.array(mask))[:, :, None], -torch.inf)
        out = (torch.softmax(logits, -1).nan_to_num() @ v).reshape(self.q.shape).numpy()
        if not lse:
            return out
        return out, torch.logsumexp(logits, -1).reshape(self.q.shape[:2]).numpy()


@pytest.fixture(scope="session")
def serve(torch):
    """`serve(lengths=(300, 70, 1), heads=2, g=3, d=16, seed=0, **settings)`; see `Served`."""
    return Served
