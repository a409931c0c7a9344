"""Rotary position embedding: what a model did to its keys and queries, and how to undo it.

Three views of a key: *rotated* as the model caches it, *unrotated* with the rotation undone, and
*windowed*, where only the pairs that turn fast are undone (`Rope.unrotate` with a `cutoff`).

Source: RoFormer, arXiv 2104.09864. Angles are formed in float64. Models form them in float32, so what
they cache differs by an angle of up to about ``6e-8 * position`` radians in the fastest pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_array, as_numpy, give_back, integers, vectors
from saapindex.devices import device_of
from saapindex.errors import InvalidInputError
from saapindex.rope_config import read_config
from saapindex.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Scaling,
    YarnScaling,
    base_frequencies,
    check_keys,
    number,
    whole_number,
)

if TYPE_CHECKING:
    from saapindex.backends.base import Floats, Ops

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Rope",
    "Scaling",
    "YarnScaling",
]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of one model, or of one type of its layers.

    Pair `i` of a key at position `p` is rotated by the angle ``p * frequencies[i]`` and multiplied by
    `attention_factor`. Instances are immutable, comparable and hashable.

    Parameters
    ----------
    theta
        Base of the wavelengths; above 1.
    dim
        Rotary dimensions, even. Fewer than the head has mean partial rotation: the first `dim`
        dimensions are rotated, the others are not.
    layout
        Pair `i` is dimensions ``(i, i + dim / 2)`` for ``"half"`` (Llama, Qwen, Mistral, Gemma, NeoX)
        and ``(2i, 2i + 1)`` for ``"interleaved"`` (GPT-J, ChatGLM, Cohere).
    scaling
        How frequencies are stretched to long contexts; None for not at all.

    Raises
    ------
    InvalidInputError
        If a parameter is of the wrong type or out of range, or if `scaling` does not fit `dim`.

    Examples
    --------
    >>> rope = Rope(theta=10000.0, dim=4)
    >>> rope.frequencies
    array([1.  , 0.01])
    >>> x = np.ones((3, 4), np.float32)
    >>> moved = rope.rotate(x, [0, 1, 2])
    >>> bool(np.allclose(rope.unrotate(moved, [0, 1, 2]), x))
    True
    """

    theta: float = 10000.0
    dim: int
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", number(self.theta, "theta", above=1.0))
        object.__setattr__(self, "dim", whole_number(self.dim, "dim", minimum=2))
        if self.dim % 2:
            raise InvalidInputError(f"dim is {self.dim}, expected an even number of rotary dimensions")
        if self.layout not in ("half", "interleaved"):
            raise InvalidInputError(f"layout is {self.layout!r}, expected 'half' or 'interleaved'")
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise InvalidInputError(
                f"scaling is a {type(self.scaling).__name__}, expected a Scaling such as YarnScaling, or None"
            )
        number(self.attention_factor, "attention_factor")
        if not (np.isfinite(self.frequencies) & (self.frequencies > 0.0)).all():
            raise InvalidInputError(
                f"{self} has frequencies that float64 cannot hold, expected milder settings"
            )

    @cached_property
    def frequencies(self) -> NDArray[np.float64]:
        """Radians per position of each pair after scaling, float64, shape (dim / 2,), read-only."""
        try:
            with np.errstate(all="ignore"):
                if self.scaling is None:
                    result = base_frequencies(self.theta, self.dim)
                else:
                    result = self.scaling.frequencies(self.theta, self.dim)
        except OverflowError:
            result = np.full(self.dim // 2, math.nan)  # refused by the constructor
        result.flags.writeable = False
        return result

    @property
    def wavelengths(self) -> NDArray[np.float64]:
        """Positions that each pair needs for a full turn, float64, shape (dim / 2,)."""
        return 2.0 * math.pi / self.frequencies

    @property
    def attention_factor(self) -> float:
        """Factor on rotated keys and queries: 1 unless YaRN or LongRoPE sets it."""
        return 1.0 if self.scaling is None else self.scaling.amplitude()

    def rotate(self, x: ArrayLike, positions: ArrayLike, *, ops: Ops | None = None) -> ArrayLike:
        """Rotate vectors to their positions, as the model does.

        Parameters
        ----------
        x
            Shape (n, d) with ``d >= dim``; float32 or float64, or float16 and bfloat16, which are
            widened to float32. NaN and infinity stay in their pair.
        positions
            Integers, shape (n,); may be negative.
        ops
            Backend, default ``get_ops("cpu")``.

        Returns
        -------
        ndarray or Tensor
            Shape (n, d), float32 (float64 for float64), new; a tensor if `x` is one.

        Raises
        ------
        InvalidInputError
            If a shape or dtype is wrong.

        Examples
        --------
        >>> Rope(dim=2).rotate(np.array([[1.0, 0.0]]), [1]).round(4)
        array([[0.5403, 0.8415]])
        """
        scale = np.full(len(self.frequencies), self.attention_factor)
        return self._turn(x, positions, self.frequencies, scale, ops)

    def unrotate(
        self, x: ArrayLike, positions: ArrayLike, *, cutoff: float | None = None, ops: Ops | None = None
    ) -> ArrayLike:
        """Undo the rotation of vectors that the model rotated to `positions`.

        Parameters
        ----------
        x, positions, ops
            As for `rotate`.
        cutoff
            Undo only the pairs of a wavelength below this many positions. The slow pairs stay
            exactly as they are, attention factor included. None undoes all.

        Returns
        -------
        ndarray or Tensor
            Shape (n, d), as from `rotate`.

        Raises
        ------
        InvalidInputError
            If a shape or dtype is wrong, or `cutoff` is not above zero.

        Examples
        --------
        >>> rope = Rope(dim=4)  # wavelengths of 6 and 628 positions
        >>> x = rope.rotate(np.ones((1, 4)), [50])
        >>> rope.unrotate(x, [50], cutoff=100).round(3)
        array([[1.   , 0.398, 1.   , 1.357]])
        """
        undone = np.ones(len(self.frequencies), bool)
        if cutoff is not None:
            if cutoff != math.inf:
                cutoff = number(cutoff, "cutoff")
            undone = self.wavelengths < cutoff
        frequencies = np.where(undone, -self.frequencies, 0.0)
        scale = np.where(undone, 1.0 / self.attention_factor, 1.0)
        return self._turn(x, positions, frequencies, scale, ops)

    def rerotate(
        self, x: ArrayLike, positions: ArrayLike, new_positions: ArrayLike, *, ops: Ops | None = None
    ) -> ArrayLike:
        """Move vectors that the model rotated to `positions` on to `new_positions`, in one rotation.

        Parameters
        ----------
        x, positions, ops
            As for `rotate`.
        new_positions
            Integers, shape (n,).

        Returns
        -------
        ndarray or Tensor
            Shape (n, d), as from `rotate`.

        Raises
        ------
        InvalidInputError
            If a shape or dtype is wrong.

        Examples
        --------
        >>> rope = Rope(dim=4)
        >>> x = np.ones((1, 4))
        >>> bool(np.allclose(rope.rerotate(rope.rotate(x, [3]), [3], [70]), rope.rotate(x, [70])))
        True
        """
        old = as_numpy(positions, "positions")
        step = integers(new_positions, "new_positions", old.shape) - integers(old, "positions", old.shape)
        return self._turn(x, step, self.frequencies, np.ones(len(self.frequencies)), ops)

    def _turn(
        self,
        x: ArrayLike,
        positions: ArrayLike,
        frequencies: NDArray[np.float64],
        scale: NDArray[np.float64],
        ops: Ops | None,
    ) -> ArrayLike:
        device = None if ops is None else device_of(x)
        rows: Floats = as_array(x, "x", device)
        if rows.ndim != 2 or rows.shape[1] < self.dim:
            raise InvalidInputError(
                f"x has shape {rows.shape}, expected (n, d) with d of at least {self.dim}"
            )
        if rows.dtype != np.float64:
            rows = vectors(rows, "x", rows.shape[1], finite=False, device=device)
        checked = integers(positions, "positions", rows.shape[:1])
        if ops is None:
            from saapindex.backends import get_ops

            ops = get_ops("cpu")
        return give_back(ops.rotate(rows, checked, frequencies, scale, self.layout == "interleaved"), x)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold.

        Examples
        --------
        >>> Rope(dim=64).to_dict()
        {'theta': 10000.0, 'dim': 64, 'layout': 'half', 'scaling': None}
        """
        return {
            "theta": self.theta,
            "dim": self.dim,
            "layout": self.layout,
            "scaling": None if self.scaling is None else self.scaling.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Build the embedding that `to_dict` described.

        Raises
        ------
        InvalidInputError
            If keys are missing or unknown, or a value is out of range.

        Examples
        --------
        >>> Rope.from_dict({"dim": 64, "theta": 500000.0}).theta
        500000.0
        """
        values = check_keys(data, "rope", known={"theta", "dim", "layout", "scaling"}, required={"dim"})
        if values.get("scaling") is not None:
            values["scaling"] = Scaling.from_dict(values["scaling"])
        return cls(**values)

    @classmethod
    def from_config(
        cls, config: object, *, context: int | None = None, layer_type: str | None = None
    ) -> Rope:
        """Read the rotary embedding out of the config of a model.

        Both styles are known: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``, one for all
        layers or one for each type of layer. Multimodal configs give their ``text_config``; image axes
        (``mrope_section``) are left out, which is right for text.

        Parameters
        ----------
        config
            A config of ``transformers``, or its ``config.json`` as a dict. A dict holds only what was
            written: one without a theta takes 10000.
        context
            Length that is served, for scalings that depend on it (dynamic, LongRoPE). Default: the
            config's ``max_position_embeddings``.
        layer_type
            Which layers, where they differ (Gemma 3). Default ``"full_attention"``.

        Raises
        ------
        InvalidInputError
            If the config has no rotary embedding, one of an unknown kind, or lacks a setting.

        Notes
        -----
        The layout follows the model's type. For a model that is not part of ``transformers`` set it with
        ``dataclasses.replace(rope, layout="interleaved")``. Which layers use the embedding at all is for
        the caller to know.

        Examples
        --------
        >>> Rope.from_config({"rope_theta": 500000.0, "hidden_size": 4096, "num_attention_heads": 32})
        Rope(theta=500000.0, dim=128, layout='half', scaling=None)
        """
        return cls(**read_config(config, context=context, layer_type=layer_type or "full_attention"))
