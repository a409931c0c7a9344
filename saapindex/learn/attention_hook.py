"""Watching the attention of a transformers model: its queries, keys and values as they are used."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from saapindex.errors import InvalidInputError
from saapindex.learn.models import import_transformers

if TYPE_CHECKING:
    import torch

__all__ = ["Call", "sliding_attention", "watched"]

_NAME = "saapindex_capture"
LONGEST_MASK = 8192
"""Tokens up to which a sliding window may be a mask of tokens times tokens; beyond, it goes in blocks."""


class Call(NamedTuple):
    """One call of the attention function of a layer.

    Attributes
    ----------
    layer
        Number of the layer.
    query
        (batch, q_heads, n, d), rotated.
    key, value
        (batch, kv_heads, n, d), the keys rotated.
    module
        The attention module.
    options
        What else the model passed: ``scaling``, ``sliding_window``, ``softcap`` and more.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    module: Any
    options: dict[str, Any]


@contextlib.contextmanager
def watched(decoder: Any, watch: Callable[[Call], None]) -> Iterator[None]:
    """Let `watch` see every call of the attention function of `decoder`, before it is computed.

    The decoder computes what it always computes, with the attention function that it had, which is put back
    afterwards. One exception: past 8192 tokens a sliding window in SDPA attention is computed in blocks (see
    `sliding_attention`), because its mask alone would take tokens times tokens bytes.

    Parameters
    ----------
    decoder
        A decoder of transformers that calls its attention through ``AttentionInterface``.
    watch
        Called with each `Call`; an exception that it raises ends the forward pass.
    """
    transformers = import_transformers()
    before = decoder.config._attn_implementation
    own = transformers.AttentionInterface().get(before)
    own_mask = transformers.AttentionMaskInterface().get(before)
    types = getattr(decoder.config, "layer_types", None) or []
    in_blocks = before == "sdpa" and "chunked_attention" not in types

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        watch(Call(module.layer_idx, query, key, value, module, options))
        window = options.get("sliding_window")
        if in_blocks and mask is None and window and key.shape[2] > max(window, LONGEST_MASK):
            return sliding_attention(query, key, value, scale=options.get("scaling"), window=window), None
        function = own or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, mask, **options)

    def mask_of(*arguments: Any, **options: Any) -> Any:
        window = options.get("local_size")
        if in_blocks and window and options.get("kv_length", 0) > max(window, LONGEST_MASK):
            return None
        return None if own_mask is None else own_mask(*arguments, **options)

    transformers.AttentionInterface.register(_NAME, attention)
    transformers.AttentionMaskInterface.register(_NAME, mask_of)
    decoder.set_attn_implementation(_NAME)
    try:
        if decoder.config._attn_implementation != _NAME:
            raise InvalidInputError(
                f"{type(decoder).__name__} does not call its attention through transformers' "
                "AttentionInterface, expected a model that does"
            )
        yield
    finally:
        decoder.set_attn_implementation(before)


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None,
    window: int,
    block: int = 2048,
) -> torch.Tensor:
    """Causal attention over a sliding window, a block of queries at a time, in memory linear in n.

    Parameters
    ----------
    query
        (batch, q_heads, n, d).
    key, value
        (batch, kv_heads, n, d).
    scale
        Factor on ``q . k``, default ``d ** -0.5``.
    window
        A query sees itself and the ``window - 1`` keys before it.
    block
        Queries at a time.

    Returns
    -------
    Tensor
        (batch, n, q_heads, d), contiguous: what transformers expects of an attention function.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    n, group = query.shape[2], query.shape[1] // key.shape[1]
    result = query.new_empty(query.shape[0], n, query.shape[1], value.shape[3])
    for start in range(0, n, block):
        end, first = min(start + block, n), max(start - window + 1, 0)
        ages = torch.arange(start, end, device=query.device)[:, None]
        ages = ages - torch.arange(first, end, device=query.device)
        k, v = (x[:, :, first:end].repeat_interleave(group, 1) for x in (key, value))
        mask = (ages >= 0) & (ages < window)
        part = scaled_dot_product_attention(query[:, :, start:end], k, v, attn_mask=mask, scale=scale)
        result[:, start:end] = part.transpose(1, 2)
    return result
