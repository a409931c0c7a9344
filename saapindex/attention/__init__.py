"""Sparse attention over the keys of a layer."""

from saapindex.attention.cache import PagedCache
from saapindex.attention.flushing import flush_layers
from saapindex.attention.index import AttentionIndex
from saapindex.attention.layer import LayerCodebook, fit_layer
from saapindex.attention.memory import MemoryStatement
from saapindex.attention.merging import merge
from saapindex.attention.selection import Selection
from saapindex.attention.shares import HeadShares
from saapindex.attention.slots import SlotIndex
from saapindex.attention.store import DENSE_BELOW
from saapindex.params import AttendParameters

__all__ = [
    "DENSE_BELOW",
    "AttendParameters",
    "AttentionIndex",
    "HeadShares",
    "LayerCodebook",
    "MemoryStatement",
    "PagedCache",
    "Selection",
    "SlotIndex",
    "fit_layer",
    "flush_layers",
    "merge",
]
