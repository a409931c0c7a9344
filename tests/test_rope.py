"""Rope: against the rotary code of transformers, its inverse, its files and its errors."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saapindex.backends import get_ops
from saapindex.errors import InvalidInputError
from saapindex.rope import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

SCALINGS = {
    "none": None,
    "linear": LinearScaling(factor=4.0),
    "dynamic": DynamicNTKScaling(factor=2.0, original_max_position=64, context=300),
    "yarn": YarnScaling(factor=8.0, original_max_position=512, truncate=False),
    "llama3": Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=512),
    "longrope": LongRopeScaling(
        short_factor=[1.0] * 8,
        long_factor=[1.0 + i for i in range(8)],
        original_max_position=64,
        context=100,
        factor=2.0,
    ),
}
ROPES = {
    **{name: Rope(dim=16, scaling=scaling) for name, scaling in SCALINGS.items()},
    "interleaved": Rope(dim=16, theta=500000.0, layout="interleaved"),
    "partial": Rope(dim=10, theta=1000.0),
    "partial, interleaved": Rope(dim=6, layout="interleaved", scaling=SCALINGS["yarn"]),
}


def rows(n=63, d=16, *, seed=0, dtype=np.float64, longest=1_000_000):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(dtype), rng.integers(-longest, longest + 1, size=n)


# Against transformers

LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
PARTIAL = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
PHI3 = {
    **LLAMA,
    "original_max_position_embeddings": 48,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "rope_theta": 5000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
    },
}
GEMMA3 = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "rope_theta": 1e6,
    "rope_local_base_freq": 2000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def llama(**scaling):
    return "llama", "Llama", {**LLAMA, "rope_theta": 20000.0, "rope_scaling": scaling or None}


def yarn(**more):
    return llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, **more)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name: module, prefix of its classes, settings of an old-style config.json, number of positions, layer type
FAMILIES = {
    "llama": (*llama(), 200, None),
    "linear": (*llama(rope_type="linear", factor=3.0), 200, None),
    "linear, old name": (*llama(type="linear", factor=3.0), 200, None),
    "dynamic, short": (*llama(rope_type="dynamic", factor=2.0), 20, None),
    "dynamic, long": (*llama(rope_type="dynamic", factor=2.0), 200, None),
    "yarn": (*yarn(), 200, None),
    "yarn, mscale": (*yarn(mscale=0.8, mscale_all_dim=0.5), 200, None),
    "yarn, zero mscale": (*yarn(mscale=0.8, mscale_all_dim=0.0), 200, None),
    "yarn, own factor": (*yarn(attention_factor=1.7, beta_fast=8.0, beta_slow=2.0), 200, None),
    "yarn, no truncation": (*yarn(truncate=False, beta_fast=2.0, beta_slow=0.5), 200, None),
    "llama3": (*llama(**LLAMA3, original_max_position_embeddings=32), 200, None),
    "longrope, short": ("phi3", "Phi3", PHI3, 48, None),
    "longrope, long": ("phi3", "Phi3", PHI3, 49, None),
    "gemma3, full": ("gemma3", "Gemma3", GEMMA3, 200, "full_attention"),
    "gemma3, sliding": ("gemma3", "Gemma3", GEMMA3, 200, "sliding_attention"),
    "gpt_neox": (
        "gpt_neox",
        "GPTNeoX",
        {**PARTIAL, "rotary_pct": 0.25, "rotary_emb_base": 5000.0},
        200,
        None,
    ),
    "stablelm": (
        "stablelm",
        "StableLm",
        {**PARTIAL, "partial_rotary_factor": 0.5, "rope_theta": 3e4},
        200,
        None,
    ),
    "cohere": ("cohere", "Cohere", {**LLAMA, "rope_theta": 4e4}, 200, None),
    "glm": (
        "glm",
        "Glm",
        {**LLAMA, "head_dim": 16, "partial_rotary_factor": 0.5, "rope_theta": 1e4},
        200,
        None,
    ),
}


def build_config(transformers, module, prefix, settings):
    """A config object of the family, built from the settings of an old-style file."""
    suffix = "TextConfig" if module == "gemma3" else "Config"
    settings = json.loads(json.dumps(settings))  # transformers writes into what it is given
    return getattr(transformers, prefix + suffix)(**settings)


def model_rotation(module, prefix, config, x, n, layer_type):
    """Keys at positions 0 to n - 1 as the model's own code rotates them; the frequencies; the factor."""
    import torch

    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    rotary = getattr(code, f"{prefix}RotaryEmbedding")(config)
    keys = torch.from_numpy(x)[None, None]
    of_layer = {} if layer_type is None else {"layer_type": layer_type}
    cos, sin = rotary(keys, torch.arange(n)[None], **of_layer)
    head, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    rotated = torch.cat([code.apply_rotary_pos_emb(head, head, cos, sin)[1], rest], -1)
    before = "" if layer_type is None else f"{layer_type}_"
    return (
        rotated[0, 0].numpy(),
        getattr(rotary, f"{before}inv_freq").numpy(),
        getattr(rotary, f"{before}attention_scaling"),
    )


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_rotates_as_the_model_does(family):
    transformers = pytest.importorskip("transformers")
    module, prefix, settings, n, layer_type = FAMILIES[family]
    config = build_config(transformers, module, prefix, settings)
    rope = Rope.from_config(config, context=n, layer_type=layer_type)
    d = settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    x, _ = rows(n, d, dtype=np.float32)
    expected, frequencies, factor = model_rotation(module, prefix, config, x, n, layer_type)
    np.testing.assert_allclose(rope.frequencies, frequencies, rtol=3e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    np.testing.assert_allclose(rope.rotate(x, np.arange(n)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rope.unrotate(expected, np.arange(n)), x, rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_every_style_of_config_reads_alike(family):
    transformers = pytest.importorskip("transformers")
    module, prefix, settings, n, layer_type = FAMILIES[family]
    config = build_config(transformers, module, prefix, settings)
    rope = Rope.from_config(config, context=n, layer_type=layer_type)
    old_style = {**settings, "model_type": config.model_type}
    assert Rope.from_config(old_style, context=n, layer_type=layer_type) == rope
    new_style = json.loads(json.dumps(config.to_dict()))
    assert Rope.from_config(new_style, context=n, layer_type=layer_type) == rope
    assert Rope.from_config({"text_config": new_style}, context=n, layer_type=layer_type) == rope


@pytest.mark.torch
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_gptj(rotary_dim):
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.gptj import modeling_gptj as code

    config = transformers.GPTJConfig(n_embd=64, n_head=4, rotary_dim=rotary_dim, n_positions=512)
    rope = Rope.from_config(config)
    assert rope == Rope(dim=rotary_dim, layout="interleaved")
    assert Rope.from_config(config.to_dict()) == rope
    x, _ = rows(200, 16, dtype=np.float32)
    sin, cos = code.create_sinusoidal_positions(200, rotary_dim)[None].chunk(2, dim=-1)
    head = torch.from_numpy(x[:, :rotary_dim])[None, :, None]
    rotated = code.apply_rotary_pos_emb(head, sin, cos)[0, :, 0].numpy()
    expected = np.concatenate([rotated, x[:, rotary_dim:]], axis=1)
    np.testing.assert_allclose(rope.rotate(x, np.arange(200)), expected, rtol=0, atol=1e-4)


@pytest.mark.torch
def test_llama4():
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.llama4 import modeling_llama4 as code

    config = transformers.Llama4TextConfig(**LLAMA, head_dim=16, num_hidden_layers=2, rope_theta=3e4)
    rope = Rope.from_config(config)
    x, _ = rows(200, 16, dtype=np.float32)
    keys = torch.from_numpy(x)[None, :, None]
    angles = code.Llama4TextRotaryEmbedding(config)(keys, torch.arange(200)[None])
    expected = code.apply_rotary_emb(keys, keys, angles)[1][0, :, 0].numpy()
    np.testing.assert_allclose(rope.rotate(x, np.arange(200)), expected, rtol=0, atol=1e-4)


@pytest.mark.torch
def test_layers_of_different_shapes():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma4TextConfig()
    assert Rope.from_config(config, layer_type="sliding_attention") == Rope(dim=256)
    with pytest.raises(InvalidInputError, match="rope_type is 'proportional', expected default"):
        Rope.from_config(config)
    with pytest.raises(InvalidInputError, match="layer_type is 'other'"):
        Rope.from_config(config, layer_type="other")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_come_back_as_tensors(kind):
    torch = pytest.importorskip("torch")
    x, positions = rows()
    tensor = torch.from_numpy(x).to(getattr(torch, kind))
    rope = ROPES["yarn"]
    out = rope.rotate(tensor, torch.from_numpy(positions))
    assert out.dtype == (torch.float64 if kind == "float64" else torch.float32)
    expected = rope.rotate(tensor.double().numpy(), positions)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-5)
    assert isinstance(rope.unrotate(out, positions, cutoff=100), torch.Tensor)
    assert isinstance(rope.rerotate(out, positions, positions + 1), torch.Tensor)


def test_context_of_the_config_is_the_default():
    assert Rope.from_config(PHI3).scaling.context == 1024
    assert Rope.from_config(PHI3).attention_factor == Rope.from_config(PHI3, context=10).attention_factor
    dynamic = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    np.testing.assert_array_equal(Rope.from_config(dynamic).frequencies, Rope(dim=16).frequencies)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_old_names_of_longrope(kind):
    old = {**PHI3, "rope_scaling": {**PHI3["rope_scaling"], "type": kind}}
    assert Rope.from_config(old) == Rope.from_config(PHI3)


def test_image_axes_are_left_out():
    config = {**LLAMA, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    assert Rope.from_config(config) == Rope(dim=16, theta=1e6)


CONFIG_ERRORS = {
    "no rotary": ({"model_type": "gpt2", "n_embd": 64, "n_head": 4}, "gpt2.* has no rotary embedding"),
    "alibi": ({**LLAMA, "rope_theta": 1e4, "alibi": True}, "has no rotary embedding"),
    "not a config": ("llama", "has no rotary embedding"),
    "no heads": ({"rope_theta": 1e4, "hidden_size": 64}, "has no head_dim, expected"),
    "odd": ({"rope_theta": 1e4, "head_dim": 10, "partial_rotary_factor": 0.5}, "dim is 5, expected an even"),
    "part": ({"rope_theta": 1e4, "head_dim": 10, "partial_rotary_factor": -1}, "partial_rotary_factor is -1"),
    "theta": ({"rope_theta": "big", "head_dim": 16}, "theta is 'big', expected a finite number above 1"),
    "type": ({**LLAMA, "rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral', expected default"),
    "alpha": ({**LLAMA, "rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 1.0}}, "without alpha"),
    "factor": (
        {**LLAMA, "rope_scaling": {"rope_type": "linear"}},
        "lacks 'factor', expected with .*'linear'",
    ),
    "length": ({"head_dim": 8, "rope_scaling": {"rope_type": "yarn"}}, "lacks 'max_position_embeddings'"),
    "list": ({"head_dim": 8, "rope_scaling": [1]}, "rope_parameters is a list, expected a dict"),
    "layers": ({"head_dim": 8, "rope_parameters": {"a": {}, "b": None}}, "layer_type is .*one of \\['a'\\]"),
    "chatglm": ({"model_type": "chatglm"}, "cannot read a config of 'chatglm'"),
    "latent": ({**LLAMA, "rope_theta": 1e4, "qk_rope_head_dim": 64}, "qk_rope_head_dim"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_errors(case):
    config, message = CONFIG_ERRORS[case]
    with pytest.raises(InvalidInputError, match=message):
        Rope.from_config(config)


# The rotation and its inverse


@pytest.mark.parametrize("name", ROPES)
def test_unrotate_undoes_rotate(name, backend):
    rope, ops = ROPES[name], get_ops(backend)
    for dtype in (np.float32, np.float64):
        x, positions = rows(100, 19, dtype=dtype)
        rotated = rope.rotate(x, positions, ops=ops)
        assert rotated.dtype == dtype
        atol = 20 * np.finfo(dtype).eps
        np.testing.assert_allclose(rope.unrotate(rotated, positions, ops=ops), x, rtol=0, atol=atol)
        np.testing.assert_array_equal(rotated[:, rope.dim :], x[:, rope.dim :])
        norms = np.linalg.norm(rotated[:, : rope.dim], axis=1) / np.linalg.norm(x[:, : rope.dim], axis=1)
        np.testing.assert_allclose(norms, rope.attention_factor, rtol=1e-5)


@given(
    name=st.sampled_from(sorted(ROPES)),
    n=st.sampled_from([0, 1, 7]),
    longest=st.sampled_from([10, 1_000_000]),
    seed=st.integers(0, 20),
)
@settings(deadline=None, max_examples=40)
def test_rerotate_is_unrotate_then_rotate(name, n, longest, seed):
    rope = ROPES[name]
    x, positions = rows(n, 16, seed=seed, longest=longest)
    _, target = rows(n, 16, seed=seed + 1, longest=longest)
    expected = rope.rotate(rope.unrotate(x, positions), target)
    np.testing.assert_allclose(rope.rerotate(x, positions, target), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ROPES)
def test_logits_depend_on_distance_alone(name):
    rope = ROPES[name]
    x, _ = rows(2)
    near = rope.rotate(x, [5, 12])
    far = rope.rotate(x, [100_005, 100_012])
    assert near[0] @ near[1] == pytest.approx(far[0] @ far[1])


@pytest.mark.parametrize("name", ROPES)
def test_cutoff_leaves_slow_pairs_untouched(name):
    rope = ROPES[name]
    x, positions = rows(dtype=np.float32)
    rotated = rope.rotate(x, positions)
    cutoff = float(np.sort(rope.wavelengths)[1])  # the pair of exactly this wavelength stays
    windowed = rope.unrotate(rotated, positions, cutoff=cutoff)
    full = rope.unrotate(rotated, positions)
    pairs = rope.dim // 2
    slow_pairs = np.flatnonzero(rope.wavelengths >= cutoff)
    assert 0 < len(slow_pairs) < pairs
    if rope.layout == "half":
        slow = np.concatenate([slow_pairs, slow_pairs + pairs])
    else:
        slow = np.concatenate([2 * slow_pairs, 2 * slow_pairs + 1])
    fast = np.setdiff1d(np.arange(x.shape[1]), slow)
    np.testing.assert_array_equal(windowed[:, slow], rotated[:, slow])
    np.testing.assert_array_equal(windowed[:, fast], full[:, fast])


def test_extreme_cutoffs():
    rope = ROPES["yarn"]
    x, positions = rows()
    np.testing.assert_array_equal(rope.unrotate(x, positions, cutoff=1.0), x)
    full = rope.unrotate(x, positions)
    np.testing.assert_array_equal(rope.unrotate(x, positions, cutoff=math.inf), full)
    np.testing.assert_array_equal(rope.unrotate(x, positions, cutoff=np.float32(1e30)), full)


def test_half_precision_is_widened():
    x, positions = rows(dtype=np.float16)
    out = ROPES["none"].rotate(x, positions)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, ROPES["none"].rotate(x.astype(np.float32), positions))


def test_strided_input():
    x, positions = rows(40, 40, dtype=np.float32)
    expected = ROPES["none"].rotate(x[::2, ::2].copy(), positions[::2].copy())
    np.testing.assert_array_equal(ROPES["none"].rotate(x[::2, ::2], positions[::2]), expected)


def test_input_errors():
    rope = Rope(dim=16)
    x, positions = rows(5, dtype=np.float32)
    with pytest.raises(
        InvalidInputError, match=r"x has shape \(5, 14\), expected \(n, d\) with d of at least 16"
    ):
        rope.rotate(x[:, :14], positions)
    with pytest.raises(InvalidInputError, match=r"x has shape \(16,\)"):
        rope.unrotate(x[0], positions)
    with pytest.raises(InvalidInputError, match=r"positions has shape \(4,\), expected \(5,\)"):
        rope.rotate(x, positions[:4])
    with pytest.raises(InvalidInputError, match="positions has dtype float64, expected integers"):
        rope.rotate(x, positions.astype(np.float64))
    with pytest.raises(InvalidInputError, match=r"new_positions has shape \(4,\), expected \(5,\)"):
        rope.rerotate(x, positions, positions[:4])
    with pytest.raises(InvalidInputError, match="x has dtype int64, expected"):
        rope.rotate(x.astype(np.int64), positions)
    for cutoff in (0, -5.0, math.nan, "far", True):
        with pytest.raises(InvalidInputError, match=r"cutoff is .*, expected a finite number above 0"):
            rope.unrotate(x, positions, cutoff=cutoff)


# Settings


@pytest.mark.parametrize("name", ROPES)
def test_dict_round_trip(name):
    rope = ROPES[name]
    again = Rope.from_dict(json.loads(json.dumps(rope.to_dict())))
    assert again == rope
    assert hash(again) == hash(rope)
    np.testing.assert_array_equal(again.frequencies, rope.frequencies)
    copy = pickle.loads(pickle.dumps(rope))
    assert copy == rope


def test_numbers_are_normalised():
    rope = Rope(dim=np.int64(16), theta=np.float32(500000), scaling=LinearScaling(factor=np.int32(2)))
    assert rope == Rope(dim=16, theta=500000.0, scaling=LinearScaling(factor=2.0))
    assert json.loads(json.dumps(rope.to_dict())) == rope.to_dict()
    assert len({rope, Rope(dim=16, theta=500000, scaling=LinearScaling(factor=2))}) == 1


def test_is_frozen():
    rope = Rope(dim=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rope.dim = 8
    with pytest.raises(ValueError, match="read-only"):
        rope.frequencies[0] = 2.0
    assert rope.frequencies is rope.frequencies
    np.testing.assert_allclose(rope.wavelengths * rope.frequencies, 2 * math.pi)


LONG = {"original_max_position": 64, "context": 100}
SETTING_ERRORS = {
    "odd dim": (lambda: Rope(dim=15), "dim is 15, expected an even number"),
    "zero dim": (lambda: Rope(dim=0), "dim is 0, expected an integer of at least 2"),
    "float dim": (lambda: Rope(dim=16.0), "dim is 16.0, expected an integer"),
    "zero theta": (lambda: Rope(dim=16, theta=0), "theta is 0, expected a finite number above 1"),
    "nan theta": (lambda: Rope(dim=16, theta=math.nan), "theta is nan"),
    "vast theta": (lambda: Rope(dim=16, theta=10**400), "theta is 1000.*expected a finite"),
    "layout": (lambda: Rope(dim=16, layout="neox"), "layout is 'neox', expected 'half' or 'interleaved'"),
    "scaling": (lambda: Rope(dim=16, scaling={"factor": 2.0}), "scaling is a dict, expected a Scaling"),
    "bool": (lambda: LinearScaling(factor=True), "factor is True, expected a finite number above 0"),
    "linear": (lambda: LinearScaling(factor=0.0), "factor is 0.0, expected a finite number above 0"),
    "two dims": (lambda: Rope(dim=2, scaling=SCALINGS["dynamic"]), "dim is 2, expected at least 4"),
    "context": (
        lambda: DynamicNTKScaling(factor=2.0, original_max_position=64, context=0),
        "context is 0, expected an integer of at least 1",
    ),
    "overflow": (
        lambda: Rope(dim=6, scaling=DynamicNTKScaling(factor=1e300, original_max_position=1, context=9)),
        "frequencies that float64 cannot hold",
    ),
    "betas": (
        lambda: YarnScaling(factor=2.0, original_max_position=64, beta_fast=1.0, beta_slow=2.0),
        "beta_fast is 1, expected at least beta_slow, 2",
    ),
    "truncate": (
        lambda: YarnScaling(factor=2.0, original_max_position=64, truncate="no"),
        "truncate is 'no', expected True or False",
    ),
    "attention factor": (
        lambda: YarnScaling(factor=2.0, original_max_position=64, attention_factor=0.0),
        "attention_factor is 0.0, expected a finite number above 0",
    ),
    "llama3": (
        lambda: Llama3Scaling(
            factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position=64
        ),
        "high_freq_factor is 4.0, expected a finite number above 4",
    ),
    "longrope, length": (
        lambda: Rope(
            dim=16, scaling=LongRopeScaling(short_factor=[1] * 8, long_factor=[1] * 7, factor=2, **LONG)
        ),
        "long_factor has length 7, expected dim / 2 = 8",
    ),
    "longrope, entry": (
        lambda: LongRopeScaling(short_factor=[1, 0], long_factor=[1, 1], factor=2, **LONG),
        r"short_factor\[1\] is 0, expected a finite number above 0",
    ),
    "longrope, text": (
        lambda: LongRopeScaling(short_factor="11", long_factor=[1, 1], factor=2, **LONG),
        "short_factor is a str, expected a list of numbers",
    ),
    "longrope, factor": (
        lambda: LongRopeScaling(short_factor=[1], long_factor=[1], **LONG),
        "factor and attention_factor are both None",
    ),
}


@pytest.mark.parametrize("case", SETTING_ERRORS)
def test_setting_errors(case):
    build, message = SETTING_ERRORS[case]
    with pytest.raises(InvalidInputError, match=message):
        build()


BAD_DICTS = {
    "no dict": ([16], "rope is a list, expected a dict"),
    "missing": ({"theta": 1e4}, r"rope lacks the keys \['dim'\]"),
    "unknown": ({"dim": 16, "base": 1e4}, r"rope has the unknown keys \['base'\]"),
    "value": ({"dim": "16"}, "dim is '16', expected an integer"),
    "null": ({"dim": 16, "theta": None}, "theta is None"),
    "layout": ({"dim": 16, "layout": []}, r"layout is \[\]"),
    "scaling": ({"dim": 16, "scaling": 4.0}, "scaling is a float, expected a dict"),
    "type": ({"dim": 16, "scaling": {"type": "spiral"}}, "scaling has type 'spiral', expected one of"),
    "no type": ({"dim": 16, "scaling": {"factor": 2.0}}, "scaling has type None"),
    "scaling, missing": ({"dim": 16, "scaling": {"type": "linear"}}, r"lacks the keys \['factor'\]"),
    "scaling, unknown": (
        {"dim": 16, "scaling": {"type": "linear", "factor": 2, "x": 1}},
        r"unknown keys \['x'\]",
    ),
}


@pytest.mark.parametrize("case", BAD_DICTS)
def test_bad_dicts(case):
    data, message = BAD_DICTS[case]
    with pytest.raises(InvalidInputError, match=message):
        Rope.from_dict(data)


def test_scaling_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Scaling()


def test_import_stays_light():
    code = "import sys, saapindex.rope; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
