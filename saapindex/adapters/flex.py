"""A selection for PyTorch's FlexAttention, as the blocks of keys that it reads.

FlexAttention skips whole blocks of columns. In the order of tokens what is selected lies scattered, so blocks
hold more than was selected: those keys are read and masked out. In the order of lists (`in_order` of
`AttentionIndex.list_order`) keys that are visited together stand together, and lists that are taken whole
fill their blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from saapindex.adapters._tensors import as_tensor, check_cache, check_queries, chosen_columns
from saapindex.arrays import ArrayLike
from saapindex.attention import Selection
from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.params import check_integer

import torch  # isort: skip  # after _tensors, which says what to install

try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError as error:
    raise MissingDependencyError("torch>=2.7", "FlexAttention", "flex") from error

__all__ = ["Blocks", "attend", "block_mask", "in_order"]

_QUERY_BLOCK = 128


class Blocks(NamedTuple):
    """What FlexAttention reads, and how much of it was asked for.

    Attributes
    ----------
    mask
        For queries of shape (batch, kv_heads, query heads a KV head, d).
    selected, read
        int64, (batch, kv_heads): keys that were selected, and keys in the blocks that hold them.
    """

    mask: BlockMask
    selected: torch.Tensor
    read: torch.Tensor


def block_mask(
    selection: Selection,
    n: int,
    g: int,
    *,
    order: ArrayLike | None = None,
    block_size: int = 128,
    device: torch.device | str | None = None,
) -> Blocks:
    """Return the blocks of a cache that hold something selected.

    Parameters
    ----------
    selection
        What `AttentionIndex.select` returned.
    n
        Columns of the cache.
    g
        Query heads a KV head.
    order
        int, (batch, kv_heads, n): the position that each column holds, -1 for none; by default the columns
        are the positions.
    block_size
        Columns of a block.
    device
        Where the mask is wanted; by default where the selection is.

    Returns
    -------
    Blocks
        Columns of a block that were not selected are masked out; a block that was selected whole is marked
        as such.

    Raises
    ------
    InvalidInputError
        If the cache has no place for what is selected, or `order` does not fit.
    """
    for name, value, least in (("n", n, 1), ("g", g, 1), ("block_size", block_size, 1)):
        check_integer(name, value, least)
    where = None if device is None else torch.device(device)
    chosen = chosen_columns(selection, n, where, order=order)
    count = -(-n // block_size)
    padded = torch.nn.functional.pad(chosen, (0, count * block_size - n))
    blocks = padded.reshape(*padded.shape[:2], count, block_size)
    some, full = blocks.any(3), blocks.all(3)
    kinds = [_numbers(kind) for kind in (some & ~full, full)]
    mask = BlockMask.from_kv_blocks(
        *kinds[0],
        *kinds[1],
        BLOCK_SIZE=(_QUERY_BLOCK, block_size),
        mask_mod=_only(chosen),
        seq_lengths=(g, n),
        compute_q_blocks=False,
    )
    return Blocks(mask, chosen.sum(2), some.sum(2) * block_size)


def _numbers(used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks are used, (batch, kv_heads, 1), and all numbers with those first."""
    order = torch.argsort((~used).to(torch.int8), dim=2, stable=True)
    return used.sum(2, dtype=torch.int32)[:, :, None], order.to(torch.int32)[:, :, None].contiguous()


def _only(chosen: torch.Tensor) -> Callable[..., torch.Tensor]:
    def mask_mod(b: Any, h: Any, q: Any, column: Any) -> torch.Tensor:
        return chosen[b, h, column]

    return mask_mod


def in_order(x: ArrayLike, order: ArrayLike) -> torch.Tensor:
    """Return keys or values in another order of columns.

    Parameters
    ----------
    x
        (batch, kv_heads, n, d), in the order of tokens.
    order
        int, (batch, kv_heads, columns): the position that each column is to hold, -1 for none.

    Returns
    -------
    Tensor
        (batch, kv_heads, columns, d), zero where there is none.
    """
    cache = as_tensor(x, "x")
    stands = as_tensor(order, "order", cache.device)[..., None]
    taken = cache.gather(2, stands.clamp(min=0).expand(-1, -1, -1, cache.shape[3]))
    return torch.where(stands >= 0, taken, 0)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)  # a cache that grows is compiled for any length the second time


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Blocks,
    *,
    scale: float | None = None,
    attention: Callable[..., torch.Tensor] | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Attend to the blocks.

    Parameters
    ----------
    q
        (batch, q_heads, d) or (batch, q_heads, 1, d), the newest token of each sequence.
    k, v
        (batch, kv_heads, n, d), in the order that the blocks were made for.
    blocks
        Of `block_mask`.
    scale
        Of the logits, by default ``1 / sqrt(d)``.
    attention
        In place of ``torch.compile(flex_attention)``; uncompiled it reads everything.
    kernel_options
        Of ``flex_attention``.

    Returns
    -------
    Tensor
        The shape of `q`.

    Raises
    ------
    InvalidInputError
        On another layout than that of the blocks.
    """
    batch, heads, g, d = check_queries(q, blocks.selected.shape)
    check_cache(q, k, v, blocks.selected.shape)
    if tuple(blocks.mask.seq_lengths) != (g, k.shape[2]):
        raise InvalidInputError(
            f"q and k have {g} query heads a KV head and {k.shape[2]} columns, the blocks were made for "
            f"{blocks.mask.seq_lengths}"
        )
    function = _compiled() if attention is None else attention
    grouped = q.reshape(batch, heads, g, d)
    out = function(grouped, k, v, block_mask=blocks.mask, scale=scale, kernel_options=kernel_options)
    return out.reshape(*q.shape[:-1], v.shape[3])
