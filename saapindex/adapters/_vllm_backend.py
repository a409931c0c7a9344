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
from saapindex.adapters._vllm_cache import attend_densely, parts, write_rows
from saapindex.adapters._vllm_requests import Requests, Step, follow
from saapindex.adapters._vllm_threads import share_cores
from saapindex.adapters.vllm import Settings
from saapindex.attention import AttendParameters, PagedCache, SlotIndex
from saapindex.codebook import Codebook
from saapindex.errors import InvalidInputError

__all__ = ["SaapBackend"]

logger = init_logger("vllm.saapindex")
_REPORT = 16, 1024
"""Steps before the log first states what the indices hold, and the most between two statements."""


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
        self._requests, self._steps, self._report_at = Requests(self.block_size), 0, _REPORT[0]

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
        if self._steps == self._report_at:
            self._report()
            self._report_at += min(self._report_at, _REPORT[1])
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
        self.params = AttendParameters(budget=settings.budget)
        self.codebook = Codebook.load(settings.codebook)
        self.context = get_current_vllm_config().model_config.max_model_len
        check_codebook(
            self.codebook, get_current_vllm_config().model_config.hf_text_config, nlist=settings.nlist
        )

    def do_kv_cache_update(
        self, layer: Any, key: Any, value: Any, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write new keys and values as plain rows."""
        write_rows(kv_cache, slot_mapping, key, value)

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
                q = query[first:last].reshape(last - first, self.num_heads, self.head_size)
                out = attend_densely(q, kv_cache, row.slots, self.scale, self.sliding_window)
                output[first:last] = out.view_as(output[first:last])
        if index is not None and names:
            # Requests that decode stand first as a rule: then nothing is copied.
            first_ones = places == list(range(len(places)))
            asked = query[: len(places)] if first_ones else query[places]
            q = asked.reshape(len(places), self.num_heads, self.head_size)
            out = index.attend(q, names, params=self.params)[0].view(len(places), *output.shape[1:])
            output[slice(len(places)) if first_ones else places] = out
        return output

    def _index_of(self, layer: Any, kv_cache: torch.Tensor) -> SlotIndex | None:
        """Return the index of the layer, None if its attention stays dense."""
        number = extract_layer_index(layer.layer_name)
        if number not in self.codebook.layers or self.sliding_window > 0:
            return None
        if self.index is None:
            if self.settings.backend == "cpu":
                share_cores()
            cache = PagedCache(*parts(kv_cache))
            book = layer_of(self.codebook, number, self.context, self.settings.nlist)
            self.index = SlotIndex(book, cache, scale=self.scale, **self.settings.index())
        return self.index
