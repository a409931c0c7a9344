"""Fourth stage: how much each head loses for want of bytes, and what becomes of what it looks up."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from saapindex.attention.limits import reading
from saapindex.codes import TransformCode
from saapindex.learn.evaluation.measures import query_errors
from saapindex.learn.judging import LOOKUP, freeze
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.peers.ladder import Ladder, Learned
from saapindex.learn.shares import ERRORS, LEFT, LOOKUPS, TOKENS
from saapindex.params import AttendParameters, default_nlist

__all__ = ["LESS", "measure_heads"]

LESS = 0.4
"""A head is measured at the budget, and at so much of it."""


class _Found(NamedTuple):
    """What one head does on one sequence."""

    errors: list[float]
    left: list[float]
    lookups: list[float]
    keys: int


def measure_heads(job: LayerJob) -> None:
    """Measure each head on the held-out sequences, where views were judged by what the index returns.

    Kept are the mean error of its output at two budgets and the bytes that these leave after statistics, over
    the longer sequences; and of each sequence the share of its queries that look something up, and the mean
    error of these, with its length. From those of all layers `saapindex.learn.shares.share_out` makes what
    each head takes of a budget. A sequence is served by as many lists as suit its length.
    """
    settings = job.settings
    if settings.judge != "error":
        return
    per = len(job.head_numbers)
    budgets = settings.share, settings.share * LESS
    for at, extra in enumerate(job.layer_extra):
        names = TransformCode.__dataclass_fields__
        codes = {
            nlist: TransformCode(**{name: extra[f"codes.{nlist}.{name}"] for name in names})
            for nlist in settings.nlist
        }
        sequences = range(len(job.held_out))
        heads = [
            [_measured(job, number, at * per + head, head, codes, budgets) for number in sequences]
            for head in range(per)
        ]
        longest = max(found.keys for found in heads[0])
        long = [[found for found in of_head if 2 * found.keys >= longest] for of_head in heads]
        errors = [np.mean([found.errors for found in of_head], axis=0) for of_head in long]
        left = [np.mean([found.left for found in of_head], axis=0) for of_head in long]
        extra[ERRORS], extra[LEFT] = np.array(errors, np.float32), np.array(left, np.float32)
        tokens = [int(context.key_positions[-1]) + 1 for context in job.held_out]
        extra[TOKENS] = np.array([tokens] * per, np.int64)
        extra[LOOKUPS] = np.array([[found.lookups for found in of_head] for of_head in heads], np.float32)


def _measured(
    job: LayerJob,
    sequence: int,
    number: int,
    head: int,
    codes: dict[int, TransformCode],
    budgets: tuple[float, ...],
) -> _Found:
    """Measure head `number` of the job, `head` of its layer."""
    snapshot = freeze(job, job.held_out[sequence], number)
    context = snapshot.context
    n = len(context.keys)
    nlist = min(codes, key=lambda count: abs(math.log2(count / default_nlist(n))))
    code, centroids = codes[nlist].head(head), job.centroids[nlist][number]
    metric = None if job.metric is None else job.metric[number]
    learned = Learned(job.views[number], centroids, metric, job.settings.spherical, code)
    peer = Ladder(scan_share=job.settings.scan_share).learned(lambda n: learned)
    peer.build(context)
    found = [query_errors(peer, snapshot, budget) for budget in budgets]
    asks = found[0][1] >= LOOKUP
    rate = float(asks.any(0).float().mean())
    lost = float(found[0][0][asks].mean()) if rate else 0.0
    long = np.array([n])
    plain = [
        reading(AttendParameters(budget=budget), long, code, nlist, context.element) for budget in budgets
    ]
    left = [float(one.left[0]) / (n * context.row) for one in plain]
    return _Found([float(part.mean()) for part, _ in found], left, [rate, lost], n)
