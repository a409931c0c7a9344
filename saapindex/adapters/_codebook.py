"""What a serving runtime asks of a codebook: that it fits the model, and a layer of it at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from saapindex.attention import LayerCodebook
from saapindex.codebook import Codebook
from saapindex.errors import CodebookMismatchError, InvalidInputError
from saapindex.rope import Rope

__all__ = ["AnyCodebook", "check_codebook", "layer_of"]

AnyCodebook: TypeAlias = Codebook | Mapping[int, LayerCodebook]


def layer_of(codebook: AnyCodebook, number: int, context: int, nlist: int | None = None) -> LayerCodebook:
    """Return layer `number` for a context of `context` tokens, in `nlist` lists if that is given.

    Raises
    ------
    CodebookMismatchError
        If the layer has no such partition, or no codes.
    """
    if not isinstance(codebook, Codebook):
        return codebook[number]
    layer = codebook.layer(number)
    if nlist is not None and nlist not in layer.nlists:
        raise CodebookMismatchError(
            f"layer {number} of the codebook has partitions into {', '.join(map(str, layer.nlists))} lists, "
            f"expected one into {nlist}"
        )
    if nlist is not None:
        layer = dataclasses.replace(layer, centroids={nlist: layer.centroids[nlist]})
    try:
        return LayerCodebook.of(layer, context)
    except InvalidInputError as error:
        raise CodebookMismatchError(str(error)) from error


def check_codebook(
    codebook: AnyCodebook,
    config: Any,
    *,
    nlist: int | None = None,
    model_id: str | None = None,
    weights_hash: str | None = None,
) -> tuple[int, ...]:
    """Return the numbers of the codebook's layers, after comparing it with a text config of transformers.

    Raises
    ------
    InvalidInputError
        If `codebook` is none.
    CodebookMismatchError
        Naming what differs.
    """
    if isinstance(codebook, Codebook):
        numbers = codebook.layers
        codebook.check(model_id=model_id, weights_hash=weights_hash)
    elif isinstance(codebook, Mapping) and all(isinstance(x, LayerCodebook) for x in codebook.values()):
        numbers = tuple(sorted(codebook))
    else:
        raise InvalidInputError(
            f"codebook is a {type(codebook).__name__}, expected a Codebook, or a LayerCodebook for each layer"
        )
    count = config.num_hidden_layers
    beyond = [number for number in numbers if not 0 <= number < count]
    if beyond or not numbers:
        raise CodebookMismatchError(f"the codebook has layers {numbers}, but the model has {count} layers")
    q_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    for number in numbers:
        if isinstance(codebook, Codebook):
            rope = _rope(config, codebook.layer(number).rope)
            codebook.check(layer=number, rope=rope, q_heads=q_heads, kv_heads=kv_heads, d=d)
            layer_of(codebook, number, 1, nlist)
        elif (codebook[number].heads, codebook[number].d) != (kv_heads, d):
            raise CodebookMismatchError(
                f"the codebook does not fit: layer {number} is for {codebook[number].heads} KV heads of "
                f"{codebook[number].d} dimensions, but the model has {kv_heads} of {d}"
            )
    return numbers


def _rope(config: Any, trained: Rope | None) -> Rope | None:
    """Return the rotary embedding in `config`, at the context that `trained` is for; None if it has none.

    Configs do not tell which layers go without, nor the layout of a foreign model; training asked the model.
    """
    if trained is None:
        return None
    rope = Rope.from_config(config, context=getattr(trained.scaling, "context", None))
    return dataclasses.replace(rope, layout=trained.layout)
