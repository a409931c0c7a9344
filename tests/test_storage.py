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
    for name in ("d", "nlist", "ntotal", "nprobe", "metric_type", "params", "rope", "dtype", "is_trained"):
        assert getattr(again, name) == getattr(index, name), name
    assert repr(again) == repr(index)
    x = blobs(20, 16, seed=5)
    for ours, theirs in zip(answers(again, x), answers(index, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again.add(x)
    index.add(x)
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
