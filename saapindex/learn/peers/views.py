"""Rotary embedding on any device: the same as `Rope`, for tensors that stay where they are."""

from __future__ import annotations

import torch

from saapindex.rope import Rope

__all__ = ["turn", "unrotate"]


def turn(x: torch.Tensor, steps: torch.Tensor, rope: Rope, amplitude: float = 1.0) -> torch.Tensor:
    """Rotate vectors on by `steps` positions and multiply what was rotated by `amplitude`.

    Angles are formed in float64, as `Rope` does.

    Parameters
    ----------
    x
        float32, (..., m, d).
    steps
        int64, (m,); negative to go back.

    Returns
    -------
    Tensor
        float32, (..., m, d), new.

    Examples
    --------
    >>> turn(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), Rope(dim=2))
    tensor([[0.5403, 0.8415]])
    """
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float64, device=x.device)
    angles = steps.to(torch.float64)[:, None] * frequencies
    cos, sin = (amplitude * angles.cos()).float(), (amplitude * angles.sin()).float()
    half = rope.dim // 2
    interleaved = rope.layout == "interleaved"
    first = slice(0, rope.dim, 2) if interleaved else slice(0, half)
    second = slice(1, rope.dim, 2) if interleaved else slice(half, rope.dim)
    turned = x.clone()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def unrotate(x: torch.Tensor, positions: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Undo the rotation of vectors, (..., m, d), that the model rotated to `positions`, (m,).

    Without a rotary embedding they come back as they are.

    Examples
    --------
    >>> rope = Rope(dim=2)
    >>> unrotate(turn(torch.ones(1, 2), torch.tensor([7]), rope), torch.tensor([7]), rope)
    tensor([[1., 1.]])
    """
    return x if rope is None else turn(x, -positions, rope, 1.0 / rope.attention_factor)
