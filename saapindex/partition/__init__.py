"""Partition of keys, and routing of queries to the parts."""

from saapindex.partition.kmeans import kmeans
from saapindex.partition.partition import Partition, train_partition
from saapindex.partition.routers import (
    CentroidRouter,
    LinearRouter,
    MeanRouter,
    MLPRouter,
    Router,
)
from saapindex.partition.view import View

__all__ = [
    "CentroidRouter",
    "LinearRouter",
    "MLPRouter",
    "MeanRouter",
    "Partition",
    "Router",
    "View",
    "kmeans",
    "train_partition",
]
