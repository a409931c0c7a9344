"""The views of all heads of a layer at once, in torch: rotations undone, or moved, per head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saapindex.partition import View
from saapindex.rope import Rope

__all__ = ["HeadViews"]

# Positions whose angles are held at once, in float64.
_CHUNK = 16384


@dataclass(frozen=True)
class HeadViews:
    """``U(x, p)`` for every KV head of a layer, each with a view of its own.

    Attributes
    ----------
    rope
        The rotary embedding of the layer; None makes every view the identity.
    undone
        bool, (kv_heads, pairs): the pairs whose rotation the view of a head undoes.

    Examples
    --------
    >>> rope = Rope(dim=4)
    >>> views = HeadViews.of([View("rotated", rope=rope), View("unrotated", rope=rope)], rope)
    >>> x = torch.tensor(rope.rotate([[1.0, 1, 1, 1]], [7])).float().expand(2, 1, 4)
    >>> views.apply(x, torch.tensor([7]))[1].round(decimals=3)
    tensor([[1., 1., 1., 1.]])
    """

    rope: Rope | None
    undone: torch.Tensor

    @classmethod
    def of(cls, views: Sequence[View], rope: Rope | None, device: torch.device | str = "cpu") -> HeadViews:
        """Return the views of a layer, one `View` for each of its KV heads."""
        if rope is None:
            return cls(None, torch.zeros((len(views), 0), dtype=torch.bool, device=device))
        cutoffs = {"rotated": 0.0, "unrotated": math.inf}
        wavelengths = torch.from_numpy(rope.wavelengths)
        undone = [wavelengths < cutoffs.get(view.kind, view.cutoff) for view in views]
        return cls(rope, torch.stack(undone).to(device))

    @property
    def keeps_rotation(self) -> torch.Tensor:
        """Whether some rotation remains in a head's view, so that positions matter; bool, (kv_heads,)."""
        return ~self.undone.all(dim=1) if self.rope is not None else self.undone.any(dim=1)

    def apply(
        self, x: torch.Tensor, positions: torch.Tensor, moved_to: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the view of `x`, moved to other positions first where these are given.

        Parameters
        ----------
        x
            (kv_heads, ..., n, d), floats, rotated at `positions` as the model caches them.
        positions
            int64, (n,).
        moved_to
            int64, (n,): positions that the vectors are rotated to before the view is taken.

        Returns
        -------
        Tensor
            float32, of the shape of `x`.
        """
        still = moved_to is None and not self.undone.any()
        if self.rope is None or still:
            return x.float()
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[-2], _CHUNK):
            rows = slice(start, start + _CHUNK)
            to = None if moved_to is None else moved_to[rows]
            self._turn(x[..., rows, :], positions[rows], to, out[..., rows, :])
        return out

    def _turn(
        self, x: torch.Tensor, positions: torch.Tensor, moved_to: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Rotate one block of positions into `out`; angles are formed in float64, as `Rope` does."""
        rope = self.rope
        assert rope is not None
        undone = self.undone
        if bool((undone == undone[:1]).all()):
            undone = undone[:1]  # one table serves every head
        frequencies = torch.from_numpy(rope.frequencies.copy()).to(x.device)
        where = positions.double()[:, None]
        back = -where * frequencies
        on = (
            torch.zeros_like(back) if moved_to is None else (moved_to.double()[:, None] - where) * frequencies
        )
        angles = torch.where(undone[:, None, :], back, on).remainder(2 * math.pi).float()
        scale = torch.where(undone, 1.0 / rope.attention_factor, 1.0)[:, None, :]
        middle = (1,) * (x.dim() - 3)
        cos, sin = (
            (part * scale).reshape(len(undone), *middle, *angles.shape[1:]).float()
            for part in (angles.cos(), angles.sin())
        )
        dim = rope.dim
        first, second = (
            (slice(0, dim // 2), slice(dim // 2, dim))
            if rope.layout == "half"
            else (slice(0, dim, 2), slice(1, dim, 2))
        )
        a, b = x[..., first].float(), x[..., second].float()
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        out[..., dim:] = x[..., dim:]
