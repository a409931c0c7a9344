"""The ANN face: an index with Faiss's names and contracts."""

from saapindex.index.device import index_cpu_to_gpu, index_gpu_to_cpu
from saapindex.index.saap import IndexSAAP
from saapindex.index.storage import read_index, write_index
from saapindex.index.store import METRIC_INNER_PRODUCT, METRIC_L2

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "IndexSAAP",
    "index_cpu_to_gpu",
    "index_gpu_to_cpu",
    "read_index",
    "write_index",
]
