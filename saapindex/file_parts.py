"""Parts of a safetensors file: where each tensor lies, and reading it from a disk or from memory."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError

__all__ = ["BFLOAT16", "DTYPES", "KEY", "Part", "Source", "header_of", "opened", "sound"]

_FAULTS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
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
    """Where a file's content is: on a disk or in memory."""

    def __init__(self, content: Path | bytes) -> None:
        self.content = content

    def __str__(self) -> str:
        return str(self.content) if isinstance(self.content, Path) else f"{len(self.content)} bytes"

    def take(self, dtype: np.dtype[Any], count: int, start: int) -> NDArray[Any]:
        """Return `count` elements from byte `start` on."""
        if isinstance(self.content, Path):
            return np.fromfile(self.content, dtype, count, offset=start)
        return np.frombuffer(self.content, dtype, count, start).copy()

    def _entries(self) -> tuple[dict[str, Any], int]:
        with open(self.content, "rb") if isinstance(self.content, Path) else io.BytesIO(self.content) as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length

    def metadata(self) -> dict[str, str]:
        """Return the texts that go with the tensors."""
        return self._entries()[0].get("__metadata__") or {}

    def places(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
        """Return dtype, shape and first byte of each tensor; safetensors has found the content valid."""
        entries, start = self._entries()
        entries.pop("__metadata__", None)
        return {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in sorted(entries.items())
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
        if not math.prod(self.shape) or not isinstance(self.source.content, Path):
            return self.read()
        return np.asarray(np.memmap(self.source.content, self.dtype, "c", self.start, self.shape))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file of this library; whatever is wrong with its content is a `FileFormatError`."""
    from safetensors import safe_open

    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, expected a saapindex file")
    with open(path, "rb"):  # a missing file or a missing right is the system's own error
        pass
    source = Source(path)
    with sound(source), safe_open(path, framework="numpy") as file:
        yield file, header_of(source, file.metadata() or {})


def header_of(source: Source, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header that is in the metadata."""
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
