"""Traces: what attention saw, as one safetensors file per sequence and layer.

A trace holds the keys and values of some KV heads of one layer over one sequence, and the
queries of the query heads that share them, as the runtime caches them (after RoPE), with
their positions. The JSON header names the model, the layer, the heads and the RoPE settings.

Tensors of the file:

=================== ==================== ==========================================
name                shape                meaning
=================== ==================== ==========================================
``keys``            (kv_heads, n, d)     keys, rotated
``values``          (kv_heads, n, d)     values
``queries``         (q_heads, m, d)      queries, rotated; KV head ``h // (q_heads // kv_heads)``
``key_positions``   (n,) int64           position of each key in the sequence
``query_positions`` (m,) int64           position of each query in the sequence
=================== ==================== ==========================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError, InvalidInputError
from saapindex.files import read_file, write_file
from saapindex.rope import Rope

__all__ = ["Trace", "read_trace", "write_trace"]

FORMAT = "saapindex.trace"
VERSION = 1
_TENSORS = ("keys", "values", "queries", "key_positions", "query_positions")


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
        The rotary embedding that was applied, or None for a model without one.
    info
        What else the header says: model, layer, heads, source of the text.

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


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write `trace` to `path`, whole or not at all."""
    tensors = {name: np.ascontiguousarray(getattr(trace, name)) for name in _TENSORS}
    header = {
        "rope": None if trace.rope is None else trace.rope.to_dict(),
        "info": dict(trace.info),
    }
    write_file(Path(path), tensors, header, format=FORMAT, version=VERSION)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read the trace at `path`.

    Raises
    ------
    FileFormatError
        If the file is no whole trace of a version that this release reads.
    """
    tensors, header = read_file(Path(path), format=FORMAT, version=VERSION)
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise FileFormatError(f"{path}: not a whole trace, tensors missing: {', '.join(missing)}")
    try:
        rope = None if header.get("rope") is None else Rope.from_dict(header["rope"])
        return Trace(**{name: tensors[name] for name in _TENSORS}, rope=rope, info=header.get("info", {}))
    except InvalidInputError as error:
        raise FileFormatError(f"{path}: not a whole trace: {error}") from error
