"""Capture of traces from a transformers model: what its attention sees while it reads a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.learn.traces import Trace
from saapindex.rope import Rope

if TYPE_CHECKING:
    import torch

__all__ = ["capture", "load_model"]

_NAME = "saapindex_capture"


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "capturing a trace", "capture") from error
    return transformers


def load_model(folder: str, *, gguf_file: str | None = None, context: int | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer for a context of `context` tokens.

    Parameters
    ----------
    folder
        A folder or an id that transformers loads.
    gguf_file
        Name of a GGUF file in it.
    context
        Tokens to be read. Past the length that the model was trained for, the base of its rotary
        embedding is raised ("NTK-aware"): ``theta * (context / trained) ** (dim / (dim - 2))``.

    Returns
    -------
    model, tokenizer
        In bfloat16, ready to run.
    """
    transformers = _transformers()
    import torch

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    model.eval()
    trained = model.config.max_position_embeddings
    if context is not None and context > trained:
        rope = Rope.from_config(model.config)
        theta = rope.theta * (context / trained) ** (rope.dim / (rope.dim - 2))
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": theta}
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(model.config).to(model.device)
    return model, tokenizer


def capture(
    model: Any,
    tokens: Sequence[int],
    *,
    layers: Sequence[int],
    query_positions: NDArray[np.int64],
    n_keys: int | None = None,
) -> dict[int, Trace]:
    """Let `model` read `tokens` and keep what the attention of some layers sees.

    The model computes what it always computes; its attention function is put back afterwards.

    Parameters
    ----------
    model
        A transformers decoder with rotary embeddings.
    tokens
        Token ids, at least one.
    layers
        Layers to keep.
    query_positions
        int64, (m,): positions whose queries are kept.
    n_keys
        Keys and values of the first so many positions are kept; by default all.

    Returns
    -------
    dict
        A `Trace` in float16 for each layer.

    Raises
    ------
    InvalidInputError
        If a layer or a position does not exist.
    """
    transformers = _transformers()
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    count = model.config.num_hidden_layers
    if not set(layers) <= set(range(count)):
        raise InvalidInputError(f"layers are {list(layers)}, expected some of 0 to {count - 1}")
    if len(query_positions) and not 0 <= query_positions.min() <= query_positions.max() < len(tokens):
        raise InvalidInputError(
            f"query positions reach {query_positions.max()}, expected below {len(tokens)}"
        )
    kept = torch.from_numpy(query_positions)
    traces: dict[int, Trace] = {}
    rope = Rope.from_config(model.config)

    def array(tensor: torch.Tensor) -> NDArray[np.float16]:
        return tensor[0].to(torch.float16).cpu().numpy().copy()

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            traces[module.layer_idx] = Trace(
                keys=array(key[:, :, :n_keys]),
                values=array(value[:, :, :n_keys]),
                queries=array(query[:, :, kept]),
                key_positions=np.arange(key[:, :, :n_keys].shape[2]),
                query_positions=query_positions,
                rope=rope,
                info={"layer": module.layer_idx, "context": len(tokens)},
            )
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    transformers.AttentionInterface.register(_NAME, attention)
    transformers.AttentionMaskInterface.register(
        _NAME, transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.no_grad():
            model.base_model(torch.tensor([list(tokens)], device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return {layer: traces[layer] for layer in layers}
