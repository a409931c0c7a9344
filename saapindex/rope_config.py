"""Reading a rotary embedding out of a model's config, in the styles that transformers has written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saapindex.errors import InvalidInputError
from saapindex.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Scaling,
    YarnScaling,
    number,
    whole_number,
)

__all__ = ["read_config", "scaling_from_config"]

_INTERLEAVED = {
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ernie4_5",
    "ernie4_5_moe",
    "glm",
    "glm4",
    "glm4v_text",
    "glm_ocr_text",
    "gptj",
    "helium",
    "llama4_text",
}
"""Model types whose pairs are neighbours."""

_FOREIGN = {
    "chatglm": "its rope_ratio means different things in different releases",
    "ernie4_5_vl_moe_text": "it orders its frequencies by image axes",
}
"""Model types whose config does not say enough."""

_SIGNS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base")
"""Settings by which a config shows that its model has a rotary embedding."""


def read_config(config: object, *, context: int | None, layer_type: str) -> dict[str, Any]:
    """Return the arguments of `Rope` for the layers of one type; see `Rope.from_config`."""
    source = _Source(config, layer_type)
    parameters = source.parameters()
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = source.read("rope_theta", "rotary_emb_base")
    if theta is None:
        default = source.read("default_theta")
        theta = default if isinstance(default, (int, float)) else 10000.0
    return {
        "theta": theta,
        "dim": source.dim(parameters),
        "layout": "interleaved" if source.read("model_type") in _INTERLEAVED else "half",
        "scaling": scaling_from_config(
            parameters,
            original=source.read("original_max_position_embeddings"),
            max_position=source.read("max_position_embeddings", "n_positions"),
            context=context,
        ),
    }


class _Source:
    """A config, object or dict, of which settings are read by name."""

    def __init__(self, config: object, layer_type: str) -> None:
        self.config = config
        self.layer_type = layer_type
        if self.read("text_config") is not None:
            self.config = self.read("text_config")
        if self.read("is_heterogeneous"):  # layers of different shapes (Gemma 4)
            layers = self.read("per_layer_config")
            try:
                self.config = layers[layer_type]
            except (KeyError, ValueError) as error:
                raise InvalidInputError(
                    f"layer_type is {layer_type!r}, but the config has no such layers"
                ) from error
        kind = self.read("model_type")
        if kind in _FOREIGN:
            raise InvalidInputError(f"cannot read a config of {kind!r}: {_FOREIGN[kind]}; use Rope(...)")
        if self.read("qk_rope_head_dim"):
            raise InvalidInputError(
                f"{kind!r} rotates a part of its own of each key (qk_rope_head_dim), expected one that "
                "rotates the first dimensions: split that part off and use Rope(...) on it"
            )
        if self.read("alibi") or not any(self._holds(name) for name in _SIGNS):
            raise InvalidInputError(
                f"the config ({kind or type(config).__name__}) has no rotary embedding, expected one of "
                f"{', '.join(_SIGNS)}"
            )

    def read(self, *names: str) -> Any:
        """Return the first of the settings that is not None."""
        for name in names:
            if isinstance(self.config, Mapping):
                value = self.config.get(name)
            else:
                value = getattr(self.config, name, None)
            if value is not None:
                return value
        return None

    def _holds(self, name: str) -> bool:
        return name in self.config if isinstance(self.config, Mapping) else self.read(name) is not None

    def parameters(self) -> Mapping[str, Any]:
        """Return the RoPE parameters of the type of layer."""
        local_theta = self.read("rope_local_base_freq")
        parameters = self.read("rope_parameters")
        if not parameters:
            if local_theta is not None and self.layer_type == "sliding_attention":
                return {"rope_theta": local_theta}  # how Gemma 3 was written before
            parameters = self.read("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise InvalidInputError(f"rope_parameters is a {type(parameters).__name__}, expected a dict")
        nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
        if not nested:
            return parameters
        if self.layer_type not in nested:
            raise InvalidInputError(
                f"layer_type is {self.layer_type!r}, expected one of {sorted(nested)}, which have parameters"
            )
        return nested[self.layer_type]

    def dim(self, parameters: Mapping[str, Any]) -> int:
        """Return how many dimensions of a head are rotated."""
        factor = parameters.get("partial_rotary_factor")
        if factor is None:
            factor = self.read("partial_rotary_factor", "rotary_pct")
        rotary = self.read("rotary_dim")
        if factor is None and rotary is not None:
            return whole_number(rotary, "rotary_dim", minimum=2)
        head = self.read("head_dim")
        if head is None:
            hidden, heads = self.read("hidden_size", "n_embd"), self.read("num_attention_heads", "n_head")
            if hidden is None or heads is None:
                raise InvalidInputError(
                    "the config has no head_dim, expected it, or hidden_size and num_attention_heads"
                )
            heads = whole_number(heads, "num_attention_heads", minimum=1)
            head = whole_number(hidden, "hidden_size", minimum=1) // heads
        head = whole_number(head, "head_dim", minimum=2)
        return head if factor is None else int(head * number(factor, "partial_rotary_factor"))


def scaling_from_config(
    parameters: Mapping[str, Any], *, original: int | None, max_position: int | None, context: int | None
) -> Scaling | None:
    """Read the scaling out of the ``rope_parameters`` (or ``rope_scaling``) of a model.

    Parameters
    ----------
    parameters
        As ``transformers`` has them.
    original
        The model's own ``original_max_position_embeddings``, which goes before that of `parameters`.
    max_position
        The model's ``max_position_embeddings``.
    context
        Length that is served, default `max_position`.

    Raises
    ------
    InvalidInputError
        If the type of scaling is unknown or a parameter is missing or wrong.

    Examples
    --------
    >>> parameters = {"rope_type": "linear", "factor": 2.0}
    >>> scaling_from_config(parameters, original=None, max_position=4096, context=None)
    LinearScaling(factor=2.0)
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("short_factor") is not None:
        kind = "longrope"  # old configs of Phi-3 call it "su" or "yarn"

    def need(name: str, value: Any = None) -> Any:
        found = parameters.get(name) if value is None else value
        if found is None:
            raise InvalidInputError(f"the config lacks {name!r}, expected with rope_type {kind!r}")
        return found

    def original_max_position() -> Any:
        if original is not None:
            return original
        own = parameters.get("original_max_position_embeddings")
        return need("max_position_embeddings", max_position) if own is None else own

    def ratio() -> Any:
        if parameters.get("factor") is not None:
            return parameters["factor"]
        longest = whole_number(need("max_position_embeddings", max_position), "max_position", minimum=1)
        return longest / whole_number(original_max_position(), "original_max_position", minimum=1)

    if kind in ("default", "mrope"):
        return None
    if kind == "linear":
        return LinearScaling(factor=need("factor"))
    if kind == "dynamic" and not parameters.get("alpha"):  # Hunyuan means something else by alpha
        longest = need("max_position_embeddings", max_position)
        return DynamicNTKScaling(
            factor=need("factor"),
            original_max_position=longest,
            context=longest if context is None else context,
        )
    if kind == "yarn":
        optional = {
            name: parameters[name]
            for name in ("mscale", "mscale_all_dim", "attention_factor", "truncate")
            if parameters.get(name) is not None
        }
        return YarnScaling(
            factor=ratio(),
            original_max_position=original_max_position(),
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            **optional,
        )
    if kind == "llama3":
        return Llama3Scaling(
            factor=need("factor"),
            low_freq_factor=need("low_freq_factor"),
            high_freq_factor=need("high_freq_factor"),
            original_max_position=original_max_position(),
        )
    if kind == "longrope":
        return LongRopeScaling(
            short_factor=need("short_factor"),
            long_factor=need("long_factor"),
            original_max_position=original_max_position(),
            context=need("max_position_embeddings", max_position) if context is None else context,
            factor=ratio(),
            attention_factor=parameters.get("attention_factor"),
        )
    raise InvalidInputError(
        f"rope_type is {kind!r}, expected default, mrope, linear, dynamic (without alpha), yarn, llama3 "
        "or longrope"
    )
