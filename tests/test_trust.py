"""Short versions of ``bench/trust.py``: faults are survived, and damaged files are refused or harmless."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import saapindex as sx

ROOT = Path(sx.__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def target():
    specification = importlib.util.spec_from_file_location("fuzz_target", BENCH / "fuzz_target.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz_target"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_target"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40))
@example(data=b"")
@example(data=bytes([0, 1]))
@example(data=bytes([3, 0]))
def test_damaged_files_are_refused_or_harmless(target, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert target.one_input(data) in ("refused", "unchanged", "accepted")


def test_faults_are_survived():
    """Kill -9, full disks, folders without rights, many writers; something wrong ends it with an error."""
    command = [sys.executable, str(BENCH / "trust.py"), "--rounds", "6", "--fuzz-seconds", "3", "--no-write"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_in(make_index, tmp_path, monkeypatch, blobs):
    """Whatever the moment, a reader gets the old index or the new one."""
    path, x = tmp_path / "index", blobs(9, 16)
    known = {n: make_index(n=n).search(x, 3)[1].tolist() for n in (400, 30)}
    fromfile, calls = np.fromfile, []
    total = _reads(path, make_index, monkeypatch)
    for moment in range(total):
        sx.write_index(make_index(n=400), path)
        calls.clear()

        def replacing(*arguments, moment=moment, **options):
            if len(calls) == moment:
                sx.write_index(make_index(n=30), path)
            calls.append(1)
            return fromfile(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(np, "fromfile", replacing)
            index = sx.read_index(path)
        assert index.search(x, 3)[1].tolist() == known[index.ntotal]


def _reads(path, make_index, monkeypatch):
    """How often reading an index reads a tensor."""
    sx.write_index(make_index(n=400), path)
    calls, fromfile = [], np.fromfile
    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", lambda *args, **options: calls.append(1) or fromfile(*args, **options))
        sx.read_index(path)
    return len(calls)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_anew(make_index, tmp_path, monkeypatch):
    path, opening, seen = tmp_path / "index", safetensors.safe_open, []
    sx.write_index(make_index(n=400), path)

    def replacing(*arguments, **options):
        if len(seen) < 3:
            sx.write_index(make_index(n=30), path)
        seen.append(1)
        return opening(*arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", replacing)
    assert sx.read_index(path).ntotal == 30
    assert len(seen) == 4

    def always(*arguments, **options):
        sx.write_index(make_index(n=30), path)
        return opening(*arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", always)
    with pytest.raises(OSError, match="replaced faster than it can be read"):
        sx.read_index(path)
