"""The ANN face: an index with Faiss's names and contracts."""

from saapindex.index.device import index_cpu_to_gpu, index_gpu_to_cpu
from saapindex.index.factory import index_factory
from saapindex.index.saap import IndexSAAP, clone_index
from saapindex.index.statistics import SearchStatistics
from saapindex.index.storage import (
    IO_FLAG_MMAP,
    deserialize_index,
    read_index,
    serialize_index,
    write_index,
)
from saapindex.index.store import METRIC_INNER_PRODUCT, METRIC_L2
from saapindex.index.threads import omp_get_max_threads, omp_set_num_threads
from saapindex.index.tuning import ParameterSpace

__all__ = [
    "IO_FLAG_MMAP",
    "IndexSAAP",
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "ParameterSpace",
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
