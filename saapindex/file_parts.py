"""Parts of a safetensors file: where each tensor lies, and reading it from a disk or from memory."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError

__all__ = ["BFLOAT16", "DTYPES", "KEY", "Part", "Source", "header_of", "opened", "sound"]

_FAULTS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
# Times that a file may be replaced while it is opened.
_TRIES = 100
KEY = "saapindex"
"""The key of the header in the metadata."""
BFLOAT16 = np.dtype("V2")  # two bytes that NumPy leaves alone
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}


class Source:
    """Where content is: in an open file, which stays what it is if another takes its name, or in memory."""

    def __init__(self, content: BinaryIO | bytes, name: str) -> None:
        self.content, self.name = content, name

    def __str__(self) -> str:
        return self.name

    def take(self, dtype: np.dtype[Any], count: int, start: int) -> NDArray[Any]:
        """Return `count` elements from byte `start` on."""
        if isinstance(self.content, bytes):
            return np.frombuffer(self.content, dtype, count, start).copy()
        self.content.seek(start)
        return np.fromfile(self.content, dtype, count)

    def map(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> NDArray[Any]:
        """Return an array that is read when it is looked at."""
        if not math.prod(shape) or isinstance(self.content, bytes):
            return self.take(dtype, math.prod(shape), start).reshape(shape)
        return np.asarray(np.memmap(self.content, dtype, "c", start, shape))

    @cached_property
    def _entries(self) -> tuple[dict[str, Any], int]:
        file = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length

    @property
    def entries(self) -> dict[str, Any]:
        """What the file says of each tensor, by name."""
        return {name: entry for name, entry in self._entries[0].items() if name != "__metadata__"}

    @property
    def metadata(self) -> dict[str, str]:
        """The texts that go with the tensors."""
        return self._entries[0].get("__metadata__") or {}

    def places(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
        """Return dtype, shape and first byte of each tensor; safetensors has found the content valid."""
        start = self._entries[1]
        return {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in sorted(self.entries.items())
        }


class Part:
    """A tensor in a file: where it lies, and how it is read."""

    def __init__(self, source: Source, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> None:
        self.source, self.dtype, self.shape, self.start = source, dtype, shape, start

    def read(self) -> NDArray[Any]:
        """Return the whole tensor."""
        return self.source.take(self.dtype, math.prod(self.shape), self.start).reshape(self.shape)

    def read_rows(self, numbers: Sequence[int]) -> NDArray[Any]:
        """Return some rows, reading no others."""
        rows = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        count = math.prod(self.shape[1:])
        for row, number in zip(rows, numbers, strict=True):
            offset = self.start + number * count * self.dtype.itemsize
            row[...] = self.source.take(self.dtype, count, offset).reshape(row.shape)
        return rows

    def map(self) -> NDArray[Any]:
        """Return the whole tensor without reading it."""
        return self.source.map(self.dtype, self.shape, self.start)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Open a file of this library; whatever is wrong with its content is a `FileFormatError`."""
    from safetensors import safe_open

    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, expected a saapindex file")
    for _ in range(_TRIES):
        with open(path, "rb") as file:  # a missing file or a missing right is the system's own error
            source = Source(file, str(path))
            with sound(source):
                with safe_open(path, framework="numpy"):  # raises where the content is not sound
                    pass
                # What was found sound is what is open, unless another file has taken the name meanwhile.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield source, header_of(source)
                    return
    raise OSError(f"{path} is replaced faster than it can be read")


def header_of(source: Source) -> dict[str, Any]:
    """Return the header that is in the metadata."""
    metadata = source.metadata
    if KEY not in metadata:
        raise FileFormatError(f"{source} is a safetensors file of something else")
    header = json.loads(metadata[KEY])
    if not isinstance(header, dict):
        raise FileFormatError(f"{source} has a header that is no object")
    return header


@contextlib.contextmanager
def sound(source: Source) -> Iterator[None]:
    """Whatever is wrong with the content is a `FileFormatError`."""
    from safetensors import SafetensorError

    try:
        yield
    except FileFormatError:
        raise
    except (
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise FileFormatError(f"{source} is truncated or no safetensors file: {error}") from error
