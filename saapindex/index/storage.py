"""Reading and writing of an index, in one safetensors file with a JSON header.

=========================== ==================== =======================================
tensor                      shape                meaning
=========================== ==================== =======================================
``centroids``               (nlist, d) float32   of a trained index
``metric``                  (d, d) float64       of a query-aware one
``router.*``                                     weights of a learned router
``sizes``, ``sums``         (nlist,), (nlist, d) keys in each list, and their sum in the view
``vectors``                 (ntotal, d)          keys, list by list, in the dtype of the index
``ids``, ``positions``      (ntotal,) int64      of the keys
=========================== ==================== =======================================
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
from saapindex.errors import FileFormatError, SaapIndexError
from saapindex.files import read_file, write_file
from saapindex.index.saap import IndexSAAP
from saapindex.index.state import State
from saapindex.lists import InvertedLists
from saapindex.params import IndexParameters
from saapindex.partition import Partition, View
from saapindex.partition.routers import router_from_tensors
from saapindex.rope import Rope

__all__ = ["read_index", "write_index"]

FORMAT = "saapindex.index"
VERSION = 1
_ROUTER = "router."


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
    state = index._state
    rows = state.lists.rows()
    tensors: dict[str, NDArray[Any]] = {
        "sizes": state.lists.sizes,
        "sums": state.sums,
        "vectors": state.lists.view.rows(rows),
        "ids": state.lists.ids[rows],
        "positions": state.lists.positions[rows],
    }
    header: dict[str, Any] = {
        "d": index.d,
        "nlist": index.nlist,
        "metric_type": index.metric_type,
        "nprobe": int(index.nprobe),
        "dtype": index.dtype.name,
        "next_id": state.next_id,
        "params": dataclasses.asdict(index.params),
        "rope": None if index.rope is None else index.rope.to_dict(),
        "max_position": None,
        "router": None,
    }
    partition, router = index._partition, index._router
    if partition is not None:
        tensors["centroids"] = partition.centroids
        header["max_position"] = partition.max_position
        if partition.metric is not None:
            tensors["metric"] = partition.metric
    if router is not None:
        header["router"] = {"name": router.name, "predicts": router.predicts}
        tensors |= {_ROUTER + name: tensor for name, tensor in router.tensors().items()}
    write_file(Path(path), tensors, header, format=FORMAT, version=VERSION)


def read_index(path: str | os.PathLike[str], *, backend: str = "cpu") -> IndexSAAP:
    """Read the index at `path`; it answers bit for bit as the one that was written.

    Raises
    ------
    FileFormatError
        If the file is truncated, foreign, newer than this release, or altered.
    OSError
        If it cannot be read at all.
    """
    get_ops(backend)  # an unknown backend is no fault of the file
    tensors, header = read_file(Path(path), format=FORMAT, version=VERSION)
    try:
        return _build(tensors, header, backend)
    except (SaapIndexError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileFormatError(f"{path} is no whole index: {error}") from error


def _build(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], backend: str) -> IndexSAAP:
    rope = None if header["rope"] is None else Rope.from_dict(header["rope"])
    params = IndexParameters(**header["params"])
    index = IndexSAAP(
        header["d"],
        header["nlist"],
        header["metric_type"],
        params=params,
        rope=rope,
        nprobe=header["nprobe"],
        dtype=header["dtype"],
        backend=backend,
    )
    index.params = params
    partition = router = None
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
    index._adopt(partition, None, _state(tensors, header, index))
    if router is not None:
        index.router = router
    return index


def _state(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], index: IndexSAAP) -> State:
    sizes = _tensor(tensors, "sizes", (index.nlist,), np.int64)
    if ((sizes < 0) | (sizes > len(tensors["ids"]))).any():
        raise FileFormatError("a list has a size below 0 or above the number of keys")
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
