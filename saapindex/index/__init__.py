"""The ANN face: an index with Faiss's names and contracts."""

from saapindex.index.factory import index_factory
from saapindex.index.saap import IndexSAAP
from saapindex.index.statistics import SearchStatistics
from saapindex.index.storage import read_index, write_index
from saapindex.index.store import METRIC_INNER_PRODUCT, METRIC_L2

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "IndexSAAP",
    "SearchStatistics",
    "index_factory",
    "read_index",
    "write_index",
]
