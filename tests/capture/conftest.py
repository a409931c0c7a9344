"""Tiny models with random weights, and a tokenizer of letters."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {},
    "Llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": None},
    "Phi3": {"sliding_window": 200},
    "Phi3 long": {
        "sliding_window": None,
        "rope_parameters": _LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "Gemma3 Text": {
        "head_dim": 16,
        "layer_types": _LOCAL,
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
    },
    "Gemma2": {"head_dim": 16, "layer_types": _LOCAL, "sliding_window": 24, "attn_logit_softcapping": 2.0},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
}


class Letters:
    """A tokenizer: one token a letter, after a BOS token."""

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        return SimpleNamespace(
            input_ids=[1] * add_special_tokens + [3 + ord(letter) % 120 for letter in text]
        )


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def families():
    """What is special in the config of each family of models."""
    return FAMILIES


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, torch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(0).integers(3, 128, 100).tolist()


@pytest.fixture(scope="session")
def tiny(torch):
    """A model of three layers with random weights: `tiny("Llama", **config)`."""
    transformers = pytest.importorskip("transformers")

    def make(family, **settings):
        name = family.split(" ")[0]
        config = getattr(transformers, name + ("TextConfig" if "Text" in family else "Config"))
        config = config(**copy.deepcopy({**_COMMON, **FAMILIES[family], **settings}))
        torch.manual_seed(0)
        model = getattr(transformers, name + "ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():  # larger than usual, so that attention is not uniform
                parameter.mul_(3.0)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(tiny, letters):
    """A loaded Llama; tests that change it make their own."""
    from saapindex.learn.models import LoadedModel

    return LoadedModel(tiny("Llama"), letters, "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "manual.txt"
    path.write_text("".join(chr(97 + number * number % 26) for number in range(1000)))
    return path


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """A tiny model and its tokenizer, as `save_pretrained` writes them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    tiny("Llama", max_position_embeddings=64).save_pretrained(path)
    return path
