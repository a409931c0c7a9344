"""Learning from real models: traces, and training of routers (which needs torch)."""

from saapindex.learn.routers import attention_mass, train_router
from saapindex.learn.traces import Trace, read_trace, write_trace

__all__ = ["Trace", "attention_mass", "read_trace", "train_router", "write_trace"]
