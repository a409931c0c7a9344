"""Means and quantiles of records, and the choice of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from saapindex.errors import InvalidInputError
from saapindex.learn.evaluation.measures import Mode, Record

__all__ = ["Summary", "choose", "imbalance", "keep", "summarise"]

_SLACK = 1.001  # rounding of bytes in float32


@dataclass(frozen=True)
class Summary:
    """Several heads and sequences taken together: statistics over records, one for each head and sequence.

    Attributes
    ----------
    key
        What the records have in common, in the order that was asked for.
    setting
        Of the method, or ``"several"``.
    count
        Records.
    error, error_median, error_p90, error_worst
        Mean, median, 90th percentile and maximum of the heads' mean errors.
    worst
        Where the maximum is.
    mass, recall_10, recall_100, bytes, keys
        Means, as in `Record`.
    within
        Whether the bytes read stay within the budget on average.
    """

    key: tuple[Any, ...]
    setting: str
    count: int
    error: float
    error_median: float
    error_p90: float
    error_worst: float
    worst: str
    mass: float
    recall_10: float
    recall_100: float
    bytes: float
    keys: float
    within: bool


def summarise(records: Iterable[Record], *by: str) -> list[Summary]:
    """Summarise records that agree in the fields `by`, in the order in which these first appear.

    Examples
    --------
    >>> summarise([], "method", "budget")
    []
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, name) for name in by), []).append(record)
    return [_summary(key, group) for key, group in groups.items()]


def _summary(key: tuple[Any, ...], records: Sequence[Record]) -> Summary:
    def mean(of: Callable[[Record], float]) -> float:
        return float(np.mean([of(record) for record in records]))

    errors = np.array([record.error for record in records])
    worst = records[int(errors.argmax())]
    settings = {record.setting for record in records}
    read = mean(lambda record: record.bytes)
    return Summary(
        key=key,
        setting=settings.pop() if len(settings) == 1 else "several",
        count=len(records),
        error=float(errors.mean()),
        error_median=float(np.median(errors)),
        error_p90=float(np.quantile(errors, 0.9)),
        error_worst=float(errors.max()),
        worst=f"{worst.sequence} layer {worst.layer} head {worst.q_head}",
        mass=mean(lambda record: record.mass),
        recall_10=mean(lambda record: record.recall_10),
        recall_100=mean(lambda record: record.recall_100),
        bytes=read,
        keys=mean(lambda record: record.keys),
        within=read <= _SLACK * mean(lambda record: record.budget),
    )


def choose(held_out: Iterable[Record]) -> dict[tuple[str, Mode, float], str]:
    """Pick one setting for each method, mode and budget: the smallest mean error among those within the
    budget.

    Where none keeps to the budget, the one that reads least.

    Parameters
    ----------
    held_out
        Records of every setting, on sequences that are not reported.

    Examples
    --------
    >>> choose([])
    {}
    """
    best: dict[tuple[str, Mode, float], tuple[tuple[bool, float], str]] = {}
    for summary in summarise(held_out, "method", "mode", "budget", "setting"):
        method, mode, budget, setting = summary.key
        rank = not summary.within, summary.error if summary.within else summary.bytes
        known = best.get((method, mode, budget))
        if known is None or rank < known[0]:
            best[method, mode, budget] = rank, setting
    return {key: setting for key, (_, setting) in best.items()}


def keep(records: Iterable[Record], chosen: dict[tuple[str, Mode, float], str]) -> list[Record]:
    """Return the records of the settings chosen, and all records of methods without a choice."""
    return [
        record
        for record in records
        if chosen.get((record.method, record.mode, record.budget), record.setting) == record.setting
    ]


def imbalance(sizes: ArrayLike) -> float:
    """Return the mean size of the list that a key is in, over the size that even lists would have.

    1 for even lists, the number of lists where one holds all keys.

    Raises
    ------
    InvalidInputError
        If no list holds a key, or a size is negative.

    Examples
    --------
    >>> imbalance([5, 5]), imbalance([10, 0]), imbalance([3, 1])
    (1.0, 2.0, 1.25)
    """
    counts = np.asarray(sizes, np.float64)
    if counts.ndim != 1 or counts.sum() <= 0 or (counts < 0).any():
        raise InvalidInputError("sizes have no keys, expected the sizes of lists, (nlist,), not all 0")
    return float(len(counts) * np.square(counts).sum() / counts.sum() ** 2)
