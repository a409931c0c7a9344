"""The attention backend that `saapindex.adapters.vllm` registers with vLLM."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from saapindex.adapters._codebook import check_codebook, layer_of
from saapindex.adapters._vllm_requests import Requests, Step, follow
from saapindex.adapters.vllm import Settings
from saapindex.attention import PagedCache, SlotIndex
from saapindex.codebook import Codebook
from saapindex.errors import InvalidInputError

__all__ = ["SaapBackend"]

logger = init_logger("vllm.saapindex")
_REPORT = 16
"""Steps between two lines in the log that state what the indices hold."""


class SaapBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU attention, whose long-range part is sparse while it decodes."""

    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_impl_cls() -> type[SaapImpl]:
        """See vLLM."""
        return SaapImpl

    @staticmethod
    def get_builder_cls() -> type[SaapBuilder]:
        """See vLLM."""
        return SaapBuilder


class SaapBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Recognises the requests of a step, once for all layers."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._requests, self._steps = Requests(self.block_size), 0

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        count, starts = common_attn_metadata.num_reqs, metadata.query_start_loc.numpy()
        metadata.starts = starts[: count + 1].tolist()
        metadata.step = self._requests.step(
            metadata.block_table.numpy()[:count],
            metadata.seq_lens.numpy()[:count],
            starts[1 : count + 1] - starts[:count],
        )
        self._steps += 1
        if self._steps % _REPORT == 0:
            self._report()
        return metadata

    def _report(self) -> None:
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        held = [layer.impl.index.memory() for layer in layers.values() if layer.impl.index is not None]
        beside, plain = sum(part.total for part in held), sum(part.plain for part in held)
        logger.info(
            "saapindex holds %.2f MiB beside %.2f MiB of keys and values", beside / 2**20, plain / 2**20
        )


class SaapImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        unsupported = {
            "alibi": self.alibi_slopes is not None,
            "a quantised cache": self.is_fp8_kv_cache,
            "attention sinks": self.sinks is not None,
            "a soft cap of the logits": bool(self.logits_soft_cap),
            "attention other than a decoder's": self.attn_type != "decoder",
            "a cache shared by layers": self.kv_sharing_target_layer_name is not None,
        }
        for what in (name for name, present in unsupported.items() if present):
            raise InvalidInputError(
                f"saapindex does not support {what} inside vLLM: unset SAAPINDEX_CODEBOOK"
            )
        settings = Settings.of(os.environ)
        assert settings is not None
        self.settings, self.index = settings, cast(SlotIndex | None, None)
        self.codebook = Codebook.load(settings.codebook)
        self.context = get_current_vllm_config().model_config.max_model_len
        check_codebook(
            self.codebook, get_current_vllm_config().model_config.hf_text_config, nlist=settings.nlist
        )

    def do_kv_cache_update(
        self, layer: Any, key: Any, value: Any, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write new keys and values as plain rows."""
        there = slot_mapping >= 0
        slots = slot_mapping[there]
        for cache, new in zip(_parts(kv_cache), (key, value), strict=True):
            size = cache.shape[2]
            cache[slots // size, :, slots % size] = new[: len(there)][there].to(cache.dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> torch.Tensor:
        """Attend to prompts densely, and to what follows them through the index."""
        if attn_metadata is None:  # a dry run
            return output
        step: Step = attn_metadata.step
        index = self._index_of(layer, kv_cache)
        if index is not None:
            follow(index, step)
        starts, names, places = attn_metadata.starts, [], []
        for row, first, last in zip(step.rows, starts[:-1], starts[1:], strict=True):
            if last - first == 1 and index is not None:
                names.append(row.name)
                places.append(first)
            elif last > first:
                slots = torch.from_numpy(row.slots)
                output[first:last] = self._dense(query[first:last], kv_cache, slots).view_as(
                    output[first:last]
                )
        if index is not None and names:
            q = query[places].reshape(len(places), self.num_heads, self.head_size)
            out, _ = index.attend(q, names, budget=self.settings.budget)
            output[places] = out.to(output.dtype).view_as(output[places])
        return output

    def _index_of(self, layer: Any, kv_cache: torch.Tensor) -> SlotIndex | None:
        """Return the index of the layer, None if its attention stays dense."""
        number = extract_layer_index(layer.layer_name)
        if number not in self.codebook.layers or self.sliding_window > 0:
            return None
        if self.index is None:
            cache = PagedCache(*_parts(kv_cache))
            book = layer_of(self.codebook, number, self.context, self.settings.nlist)
            self.index = SlotIndex(book, cache, scale=self.scale, **self.settings.index())
        return self.index

    def _dense(self, q: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Attend to all tokens before each of the last ones, (m, q_heads, d)."""
        q = q.reshape(len(q), self.num_heads, self.head_size).transpose(0, 1)[None]
        size = kv_cache.shape[2]
        k, v = (
            cache[slots // size, :, slots % size]
            .transpose(0, 1)
            .repeat_interleave(self.num_queries_per_kv, dim=0)[None]
            for cache in _parts(kv_cache)
        )
        m, n = q.shape[2], k.shape[2]
        seen = torch.ones(m, n, dtype=torch.bool).tril(n - m)
        if self.sliding_window > 0:
            seen &= ~torch.ones(m, n, dtype=torch.bool).tril(n - m - self.sliding_window)
        mask = None if bool(seen.all()) else seen
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out[0].transpose(0, 1).contiguous()


def _parts(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values, (blocks, kv_heads, block_size, d), views of vLLM's blocks."""
    blocks, heads, size, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
    return keys, values
