"""Learning from real models: traces, training of codebooks and routers, evaluation. Most needs torch."""

from saapindex.learn.routers import attention_mass, train_router
from saapindex.learn.traces import (
    Trace,
    TraceHeader,
    find_traces,
    read_trace,
    read_trace_header,
    write_trace,
)

__all__ = [
    "Trace",
    "TraceHeader",
    "attention_mass",
    "find_traces",
    "read_trace",
    "read_trace_header",
    "train_router",
    "write_trace",
]
