"""What adapters to torch share: a selection as tensors of positions, and checks of what it is applied to."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from saapindex.arrays import ArrayLike
from saapindex.attention import Selection
from saapindex.errors import InvalidInputError, MissingDependencyError

try:
    import torch
    from torch.utils.dlpack import from_dlpack
except ImportError as error:
    raise MissingDependencyError("torch", "handing a selection to another attention", "sdpa") from error

__all__ = [
    "as_tensor",
    "check_cache",
    "check_columns",
    "check_queries",
    "chosen_columns",
    "like",
    "membership",
    "positions",
]


def as_tensor(value: ArrayLike, name: str, device: torch.device | None = None) -> torch.Tensor:
    """Return an array of any framework as a tensor, without a copy where it is on `device` already.

    Raises
    ------
    InvalidInputError
        If `value` is no array.
    """
    if not isinstance(value, torch.Tensor):
        try:
            if hasattr(value, "__dlpack__") and not (
                isinstance(value, np.ndarray) and not value.flags.writeable
            ):
                value = from_dlpack(value)
            else:
                value = torch.from_numpy(np.array(value))
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise InvalidInputError(
                f"{name} is a {type(value).__name__} that is no array: {error}"
            ) from error
    tensor: torch.Tensor = value if device is None else value.to(device)
    return tensor


def like(result: torch.Tensor, model: ArrayLike) -> ArrayLike:
    """Return `result` in the framework of `model`, through DLPack."""
    if isinstance(model, torch.Tensor):
        return result
    if isinstance(model, np.ndarray):
        return result.numpy()
    if hasattr(model, "__array_namespace__"):
        return model.__array_namespace__().from_dlpack(result)
    return importlib.import_module(type(model).__module__.partition(".")[0]).from_dlpack(result)


def check_queries(q: torch.Tensor, streams: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return batch, KV heads, query heads a KV head, and dimension of queries of one token.

    Raises
    ------
    InvalidInputError
        If `q` is not (batch, q_heads, d) or (batch, q_heads, 1, d) with the sequences and KV heads of the
        selection.
    """
    batch, heads = streams
    fits = q.ndim == 3 or (q.ndim == 4 and q.shape[2] == 1)
    if not fits or q.shape[0] != batch or not q.shape[1] or q.shape[1] % heads:
        raise InvalidInputError(
            f"q has shape {tuple(q.shape)}, expected ({batch}, a multiple of {heads} heads, d): a selection "
            "is for the newest token of each sequence"
        )
    return batch, heads, q.shape[1] // heads, q.shape[-1]


def check_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, streams: tuple[int, ...]) -> None:
    """Check keys and values of shape (batch, kv_heads, n, d) beside queries.

    Raises
    ------
    InvalidInputError
        On another layout, dtype or device.
    """
    batch, heads, _, d = check_queries(q, streams)
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:2] != (batch, heads) or (name == "k" and x.shape[3] != d):
            raise InvalidInputError(
                f"{name} has shape {tuple(x.shape)}, expected (batch, kv_heads, n, d) = ({batch}, {heads}, "
                f"n, {d}); another layout has to be transposed to it, {name}.transpose(1, 2) for (batch, n, "
                "kv_heads, d)"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise InvalidInputError(
                f"{name} is {x.dtype} on {x.device}, expected {q.dtype} on {q.device} as q is"
            )
    if k.shape[2] != v.shape[2]:
        raise InvalidInputError(f"k has {k.shape[2]} columns and v {v.shape[2]}, expected as many of both")


def positions(
    selection: Selection, device: torch.device | None = None, *, near: bool = True, shift: Any = None
) -> torch.Tensor:
    """Return everything that each KV head attends to, sinks and window once.

    Parameters
    ----------
    selection
        Of any device.
    device
        Where the result is wanted; by default where the selection is.
    near
        Whether the sinks and the window belong to it.
    shift
        int, (batch,), added to every position: the column of position 0.

    Returns
    -------
    Tensor
        int64, (batch, kv_heads, most): rising up to gaps of -1.
    """
    ids = as_tensor(selection.ids, "ids", device)
    most = as_tensor(selection.lengths, "lengths", device).max() if ids.shape[2] else 0
    parts = [ids := ids[..., : int(most)]]  # a device may give rows that are wider than what was selected
    if near:
        start, ends = (
            as_tensor(getattr(selection, name), name, device)[:, None] for name in ("window_start", "ends")
        )
        sinks = torch.arange(selection.sinks, device=ids.device)[None]
        width = max(0, int((ends - start).max()))
        recent = start + torch.arange(width, device=ids.device)
        close = (
            torch.where(at < ends, at, -1)[:, None].expand(-1, ids.shape[1], -1) for at in (sinks, recent)
        )
        parts = [next(close), ids, next(close)]
    found = torch.cat(parts, dim=2)
    if shift is None:
        return found
    moved = found + as_tensor(shift, "offsets", ids.device)[:, None, None]
    return torch.where(found >= 0, moved, -1)


def membership(columns: torch.Tensor, n: int) -> torch.Tensor:
    """Return which of `n` columns are in `columns`, (batch, kv_heads, any), gaps of -1 apart.

    Returns
    -------
    Tensor
        bool, (batch, kv_heads, n).
    """
    mask = columns.new_zeros((*columns.shape[:2], n + 1), dtype=torch.bool)
    mask.scatter_(2, torch.where(columns >= 0, columns, n), True)  # the last column takes the gaps
    return mask[..., :n]


def chosen_columns(
    selection: Selection,
    n: int,
    device: torch.device | None = None,
    *,
    order: ArrayLike | None = None,
    near: bool = True,
    offsets: ArrayLike | None = None,
) -> torch.Tensor:
    """Return which of the `n` columns of a cache hold something selected.

    Parameters
    ----------
    selection, device, near
        As for `positions`.
    n
        Columns of the cache.
    order
        int, (batch, kv_heads, n): the position that each column holds, -1 for none; by default the columns
        are the positions.
    offsets
        int, (batch,): the column of position 0; not with `order`.

    Returns
    -------
    Tensor
        bool, (batch, kv_heads, n).

    Raises
    ------
    InvalidInputError
        If the cache does not hold what is selected, or `order` has another shape.
    """
    if order is None:
        check_columns(selection, n, offsets)
        return membership(positions(selection, device, near=near, shift=offsets), n)
    found = positions(selection, device, near=near)
    stands = as_tensor(order, "order", found.device)
    if tuple(stands.shape) != (*found.shape[:2], n):
        raise InvalidInputError(
            f"order has shape {tuple(stands.shape)}, expected {(*tuple(found.shape[:2]), n)}"
        )
    end = int(as_tensor(selection.ends, "ends").max())
    chosen = membership(found, max(end, 1)).gather(2, stands.clamp(0, max(end - 1, 0)))
    chosen &= (stands >= 0) & (stands < end)
    if not torch.equal(chosen.sum(2), (found >= 0).sum(2)):
        raise InvalidInputError("order does not hold every key selected, expected one made after the last")
    return chosen


def check_columns(selection: Selection, n: int, offsets: ArrayLike | None = None) -> None:
    """Check that a cache of `n` columns, with position 0 at `offsets`, holds all that was selected.

    Raises
    ------
    InvalidInputError
        If it does not.
    """
    ends = as_tensor(selection.ends, "ends")
    if offsets is not None:
        ends = ends + as_tensor(offsets, "offsets", ends.device)
    if int(ends.max()) > n:
        raise InvalidInputError(
            f"the cache has {n} columns, expected {int(ends.max())} for the keys selected"
        )
