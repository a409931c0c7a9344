"""CUDA where it cannot be had: what to do is said, and nothing is loaded for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import saapindex as sx
from saapindex import devices
from saapindex.devices import check_device, current, device_of, get_cupy
from saapindex.errors import InvalidInputError, MissingDependencyError


@pytest.fixture
def fresh():
    """Forget whether there is CuPy, before and after."""
    get_cupy.cache_clear()
    yield
    get_cupy.cache_clear()


def without_devices(answer):
    """CuPy on a machine where the driver says `answer`."""

    class CUDARuntimeError(Exception):
        pass

    def count():
        if isinstance(answer, str):
            raise CUDARuntimeError(answer)
        return answer

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    "ask",
    [
        lambda: sx.IndexSAAP(8, 4, device="cuda"),
        lambda: sx.IndexSAAP(8, 4, backend="cuda"),
        lambda: sx.IndexSAAP(8, 4).to("cuda"),
        lambda: sx.index_cpu_to_gpu(None, 0, sx.IndexSAAP(8, 4)),
        lambda: check_device("cuda:1"),
    ],
)
def test_what_to_install_is_said(monkeypatch, fresh, ask):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        MissingDependencyError, match=r"CUDA needs .*'cupy'.* pip install 'saapindex\[cuda\]'"
    ):
        ask()


@pytest.mark.parametrize("answer", [0, "CUDA driver version is insufficient"])
def test_a_machine_without_devices_is_told_apart(monkeypatch, fresh, answer):
    monkeypatch.setitem(sys.modules, "cupy", without_devices(answer))
    with pytest.raises(InvalidInputError, match=r"CUDA finds no device.*use the backend 'cpu'"):
        sx.IndexSAAP(8, 4, device="cuda")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "CUDA", None, 0])
def test_names_of_devices(name):
    with pytest.raises(InvalidInputError, match="expected 'cpu', 'cuda' or 'cuda:0'"):
        check_device(name)


def test_the_host_is_a_device_too(make_index):
    index = make_index()
    assert index.device == "cpu"
    assert index.to("cpu") is index
    assert sx.index_gpu_to_cpu(index) is index
    with pytest.raises(InvalidInputError, match="backend is 'cuda', but device is 'cpu'"):
        sx.IndexSAAP(8, 4, backend="cuda", device="cpu")


def test_arrays_of_the_host_need_no_device(monkeypatch):
    monkeypatch.setattr(devices, "get_cupy", lambda: pytest.fail("CuPy is asked for"))
    assert device_of(np.zeros(3)) is None
    assert device_of([1.0]) is None
    with current(np.zeros(3)):
        pass


@pytest.mark.torch
def test_tensors_of_the_host_need_no_device(torch):
    assert device_of(torch.zeros(3)) is None
    assert device_of(torch.zeros(3, device="meta")) is None
