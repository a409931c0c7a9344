"""The indexes that `bench/run.py pareto` compares, behind one interface."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from pareto_data import Dataset

import saapindex as sx

Ints = NDArray[np.int64]
Vectors = NDArray[np.float32]
OPTIONAL = {"hnswlib": "hnswlib", "usearch": "usearch", "scann": "ScaNN"}
"""Packages of the extra ``bench``, and what their methods are called here."""
FAISS = ("Faiss IVFFlat", "Faiss IVFPQ fast-scan", "Faiss IVF, quantised", "Faiss HNSW")
GROUPS = ("saapindex", "saapindex, codes", *FAISS, *OPTIONAL.values())
"""Names of the groups of methods."""

_FAISS: Any = faiss  # for what its type stubs leave out


@dataclass
class Built:
    """An index that holds the keys, and how to search it.

    `search` takes queries, k and a value of `ladder`, of which larger values read more, and returns ids;
    `read` returns the keys that were scored a query, or None where the library does not count them.
    """

    search: Callable[[Vectors, int, int], Ints]
    ladder: list[int]
    nbytes: int
    read: Callable[[Vectors, int, int], float | None]


@dataclass(frozen=True)
class Method:
    """One library, one kind of index and one way to build it."""

    group: str
    setting: str
    make: Callable[[Dataset], Built]


def steps(last: int) -> list[int]:
    """Whole numbers from 1 to `last`, about eight a doubling."""
    return sorted({*np.unique(np.geomspace(1, last, 8 * int(np.log2(last)) + 1).astype(int)).tolist(), last})


BUILD = 100
"""Size of the beam that graphs are built with."""
BEAMS = [ef for ef in steps(1024) if ef >= 8]
"""Sizes of the beam that graphs are searched with."""


def make_saap(
    data: Dataset, *, storage: str, nlist: int, factor: int | None = None, aware: bool = True
) -> Built:
    """Build an index of ours, trained on keys and training queries; with Faiss's partition unless `aware`."""
    d = data.keys.shape[1]
    if aware:
        index = sx.index_factory(d, f"SAAP{nlist},{storage}", params=sx.IndexParameters(augment=0))
    else:
        index = sx.index_factory(d, f"IVF{nlist},{storage}")
    index.train(data.keys, xq_train=data.train)
    index.add(data.keys)

    def search(queries: Vectors, k: int, nprobe: int, stats: sx.SearchStatistics | None = None) -> Ints:
        params = sx.SearchParameters(nprobe=nprobe, k_factor=factor)
        ids: Ints = index.search(queries, k, params=params, stats=stats)[1]
        return ids

    def read(queries: Vectors, k: int, nprobe: int) -> float:
        stats = sx.SearchStatistics()
        search(queries, k, nprobe, stats)
        return stats.ndis / stats.nq

    return Built(search, steps(nlist), index.nbytes, read)


def make_ivf(
    data: Dataset,
    *,
    storage: str,
    nlist: int,
    factor: int | None = None,
    plain: bool = False,
    seed: int = 1234,
) -> Built:
    """Build a Faiss inverted file, refined by the keys where `factor` is given.

    Faiss partitions by spherical k-means for inner products; `plain` k-means is the other usual choice.
    """
    d, ip = data.keys.shape[1], faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.index_factory(d, f"IVF{nlist},{storage}", ip)
    index.cp.seed = seed
    if plain:
        index.cp.spherical = False
    index.train(data.keys)
    index.add(data.keys)
    params: Any = faiss.SearchParametersIVF()
    outer = index if factor is None else faiss.IndexRefineFlat(index, faiss.swig_ptr(data.keys))
    refining: Any = None if factor is None else _refine_parameters(factor)
    if refining is not None:
        refining.base_index_params = params

    def search(queries: Vectors, k: int, nprobe: int) -> Ints:
        params.nprobe = nprobe
        ids: Ints = outer.search(queries, k, params=params if refining is None else refining)[1]
        return ids

    sizes = np.array([index.invlists.list_size(i) for i in range(nlist)])

    def read(queries: Vectors, k: int, nprobe: int) -> float:
        return float(sizes[index.quantizer.search(queries, nprobe)[1]].sum(axis=1).mean())

    nbytes = len(faiss.serialize_index(index)) + (0 if factor is None else data.keys.nbytes)
    return Built(search, steps(nlist), nbytes, read)


def _fast_scan(data: Dataset, *, nlist: int, factor: int) -> Built:
    storage = f"PQ{data.keys.shape[1] // 2}x4fs"
    return make_ivf(data, storage=storage, nlist=nlist, factor=factor)


def _hnsw(data: Dataset, *, m: int) -> Built:
    index: Any = faiss.IndexHNSWFlat(data.keys.shape[1], m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD
    index.add(data.keys)
    params: Any = _FAISS.SearchParametersHNSW()

    def search(queries: Vectors, k: int, ef: int) -> Ints:
        params.efSearch = ef
        ids: Ints = index.search(queries, k, params=params)[1]
        return ids

    def read(queries: Vectors, k: int, ef: int) -> float:
        _FAISS.cvar.hnsw_stats.reset()
        search(queries, k, ef)
        return float(_FAISS.cvar.hnsw_stats.ndis / len(queries))

    return Built(search, BEAMS, len(faiss.serialize_index(index)), read)


def _refine_parameters(factor: int) -> Any:
    return _FAISS.IndexRefineSearchParameters(k_factor=factor)


def _hnswlib(data: Dataset, *, m: int, threads: int) -> Built:
    hnswlib: Any = importlib.import_module("hnswlib")
    index = hnswlib.Index(space="ip", dim=data.keys.shape[1])
    index.init_index(max_elements=len(data.keys), ef_construction=BUILD, M=m, random_seed=0)
    index.set_num_threads(threads)
    index.add_items(data.keys)

    def search(queries: Vectors, k: int, ef: int) -> Ints:
        index.set_ef(max(ef, k))
        return np.asarray(index.knn_query(queries, k)[0], np.int64)

    return Built(search, BEAMS, index.index_file_size(), lambda queries, k, ef: None)


def _usearch(data: Dataset, *, m: int, threads: int) -> Built:
    usearch: Any = importlib.import_module("usearch.index")
    index = usearch.Index(
        ndim=data.keys.shape[1], metric="ip", dtype="f32", connectivity=m, expansion_add=BUILD
    )
    index.add(np.arange(len(data.keys)), data.keys, threads=threads)

    def matches(queries: Vectors, k: int, ef: int) -> Any:
        index.expansion_search = ef
        return index.search(queries, k, threads=threads)

    def search(queries: Vectors, k: int, ef: int) -> Ints:
        return np.asarray(matches(queries, k, ef).keys, np.int64).reshape(len(queries), -1)

    def read(queries: Vectors, k: int, ef: int) -> float:
        return float(matches(queries, k, ef).computed_distances / len(queries))

    return Built(search, BEAMS, int(index.serialized_length), read)


def _scann(data: Dataset, *, nlist: int, factor: int, threads: int) -> Built:
    scann: Any = importlib.import_module("scann")
    n = len(data.keys)
    index = (
        scann.scann_ops_pybind.builder(data.keys, 10, "dot_product")
        .set_n_training_threads(threads)
        .tree(num_leaves=nlist, num_leaves_to_search=nlist, training_sample_size=min(n, 256 * nlist))
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(100)
        .build()
    )
    index.set_num_threads(threads)

    def search(queries: Vectors, k: int, nprobe: int) -> Ints:
        settings = {"leaves_to_search": nprobe, "pre_reorder_num_neighbors": factor * k}
        if len(queries) == 1:
            ids = index.search(queries[0], k, **settings)[0][None]
        else:
            ids = index.search_batched_parallel(queries, k, **settings)[0]
        return np.asarray(ids, np.int64)

    with tempfile.TemporaryDirectory() as folder:
        index.serialize(folder)
        nbytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    return Built(search, steps(nlist), nbytes, lambda queries, k, nprobe: None)


def installed() -> dict[str, str | None]:
    """Versions of the optional packages, None for one that is not installed or does not load."""
    found: dict[str, str | None] = {}
    for package in OPTIONAL:
        try:
            importlib.import_module("usearch.index" if package == "usearch" else package)
            found[package] = version(package)
        except ImportError:
            found[package] = None
    return found


def methods(nlists: tuple[int, ...], degrees: tuple[int, ...], threads: int) -> Iterator[Method]:
    """Yield every method that is installed, at each number of lists or degree of a graph.

    What is slower at equal recall nearly always (codes, the slower storages) is tried at one number of lists.
    """
    for nlist in nlists:
        for plain in (False, True):
            name = f"IVF{nlist},Flat, {'plain' if plain else 'spherical'} k-means"
            yield Method("Faiss IVFFlat", name, partial(make_ivf, storage="Flat", nlist=nlist, plain=plain))
        for lists in ("SAAP", "IVF"):
            make = partial(make_saap, storage="SQfp16", nlist=nlist, aware=lists == "SAAP")
            yield Method("saapindex", f"{lists}{nlist},SQfp16", make)
    middle = nlists[len(nlists) // 2]
    for factor in (4, 16, 64, 256):
        yield Method(
            "Faiss IVFPQ fast-scan",
            f"IVF{middle},PQ(d/2)x4fs,RFlat, k_factor {factor}",
            partial(_fast_scan, nlist=middle, factor=factor),
        )
    flat = partial(make_saap, storage="Flat", nlist=middle)
    yield Method("saapindex", f"SAAP{middle},Flat", flat)
    for storage in ("SQfp16", "SQ8"):
        quantised = partial(make_ivf, storage=storage, nlist=middle)
        yield Method("Faiss IVF, quantised", f"IVF{middle},{storage}", quantised)
    found = installed()
    for m in (m for m in degrees if m):
        yield Method("Faiss HNSW", f"M {m}, efConstruction {BUILD}", partial(_hnsw, m=m))
        if found["hnswlib"]:
            graph = partial(_hnswlib, m=m, threads=threads)
            yield Method("hnswlib", f"M {m}, ef_construction {BUILD}", graph)
        if found["usearch"]:
            graph = partial(_usearch, m=m, threads=threads)
            yield Method("usearch", f"connectivity {m}, expansion_add {BUILD}", graph)
    if found["scann"]:
        for factor in (4, 16):
            leaves = partial(_scann, nlist=middle, factor=factor, threads=threads)
            yield Method("ScaNN", f"{middle} leaves, reorder {factor}", leaves)
    coded = partial(make_saap, storage="Bits2,RFlat", nlist=nlists[0], factor=4)
    yield Method("saapindex, codes", f"SAAP{nlists[0]},Bits2,RFlat, k_factor 4", coded)
