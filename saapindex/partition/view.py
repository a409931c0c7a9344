"""The space in which keys are partitioned and queries are routed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import Ints, Ops
from saapindex.params import ViewName
from saapindex.rope import Rope

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """``U(x, p)``: how much of the rotation at position `p` is undone.

    Attributes
    ----------
    kind
        ``"rotated"`` undoes nothing, ``"unrotated"`` everything (the paper), ``"windowed"`` only the
        pairs whose wavelength is below `cutoff`.
    cutoff
        Tokens.
    rope
        The embedding that was applied; None makes every view the identity.

    Examples
    --------
    >>> View("rotated").needs_positions
    False
    """

    kind: ViewName = "rotated"
    cutoff: float = 1000.0
    rope: Rope | None = None

    @property
    def needs_positions(self) -> bool:
        """Whether a vector's view depends on its position."""
        return self.rope is not None and self.kind != "rotated"

    @property
    def keeps_rotation(self) -> bool:
        """Whether a rotation remains in the view, so that a codebook knows only some positions."""
        return self.rope is not None and self.kind != "unrotated"

    def apply(self, x: NDArray[np.float32], positions: Ints, ops: Ops) -> NDArray[np.float32]:
        """Return the view of `x`, shape (n, d), at `positions`, shape (n,)."""
        if self.rope is None or self.kind == "rotated":
            return x
        cutoff = self.cutoff if self.kind == "windowed" else None
        seen: NDArray[np.float32] = self.rope.unrotate(x, positions, cutoff=cutoff, ops=ops)
        return seen

    def scatter(
        self,
        x: NDArray[np.float32],
        positions: Ints,
        max_position: int,
        rng: np.random.Generator,
        ops: Ops,
    ) -> NDArray[np.float32]:
        """Return the view of `x` moved to random positions below `max_position`.

        A rotated codebook knows only the positions it was trained on. Since the rotation is known,
        keys of short contexts can be moved over the whole range to be served.
        """
        if self.rope is None or self.kind == "unrotated":
            return self.apply(x, positions, ops)
        target = rng.integers(max_position, size=len(x))
        return self.apply(self.rope.rerotate(x, positions, target, ops=ops), target, ops)
