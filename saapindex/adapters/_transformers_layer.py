"""The cache of one layer of full attention: an attention index, and the tokens that are not in it yet."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicLayer

from saapindex.adapters._codebook import AnyCodebook, layer_of
from saapindex.attention import AttendParameters, AttentionIndex, MemoryStatement
from saapindex.errors import CodebookMismatchError, InvalidInputError

__all__ = ["NAME", "SaapLayer", "Shared", "layer_behind"]

NAME = "saapindex"
"""What the attention implementation is called in transformers."""

_HANDLE = "_saapindex_layer"

Seen: TypeAlias = NDArray[np.bool_] | None
_ALL: Seen = None


@dataclass(eq=False)
class Shared:
    """What all layers of a cache know.

    Attributes
    ----------
    config
        The text config of the model, which says which attention it runs.
    codebook, nlist
        Of the model, and of which partition.
    index
        Arguments of `AttentionIndex`.
    max_decode
        Queries of more tokens than this are attended to densely.
    """

    config: Any
    codebook: AnyCodebook
    nlist: int | None
    index: Mapping[str, Any]
    max_decode: int
    _mask: weakref.ref[torch.Tensor] | None = field(default=None, init=False)
    _seen: Seen = field(default=None, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def is_on(self) -> bool:
        """Whether the model attends through this library."""
        return bool(self.config._attn_implementation == NAME)

    def seen(self, mask: torch.Tensor | None, t: int, n: int) -> Seen:
        """Return which of `n` cached tokens each sequence has, bool (batch, n); None for all of them.

        All layers are given the same mask, so it is looked at once.
        """
        if mask is None:
            return None
        if self._mask is None or self._mask() is not mask:
            self._seen = _seen(mask, t, n)
            self._mask = weakref.ref(mask)
        return self._seen


def _seen(mask: torch.Tensor, t: int, n: int) -> Seen:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, t, n):
        raise InvalidInputError(
            f"the attention mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool of "
            f"(batch, 1, {t}, {n})"
        )
    last = mask[:, 0, -1]
    causal = torch.ones(t, n, dtype=torch.bool, device=mask.device).tril(n - t)
    if t > 1 and not torch.equal(mask[:, 0], last[:, None] & causal):
        raise InvalidInputError(
            f"the attention mask of {t} tokens is not causal, expected one that is: set max_decode below {t}"
        )
    return _or_none(last.cpu().numpy())


def _or_none(seen: NDArray[np.bool_]) -> Seen:
    return None if seen.all() else seen


def _same(seen: Seen, stored: Seen, columns: int) -> bool:
    """Whether the first `columns` that are seen are those that are stored."""
    now = None if seen is None else _or_none(seen[:, :columns])
    if now is None or stored is None:
        return now is stored
    return np.array_equal(now, stored)


def layer_behind(key: torch.Tensor) -> SaapLayer | None:
    """Return the layer that gave these keys to the model."""
    handle = getattr(key, _HANDLE, None)
    return None if handle is None else handle()


class SaapLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer.

    While the model reads a prompt, they are plain tensors (`keys`, `values`), and attention is exact. The
    first short query that follows moves them into an index. From then on the tensors hold only what has come
    since: nothing while the model generates, the new tokens of a further prompt until it generates again.

    Parameters
    ----------
    shared
        What all layers of the cache know.
    number
        Of the layer.
    params
        What a step may read.
    """

    keys: Any
    values: Any

    def __init__(self, shared: Shared, number: int, params: AttendParameters) -> None:
        super().__init__()
        self.shared, self.number, self.params = shared, number, params
        self.index: AttentionIndex | None = None
        # How many tokens of the cache are in the index, padding included, and which of them are no padding.
        self._columns, self._stored = 0, _ALL

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)  # tensors are replaced when they grow, never written to
        if self.index is not None:
            twin.index = self.index.fork()
        return twin

    @property
    def _waiting(self) -> int:
        """How many tokens are not in the index."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens, padding included."""
        return self._columns + self._waiting

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values, (batch, kv_heads, t, d), and return what the model should attend to.

        For a sparse step these have the right shape, but no content: the attention function finds this
        layer behind them, and any other fails on them.
        """
        before, t = self.get_seq_length(), key_states.shape[-2]
        long = before + t >= self.shared.index["dense_below"]
        sparse = self.shared.is_on and long and before and t <= self.shared.max_decode
        if sparse and not self._waiting:
            self.keys, self.values = key_states, value_states  # for as long as it takes to index them
        else:
            keys, values = super().update(key_states, value_states)
        if sparse:
            shape = (*key_states.shape[:2], before + t, key_states.shape[-1])
            keys = values = torch.empty(shape, dtype=key_states.dtype, device="meta")
        elif self.index is not None and self._columns:
            keys, values = self._whole(self.index)
        setattr(keys, _HANDLE, weakref.ref(self))
        return keys, values

    def _whole(self, index: AttentionIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all tokens, zero in padding; a copy that nobody keeps."""
        shape = index.batch, index.codebook.heads, self.get_seq_length(), index.codebook.d
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for b in range(index.batch):
            columns: Any = slice(0, self._columns)
            if self._stored is not None:
                columns = torch.from_numpy(np.flatnonzero(self._stored[b])).to(self.device)
            for whole, part in zip((keys, values), index.reconstruct(b), strict=True):
                whole[b, :, columns] = _tensor(part).to(self.device)
        if self._waiting:
            keys[:, :, self._columns :], values[:, :, self._columns :] = self.keys, self.values
        return keys, values

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the output for the newest tokens, (batch, t, q_heads, d).

        Parameters
        ----------
        query
            (batch, q_heads, t, d).
        mask
            bool, (batch, 1, t, tokens); None shows all.
        options
            What else the model says about its attention.
        """
        t, n = query.shape[2], self.get_seq_length()
        seen = self.shared.seen(mask, t, n)
        if self._columns and not _same(seen, self._stored, self._columns):
            raise InvalidInputError(
                f"layer {self.number}: the attention mask shows other tokens of the past than it did before, "
                "expected the mask of the steps before, with the new tokens behind it"
            )
        index = self._with_index(query, options)
        new = None if seen is None else _or_none(seen[:, self._columns :])
        index.add(self._placed(self.keys), self._placed(self.values), mask=new)
        self.keys = self.values = self.keys.new_empty(0)
        self._columns, self._stored = n, seen
        positions = None
        if new is not None:
            latest = new[:, new.shape[1] - t :]
            first = index.lengths - latest.sum(axis=1)
            positions = first[:, None] + np.cumsum(latest, axis=1) - 1
        out: torch.Tensor = index.attend(self._placed(query), params=self.params, positions=positions)[0]
        return out.to(query.device).transpose(1, 2).contiguous()

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor where the index is."""
        x = x.detach()
        return x.cpu() if self.shared.index.get("device", "cpu") == "cpu" else x

    def _with_index(self, query: torch.Tensor, options: Mapping[str, Any]) -> AttentionIndex:
        """Return the index, made when it is first needed."""
        if self.index is None:
            codebook = layer_of(self.shared.codebook, self.number, self.get_seq_length(), self.shared.nlist)
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            for name, given, trained in (
                ("scale", scale, codebook.scale),
                ("softcap", options.get("softcap") or 0.0, codebook.softcap or 0.0),
            ):
                if not math.isclose(given, trained, rel_tol=1e-6):
                    raise CodebookMismatchError(
                        f"the codebook does not fit: layer {self.number}: {name} of the logits is {given}, "
                        f"trained for {trained}"
                    )
            sinks = options.get("s_aux")
            self.index = AttentionIndex(
                codebook,
                batch=len(self.keys),
                sink_logits=None if sinks is None else sinks.detach().float().cpu(),
                **self.shared.index,
            )
        return self.index

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens; a positive number is how many to keep."""
        length = self.get_seq_length()
        left = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        left = min(max(left, 0), length)
        if self._waiting and left < length:
            keep = max(left - self._columns, 0)
            self.keys, self.values = self.keys[:, :, :keep], self.values[:, :, :keep]
        if left < self._columns and self.index is not None:
            stored = None if self._stored is None else self._stored[:, :left]
            self.index.truncate(left if stored is None else stored.sum(axis=1))
            self._columns, self._stored = left, None if stored is None else _or_none(stored)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence `i` be what ``beam_idx[i]`` was; nothing in the index is copied."""
        if self._waiting:
            order = beam_idx.to(self.device)
            self.keys, self.values = self.keys.index_select(0, order), self.values.index_select(0, order)
        if self.index is not None:
            rows = beam_idx.cpu().numpy()
            self.index.reorder(rows)
            self._stored = None if self._stored is None else _or_none(self._stored[rows])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, each behind itself."""
        self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences only."""
        self.reorder_cache(torch.arange(self._batch)[indices.cpu()])

    @property
    def _batch(self) -> int:
        if self.index is not None:
            return self.index.batch
        return len(self.keys) if self._waiting else 0

    def reset(self) -> None:
        """Forget every token."""
        self.keys = self.values = self.index = None
        self.is_initialized, self._columns, self._stored = False, 0, None

    def memory(self) -> MemoryStatement:
        """Return what is held, in bytes."""
        plain = 0
        if self._waiting:
            plain = sum(x.numel() * x.element_size() for x in (self.keys, self.values))
        if self.index is None:
            return MemoryStatement(plain=plain, pages=plain, used=plain, statistics=0)
        held = self.index.memory()
        return MemoryStatement(
            plain=held.plain + plain,
            pages=held.pages + plain,
            used=held.used + plain,
            statistics=held.statistics,
        )


def _tensor(x: NDArray[Any]) -> torch.Tensor:
    """Return what an index stores as a tensor, where it is; it holds bfloat16 as its bits."""
    make = torch.from_numpy if isinstance(x, np.ndarray) else torch.from_dlpack
    return make(x.view(np.int16)).view(torch.bfloat16) if x.dtype == np.uint16 else make(x)
