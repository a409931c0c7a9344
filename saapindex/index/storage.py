"""Reading and writing of an index, in one safetensors file with a JSON header.

============================= ==================== =======================================
tensor                        shape                meaning
============================= ==================== =======================================
``centroids``                 (nlist, d) float32   of a trained index
``metric``                    (d, d) float64       of a query-aware one
``router.*``                                       weights of a learned router
``coder.anchors``, ``code.*``                      of an index that scans codes
``sizes``, ``sums``           (nlist,), (nlist, d) keys in each list, and their sum in the view
``vectors``, ``exact``,       (blocks, ...)        what is stored of keys, list by list, each list in
``words``, ``exponents``,                          whole blocks: see `saapindex.lists.ragged.Stored`
``norms``
``ids``, ``positions``        (blocks * 16,) int64 of the keys, zero where there is none
============================= ==================== =======================================

What is stored of keys lies in the file as it does in memory and has a checksum of its own, so that it can be
mapped. Files of version 1 held keys as one row each; they are read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from saapindex.backends import get_ops
from saapindex.backends.base import LANES
from saapindex.backends.paged import Code
from saapindex.codes import TransformCode
from saapindex.errors import FileFormatError, InvalidInputError, SaapIndexError
from saapindex.files import from_bytes, read_file, to_bytes, write_file
from saapindex.index.coder import Coder, code_words
from saapindex.index.saap import IndexSAAP
from saapindex.index.state import State
from saapindex.lists import InvertedLists, Stored
from saapindex.params import IndexParameters, check_integer
from saapindex.partition import Partition, View
from saapindex.partition.routers import router_from_tensors
from saapindex.rope import Rope

__all__ = ["IO_FLAG_MMAP", "deserialize_index", "read_index", "serialize_index", "write_index"]

IO_FLAG_MMAP = 1
"""Map keys into memory instead of reading them."""
FORMAT = "saapindex.index"
VERSION = 2
_ROUTER, _CODE = "router.", "code."
_ROWS = (*Stored._fields, "ids", "positions")


def write_index(index: IndexSAAP, path: str | os.PathLike[str]) -> None:
    """Write `index` to `path`, whole or not at all; a file that is there is replaced.

    Examples
    --------
    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_index(IndexSAAP(8, 4), os.path.join(folder, "index.safetensors"))
    ...     read_index(os.path.join(folder, "index.safetensors")).nlist
    4
    """
    tensors, header = _content(index)
    write_file(Path(path), tensors, header, format=FORMAT, version=VERSION, apart=_apart(tensors))


def serialize_index(index: IndexSAAP) -> NDArray[np.uint8]:
    """Return what `write_index` writes, uint8 (n,).

    Examples
    --------
    >>> deserialize_index(serialize_index(IndexSAAP(8, 4))).nlist
    4
    """
    tensors, header = _content(index)
    data = to_bytes(tensors, header, format=FORMAT, version=VERSION, apart=_apart(tensors))
    return np.frombuffer(data, np.uint8)


def _apart(tensors: Mapping[str, NDArray[Any]]) -> list[str]:
    return [name for name in _ROWS if name in tensors]


def _content(index: IndexSAAP) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return tensors and header."""
    held = index._held
    state = held.state
    lists = state.lists.compact()
    tensors: dict[str, NDArray[Any]] = {"sizes": lists.sizes, "sums": state.sums}
    tensors |= {name: part for name, part in lists.stored._asdict().items() if 0 not in part.shape[1:]}
    tensors |= {"ids": lists.ids, "positions": lists.positions}
    header: dict[str, Any] = {
        "d": index.d,
        "nlist": index.nlist,
        "metric_type": index.metric_type,
        "nprobe": int(index.nprobe),
        "k_factor": index.k_factor,
        "dtype": index.dtype.name,
        "ntotal": lists.ntotal,
        "next_id": state.next_id,
        "params": dataclasses.asdict(index.params),
        "rope": None if index.rope is None else index.rope.to_dict(),
        "max_position": None,
        "router": None,
    }
    partition, router, coder = held.partition, held.router, held.coder
    if partition is not None:
        tensors["centroids"] = partition.centroids
        header["max_position"] = partition.max_position
        if partition.metric is not None:
            tensors["metric"] = partition.metric
    if router is not None:
        header["router"] = {"name": router.name, "predicts": router.predicts}
        tensors |= {_ROUTER + name: tensor for name, tensor in router.tensors().items()}
    if coder is not None:
        tensors["coder.anchors"] = coder.anchors
        tensors |= {_CODE + name: tensor for name, tensor in coder.code.tensors().items()}
    return tensors, header


def read_index(path: str | os.PathLike[str], io_flags: int = 0, *, backend: str = "cpu") -> IndexSAAP:
    """Read the index at `path`; it answers bit for bit as the one that was written.

    Parameters
    ----------
    path
        The file.
    io_flags
        `IO_FLAG_MMAP`: keys are mapped into memory, so that only what searches visit is read, and are not
        checked against their checksum; the rest is. The file is never changed: what is added stays in
        memory. It may be replaced meanwhile, as `write_index` does, but not be overwritten in place.
    backend
        As for `IndexSAAP`.

    Raises
    ------
    FileFormatError
        If the file is truncated, foreign, newer than this release, or altered.
    OSError
        If it cannot be read at all.
    """
    get_ops(backend)  # an unknown backend is no fault of the file
    if io_flags not in (0, IO_FLAG_MMAP):
        raise InvalidInputError(f"io_flags is {io_flags!r}, expected 0 or IO_FLAG_MMAP")
    mapped = io_flags == IO_FLAG_MMAP
    return _built(str(path), backend, *read_file(Path(path), format=FORMAT, version=VERSION, mapped=mapped))


def deserialize_index(data: NDArray[np.uint8] | bytes, *, backend: str = "cpu") -> IndexSAAP:
    """Return the index that `serialize_index` made `data` of.

    Raises
    ------
    FileFormatError
        As `read_index`.
    """
    get_ops(backend)
    if isinstance(data, np.ndarray) and data.dtype != np.uint8:
        raise InvalidInputError(f"data is {data.dtype}, expected uint8")
    content = data.tobytes() if isinstance(data, np.ndarray) else bytes(data)
    return _built(f"{len(content)} bytes", backend, *from_bytes(content, format=FORMAT, version=VERSION))


def _built(
    source: str, backend: str, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]
) -> IndexSAAP:
    try:
        return _build(tensors, header, backend)
    except (SaapIndexError, LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{source} is no whole index: {error}") from error


def _build(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], backend: str) -> IndexSAAP:
    rope = None if header["rope"] is None else Rope.from_dict(header["rope"])
    params = IndexParameters(**header["params"])
    # Before anything of the size that the header says is made.
    _tensor(tensors, "sums", (header["nlist"], header["d"]), np.float64)
    if header["max_position"] is not None:
        check_integer("max_position", header["max_position"], 1)
    index = IndexSAAP(
        header["d"],
        header["nlist"],
        header["metric_type"],
        params=params,
        rope=rope,
        nprobe=header["nprobe"],
        dtype=header["dtype"],
        backend=backend,
        k_factor=header.get("k_factor", 4.0),
    )
    index.params = params
    partition = router = coder = None
    if "centroids" in tensors:
        d, nlist = index.d, index.nlist
        centroids = _tensor(tensors, "centroids", (nlist, d), np.float32)
        metric = _tensor(tensors, "metric", (d, d), np.float64) if "metric" in tensors else None
        view = View(params.view, params.cutoff, rope)
        partition = Partition(view, centroids, metric, params.spherical, header["max_position"])
    if header["router"] is not None:
        weights = {
            name.removeprefix(_ROUTER): tensor for name, tensor in tensors.items() if name.startswith(_ROUTER)
        }
        router = router_from_tensors(**header["router"], scale=index.scale, tensors=weights)
    if partition is not None and params.bits:
        coder = _coder(tensors, index)
    read = _state if header["version"] > 1 else _state_of_rows
    index._adopt(partition, None, read(tensors, header, index), coder)
    if router is not None:
        index.router = router
    return index


def _coder(tensors: Mapping[str, NDArray[Any]], index: IndexSAAP) -> Coder:
    fields = {name: tensors[_CODE + name] for name in Code._fields}
    code = TransformCode(**fields)
    words = code_words(index.d, index.params.bits)
    if (code.heads, code.d, code.words) != (1, index.d, words):
        raise FileFormatError(
            f"codes of {code.heads} heads, {code.d} dimensions and {code.words} words, "
            f"expected 1, {index.d} and {words}"
        )
    return Coder(_tensor(tensors, "coder.anchors", (index.nlist, index.d), np.float32), code, index._l2)


def _state(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], index: IndexSAAP) -> State:
    sizes = _sizes(tensors, index)
    blocks = int((-(-sizes // LANES)).sum())
    empty = Stored.zeros(blocks, index._nothing().lists.stored)
    stored = Stored(
        *(
            _tensor(tensors, name, part.shape, part.dtype) if 0 not in part.shape[1:] else part
            for name, part in empty._asdict().items()
        )
    )
    rows = (blocks * LANES,)
    ids, positions = (_tensor(tensors, name, rows, np.int64) for name in ("ids", "positions"))
    sums = _tensor(tensors, "sums", (index.nlist, index.d), np.float64)
    check_integer("next_id", header["next_id"], 0)
    if header["ntotal"] != sizes.sum():
        raise FileFormatError(f"lists hold {sizes.sum()} keys, expected {header['ntotal']}")
    return State(InvertedLists.packed(stored, ids, positions, sizes), sums, header["next_id"])


def _sizes(tensors: Mapping[str, NDArray[Any]], index: IndexSAAP) -> NDArray[np.int64]:
    sizes = _tensor(tensors, "sizes", (index.nlist,), np.int64)
    if ((sizes < 0) | (sizes > len(tensors["ids"]))).any():
        raise FileFormatError("a list has a size below 0 or above the number of keys")
    return sizes


def _state_of_rows(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], index: IndexSAAP) -> State:
    """Of a file of version 1."""
    sizes = _sizes(tensors, index)
    ntotal = int(sizes.sum())
    lists = InvertedLists.empty(index.nlist, index.d, index.dtype).append(
        _tensor(tensors, "vectors", (ntotal, index.d), index.dtype),
        _tensor(tensors, "ids", (ntotal,), np.int64),
        _tensor(tensors, "positions", (ntotal,), np.int64),
        np.repeat(np.arange(index.nlist, dtype=np.int64), sizes),
    )
    return State(lists, _tensor(tensors, "sums", (index.nlist, index.d), np.float64), int(header["next_id"]))


def _tensor(
    tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], dtype: DTypeLike
) -> NDArray[Any]:
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != dtype:
        raise FileFormatError(
            f"{name} is {tensor.dtype} of shape {tensor.shape}, expected {np.dtype(dtype)} of {shape}"
        )
    return tensor
