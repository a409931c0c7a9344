"""Traces: what attention saw, as one safetensors file per sequence and layer.

A trace holds the keys and values of KV heads of one layer over one sequence, and queries of the query
heads that share them, as the runtime caches them (after RoPE), with their positions. Tensors of the file:

=================== ==================== ==========================================
name                shape                meaning
=================== ==================== ==========================================
``keys``            (kv_heads, n, d)     keys, rotated
``values``          (kv_heads, n, d)     values
``queries``         (q_heads, m, d)      queries, rotated; KV head ``h // (q_heads // kv_heads)``
``key_positions``   (n,) int64           position of each key in the sequence
``query_positions`` (m,) int64           position of each query in the sequence
=================== ==================== ==========================================

The first three are ``F16``, ``BF16`` or ``F32``, and have a checksum for every head, so that one head of a
large trace can be read alone. The JSON header (see `saapindex.files`) holds ``rope``, as `Rope.to_dict`
writes it or null for a layer without one, and ``info``, in which `saapindex.learn.capture.capture` puts:

================== ======================================================================
name               meaning
================== ======================================================================
``model``          Hub id, or the name of the folder or GGUF file
``weights``        fingerprint of the weights, see `saapindex.learn.models.weights_hash`
``layer``          number of the layer, from 0
``layers``         layers of the model
``heads``          numbers of the KV heads in this file
``kv_heads``       KV heads of the layer
``q_heads``        query heads of the layer
``context``        tokens that the model read
``text``           name of the text
``text_hash``      SHA-256 of the whole text
``sequence``       which stretch of the text, from 0
``tokens_hash``    SHA-256 of the token ids that were read, as little-endian int64
``queries``        ``"all"``, or the number of positions that were sampled
``seed``           of the sampling; null with ``"all"``
``scale``          factor on ``q . k``
``softcap``        ``c`` of a model whose logits are ``c * tanh(scale * q . k / c)``, else null
``dtype``          float16, bfloat16 or float32: what keys, values and queries are stored as
``compute_dtype``  what the model computed in
================== ======================================================================

Version 1 had neither bfloat16 nor checksums of heads; it is still read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saapindex.errors import FileFormatError, InvalidInputError
from saapindex.files import read_file, read_header, write_file
from saapindex.learn.trace import Trace, head_numbers
from saapindex.rope import Rope

__all__ = ["Trace", "TraceHeader", "find_traces", "read_trace", "read_trace_header", "write_trace"]

FORMAT = "saapindex.trace"
VERSION = 2
_BY_HEAD = ("keys", "values", "queries")
_TENSORS = (*_BY_HEAD, "key_positions", "query_positions")
_STORED = {"F16": "float16", "F32": "float32"}  # where the header does not say: version 1
_NAME = re.compile(r"(?:(?P<sequence>.+)-)?layer-?(?P<layer>\d+)\.safetensors")


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says of itself, read without its tensors.

    Attributes
    ----------
    info
        As `Trace.info`, its ``dtype`` filled in.
    rope
        As `Trace.rope`.
    kv_heads, q_heads, n, m, d
        Shape of the trace: KV heads and query heads in the file, keys, queries, size of a head.
    """

    info: Mapping[str, Any]
    rope: Rope | None
    kv_heads: int
    q_heads: int
    n: int
    m: int
    d: int

    @property
    def heads(self) -> list[int]:
        """Numbers of the KV heads in the model, in the order of `Trace.keys`."""
        return head_numbers(self.info, self.kv_heads)


def write_trace(path: str | os.PathLike[str], trace: Trace, *, dtype: str | None = None) -> None:
    """Write `trace` to `path`, whole or not at all.

    Parameters
    ----------
    path
        File to write; its folder must exist.
    trace
        What to write.
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``, which is what keys, values and queries are stored
        as. Default: ``trace.info["dtype"]``, or the dtype of the keys.

    Raises
    ------
    InvalidInputError
        If `dtype` is another, or float16 cannot hold a value.

    Examples
    --------
    >>> import tempfile
    >>> ones = np.ones((1, 2, 8), np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "layer-00.safetensors")
    ...     write_trace(path, Trace(ones, ones, ones, np.arange(2), np.arange(2)), dtype="bfloat16")
    ...     read_trace(path).info
    {'dtype': 'bfloat16'}
    """
    dtype = dtype or trace.info.get("dtype") or trace.keys.dtype.name
    if dtype not in ("float16", "bfloat16", "float32"):
        raise InvalidInputError(f"dtype is {dtype!r}, expected 'float16', 'bfloat16' or 'float32'")
    tensors = {name: np.asarray(getattr(trace, name)) for name in _TENSORS}
    for name in _BY_HEAD:
        with np.errstate(over="ignore"):
            narrow = tensors[name].astype("float32" if dtype == "bfloat16" else dtype, copy=False)
        if narrow.dtype != tensors[name].dtype and (np.isinf(narrow) & np.isfinite(tensors[name])).any():
            raise InvalidInputError(f"{name} reach beyond what {dtype} can hold: use dtype 'bfloat16'")
        tensors[name] = narrow
    header = {
        "rope": None if trace.rope is None else trace.rope.to_dict(),
        "info": {**trace.info, "dtype": dtype},
    }
    bfloat16 = _BY_HEAD if dtype == "bfloat16" else ()
    write_file(Path(path), tensors, header, format=FORMAT, version=VERSION, bfloat16=bfloat16, rows=_BY_HEAD)


def read_trace_header(path: str | os.PathLike[str]) -> TraceHeader:
    """Read what the trace at `path` says of itself, and none of its tensors.

    Raises
    ------
    FileFormatError
        If the file is no whole trace of a version that this release reads.
    OSError
        If it cannot be read at all.
    """
    shapes, header = read_header(Path(path))
    if header.get("format") != FORMAT:
        raise FileFormatError(f"{path} holds a {header.get('format')!r}, expected a {FORMAT!r}")
    if not isinstance(header.get("version"), int) or header["version"] > VERSION:
        raise FileFormatError(
            f"{path} has version {header.get('version')} of {FORMAT}, this release reads up to {VERSION}: "
            "upgrade saapindex"
        )
    _check_tensors(path, shapes)
    try:
        (kv_heads, n, d), (q_heads, m, _) = shapes["keys"][1], shapes["queries"][1]
        info = {"dtype": _STORED.get(shapes["keys"][0]), **_info(header)}
        return TraceHeader(info, _rope(header), kv_heads, q_heads, n, m, d)
    except ValueError as error:
        raise FileFormatError(f"{path}: not a whole trace: {error}") from error


def _check_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise FileFormatError(f"{path}: not a whole trace, tensors missing: {', '.join(missing)}")


def _rope(header: Mapping[str, Any]) -> Rope | None:
    return None if header.get("rope") is None else Rope.from_dict(header["rope"])


def _info(header: Mapping[str, Any]) -> Mapping[str, Any]:
    info = header.get("info", {})
    if not isinstance(info, Mapping):
        raise InvalidInputError(f"info is a {type(info).__name__}, expected a mapping")
    return info


def read_trace(path: str | os.PathLike[str], *, heads: Sequence[int] | None = None) -> Trace:
    """Read the trace at `path`, or some of its heads.

    Parameters
    ----------
    path
        A file that `write_trace` wrote.
    heads
        Numbers of the KV heads that are wanted, as `TraceHeader.heads` has them; their query heads come
        with them. Nothing else is read (of a file of version 2). Default: all.

    Returns
    -------
    Trace
        bfloat16 comes as float32.

    Raises
    ------
    FileFormatError
        If the file is no whole trace of a version that this release reads.
    InvalidInputError
        If a head is not in the file.
    OSError
        If it cannot be read at all.
    """
    rows: dict[str, list[int]] | None = None
    info: dict[str, Any] = {}
    if heads is not None:
        header = read_trace_header(path)
        strange = sorted(set(heads) - set(header.heads))
        if strange or not heads:
            raise InvalidInputError(
                f"heads is {list(heads)}, expected some of {header.heads}, those in {path}"
            )
        at = [header.heads.index(head) for head in heads]
        group = header.q_heads // header.kv_heads
        queries = [head * group + member for head in at for member in range(group)]
        rows, info = {"keys": at, "values": at, "queries": queries}, {"heads": list(heads)}
    tensors, read = read_file(Path(path), format=FORMAT, version=VERSION, rows=rows)
    _check_tensors(path, tensors)
    try:
        info = {"dtype": tensors["keys"].dtype.name, **_info(read), **info}
        return Trace(**{name: tensors[name] for name in _TENSORS}, rope=_rope(read), info=info)
    except InvalidInputError as error:
        raise FileFormatError(f"{path}: not a whole trace: {error}") from error


def find_traces(folder: str | os.PathLike[str]) -> dict[str, dict[int, Path]]:
    """Find the traces in `folder`, by their names.

    Parameters
    ----------
    folder
        What `saapindex.learn.capture.capture` wrote: ``SEQUENCE/layer-04.safetensors``. Files that lie flat
        in it, ``SEQUENCE-layer4.safetensors``, are found too, and so are those of one sequence's folder.

    Returns
    -------
    dict
        Of each sequence, by name: of each layer, by number: the file. Both in order.

    Raises
    ------
    InvalidInputError
        If there is no such folder, or no trace in it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "manual-0").mkdir()
    ...     (Path(folder) / "manual-0" / "layer-04.safetensors").touch()
    ...     {name: list(layers) for name, layers in find_traces(folder).items()}
    {'manual-0': [4]}
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidInputError(f"{root} is no folder, expected one with traces")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted([*root.glob("*.safetensors"), *root.glob("*/*.safetensors")]):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["sequence"] or path.parent.resolve().name, {})[int(match["layer"])] = path
    if not found:
        raise InvalidInputError(f"{root} holds no traces, expected files like SEQUENCE/layer-04.safetensors")
    return {sequence: dict(sorted(layers.items())) for sequence, layers in sorted(found.items())}
