"""The benchmark of generation: prompts that another copy of the model reads."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def generate():
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    try:
        import generate

        yield generate
    finally:
        sys.path.remove(folder)


class Layers(dict):
    """A codebook by layer, of a model whose weights are known."""

    weights_hash = "f00d"


def test_a_prompt_read_elsewhere_is_the_same_to_what_follows(generate, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from saapindex.attention import AttendParameters, fit_layer

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    sample = np.random.default_rng(0).standard_normal((4, 90, 8))
    layers = {number: fit_layer(sample[:2], sample, 4, words=1) for number in range(2)}
    settings = {"window": 20, "dense_below": 0}
    codebook = Layers(layers)
    common = model, None, codebook, settings, {"0.5": AttendParameters(budget=0.5)}, 400, "ntk", 50, None
    tokens = torch.randint(3, 64, (300,)).tolist()
    found = []
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for reader, prompts in ((None, None), (twin, None), (twin, tmp_path), (None, tmp_path)):
            bench = generate.Bench(*common, reader, prompts)
            caches = bench.caches(bench.read(tokens))
            assert [cache.get_seq_length() for cache in caches.values()] == [300, 300]
            found.append([step for part in bench.follow([5, 6, 7], caches, 2) for step in part.values()])
    assert len(list(tmp_path.iterdir())) == 1
    for steps in zip(*found, strict=True):
        for step in steps[1:]:
            torch.testing.assert_close(step, steps[0])
