"""Traces: written, read, and refused where they are not whole."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest

import saapindex as sx
from saapindex.files import read_file, read_header, write_file
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.traces import FORMAT, VERSION, find_traces, read_trace_header

RNG = np.random.default_rng(0)


def parts(dtype=np.float32):
    return {
        "keys": RNG.standard_normal((2, 5, 8)).astype(dtype),
        "values": RNG.standard_normal((2, 5, 8)).astype(dtype),
        "queries": RNG.standard_normal((6, 3, 8)).astype(dtype),
        "key_positions": np.arange(5),
        "query_positions": np.array([5, 7, 9]),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.safetensors"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rope", [None, sx.Rope(theta=500.0, dim=6, layout="interleaved")])
def test_what_was_written_is_read(path, dtype, rope):
    trace = Trace(**parts(dtype), rope=rope, info={"model": "x", "layer": 3, "heads": [0, 1]})
    write_trace(str(path), trace)
    again = read_trace(path)
    for name in parts():
        assert getattr(again, name).dtype == getattr(trace, name).dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert again.rope == rope
    assert again.info == {**trace.info, "dtype": np.dtype(dtype).name}
    header = read_trace_header(path)
    assert (header.info, header.rope, header.heads) == (again.info, rope, [0, 1])
    assert (header.kv_heads, header.q_heads, header.n, header.m, header.d) == (2, 6, 5, 3, 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_head_is_read_alone(path, dtype):
    trace = Trace(**parts(), info={"heads": [4, 6], "scale": 0.5, "softcap": 30})
    write_trace(path, trace, dtype=dtype)
    whole = read_trace(path)
    assert (whole.heads, whole.scale, whole.softcap, whole.info["dtype"]) == ([4, 6], 0.5, 30.0, dtype)
    for name in ("keys", "values", "queries"):
        assert getattr(whole, name).dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_allclose(getattr(whole, name), getattr(trace, name), rtol=2**-8, atol=1e-6)
    for heads, rows, group in (([6], [1], [3, 4, 5]), ([6, 4], [1, 0], [3, 4, 5, 0, 1, 2])):
        part = read_trace(path, heads=heads)
        np.testing.assert_array_equal(part.keys, whole.keys[rows])
        np.testing.assert_array_equal(part.values, whole.values[rows])
        np.testing.assert_array_equal(part.queries, whole.queries[group])
        np.testing.assert_array_equal(part.query_positions, whole.query_positions)
        assert (part.heads, part.info["scale"]) == (heads, 0.5)
    write_trace(path, whole)  # as it was stored before
    np.testing.assert_array_equal(read_trace(path).keys, whole.keys)
    for heads in ([], [0], [4, 5]):
        with pytest.raises(sx.InvalidInputError, match=r"expected some of \[4, 6\]"):
            read_trace(path, heads=heads)


def test_without_a_header_the_scale_is_that_of_the_size():
    trace = Trace(**parts())
    assert (trace.scale, trace.softcap, trace.heads) == (8**-0.5, None, [0, 1])


def test_dtypes_that_do_not_fit(path):
    trace = Trace(**{**parts(), "values": np.full((2, 5, 8), 1e5, np.float32)})
    with pytest.raises(sx.InvalidInputError, match="values reach beyond what float16 can hold"):
        write_trace(path, trace, dtype="float16")
    with pytest.raises(sx.InvalidInputError, match="dtype is 'int8', expected"):
        write_trace(path, trace, dtype="int8")
    assert not path.exists()


@pytest.mark.parametrize("name", ["train", "test"])
def test_what_ships_is_of_version_1_and_still_read(name):
    path = files("saapindex") / "data" / f"{name}.safetensors"
    trace = read_trace(path)
    assert read_header(path)[1]["version"] == 1
    assert (trace.heads, trace.info["dtype"], trace.scale) == ([0], "float16", 0.125)
    assert read_trace(path, heads=[0]).keys.shape == trace.keys.shape == (1, 8192, 64)


def test_traces_are_found_by_their_names(tmp_path):
    for name in ("b-0/layer-11.safetensors", "b-0/layer-02.safetensors", "a-0/layer-104.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("test0-layer4.safetensors", "paper.safetensors", "b-0/notes.txt"):
        (tmp_path / name).touch()
    found = find_traces(tmp_path)
    assert {name: list(layers) for name, layers in found.items()} == {
        "a-0": [104],
        "b-0": [2, 11],
        "test0": [4],
    }
    assert list(found) == sorted(found)
    assert found["b-0"] == find_traces(str(tmp_path / "b-0"))["b-0"]
    for folder in (tmp_path / "none", tmp_path / "a-0" / "layer-104.safetensors"):
        with pytest.raises(sx.InvalidInputError, match="is no folder"):
            find_traces(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(sx.InvalidInputError, match="holds no traces, expected files like SEQUENCE/layer-04"):
        find_traces(tmp_path / "empty")


def test_queries_of_a_head_are_those_of_its_group():
    trace = Trace(**parts())
    assert (trace.d, trace.group_size) == (8, 3)
    queries, positions = trace.head_queries(1)
    np.testing.assert_array_equal(queries, trace.queries[3:].reshape(9, 8))
    assert positions.tolist() == [5, 7, 9] * 3
    assert queries.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((2, 5, 7))}, r"values has shape \(2, 5, 7\), expected \(2, 5, 8\)"),
        ({"keys": np.zeros((5, 8))}, r"keys is float64 of shape \(5, 8\), expected floats, \(heads, n, d\)"),
        ({"queries": np.zeros(3)}, r"queries is float64 of shape \(3,\)"),
        ({"queries": np.zeros((6, 3, 8), int)}, "queries is int64"),
        ({"queries": np.zeros((6, 3, 9))}, r"queries has shape \(6, 3, 9\), expected \(6, 3, 8\)"),
        ({"queries": np.zeros((5, 3, 8))}, "5 query heads cannot share 2 KV heads evenly"),
        ({"keys": np.zeros((0, 5, 8)), "values": np.zeros((0, 5, 8))}, "cannot share 0 KV heads"),
        ({"key_positions": np.arange(4)}, r"key_positions has shape \(4,\), expected \(5,\)"),
        ({"query_positions": np.zeros(3)}, "query_positions is float64, expected integers"),
        ({"info": [1]}, "info is a list, expected a mapping"),
    ],
)
def test_parts_that_do_not_fit(path, change, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        Trace(**{**parts(), **change})
    header = {"rope": None, "info": change.get("info", {})}
    tensors = {name: part for name, part in {**parts(), **change}.items() if name != "info"}
    write_file(path, tensors, header, format=FORMAT, version=VERSION)
    with pytest.raises(sx.FileFormatError, match=f"not a whole trace.*{message}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: tensors.pop("values"), "tensors missing: values"),
        (lambda tensors, header: header.update(rope={"dim": 3}), "dim is 3"),
        (lambda tensors, header: header.update(rope={"colour": "red"}), "rope"),
        (lambda tensors, header: header.update(version=VERSION + 1), "upgrade saapindex"),
        (lambda tensors, header: header.update(format="saapindex.index"), "holds a 'saapindex.index'"),
    ],
)
def test_other_damage(path, change, message):
    write_trace(path, Trace(**parts(), rope=sx.Rope(dim=8)))
    tensors, header = read_file(path, format=FORMAT, version=VERSION)
    change(tensors, header)
    kind = {"format": header.pop("format"), "version": header.pop("version")}
    write_file(path, tensors, json.loads(json.dumps(header)), **kind)
    for read in (read_trace, read_trace_header):
        with pytest.raises(sx.FileFormatError, match=message):
            read(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: data[:-1] + b"?"]
)
def test_damaged_bytes(path, damage):
    write_trace(path, Trace(**parts()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(sx.FileFormatError, match=r"trace\.safetensors"):
        read_trace(path)
