"""Files: safetensors with a versioned JSON header, written whole or not at all.

The header lives in the safetensors metadata under the key ``saapindex`` and holds the format's
name, its version, a checksum of every tensor and of itself, and whatever the caller adds. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import FileFormatError, InvalidInputError

__all__ = ["read_file", "read_header", "write_file"]

_KEY = "saapindex"


def _digest(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> str:
    """Checksum of names, dtypes, shapes, bytes and header."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        digest.update(tensor.data if tensor.size else b"")
    return digest.hexdigest()


def write_file(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    header: Mapping[str, Any],
    *,
    format: str,
    version: int,
) -> None:
    """Write `tensors` and `header` to `path` through a temporary file beside it.

    The data is flushed to the disk before the file takes its name, so a crash or a full disk
    leaves either the old file or the new one.

    Raises
    ------
    InvalidInputError
        If the folder does not exist.
    OSError
        If the disk is full or the folder cannot be written.
    """
    from safetensors.numpy import save

    if not path.parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: the folder {path.parent} does not exist")
    body = {"format": format, "version": version, **header}
    data = save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        metadata={_KEY: json.dumps({**body, "checksum": _digest(tensors, body)})},
    )
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dtypes and shapes of the tensors of any saapindex file, and its header.

    Raises
    ------
    FileFormatError
        If it is truncated or no file of this library.
    OSError
        If it cannot be read at all.
    """
    with _opened(path) as (file, header):
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: [part.get_dtype(), part.get_shape()] for name, part in slices.items()}, header


def read_file(path: Path, *, format: str, version: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a file that `write_file` wrote; return its tensors and its header.

    Raises
    ------
    FileFormatError
        If it is truncated, not of `format`, of a version newer than `version`, or altered.
    OSError
        If it cannot be read at all.
    """
    with _opened(path) as (file, header):
        if header.get("format") != format:
            raise FileFormatError(f"{path} holds a {header.get('format')!r}, expected a {format!r}")
        if not isinstance(header.get("version"), int) or header["version"] > version:
            raise FileFormatError(
                f"{path} has version {header.get('version')} of {format}, this release reads up "
                f"to {version}: upgrade saapindex"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    checksum = header.pop("checksum", None)
    if checksum != _digest(tensors, header):
        raise FileFormatError(f"{path} was altered after it was written: its checksum does not match")
    return tensors, header


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file of this library; whatever is wrong with its content is a `FileFormatError`."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, expected a saapindex file")
    with open(path, "rb"):  # a missing file or a missing right is the system's own error
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise FileFormatError(f"{path} is a safetensors file of something else")
            header = json.loads(metadata[_KEY])
            if not isinstance(header, dict):
                raise FileFormatError(f"{path} has a header that is no object")
            yield file, header
    except FileFormatError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FileFormatError(f"{path} is truncated or no safetensors file: {error}") from error
