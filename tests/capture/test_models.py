"""Loading of models, their fingerprint, and ropes that are stretched."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.errors import InvalidInputError
from saapindex.learn.capture import capture
from saapindex.learn.layers import inspect_layers
from saapindex.learn.models import load_model, stretched, weights_hash
from saapindex.rope import LinearScaling, Rope, YarnScaling

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.torch
CONTEXT = 100


LLAMA = {"rope_theta": 1e4, "head_dim": 64, "max_position_embeddings": 2048}
NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_stretched_rope():
    assert stretched(LLAMA, None, 2048) is None
    assert stretched(LLAMA, "yarn", 100) is None
    assert stretched(LLAMA, "none", 9999) is None
    ntk = stretched(LLAMA, "ntk", 8192)
    assert ntk == {"rope_theta": 1e4 * 4 ** (64 / 62)}
    # Raised like this, the slowest pair turns as far over the whole context as it did before.
    slow = [Rope(theta=theta, dim=64).wavelengths[-1] for theta in (1e4, ntk["rope_theta"])]
    np.testing.assert_allclose(slow[1], 4 * slow[0])
    yarn = Rope.from_config({**LLAMA, "rope_parameters": stretched(LLAMA, "yarn", 8192)})
    assert yarn.scaling == YarnScaling(factor=4.0, original_max_position=2048)
    own = stretched(LLAMA, {"rope_type": "linear", "factor": 2.0}, None)
    assert Rope.from_config({**LLAMA, "rope_parameters": own}).scaling == LinearScaling(factor=2.0)
    nested = stretched({**LLAMA, "rope_parameters": NESTED}, "linear", 8192)
    assert nested["sliding_attention"] == NESTED["sliding_attention"]
    assert nested["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "scaling", "message"),
    [
        ({}, None, r"context is 8192, but .* 2048 positions: give rope_scaling 'ntk'"),
        ({}, "magic", "rope_scaling is 'magic', expected one of"),
        ({}, {"factor": 2.0}, "expected a rope_type"),
        ({}, {"rope_type": "linear"}, "lacks 'factor'"),
        ({}, {"rope_type": "magic"}, "rope_type is 'magic'"),
        ({"rope_type": "linear", "factor": 2.0}, "yarn", "already has rope_type 'linear': give the whole"),
        ({"rope_type": "dynamic", "factor": 2.0}, "ntk", "already has rope_type 'dynamic'"),
    ],
)
def test_scalings_that_do_not_fit(config, scaling, message):
    config = {**LLAMA, "rope_parameters": {"rope_theta": 1e4, **config}}
    with pytest.raises(InvalidInputError, match=message):
        stretched(config, scaling, 8192)


@pytest.mark.parametrize("scaling", ["ntk", "yarn", "linear"])
def test_a_folder_is_loaded_and_its_rope_stretched(folder, text, tmp_path, scaling, tiny):
    loaded = load_model(folder, context=CONTEXT, rope_scaling=scaling, device="cpu", dtype="float32")
    assert loaded.name == "tiny-llama"
    rope = inspect_layers(loaded.model, CONTEXT).usable[2].rope
    config = {**LLAMA, "head_dim": 16, "max_position_embeddings": 64}
    expected = {**config, "rope_parameters": stretched(config, scaling, CONTEXT)}
    assert rope == Rope.from_config(expected)
    report = capture(loaded, [text], context=CONTEXT, out=tmp_path)
    assert report.info["weights"] == weights_hash(tiny("Llama"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.gguf", "no such file"),
        ("/none", "no such folder"),
        ("", "no config.json"),
        ("../x", "no such folder"),
    ],
)
def test_models_that_are_not_there(tmp_path, name, message):
    with pytest.raises(InvalidInputError, match=f"cannot load the model.*{message}"):
        load_model(name if name.startswith((".", "/")) else tmp_path / name)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InvalidInputError, match=r"give the file, .*x\.gguf"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="cannot load the model"):
        load_model(tmp_path)


def test_fingerprint_of_the_weights(device, tiny):
    model = tiny("Llama")
    ours = weights_hash(model)
    assert len(ours) == 64
    assert weights_hash(tiny("Llama").to(device)) == ours
    assert weights_hash(model.model) == ours  # without the head
    assert weights_hash(tiny("Llama").to(torch.bfloat16)) != ours
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert weights_hash(model) != ours
    with pytest.raises(InvalidInputError, match="not in memory"):
        weights_hash(tiny("Llama").to("meta"))
