"""A trace: keys, values and queries of one layer over one sequence, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError
from saapindex.rope import Rope

__all__ = ["Trace"]


@dataclass(frozen=True)
class Trace:
    """Keys, values and queries of one layer over one sequence.

    Attributes
    ----------
    keys, values
        float16 or float32, shape (kv_heads, n, d); keys as cached, after RoPE.
    queries
        float16 or float32, shape (q_heads, m, d), after RoPE.
    key_positions, query_positions
        int64, shapes (n,) and (m,).
    rope
        The rotary embedding that was applied, or None for a layer without one.
    info
        What else the header says: model, layer, heads, text and more, see `saapindex.learn.traces`.

    Examples
    --------
    >>> import numpy as np
    >>> zeros = np.zeros((1, 4, 8), np.float32)
    >>> trace = Trace(zeros, zeros, np.zeros((3, 2, 8), np.float32), np.arange(4), np.arange(4, 6))
    >>> trace.group_size, trace.d
    (3, 8)
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    queries: NDArray[Any]
    key_positions: NDArray[np.int64]
    query_positions: NDArray[np.int64]
    rope: Rope | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("keys", "values", "queries"):
            array = getattr(self, name)
            if array.ndim != 3 or array.dtype.kind != "f":
                raise InvalidInputError(
                    f"trace: {name} is {array.dtype} of shape {array.shape}, expected floats, (heads, n, d)"
                )
        for name in ("key_positions", "query_positions"):
            if getattr(self, name).dtype.kind != "i":
                raise InvalidInputError(f"trace: {name} is {getattr(self, name).dtype}, expected integers")
        if not isinstance(self.info, Mapping):
            raise InvalidInputError(f"trace: info is a {type(self.info).__name__}, expected a mapping")
        heads, n, d = self.keys.shape
        expected = {
            "values": (heads, n, d),
            "queries": (self.queries.shape[0], self.queries.shape[1], d),
            "key_positions": (n,),
            "query_positions": (self.queries.shape[1],),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise InvalidInputError(
                    f"trace: {name} has shape {getattr(self, name).shape}, expected {shape}"
                )
        if not heads or self.queries.shape[0] % heads:
            raise InvalidInputError(
                f"trace: {self.queries.shape[0]} query heads cannot share {heads} KV heads evenly"
            )

    @property
    def d(self) -> int:
        """Size of a head."""
        return int(self.keys.shape[2])

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (GQA)."""
        return int(self.queries.shape[0] // self.keys.shape[0])

    @property
    def heads(self) -> list[int]:
        """Numbers of the KV heads in the model, in the order of `keys`."""
        return head_numbers(self.info, len(self.keys))

    @property
    def scale(self) -> float:
        """Factor on ``q . k``: what the header says, or ``d ** -0.5``."""
        scale = self.info.get("scale")
        return self.d**-0.5 if scale is None else float(scale)

    @property
    def softcap(self) -> float | None:
        """Soft cap `c` on the logits, ``c * tanh(scale * q . k / c)``, or None."""
        softcap = self.info.get("softcap")
        return None if softcap is None else float(softcap)

    def head_queries(self, head: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return every query of the group of KV head `head`, with its position.

        Returns
        -------
        queries : float32, shape (group_size * m, d)
        positions : int64, shape (group_size * m,)
        """
        group = self.queries[head * self.group_size : (head + 1) * self.group_size]
        queries = group.reshape(-1, self.d).astype(np.float32)
        return queries, np.tile(self.query_positions, self.group_size)


def head_numbers(info: Mapping[str, Any], count: int) -> list[int]:
    """Return the numbers of the KV heads of a file: version 1 named one or none."""
    heads = info.get("heads")
    if heads is None and count == 1 and info.get("kv_head") is not None:
        heads = [info["kv_head"]]
    return list(range(count)) if heads is None else list(heads)
