"""Evaluation of sparse attention: error, attention mass and recall against the bytes read. Needs torch."""

from saapindex.errors import MissingDependencyError

try:
    import torch as _  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("torch", "evaluation", "learn") from error

from saapindex.learn.evaluation.measures import MODES, Mode, Record, measure
from saapindex.learn.evaluation.report import Report
from saapindex.learn.evaluation.run import OWN, evaluate, trace_files
from saapindex.learn.evaluation.snapshot import Protocol, Snapshot, take_snapshot, training_sequence
from saapindex.learn.evaluation.summary import Summary, choose, imbalance, keep, summarise

__all__ = [
    "MODES",
    "OWN",
    "Mode",
    "Protocol",
    "Record",
    "Report",
    "Snapshot",
    "Summary",
    "choose",
    "evaluate",
    "imbalance",
    "keep",
    "measure",
    "summarise",
    "take_snapshot",
    "trace_files",
    "training_sequence",
]
