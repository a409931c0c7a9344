"""Selection of an index on a device: nothing is allocated where arrays are given, and nobody waits."""

from __future__ import annotations

from typing import Any

import numpy as np

from saapindex.arrays import ArrayLike
from saapindex.attention.device_attend import limits_of, type_of, workspace
from saapindex.attention.device_batch import DeviceBatch
from saapindex.attention.device_keeping import allocating
from saapindex.attention.device_tensors import buffer, placed, raw
from saapindex.attention.selection import Selection
from saapindex.attention.streams import as_host
from saapindex.backends.cuda.chosen import Bits, Chosen, choose_streams, most_chosen
from saapindex.backends.cuda.launch import multiprocessors
from saapindex.backends.paged import Scaling
from saapindex.devices import device_of
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

__all__ = ["select_on_device"]

_FIELDS = ("ids", "lengths", "partitions", "window_start", "ends")


def select_on_device(
    batch: DeviceBatch,
    q: ArrayLike,
    device: int,
    scaling: Scaling,
    wanted: AttendParameters,
    out: Selection | None,
) -> Selection:
    """See `AttentionIndex.select`; what is returned is on the device where `q` is, else in host memory."""
    xp, heads, book = batch.keeping.xp, batch.keeping.heads, batch.keeping.book
    count, streams = len(batch.centroids), batch.streams
    x = placed(q, "q", (count, None, book.codebook.d), type_of(q), device)
    x = xp.ascontiguousarray(x).reshape(count * heads, 1, -1, book.codebook.d)
    limits = limits_of(wanted, batch, x.shape[2], device)
    everything = wanted.budget == 1
    most = most_chosen(streams, limits, everything=everything)
    shapes = dict(
        zip(
            _FIELDS,
            ((count, heads, most), (count, heads), (count, heads, book.codebook.nlist), (count,), (count,)),
            strict=True,
        )
    )
    space, bits = workspace(batch, x.shape[2], 1, device), _bits(batch)
    given, arrays = _written(out, q, shapes, device, xp)
    choose_streams(
        x,
        streams,
        book.code,
        scaling,
        limits,
        space,
        bits,
        Chosen(*(array.reshape(-1, *array.shape[2:]) for array in arrays[:3]), *arrays[3:]),
        multiprocessors(device),
        everything=everything,
    )
    if given is None:
        given = [as_host(array) for array in arrays]
    return Selection(sinks=batch.keeping.sinks, **dict(zip(_FIELDS, given, strict=True)))


def _bits(batch: DeviceBatch) -> Bits:
    """Return the bits of a step, the same ones each time: a graph goes on with them."""
    if "bits" not in batch.spaces:
        with allocating("bits of what is selected"):
            batch.spaces["bits"] = Bits.empty(batch.streams, batch.keeping.xp)
    bits: Bits = batch.spaces["bits"]
    return bits


def _written(
    out: Selection | None, q: ArrayLike, shapes: dict[str, tuple[int, ...]], device: int, xp: Any
) -> tuple[list[ArrayLike] | None, list[Any]]:
    """Return the caller's arrays and CuPy's views of them; no arrays where the caller is on the host."""
    if out is not None:
        given = [getattr(out, name) for name in _FIELDS]
        for name, array in zip(_FIELDS, given, strict=True):
            found = device_of(array), str(getattr(array, "dtype", "")), tuple(getattr(array, "shape", ()))
            if found[0] != device or not found[1].endswith("int64") or found[2] != shapes[name]:
                raise InvalidInputError(
                    f"out.{name} is {found[1] or 'no array'} of shape {found[2]}, expected int64 of "
                    f"{shapes[name]} on cuda:{device}: a selection of this index with the same limits, made "
                    "since its tables last grew"
                )
        arrays = [raw(array) for array in given]
        if not all(array.flags.c_contiguous for array in arrays):
            raise InvalidInputError("arrays of out are not contiguous, expected those of a selection")
        return given, arrays
    if device_of(q) is None:
        return None, [xp.empty(shape, np.int64) for shape in shapes.values()]
    made = [buffer(q, shape, "int64", device) for shape in shapes.values()]
    return [one for one, _ in made], [other for _, other in made]
