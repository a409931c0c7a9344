"""saapindex: a vector-search index for LLM attention.

Attention at inference time is a vector search in which queries and keys are distributed differently and
RoPE rotates every key by its position. saapindex partitions keys in the metric of the queries, routes
queries by a model of their own, and scores the keys of the lists they visit exactly.

>>> import saapindex as sx
>>> sx.IndexSAAP(64, 256, rope=sx.Rope(theta=100_000.0, dim=64))
IndexSAAP(d=64, nlist=256, rotated, mean, not trained, ntotal=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saapindex.attention import AttentionIndex
    from saapindex.codebook import Codebook
    from saapindex.errors import (
        CodebookMismatchError,
        DeviceMemoryError,
        FileFormatError,
        InvalidInputError,
        MissingDependencyError,
        NotTrainedError,
        SaapIndexError,
        SaapIndexWarning,
    )
    from saapindex.index import (
        IO_FLAG_MMAP,
        METRIC_INNER_PRODUCT,
        METRIC_L2,
        IndexSAAP,
        ParameterSpace,
        SearchStatistics,
        clone_index,
        deserialize_index,
        index_cpu_to_gpu,
        index_factory,
        index_gpu_to_cpu,
        omp_get_max_threads,
        omp_set_num_threads,
        read_index,
        serialize_index,
        write_index,
    )
    from saapindex.params import PRESETS, AttendParameters, IndexParameters, SearchParameters
    from saapindex.rope import Rope

_HOMES = {
    "AttendParameters": "saapindex.params",
    "AttentionIndex": "saapindex.attention",
    "Codebook": "saapindex.codebook",
    "CodebookMismatchError": "saapindex.errors",
    "DeviceMemoryError": "saapindex.errors",
    "FileFormatError": "saapindex.errors",
    "IO_FLAG_MMAP": "saapindex.index",
    "IndexParameters": "saapindex.params",
    "IndexSAAP": "saapindex.index",
    "InvalidInputError": "saapindex.errors",
    "METRIC_INNER_PRODUCT": "saapindex.index",
    "METRIC_L2": "saapindex.index",
    "MissingDependencyError": "saapindex.errors",
    "NotTrainedError": "saapindex.errors",
    "PRESETS": "saapindex.params",
    "ParameterSpace": "saapindex.index",
    "Rope": "saapindex.rope",
    "SaapIndexError": "saapindex.errors",
    "SaapIndexWarning": "saapindex.errors",
    "SearchParameters": "saapindex.params",
    "SearchStatistics": "saapindex.index",
    "clone_index": "saapindex.index",
    "deserialize_index": "saapindex.index",
    "index_cpu_to_gpu": "saapindex.index",
    "index_factory": "saapindex.index",
    "index_gpu_to_cpu": "saapindex.index",
    "omp_get_max_threads": "saapindex.index",
    "omp_set_num_threads": "saapindex.index",
    "read_index": "saapindex.index",
    "serialize_index": "saapindex.index",
    "write_index": "saapindex.index",
}

__all__ = [
    "IO_FLAG_MMAP",
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "PRESETS",
    "AttendParameters",
    "AttentionIndex",
    "Codebook",
    "CodebookMismatchError",
    "DeviceMemoryError",
    "FileFormatError",
    "IndexParameters",
    "IndexSAAP",
    "InvalidInputError",
    "MissingDependencyError",
    "NotTrainedError",
    "ParameterSpace",
    "Rope",
    "SaapIndexError",
    "SaapIndexWarning",
    "SearchParameters",
    "SearchStatistics",
    "clone_index",
    "deserialize_index",
    "index_cpu_to_gpu",
    "index_factory",
    "index_gpu_to_cpu",
    "omp_get_max_threads",
    "omp_set_num_threads",
    "read_index",
    "serialize_index",
    "write_index",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saapindex' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
