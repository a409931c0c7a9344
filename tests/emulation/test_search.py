"""A search in one launch, on the host: the short way plans it, its kernel finds what the reference does."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.backends import get_ops
from saapindex.backends.base import LANES, Lists, to_blocks
from saapindex.backends.cuda import quick
from saapindex.backends.cuda.route import THREADS

SPEC = importlib.util.spec_from_file_location("emulation", Path(__file__).parent / "emulation.py")
emulation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulation)
REFERENCE = get_ops("reference")
ARGUMENT = 16 * 8


class OnDevice(np.ndarray):
    """An array of the host that says where it is as CuPy's do."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)


def placed(array):
    return np.ascontiguousarray(array).view(OnDevice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def launches(folder, monkeypatch):
    """Let the short way launch emulated kernels; what was launched."""
    built, done = [], []

    def kernel(file, name, *, shared, **macros):
        built.append(emulation.build(folder, file, "Search", **macros))
        return SimpleNamespace(kernel=SimpleNamespace(ptr=len(built) - 1))

    def launch(number, grid, _y, _z, threads, _ty, _tz, shared, stream, parameters, extra):
        place = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        argument = np.frombuffer((ctypes.c_char * ARGUMENT).from_address(place), np.uint64)
        built[number](grid, threads, shared, argument)
        done.append((grid, threads))

    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    cuda = SimpleNamespace(
        runtime=runtime,
        driver=SimpleNamespace(launchKernel=launch),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
    )
    empty = lambda shape, kind: placed(np.full(shape, 77, kind))  # noqa: E731
    cupy = SimpleNamespace(ndarray=OnDevice, cuda=cuda, empty=empty)
    monkeypatch.setattr(quick, "get_cupy", lambda: cupy)
    monkeypatch.setattr(quick, "has_clusters", lambda device: True)
    monkeypatch.setattr(quick, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(quick, "kernel", kernel)
    return done


def drawn(rng, q, d, nlist, dtype, longest):
    """Queries, a table, and lists, some empty: small integers, so that sums are exact and many equal."""
    queries, table = (rng.integers(-2, 3, (n, d)).astype(np.float32) for n in (q, nlist))
    sizes = rng.integers(longest, size=nlist) * rng.integers(2, size=nlist)
    bias = np.where(sizes, rng.integers(-2, 3, nlist), -np.inf).astype(np.float32)
    room = -(-sizes // LANES) * LANES
    keys = rng.integers(-2, 3, (room.sum() + LANES, d)).astype(dtype)
    lists = Lists(to_blocks(keys), rng.permutation(len(keys)), np.cumsum(room) - room, sizes)
    return queries, to_blocks(table), bias, lists


CASES = pytest.mark.parametrize(
    ("q", "d", "nlist", "p", "k", "dtype", "longest"),
    [
        (3, 17, 40, 9, 5, "float16", 60),
        (1, 8, 300, 70, 30, "float32", 40),
        (2, 64, 1, 1, 1, "float16", 900),
        (1, 16, 12, 12, 100, "float16", 900),
        (1, 5, 700, 3, 250, "float32", 20),
        (1, 1, 2, 2, 40, "float16", 9000),
    ],
)


@pytest.mark.parametrize(("cluster", "l2"), [(8, False), (2, True)], ids=["products", "distances"])
@CASES
def test_a_search_in_one_launch(launches, monkeypatch, cluster, l2, q, d, nlist, p, k, dtype, longest):
    monkeypatch.setattr(quick, "CLUSTERS", (cluster,))
    queries, table, bias, lists = drawn(np.random.default_rng(q + d), q, d, nlist, dtype, longest)
    there = Lists(*(placed(part) for part in lists[:4]))
    search = quick.DeviceSearch(placed(table), placed(bias), there, l2, 0)
    known = REFERENCE.search(queries, queries, table, bias, p, lists, k, l2)
    for _ in range(2):
        best, found = search(placed(queries), p, k)
        np.testing.assert_array_equal(found, known[1])
        np.testing.assert_array_equal(best, known[0])
    assert launches == 2 * [(q * cluster, THREADS)]


@pytest.mark.gpu
@pytest.mark.parametrize("l2", [False, True], ids=["products", "distances"])
@CASES
def test_a_search_on_a_device(cupy, monkeypatch, l2, q, d, nlist, p, k, dtype, longest):
    queries, table, bias, lists = drawn(np.random.default_rng(q + d), q, d, nlist, dtype, longest)
    there = Lists(*map(cupy.asarray, lists[:4]))
    known = REFERENCE.search(queries, queries, table, bias, p, lists, k, l2)
    for clusters in ((8,), (4,), (2,), ()):  # in several launches in the end
        monkeypatch.setattr(quick, "CLUSTERS", clusters)
        search = quick.DeviceSearch(cupy.asarray(table), cupy.asarray(bias), there, l2, 0)
        best, found = search(cupy.asarray(queries), p, k)
        np.testing.assert_array_equal(found.get(), known[1])
        np.testing.assert_array_equal(best.get(), known[0])
