"""Saved indexes answer bit for bit as before, and damaged files are refused."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saapindex as sx
from saapindex.files import read_file, write_file
from saapindex.index.storage import FORMAT, VERSION
from saapindex.learn.traces import Trace, write_trace
from saapindex.partition import LinearRouter, MLPRouter

ROPE = sx.Rope(theta=1000.0, dim=12)
RNG = np.random.default_rng(0)
ROUTERS = {
    "linear": LinearRouter(RNG.standard_normal((8, 16)), RNG.standard_normal(8), "mass"),
    "mlp": MLPRouter(
        RNG.standard_normal((5, 16)), RNG.standard_normal(5), RNG.standard_normal((8, 5)), np.zeros(8)
    ),
}
KINDS = {
    "inner product": {},
    "distances": {"metric_type": sx.METRIC_L2},
    "no keys": {"n": 0},
    "half precision": {"dtype": "float16"},
    "centroid router": {"params": sx.IndexParameters(router="centroid", niter=2)},
    "linear router": {"router": "linear"},
    "mlp router": {"router": "mlp"},
    "faiss-ivf": {"params": "faiss-ivf"},
    "codes": {"params": sx.IndexParameters(niter=2, bits=2)},
    "codes, distances": {"metric_type": sx.METRIC_L2, "params": sx.IndexParameters(niter=2, bits=4)},
    "codes, refined": {
        "dtype": "float16",
        "k_factor": 2.5,
        "params": sx.IndexParameters(niter=2, bits=1, refine=True),
    },
    **{
        f"rope, {view}": {"rope": ROPE, "params": sx.IndexParameters(view=view, niter=2, max_position=999)}
        for view in ("rotated", "unrotated", "windowed")
    },
}


@pytest.fixture(params=KINDS)
def index(request, make_index):
    """An index that has lived: keys were added bit by bit and some removed."""
    settings = {**KINDS[request.param]}
    router = settings.pop("router", None)
    index = make_index(nprobe=3, **settings)
    if router:
        index.router = ROUTERS[router]
    if index.ntotal:
        index.add(RNG.standard_normal((30, 16)))
        index.remove_ids(np.arange(0, 400, 7))
    return index


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index.safetensors"


def present(index):
    """The ids in an index."""
    return index._state.lists.ids[index._state.lists.rows()].tolist()


def answers(index, x):
    calls = [
        lambda: index.search(x, 9),
        lambda: index.search(x, 9, params=sx.SearchParameters(budget=0.3)),
        lambda: index.route(x),
        lambda: index.range_search(x, 1.0),
        lambda: (
            (index.list_sizes, index.reconstruct_batch(index.search(x, 1)[1][:1, 0])) if index.ntotal else ()
        ),
    ]
    return [part for call in calls for part in call()]


def test_what_is_read_answers_bit_for_bit(index, path, blobs):
    sx.write_index(index, str(path))
    again = sx.read_index(path)
    for name in ("d", "nlist", "ntotal", "nprobe", "metric_type", "params", "rope", "dtype", "k_factor"):
        assert getattr(again, name) == getattr(index, name), name
    assert repr(again) == repr(index)
    x = blobs(20, 16, seed=5)
    for ours, theirs in zip(answers(again, x), answers(index, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again.add(x)
    index.add(x)
    for ours, theirs in zip(answers(again, x), answers(index, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mapped_and_serialised_indexes_answer_as_well_and_go_their_own_ways(index, path, blobs):
    sx.write_index(index, path)
    data, x = path.read_bytes(), blobs(20, 16, seed=5)
    known = answers(index, x)
    np.testing.assert_array_equal(sx.serialize_index(index), np.frombuffer(data, np.uint8))
    twins = (
        sx.read_index(path, sx.IO_FLAG_MMAP),
        sx.deserialize_index(sx.serialize_index(index)),
        sx.deserialize_index(data),
        sx.clone_index(index),
    )
    for twin in twins:
        for ours, theirs in zip(answers(twin, x), known, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    index.add(x)
    known = answers(index, x)
    for twin in twins:
        twin.add(x)
        for ours, theirs in zip(answers(twin, x), known, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        twin.remove_ids(np.arange(9))
        assert sorted(present(twin)) == sorted(id for id in present(index) if id >= 9)
    assert path.read_bytes() == data


def test_a_mapped_index_keeps_its_file_when_that_is_replaced(make_index, path, blobs, same):
    index, x = make_index(), blobs(9, 16)
    sx.write_index(index, path)
    mapped = sx.read_index(path, sx.IO_FLAG_MMAP)
    sx.write_index(make_index(n=1), path)
    same(mapped.search(x, 5), index.search(x, 5))


def test_mapping_checks_all_but_the_keys(make_index, path):
    sx.write_index(make_index(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    seen = set()
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        damaged = bytearray(data)
        damaged[8 + length + entry["data_offsets"][0]] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(sx.FileFormatError, match="altered"):
            sx.read_index(path)
        try:
            sx.read_index(path, sx.IO_FLAG_MMAP)
            seen.add(name)
        except sx.FileFormatError as error:
            assert "altered" in str(error)  # noqa: PT017
    assert seen == {"vectors", "ids", "positions"}


@pytest.mark.parametrize("flags", [2, -1, None, "mmap"])
def test_unknown_flags_are_refused(make_index, path, flags):
    sx.write_index(make_index(n=0), path)
    with pytest.raises(sx.InvalidInputError, match="expected 0 or IO_FLAG_MMAP"):
        sx.read_index(path, flags)


@pytest.mark.parametrize("data", [b"", b"\0" * 9, np.zeros(50, np.uint8), b"\xff" * 64])
def test_bytes_that_hold_no_index(data):
    with pytest.raises(sx.FileFormatError, match=r"\d+ bytes is truncated or no safetensors"):
        sx.deserialize_index(data)
    with pytest.raises(sx.InvalidInputError, match="data is int64, expected uint8"):
        sx.deserialize_index(np.zeros(3, np.int64))


def test_files_of_the_first_version_are_read(make_index, path, blobs, same):
    index, x = make_index(dtype="float16"), blobs(20, 16, seed=5)
    lists = index._state.lists
    rows = lists.rows()

    def as_it_was(tensors, header):
        for name in ("vectors", "ids", "positions"):
            del tensors[name]
        tensors["vectors"] = lists.view.rows(rows)
        tensors["ids"], tensors["positions"] = lists.ids[rows], lists.positions[rows]
        for name in ("bits", "refine"):
            del header["params"][name]
        del header["k_factor"]
        header["version"] = 1

    again = sx.read_index(tampered(path, index, as_it_was))
    for ours, theirs in zip(answers(again, x), answers(index, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_writing_what_was_read_gives_the_same_file(index, path):
    sx.write_index(index, path)
    sx.write_index(sx.read_index(path), path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_any_backend_reads(make_index, path, blobs):
    index, x = make_index(), blobs(9, 16)
    sx.write_index(index, path)
    reference = sx.read_index(path, backend="reference")
    assert reference.ops.name == "reference"
    np.testing.assert_array_equal(reference.search(x, 5)[1], index.search(x, 5)[1])


def test_untrained_indexes(path):
    sx.write_index(sx.IndexSAAP(16, 8), path)
    index = sx.read_index(path)
    assert not index.is_trained
    with pytest.raises(sx.NotTrainedError, match="call train"):
        index.search(np.ones((1, 16)), 1)


def test_a_partition_that_waits_for_its_router(make_index, path):
    index = make_index(n=0, params="paper")
    sx.write_index(index, path)
    again = sx.read_index(path)
    np.testing.assert_array_equal(again.partition.centroids, index.partition.centroids)
    with pytest.raises(sx.NotTrainedError, match="train_router"):
        again.search(np.ones((1, 16)), 1)


def test_writing_leaves_the_index_alone(make_index, path, blobs):
    index, x = make_index(), blobs(9, 16)
    before = index.search(x, 5)
    sx.write_index(index, path)
    for ours, theirs in zip(index.search(x, 5), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_index(make_index, path, monkeypatch, call):
    index = make_index()
    sx.write_index(index, path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            sx.write_index(make_index(n=0), path)
    assert sx.read_index(path).ntotal == index.ntotal
    assert list(path.parent.iterdir()) == [path]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans(), flip=st.integers(1, 255))
def test_damage_is_seen(make_index, path, place, cut, flip):
    index = make_index(n=20)
    sx.write_index(index, path)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= flip
    path.write_bytes(data)
    with contextlib.suppress(sx.FileFormatError):
        assert sx.read_index(path).reconstruct_n().tolist() == index.reconstruct_n().tolist()


def tampered(path, index, change):
    """A file whose tensors or header were changed, with a checksum that fits."""
    sx.write_index(index, path)
    tensors, header = read_file(path, format=FORMAT, version=VERSION)
    change(tensors, header)
    kind = {"format": header.pop("format"), "version": header.pop("version")}
    write_file(path, tensors, json.loads(json.dumps(header)), **kind)
    return path


def cut(name):
    return lambda tensors, header: tensors.update({name: tensors[name][:-1]})


def put(**values):
    return lambda tensors, header: (tensors if {*values} & {*tensors} else header).update(values)


@pytest.mark.parametrize(
    "change",
    [
        *(cut(name) for name in ("centroids", "metric", "sizes", "sums", "vectors", "ids", "positions")),
        cut("router.weight"),
        cut("router.offset"),
        lambda tensors, header: tensors.pop("router.offset"),
        lambda tensors, header: tensors.pop("vectors"),
        lambda tensors, header: tensors.pop("centroids"),
        lambda tensors, header: header.pop("params"),
        put(vectors=np.zeros((20, 16))),
        put(vectors=np.zeros((20, 15), np.float32)),
        put(ids=np.arange(20, dtype=np.int32)),
        put(ids=np.arange(20.0)),
        put(sizes=np.array([-1, 21, 0, 0, 0, 0, 0, 0])),
        put(sizes=np.array([2**62, 2**62, 2**62, 2**62 + 20, 0, 0, 0, 0])),
        put(d=15),
        put(d="16"),
        put(nlist=9),
        put(nlist=0),
        put(metric_type=7),
        put(next_id="many"),
        put(next_id=None),
        put(dtype="int8"),
        put(dtype=None),
        put(params={"view": "sideways"}),
        put(params={"colour": "red"}),
        put(params=[1]),
        put(rope={"dim": 3}),
        put(rope=5),
        put(router={"name": "oracle", "predicts": "key"}),
        put(router={"name": "mlp", "predicts": "key"}),
        put(router="linear"),
        put(nprobe=0),
    ],
)
def test_what_does_not_fit_is_refused(make_index, path, change):
    index = make_index(n=20)
    index.router = ROUTERS["linear"]
    with pytest.raises(sx.FileFormatError, match=r"index\.safetensors is no whole index"):
        sx.read_index(tampered(path, index, change))


def test_another_kind_of_file(path):
    zeros = np.zeros((1, 4, 8), np.float32)
    write_trace(path, Trace(zeros, zeros, zeros, np.arange(4), np.arange(4)))
    with pytest.raises(
        sx.FileFormatError, match=r"holds a 'saapindex\.trace', expected a 'saapindex\.index'"
    ):
        sx.read_index(path)


def test_a_newer_version(make_index, path):
    with pytest.raises(sx.FileFormatError, match=f"version {VERSION + 1} .* upgrade saapindex"):
        sx.read_index(tampered(path, make_index(n=0), put(version=VERSION + 1)))


def test_an_unknown_backend_is_no_fault_of_the_file(make_index, path):
    sx.write_index(make_index(n=0), path)
    with pytest.raises(sx.InvalidInputError, match="backend is 'gpu'"):
        sx.read_index(path, backend="gpu")


def test_missing_files_and_folders(make_index, tmp_path):
    with pytest.raises(FileNotFoundError):
        sx.read_index(tmp_path / "none")
    with pytest.raises(sx.FileFormatError, match="is a folder"):
        sx.read_index(tmp_path)
    with pytest.raises(sx.InvalidInputError, match="does not exist"):
        sx.write_index(make_index(n=0), tmp_path / "none" / "index")
    assert not pathlib.Path(tmp_path / "none").exists()
