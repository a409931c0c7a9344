"""Traces: written, read, and refused where they are not whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

import saapindex as sx
from saapindex.files import read_file, write_file
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.traces import FORMAT, VERSION

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
    assert again.info == trace.info


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
    with pytest.raises(sx.FileFormatError, match=message):
        read_trace(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: data[:-1] + b"?"]
)
def test_damaged_bytes(path, damage):
    write_trace(path, Trace(**parts()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(sx.FileFormatError, match=r"trace\.safetensors"):
        read_trace(path)
