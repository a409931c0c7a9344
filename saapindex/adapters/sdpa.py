"""A selection for PyTorch's scaled dot product attention: the fallback that works everywhere.

`attend` fetches what was selected and attends to it; `attention_mask` says to a dense cache what counts. Both
run wherever torch runs, and take arrays of any framework that speaks DLPack.

Fetching reads exactly what was selected; a mask lets SDPA read everything, which saves no time but is right
inside any model.
"""

from __future__ import annotations

from saapindex.adapters._tensors import (
    as_tensor,
    check_cache,
    check_columns,
    check_queries,
    chosen_columns,
    like,
    positions,
)
from saapindex.arrays import ArrayLike
from saapindex.attention import Selection
from saapindex.errors import InvalidInputError
from saapindex.params import check_integer

import torch  # isort: skip  # after _tensors, which says what to install

__all__ = ["attend", "attention_mask"]


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    selection: Selection,
    *,
    scale: float | None = None,
    offsets: ArrayLike | None = None,
) -> ArrayLike:
    """Fetch the selected keys, those of sinks and window among them, and attend to them.

    Parameters
    ----------
    q
        (batch, q_heads, d) or (batch, q_heads, 1, d), the newest token of each sequence.
    k, v
        (batch, kv_heads, n, d): the cache, on the device and in the precision of `q`.
    selection
        What `AttentionIndex.select` returned for these queries.
    scale
        Of the logits, by default ``1 / sqrt(d)``. A soft cap is not supported.
    offsets
        int, (batch,): the column of each sequence's position 0, where it is padded on the left.

    Returns
    -------
    array
        The shape of `q`, in its framework and precision; zero where a sequence has no key.

    Raises
    ------
    InvalidInputError
        On another layout, or a selected position beyond the last column.

    Examples
    --------
    >>> import numpy as np
    >>> selection = Selection(np.array([[[2]]]), np.array([[1]]), np.array([[[0]]]), 1, [4], [5])
    >>> q, k, v = np.zeros((1, 2, 8)), np.ones((1, 1, 5, 8)), np.arange(5.0).reshape(1, 1, 5, 1)
    >>> attend(q, k, v, selection)[0, :, 0]  # of keys 0, 2 and 4
    array([2., 2.])
    """
    x, keys, values = (as_tensor(part, name) for part, name in ((q, "q"), (k, "k"), (v, "v")))
    streams = tuple(selection.ids.shape[:2])
    check_cache(x, keys, values, streams)
    batch, heads, g, d = check_queries(x, streams)
    check_columns(selection, keys.shape[2], offsets)
    columns = positions(selection, keys.device, shift=offsets)
    if not columns.shape[2]:
        return like(x.new_zeros((*x.shape[:-1], values.shape[3])), q)
    rows = columns.clamp(min=0)[..., None]
    keys, values = (part.gather(2, rows.expand(-1, -1, -1, part.shape[3])) for part in (keys, values))
    there = (columns >= 0)[:, :, None]
    # A KV head's queries are the rows of one small problem, so its keys are fetched and read once.
    out = torch.nn.functional.scaled_dot_product_attention(
        x.reshape(batch, heads, g, d), keys, values, attn_mask=there, scale=scale
    )
    out = torch.where(there.any(dim=3, keepdim=True), out, 0)
    return like(out.reshape(*x.shape[:-1], values.shape[3]), q)


def attention_mask(
    selection: Selection,
    n: int,
    q_heads: int,
    *,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str | None = None,
    near: bool = True,
    offsets: ArrayLike | None = None,
) -> torch.Tensor:
    """Return the mask with which dense attention attends to the selected keys alone.

    Parameters
    ----------
    selection
        What `AttentionIndex.select` returned.
    n
        Columns of the cache.
    q_heads
        Query heads; head `j` belongs to KV head ``j // (q_heads / kv_heads)``.
    dtype
        ``torch.bool``, true where a key counts; or a floating type: zero there, minus infinity elsewhere.
    device
        Where the mask is wanted; by default where the selection is.
    near
        Whether the sinks and the window count.
    offsets
        As for `attend`.

    Returns
    -------
    Tensor
        (batch, q_heads, 1, n), as ``scaled_dot_product_attention(attn_mask=...)`` takes it.

    Raises
    ------
    InvalidInputError
        If a selected position lies beyond the last column, or heads do not fit.
    """
    check_integer("n", n, 0)
    heads = selection.ids.shape[1]
    if q_heads < 1 or q_heads % heads:
        raise InvalidInputError(f"q_heads is {q_heads}, expected a multiple of the {heads} KV heads")
    if dtype != torch.bool and not dtype.is_floating_point:
        raise InvalidInputError(f"dtype is {dtype}, expected torch.bool or a floating one")
    where = None if device is None else torch.device(device)
    chosen = chosen_columns(selection, n, where, near=near, offsets=offsets)
    mask = chosen.repeat_interleave(q_heads // heads, dim=1)[:, :, None]
    if dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
