"""Files: whole or not at all, and nothing altered goes unseen."""

from __future__ import annotations

import errno
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from saapindex.errors import FileFormatError, InvalidInputError
from saapindex.files import _digest, _rounded, _widened, read_file, read_header, write_file

KIND = {"format": "test", "version": 3}
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.zeros((0, 4)),
    "ids": np.array([3, -1]),
    "strided": np.arange(8, dtype=np.float16)[::2],
}
HEADER = {"text": "λ", "nested": {"list": [1, 2.5, None]}}


@pytest.fixture
def path(tmp_path):
    write_file(tmp_path / "x.safetensors", TENSORS, HEADER, **KIND)
    return tmp_path / "x.safetensors"


def same(tensors, header):
    assert sorted(tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)
    assert header == {**HEADER, **KIND}


def test_what_was_written_is_read(path):
    same(*read_file(path, **KIND))
    shapes, header = read_header(path)
    assert shapes["a"] == ["F32", [2, 3]]
    assert {*HEADER, *KIND} < {*header}
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_equal_content_makes_equal_files(path):
    other = path.with_name("y.safetensors")
    write_file(other, dict(reversed(TENSORS.items())), HEADER, **KIND)
    assert other.read_bytes() == path.read_bytes()


def test_permissions_follow_the_umask(path):
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_truncated_at_any_length(path):
    data = path.read_bytes()
    for length in [*range(0, 80), *range(80, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=r"x\.safetensors"):
            read_file(path, **KIND)


def test_longer_than_written(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FileFormatError):
        read_file(path, **KIND)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_altered_byte_changes_what_is_read(path, place, flip):
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[int(place * len(data))] ^= flip
    path.write_bytes(damaged)
    try:
        same(*read_file(path, **KIND))  # white space and the case of escapes may change
    except FileFormatError:
        pass
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["a", "ids"])
def test_every_byte_of_a_tensor_counts(path, name):
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    for place in range(8 + length + start, 8 + length + end):
        data[place] ^= 1
        path.write_bytes(data)
        data[place] ^= 1
        with pytest.raises(FileFormatError, match="altered after it was written"):
            read_file(path, **KIND)


def rewritten(path, header):
    """A file with this header, its checksum right."""
    body = json.dumps({**header, "checksum": _digest(TENSORS, header)})
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in TENSORS.items()}
    save_file(tensors, path, metadata={"saapindex": body})
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "other", "version": 3}, "holds a 'other', expected a 'test'"),
        ({"version": 3}, "holds a None, expected a 'test'"),
        ({"format": "test", "version": 4}, "version 4 of test, this release reads up to 3: upgrade"),
        ({"format": "test", "version": "3"}, "version 3 of test"),
        ({"format": "test"}, "version None of test"),
    ],
)
def test_another_format_or_version_is_refused(tmp_path, header, message):
    with pytest.raises(FileFormatError, match=message):
        read_file(rewritten(tmp_path / "x.safetensors", header), **KIND)


def test_an_older_version_is_read(tmp_path):
    _, header = read_file(rewritten(tmp_path / "x", {"format": "test", "version": 1}), **KIND)
    assert header["version"] == 1


@pytest.mark.parametrize("metadata", [None, {"pt": "x"}, {"saapindex": "[1]"}, {"saapindex": "no json"}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    save_file({"a": np.ones(3)}, tmp_path / "x", metadata=metadata)
    for read in (read_header, lambda path: read_file(path, **KIND)):
        with pytest.raises(FileFormatError, match="x "):
            read(tmp_path / "x")


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04", "χ".encode() * 50])
def test_no_safetensors_at_all(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileFormatError, match="truncated or no safetensors file"):
        read_file(tmp_path / "x", **KIND)


PARTS = {
    "heads": np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32),
    "narrow": np.random.default_rng(1).standard_normal((4, 63)).astype(np.float32),
    "ids": np.arange(7),
}


@pytest.fixture
def parts(tmp_path):
    options = {"rows": ["heads", "narrow"], "bfloat16": ["narrow"]}
    write_file(tmp_path / "parts.safetensors", PARTS, HEADER, **KIND, **options)
    return tmp_path / "parts.safetensors"


def test_rows_are_read_alone(parts):
    whole, header = read_file(parts, **KIND)
    assert header == {**HEADER, **KIND}
    assert read_header(parts)[0]["narrow"] == ["BF16", [4, 63]]
    np.testing.assert_array_equal(whole["heads"], PARTS["heads"])
    for rows in ([], [2], [3, 0], [1, 1]):
        some, _ = read_file(parts, **KIND, rows={"heads": rows, "ids": rows})
        np.testing.assert_array_equal(some["heads"], PARTS["heads"][rows])
        np.testing.assert_array_equal(some["ids"], PARTS["ids"][rows])
        np.testing.assert_array_equal(some["narrow"], whole["narrow"])
    for rows in ({"heads": [4]}, {"heads": [-1]}, {"nothing": [0]}):
        with pytest.raises(FileFormatError, match="rows"):
            read_file(parts, **KIND, rows=rows)


def test_only_the_rows_that_are_read_are_checked(parts):
    data = bytearray(parts.read_bytes())
    at = data.index(PARTS["heads"][1].tobytes())
    data[at] ^= 1
    parts.write_bytes(data)
    for rows in (None, {"heads": [0, 1]}):
        with pytest.raises(FileFormatError, match="altered after it was written"):
            read_file(parts, **KIND, rows=rows)
    some, _ = read_file(parts, **KIND, rows={"heads": [0, 2, 3]})
    np.testing.assert_array_equal(some["heads"], PARTS["heads"][[0, 2, 3]])


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_is_the_nearest_and_ties_go_to_even(values):
    x = np.array(values, np.float32)
    ours = _widened(_rounded(x))
    bits = ours.view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(x))
    finite = np.isfinite(x) & np.isfinite(ours)
    x, ours, bits = x[finite].astype(np.float64), ours[finite].astype(np.float64), bits[finite]
    for step in (-0x10000, 0x10000):
        other = (bits + np.uint32(step & 0xFFFFFFFF)).view(np.float32).astype(np.float64)
        other[~np.isfinite(other)] = np.inf
        assert (abs(ours - x) <= abs(other - x)).all()
    np.testing.assert_array_equal(_widened(_rounded(np.float32([1.00390625, 1.01171875]))), [1.0, 1.015625])


@pytest.mark.torch
def test_files_are_those_of_safetensors(parts):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    loaded = load_file(parts)
    assert loaded["narrow"].dtype == torch.bfloat16
    assert torch.equal(loaded["narrow"], torch.from_numpy(PARTS["narrow"]).bfloat16())
    np.testing.assert_array_equal(loaded["heads"].numpy(), PARTS["heads"])


def test_a_dtype_that_files_cannot_hold(tmp_path):
    with pytest.raises(InvalidInputError, match="a has dtype complex64"):
        write_file(tmp_path / "x", {"a": np.ones(1, np.complex64)}, {}, **KIND)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(FileFormatError, match="is a folder"):
        read_file(tmp_path, **KIND)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none", **KIND)
    with pytest.raises(InvalidInputError, match=r"the folder .*none does not exist"):
        write_file(tmp_path / "none" / "x", TENSORS, HEADER, **KIND)
    with pytest.raises(OSError):  # noqa: PT011  which error depends on the system
        write_file(tmp_path, TENSORS, HEADER, **KIND)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "fdopen"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(monkeypatch, path, call, error):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            write_file(path, {"a": np.ones(1)}, {}, **KIND)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_without_the_right_to_write(monkeypatch, path):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("saapindex.files.tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError):
        write_file(path, TENSORS, HEADER, **KIND)
    same(*read_file(path, **KIND))
