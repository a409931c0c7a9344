"""The modules for ann-benchmarks and VIBE keep the contracts of those programs.

The programs themselves are not needed: a stand-in of their abstract base class is put where the modules
import it from, and the modules are driven as the programs' documents say.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import saapindex as sx

yaml = pytest.importorskip("yaml")

BENCH = Path(__file__).parent.parent / "bench"
BASE = """
class BaseANN:
    def done(self):
        pass

    def get_memory_usage(self):
        return 0.0

    def batch_query(self, X, n):
        self.res = [self.query(q, n) for q in X]

    def get_batch_results(self):
        return self.res

    def get_additional(self):
        return {}

    def __str__(self):
        return self.name
"""
METRICS = {"ann_benchmarks": ("angular", "euclidean"), "vibe": ("cosine", "normalized", "ip", "euclidean")}
CASES = [(program, metric) for program, metrics in METRICS.items() for metric in metrics]
K = 10


@pytest.fixture
def single_thread():
    """VIBE's module sets the number of threads for the process: set it back."""
    before = sx.omp_get_max_threads()
    yield
    sx.omp_set_num_threads(before)


@pytest.fixture
def make_class(tmp_path, monkeypatch, single_thread):
    """The class of a program's module, imported from where the program would have it."""

    def make(program):
        root = tmp_path / program / "algorithms"
        for name in ("base", "saapindex"):
            (root / name).mkdir(parents=True)
        (root / "base" / "module.py").write_text(BASE)
        shutil.copy(BENCH / program / "module.py", root / "saapindex")
        for name in [name for name in sys.modules if name.split(".")[0] == program]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(f"{program}.algorithms.saapindex.module")
        base = importlib.import_module(f"{program}.algorithms.base.module")
        assert issubclass(module.SaapIndex, base.BaseANN)
        return module.SaapIndex

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in METRICS]:
        del sys.modules[name]


def definitions(program):
    """Every (build arguments, query arguments) that the configuration spans."""
    config = yaml.safe_load((BENCH / program / "config.yml").read_text())
    (entry,) = config["float"]["any"]
    for group in entry["run_groups"].values():
        grids = (group["args"], group["query_args"])
        lists = [list(grid.values()) if isinstance(grid, dict) else grid for grid in grids]
        for built, asked in itertools.product(*(itertools.product(*grid) for grid in lists)):
            yield entry, built, asked


def truth(keys, queries, metric):
    if metric == "euclidean":
        scores = -((queries[:, None] - keys[None]) ** 2).sum(axis=2)
    else:
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True) if metric in ("cosine", "angular") else keys
        scores = queries @ unit.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


def found(results, expected):
    return np.mean(
        [len(set(map(int, got)) & set(want)) / K for got, want in zip(results, expected, strict=True)]
    )


@pytest.mark.parametrize(("program", "metric"), CASES)
@pytest.mark.parametrize(
    ("storage", "arguments"), [("Flat", (8,)), ("SQfp16", (8,)), ("Bits4,RFlat", (8, 8))]
)
def test_contract(make_class, blobs, program, metric, storage, arguments):
    keys, queries = blobs(900, 32), blobs(20, 32, seed=1)
    kept = keys.copy(), queries.copy()
    algorithm = make_class(program)(metric, storage, 8)
    before = str(algorithm)
    algorithm.fit(keys)
    algorithm.set_query_arguments(*arguments)
    assert str(algorithm) != before
    assert storage in str(algorithm)
    assert "n_probe=8" in str(algorithm)
    single = [algorithm.query(q, K) for q in queries]
    assert algorithm.get_additional()["dist_comps"] >= 20 * 8
    algorithm.batch_query(queries, K)
    for one, many in zip(single, algorithm.get_batch_results(), strict=True):
        np.testing.assert_array_equal(one, many)
        assert len(set(one.tolist())) == K
    assert found(single, truth(keys, queries, metric)) > 0.97  # every list is visited
    assert algorithm.get_memory_usage() >= 0
    np.testing.assert_array_equal(keys, kept[0])
    np.testing.assert_array_equal(queries, kept[1])


@pytest.mark.parametrize("metric", METRICS["vibe"])
def test_training_queries(make_class, blobs, metric):
    keys, learn = blobs(900, 32), blobs(400, 32, seed=2)
    algorithm = make_class("vibe")(metric, "Flat", 8)
    algorithm.fit_ood(keys, learn, truth(keys, learn, metric))
    algorithm.set_query_arguments(8)
    queries = blobs(20, 32, seed=1)
    assert found([algorithm.query(q, K) for q in queries], truth(keys, queries, metric)) == 1


@pytest.mark.parametrize("program", METRICS)
def test_fewer_keys_than_asked_for(make_class, blobs, program):
    algorithm = make_class(program)("euclidean", "Flat", 8)
    algorithm.fit(blobs(40, 32))
    algorithm.set_query_arguments(1)
    ids = algorithm.query(blobs(1, 32, seed=1)[0], 40)
    assert 0 < len(ids) < 40
    assert (ids >= 0).all()


@pytest.mark.parametrize("program", METRICS)
def test_bad_metric(make_class, program):
    with pytest.raises(ValueError, match="metric is 'hamming', expected"):
        make_class(program)("hamming", "Flat", 8)


@pytest.mark.parametrize("program", METRICS)
def test_configuration(make_class, program):
    """Every definition constructs, and its factory string and search parameters are valid."""
    made = make_class(program)
    names = set()
    for count, (entry, built, asked) in enumerate(definitions(program), 1):
        assert entry["module"] == f"{program}.algorithms.saapindex"
        assert entry["constructor"] == made.__name__
        assert entry["base_args"] == ["@metric"]
        algorithm = made("euclidean", *built)
        sx.index_factory(32, f"SAAP{built[1]},{built[0]}")
        algorithm.set_query_arguments(*asked)
        names.add(str(algorithm))
        assert len(names) == count, "two definitions share a name"
