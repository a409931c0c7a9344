"""vLLM's blocks on its CPU platform, with keys and values as plain rows: writing, and dense attention."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["attend_densely", "parts", "write_rows"]

_MANY = 512
"""Tokens from which on heads are repeated, so that the mask of one is that of all."""


def parts(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values, (blocks, kv_heads, block_size, d), views of blocks."""
    blocks, heads, size, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
    return keys, values


def write_rows(kv_cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write keys and values, (n, kv_heads, d), to `slots`: there may be fewer, and below zero is none."""
    blocks, heads, size, width = kv_cache.shape
    d = width // 2
    by_page, by_head = kv_cache.stride(0) // d, kv_cache.stride(1) // d
    last = (blocks - 1) * by_page + (heads - 1) * by_head + 2 * size
    rows = kv_cache.as_strided((last, d), (d, 1))
    page, lane = np.divmod(slots.numpy(), size)
    first = page[:, None] * by_page + np.arange(heads) * by_head + lane[:, None]
    n, there = len(first), page >= 0
    keys, values = keys[:n], values[:n]
    if not there.all():
        kept = torch.from_numpy(there)
        first, keys, values = first[there], keys[kept], values[kept]
    at = torch.from_numpy(first.reshape(-1))
    rows.index_copy_(0, at, keys.reshape(-1, d).to(rows.dtype))
    rows.index_copy_(0, at + size, values.reshape(-1, d).to(rows.dtype))


def attend_densely(
    q: torch.Tensor, kv_cache: torch.Tensor, slots: NDArray[np.int64], scale: float, window: int = 0
) -> torch.Tensor:
    """Attend to all tokens before each of the last ones.

    Parameters
    ----------
    q
        (m, q_heads, d), of the last `m` tokens.
    slots
        (n,), of all tokens, those of the queries among them.
    scale
        Of the logits.
    window
        Tokens that each query sees, itself among them; all if it is not above zero.

    Returns
    -------
    Tensor
        (m, q_heads, d).
    """
    (m, q_heads, d), n, size = q.shape, len(slots), kv_cache.shape[2]
    page, lane = (torch.from_numpy(x) for x in np.divmod(slots, size))
    k, v = (cache[page, :, lane].transpose(0, 1)[None] for cache in parts(kv_cache))
    heads = k.shape[1]
    group = q_heads // heads
    seen = None
    if m > 1 or 0 < window < n:
        seen = torch.ones(m, n, dtype=torch.bool).tril(n - m)
        if window > 0:
            seen &= ~torch.ones(m, n, dtype=torch.bool).tril(n - m - window)
    attend = torch.nn.functional.scaled_dot_product_attention
    if m >= _MANY:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        causal = m == n and window <= 0
        out = attend(
            q.transpose(0, 1)[None], k, v, attn_mask=None if causal else seen, is_causal=causal, scale=scale
        )
        return out[0].transpose(0, 1).contiguous()
    # The queries of a group are rows of one problem, so that its keys are read once and copied never.
    rows = q.reshape(m, heads, group, d).permute(1, 2, 0, 3).reshape(1, heads, group * m, d)
    mask = None if seen is None else seen.repeat(group, 1)
    out = attend(rows, k, v, attn_mask=mask, scale=scale)
    return out.view(heads, group, m, d).permute(2, 0, 1, 3).reshape(m, q_heads, d)
