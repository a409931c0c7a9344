"""Files: safetensors with a versioned JSON header, written whole or not at all.

The header lives in the safetensors metadata under the key ``saapindex`` and holds the format's
name, its version, a checksum of every tensor and of itself, and whatever the caller adds. Nothing is pickled.

A tensor may have a checksum for each of its rows instead (``row_checksums`` in the header, which the file's
own checksum covers), so that a few rows of a large one can be read, and checked, alone; or one of its own
(``tensor_checksums``), so that the rest can be checked while it is mapped into memory. NumPy has no bfloat16:
such tensors are float32 in memory and ``BF16`` in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError, InvalidInputError
from saapindex.file_parts import BFLOAT16, DTYPES, KEY, Part, Source, header_of, opened, sound

__all__ = ["from_bytes", "read_file", "read_header", "to_bytes", "write_file", "write_whole"]

_ROWS = "row_checksums"
_APART = "tensor_checksums"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def _rounded(x: NDArray[Any]) -> NDArray[Any]:
    """Round float32 to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    halves = bits.view("<u2")
    if not halves[..., ::2].any():  # bfloat16 that was widened, as a model's keys are: much the fastest
        return np.ascontiguousarray(halves[..., 1::2]).view(BFLOAT16)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[np.isnan(x)] = 0x7FC0  # the carry would make some of them infinite
    result: NDArray[Any] = rounded.view(BFLOAT16)
    return result


def _widened(tensor: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 as float32, and anything else as it is."""
    if tensor.dtype != BFLOAT16:
        return tensor
    return (tensor.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _digest(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> str:
    """Checksum of names, dtypes, shapes, bytes and header."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        digest.update(tensor.data if tensor.size else b"")
    return digest.hexdigest()


def _row_digests(name: str, tensor: NDArray[Any]) -> list[str]:
    """Checksum of each row, in threads: hashing gives up the interpreter's lock."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda row: _digest({name: row}, {}), tensor))


def _own_digests(tensors: Mapping[str, NDArray[Any]], names: Collection[str]) -> dict[str, str]:
    """Checksum of each tensor by itself, in threads."""
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _digest({name: tensors[name]}, {}), sorted(names))
        return dict(zip(sorted(names), found, strict=True))


def write_file(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    header: Mapping[str, Any],
    *,
    format: str,
    version: int,
    bfloat16: Collection[str] = (),
    rows: Collection[str] = (),
    apart: Collection[str] = (),
) -> None:
    """Write `tensors` and `header` to `path` through a temporary file beside it.

    The data is flushed to the disk before the file takes its name, so a crash or a full disk
    leaves either the old file or the new one.

    Parameters
    ----------
    path
        File to write; its folder must exist.
    tensors, header
        Arrays by name, and what JSON can hold.
    format, version
        What `read_file` checks.
    bfloat16
        Names of float32 tensors that are rounded to bfloat16.
    rows
        Names of tensors that get a checksum for each row, so that rows can be read alone.
    apart
        Names of tensors that get a checksum of their own, so that they can be mapped.

    Raises
    ------
    InvalidInputError
        If the folder does not exist, or a tensor has a dtype that the file cannot hold.
    OSError
        If the disk is full or the folder cannot be written.
    """
    if not path.parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: the folder {path.parent} does not exist")
    stored = {
        name: _rounded(tensor) if name in bfloat16 else np.ascontiguousarray(tensor)
        for name, tensor in tensors.items()
    }
    for name, tensor in stored.items():
        if tensor.dtype not in _CODES:
            raise InvalidInputError(f"cannot write {path}: {name} has dtype {tensor.dtype}")
    body = {"format": format, "version": version, **header}
    with _whole(path) as file:
        _write(file, stored, _metadata(stored, body, rows, apart))


def to_bytes(
    tensors: Mapping[str, NDArray[Any]],
    header: Mapping[str, Any],
    *,
    format: str,
    version: int,
    apart: Collection[str] = (),
) -> bytes:
    """Return what `write_file` writes."""
    stored = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    file = io.BytesIO()
    _write(file, stored, _metadata(stored, {"format": format, "version": version, **header}, (), apart))
    return file.getvalue()


def _metadata(
    stored: Mapping[str, NDArray[Any]],
    header: dict[str, Any],
    rows: Collection[str],
    apart: Collection[str],
) -> dict[str, str]:
    """Return the header with its checksums."""
    body = dict(header)
    if rows:
        body[_ROWS] = {name: _row_digests(name, stored[name]) for name in sorted(rows)}
    if apart:
        body[_APART] = _own_digests(stored, apart)
    whole = {name: tensor for name, tensor in stored.items() if name not in {*rows, *apart}}
    return {KEY: json.dumps({**body, "checksum": _digest(whole, body)})}


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it, as `write_file` does.

    Raises
    ------
    InvalidInputError
        If the folder does not exist.
    OSError
        If the disk is full or the folder cannot be written.
    """
    if not path.parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: the folder {path.parent} does not exist")
    with _whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` once it is on the disk, or leaves nothing."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(file: BinaryIO, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write the safetensors format straight from the arrays: its own NumPy writer copies them, twice.

    Source: https://github.com/huggingface/safetensors#format. Wide dtypes come first, which aligns all.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        code, shape = _CODES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for name in names:
        if tensors[name].size:
            file.write(tensors[name].data)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dtypes and shapes of the tensors of any saapindex file, and its header.

    Raises
    ------
    FileFormatError
        If it is truncated or no file of this library.
    OSError
        If it cannot be read at all.
    """
    with opened(path) as (source, header):
        return {name: [entry["dtype"], entry["shape"]] for name, entry in source.entries.items()}, header


def read_file(
    path: Path,
    *,
    format: str,
    version: int,
    rows: Mapping[str, Sequence[int]] | None = None,
    mapped: bool = False,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a file that `write_file` wrote; return its tensors and its header.

    Parameters
    ----------
    path
        The file.
    format, version
        What it must be, and the newest version that is known.
    rows
        For some tensors, the rows that are wanted. Where the file has their checksums, no other rows of
        these tensors are read.
    mapped
        Map tensors that have a checksum of their own into memory, unread and unchecked. They can be written
        to, which changes the memory of this process alone.

    Raises
    ------
    FileFormatError
        If it is truncated, not of `format`, of a version newer than `version`, altered, or lacks a row.
    OSError
        If it cannot be read at all.
    """
    with opened(path) as (source, header):
        return _read(source, header, format, version, dict(rows or {}), mapped)


def from_bytes(data: bytes, *, format: str, version: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what `to_bytes` returned; return its tensors and its header.

    Raises
    ------
    FileFormatError
        As `read_file`.
    """
    from safetensors import deserialize

    source = Source(data, f"{len(data)} bytes")
    with sound(source):
        deserialize(data)  # type: ignore[no-untyped-call]  # raises where the content is not sound
        header = header_of(source)
        return _read(source, header, format, version, {}, False)


def _read(
    source: Source,
    header: dict[str, Any],
    format: str,
    version: int,
    wanted: dict[str, Sequence[int]],
    mapped: bool,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    if header.get("format") != format:
        raise FileFormatError(f"{source} holds a {header.get('format')!r}, expected a {format!r}")
    if not isinstance(header.get("version"), int) or header["version"] > version:
        raise FileFormatError(
            f"{source} has version {header.get('version')} of {format}, this release reads up "
            f"to {version}: upgrade saapindex"
        )
    parts = {name: Part(source, *place) for name, place in source.places().items()}
    for name, numbers in wanted.items():
        count = parts[name].shape[0] if name in parts and parts[name].shape else 0
        if not all(0 <= number < count for number in numbers):
            raise FileFormatError(f"{source}: rows {list(numbers)} of {name}, but it has {count}")
    checksum, digests, own = header.pop("checksum", None), header.get(_ROWS, {}), header.get(_APART, {})
    tensors = {name: part.read() for name, part in parts.items() if name not in {*digests, *own}}
    intact = checksum == _digest(tensors, header)
    for name in digests if intact else ():
        numbers = range(parts[name].shape[0]) if name not in wanted else wanted[name]
        tensors[name] = parts[name].read_rows(numbers)
        intact &= _row_digests(name, tensors[name]) == [digests[name][number] for number in numbers]
    if intact and own:
        large = {name: parts[name].map() if mapped else parts[name].read() for name in own}
        intact = mapped or _own_digests(large, own) == own
        tensors |= large
    if not intact:
        raise FileFormatError(f"{source} was altered after it was written: its checksum does not match")
    header.pop(_ROWS, None)
    header.pop(_APART, None)
    for name in wanted.keys() - digests.keys():
        tensors[name] = tensors[name][list(wanted[name])]
    return {name: _widened(tensor) for name, tensor in tensors.items()}, header
