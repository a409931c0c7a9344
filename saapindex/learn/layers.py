"""Which layers of a model can be captured, and what their attention does: heads, scale, rotary embedding.

Configs name these things in many ways, so the model itself is asked. One token is read at several positions,
each in a sequence of its own. With nothing else to attend to, attention returns the value and every hidden
state is the same in all sequences; keys can only differ by their rotation. So a rotary embedding that is
read out of the config is right for a layer if it undoes this difference, and where there is no difference
the layer has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError
from saapindex.learn.attention_hook import Call, watched
from saapindex.learn.models import decoder_of
from saapindex.rope import Rope

if TYPE_CHECKING:
    import torch

__all__ = ["Layer", "Layers", "inspect_layers"]

_SAME, _UNDONE = 1e-3, 0.1
"""Relative differences of keys: none at all, and no more than half precision makes of the angles."""


@dataclass(frozen=True)
class Layer:
    """A layer of full attention.

    Attributes
    ----------
    kv_heads, q_heads, d
        Its heads and their size.
    scale
        Factor on ``q . k``.
    softcap
        Soft cap on the logits, or None.
    rope
        Rotary embedding of its keys and queries, or None.
    """

    kv_heads: int
    q_heads: int
    d: int
    scale: float
    softcap: float | None
    rope: Rope | None


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes
    ----------
    count
        How many the model has.
    usable
        Those of full attention, by number.
    left_out
        Why each of the others cannot be captured, by number.
    """

    count: int
    usable: Mapping[int, Layer]
    left_out: Mapping[int, str]


def inspect_layers(model: Any, context: int) -> Layers:
    """Find out what the layers of `model` do when it reads `context` tokens.

    Parameters
    ----------
    model
        A decoder of transformers.
    context
        Tokens that are to be read: a sliding window of no fewer is none, and some scalings depend on it.

    Raises
    ------
    InvalidInputError
        If the rotary embedding in the config is unknown, or is not what the model does.
    """
    decoder = decoder_of(model)
    calls, positions = _probe(decoder, context)
    count = decoder.config.num_hidden_layers
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * count
    usable, left_out = {}, {}
    for number in range(count):
        reason = _unusable(calls.get(number), types[number], decoder.config, context)
        if reason:
            left_out[number] = reason
        else:
            usable[number] = _layer(calls[number], decoder.config, context, positions)
    return Layers(count, usable, left_out)


def _probe(decoder: Any, context: int) -> tuple[dict[int, Call], NDArray[np.int64]]:
    """Read one token at several positions; return each layer's call, and the positions."""
    import torch

    positions = np.unique([0, min(1, context - 1), min(7, context - 1), context // 3, context - 1])
    vocabulary = decoder.config.vocab_size
    token = vocabulary // 2
    if token == getattr(decoder.config, "pad_token_id", None):  # whose embedding is zero
        token = (token + 1) % vocabulary
    calls: dict[int, Call] = {}
    device = decoder.device

    def watch(call: Call) -> None:
        calls[call.layer] = call

    with torch.no_grad(), watched(decoder, watch):
        decoder(
            torch.full((len(positions), 1), token, device=device),
            position_ids=torch.from_numpy(positions)[:, None].to(device),
            use_cache=False,
        )
    return calls, positions


def _unusable(call: Call | None, kind: str, config: Any, context: int) -> str | None:
    """Return why a layer cannot be captured, or None if it can."""
    window = None if call is None else call.options.get("sliding_window")
    if kind != "full_attention":
        size = window or getattr(config, "sliding_window", None)
        return f"{kind}, window {size}" if kind == "sliding_attention" and size else str(kind)
    if call is None:
        return "no softmax attention"
    if window and window < context:
        return f"sliding_attention, window {window}"
    if not getattr(call.module, "is_causal", True):
        return "attention that is not causal"
    extra = [name for name in ("s_aux", "position_bias") if call.options.get(name) is not None]
    if extra:
        return f"attention with {extra[0]}"
    if call.value.shape != call.key.shape or call.query.shape[-1] != call.key.shape[-1]:
        return "keys, values and queries of different sizes"
    return None


def _layer(call: Call, config: Any, context: int, positions: NDArray[np.int64]) -> Layer:
    scale, softcap = call.options.get("scaling"), call.options.get("softcap")
    d = call.key.shape[3]
    return Layer(
        kv_heads=call.key.shape[1],
        q_heads=call.query.shape[1],
        d=d,
        scale=d**-0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        rope=_rope(call, config, context, positions),
    )


def _rope(call: Call, config: Any, context: int, positions: NDArray[np.int64]) -> Rope | None:
    """Return the rotary embedding of a layer, after trying it on the keys of the probe."""
    keys = _rows(call.key)
    if not np.isfinite(keys).all():
        raise InvalidInputError(f"layer {call.layer}: the keys hold NaN or infinity, expected finite values")
    if len(positions) > 1 and _spread(keys) < _SAME:
        return None
    rope = Rope.from_config(config, context=context)
    other: Literal["half", "interleaved"] = "half" if rope.layout == "interleaved" else "interleaved"
    # The config of a model that is not part of transformers does not tell the layout.
    for candidate in (rope, dataclasses.replace(rope, layout=other)):
        at = np.tile(positions, keys.shape[0])
        if rope.dim <= keys.shape[2]:
            undone = candidate.unrotate(keys.reshape(-1, keys.shape[2]), at).reshape(keys.shape)
            if _spread(undone) < _UNDONE:
                return candidate
    raise InvalidInputError(
        f"layer {call.layer}: the keys are not rotated as the config says ({rope}), expected a model whose "
        "rotary embedding depends on the position alone"
    )


def _rows(key: torch.Tensor) -> NDArray[np.float32]:
    """Return the probe's keys as (kv_heads, positions, d)."""
    rows: NDArray[np.float32] = key[:, :, 0].transpose(0, 1).float().cpu().numpy()
    return rows


def _spread(keys: NDArray[np.float32]) -> float:
    """Return how far keys of one head at different positions lie apart, relative to their length."""
    lengths = np.linalg.norm(keys[:, 0], axis=1)
    apart = np.linalg.norm(keys - keys[:, :1], axis=2).max(axis=1)
    return float((apart / np.maximum(lengths, 1e-30)).max())
