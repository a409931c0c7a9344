"""Sparse attention for models of transformers: a cache, and an attention function that reads it.

Importing this module registers the attention function (and its mask) with transformers as
``"saapindex"``. A model uses it inside of `sparse_attention`, or after
``model.set_attn_implementation("saapindex")``::

    cache = SaapCache(Codebook.load("codebook.safetensors"), model.config, budget=0.05)
    with sparse_attention(model):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=200)

Prompts are read with dense, exact attention; the steps that follow, of one token or a few, attend through
`saapindex.attention.AttentionIndex`. With another attention function, or another cache, the model is what it
always was.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from saapindex.attention import DENSE_BELOW, AttendParameters, AttentionIndex, MemoryStatement
from saapindex.errors import CodebookMismatchError, InvalidInputError, MissingDependencyError
from saapindex.params import check_integer

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
except ImportError as error:
    raise MissingDependencyError(
        error.name or "transformers", "generating with a transformers model", "transformers"
    ) from error

from saapindex.adapters._codebook import AnyCodebook, check_codebook, layer_of
from saapindex.adapters._transformers_layer import NAME, SaapLayer, Shared, layer_behind

__all__ = ["NAME", "SaapCache", "SaapLayer", "sparse_attention"]


class SaapCache(Cache):  # type: ignore[misc]
    """The cache of a model whose long-range attention is sparse.

    It serves all that `generate` does with a dynamic cache: greedy search and sampling, beam search, assisted
    generation, batches padded on the left, prompts read in chunks, and several turns. ``copy.deepcopy`` of a
    cache shares what is in the index, so a prompt that several conversations begin with is held once.

    Layers of full attention that the codebook has hold their keys and values in an `AttentionIndex` once the
    model generates, and nowhere else; before, and for the tokens of a further prompt, in plain tensors. While
    a further prompt is read, one layer at a time is copied out of its index. Other layers (sliding windows,
    linear attention, layers without a codebook) have the caches that transformers gives them.

    Parameters
    ----------
    codebook
        What training learned about the model; or a `LayerCodebook` for each layer, by number.
    config
        ``model.config``, itself and not a copy: it says whether sparse attention is on.
    budget
        Share of the bytes of the long-range keys and values that a step may read, 1 for dense attention;
        by default 0.05.
    params
        What a step may read in full, in place of `budget`.
    window, sinks
        Recent and first tokens that are always attended to.
    dense_below
        Shorter contexts are attended to densely, and kept in plain tensors.
    flush
        Tokens leave the window so many at a time.
    max_decode
        Queries of more tokens than this are attended to densely, as prompts are; assisted generation asks for
        as many tokens at a time as its assistant proposes.
    nlist
        Which partition of the codebook to use. Default: the one that suits the length of the context when the
        layer is indexed, see `saapindex.params.default_nlist`.
    adapt
        Lloyd steps that fit the partition to the context.
    backend
        ``"cpu"`` (numba, all cores) or ``"reference"`` (NumPy): what works on the host.
    device
        Where keys are kept and attended to: ``"cpu"``, or ``"cuda"`` or ``"cuda:1"``, where the model is.
    model_id, weights_hash
        Of the model, compared with those in the codebook where both are known.

    Raises
    ------
    CodebookMismatchError
        If the codebook was trained for other layers, heads, RoPE or weights. The scale and the soft cap of
        the logits are compared in the first sparse step.
    InvalidInputError
        On parameters out of their range.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from saapindex.attention import fit_layer
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=1, pad_token_id=0,
    ... )
    >>> model, prompt = LlamaForCausalLM(config).eval(), torch.arange(3, 43)[None]
    >>> sample = np.random.default_rng(0).standard_normal((2, 50, 16))
    >>> cache = SaapCache({0: fit_layer(sample[:1], sample, 4, words=1)}, config, window=8, dense_below=0)
    >>> how = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    >>> with sparse_attention(model):
    ...     tokens = model.generate(prompt, past_key_values=cache, **how)
    >>> tokens.shape, cache.get_seq_length()
    (torch.Size([1, 43]), 42)
    """

    def __init__(
        self,
        codebook: AnyCodebook,
        config: Any,
        *,
        budget: float | None = None,
        params: AttendParameters | None = None,
        window: int = 2047,
        sinks: int = 1,
        dense_below: int = DENSE_BELOW,
        flush: int = 256,
        max_decode: int = 32,
        nlist: int | None = None,
        adapt: int = 3,
        backend: str = "cpu",
        device: str = "cpu",
        model_id: str | None = None,
        weights_hash: str | None = None,
    ) -> None:
        check_integer("max_decode", max_decode, 1)
        if budget is not None and params is not None:
            raise InvalidInputError("budget and params are given together, expected one of them")
        if not hasattr(config, "get_text_config"):
            raise InvalidInputError(f"config is a {type(config).__name__}, expected model.config")
        text = config.get_text_config(decoder=True)
        numbers = check_codebook(codebook, text, nlist=nlist, model_id=model_id, weights_hash=weights_hash)
        layers = DynamicCache(config=text).layers
        served = [number for number in numbers if type(layers[number]) is DynamicLayer]
        if not served:
            raise CodebookMismatchError(
                f"the codebook has layers {numbers}, but none of them is one of full attention in the model"
            )
        index: dict[str, Any] = {
            "window": window,
            "sinks": sinks,
            "dense_below": dense_below,
            "flush": flush,
            "adapt": adapt,
            "backend": backend,
            "device": device,
        }
        wanted = AttendParameters(budget=budget) if params is None else params
        first = layer_of(codebook, served[0], 1, nlist)
        AttentionIndex(first, params=wanted, **index)  # which checks these settings
        shared = Shared(text, codebook, nlist, index, max_decode)
        for number in served:
            layers[number] = SaapLayer(shared, number, wanted)
        super().__init__(layers=layers)

    @property
    def served(self) -> tuple[int, ...]:
        """Numbers of the layers whose attention is sparse."""
        return tuple(number for number, layer in enumerate(self.layers) if isinstance(layer, SaapLayer))

    @property
    def params(self) -> AttendParameters:
        """What a step may read; may be changed between steps, of a copy without changing the original."""
        found: AttendParameters = self.layers[self.served[0]].params
        return found

    @params.setter
    def params(self, params: AttendParameters) -> None:
        if not isinstance(params, AttendParameters):
            raise InvalidInputError(f"params is a {type(params).__name__}, expected AttendParameters")
        for number in self.served:
            self.layers[number].params = params

    def memory(self) -> MemoryStatement:
        """Return the bytes that the layers with sparse attention hold; forks of a cache share pages."""
        parts = [self.layers[number].memory() for number in self.served]
        names = MemoryStatement.__dataclass_fields__
        return MemoryStatement(**{name: sum(getattr(part, name) for part in parts) for name in names})


@contextlib.contextmanager
def sparse_attention(model: Any) -> Iterator[None]:
    """Let the text decoder of `model` attend through this library, where its cache is a `SaapCache`.

    Afterwards the attention function that it had is back. A `SaapCache` goes on to work with that one, exact
    and dense, but slowly, since every step then copies all keys out of the index.

    Parameters
    ----------
    model
        A decoder of transformers, with or without its language-modelling head.

    Raises
    ------
    InvalidInputError
        If the model does not take its attention function from transformers' ``AttentionInterface``.
    """
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    if decoder.config._attn_implementation != NAME:
        raise InvalidInputError(
            f"{type(decoder).__name__} does not call its attention through transformers' AttentionInterface, "
            "expected a model that does"
        )
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a layer, as ``AttentionInterface`` calls it: sparse where its cache asks for it."""
    layer = layer_behind(key)
    if layer is not None and not layer.shared.is_on:
        raise InvalidInputError(
            "the cache was made with another config than the model's, expected SaapCache(..., model.config)"
        )
    if key.is_meta and not query.is_meta:
        if layer is None:
            raise InvalidInputError(
                f"{type(module).__name__} changes what its cache returns before it attends, expected a model "
                "that hands it to the attention function"
            )
        return layer.attend(query, attention_mask, options), None
    if options.get("softcap") is None and options.get("s_aux") is None:
        result: tuple[torch.Tensor, None] = AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, **options
        )
        return result
    return _eager(module, query, key, value, attention_mask, options)


def _eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the model's own code, for what SDPA cannot do."""
    t, n = query.shape[2], key.shape[2]
    if mask is None and t > 1:
        mask = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    function = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[torch.Tensor, torch.Tensor | None] = function(module, query, key, value, mask, **options)
    return result


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
