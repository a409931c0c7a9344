"""Fourth stage: how much each head loses for want of bytes, and how often it looks something up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saapindex.attention.limits import reading
from saapindex.codes import TransformCode
from saapindex.learn.evaluation.measures import query_errors
from saapindex.learn.judging import LOOKUP, freeze
from saapindex.learn.layer_job import LayerJob
from saapindex.learn.peers.ladder import Ladder, Learned
from saapindex.learn.shares import ERRORS, LEFT, LOOKUPS
from saapindex.params import AttendParameters

__all__ = ["LESS", "measure_heads"]

LESS = 0.4
"""A head is measured at the budget, and at so much of it."""


def measure_heads(job: LayerJob) -> None:
    """Measure each head on the held-out sequences, where views were judged by what the index returns.

    Kept are the mean error of its output at two budgets, the bytes that these leave after statistics, and the
    largest share, over the sequences, of its queries that look something up: from these of all layers
    `saapindex.learn.shares.share_out` makes what each head takes of a budget.
    """
    settings = job.settings
    if settings.judge != "error":
        return
    finest, per = settings.nlist[-1], len(job.head_numbers)
    budgets = settings.share, settings.share * LESS
    for at, extra in enumerate(job.layer_extra):
        code = TransformCode(
            **{name: extra[f"codes.{finest}.{name}"] for name in TransformCode.__dataclass_fields__}
        )
        heads = [_head(job, at * per + head, code.head(head), budgets) for head in range(per)]
        for name, column in zip((ERRORS, LEFT, LOOKUPS), zip(*heads, strict=True), strict=True):
            extra[name] = np.array(column, np.float32)


def _head(
    job: LayerJob, head: int, code: TransformCode, budgets: tuple[float, ...]
) -> tuple[NDArray[Any], NDArray[Any], float]:
    metric = None if job.metric is None else job.metric[head]
    centroids = job.centroids[job.settings.nlist[-1]][head]
    learned = Learned(job.views[head], centroids, metric, job.settings.spherical, code)
    errors, left, lookups = [], [], []
    for context in job.held_out:
        snapshot = freeze(job, context, head)
        peer = Ladder(scan_share=job.settings.scan_share).learned(lambda n: learned)
        peer.build(snapshot.context)
        found = [query_errors(peer, snapshot, budget) for budget in budgets]
        errors.append(torch.stack([part.mean() for part, _ in found]).cpu().numpy())
        lookups.append(float((found[0][1].amax(0) >= LOOKUP).float().mean()))
        long, element = np.array([len(snapshot.context.keys)]), snapshot.context.element
        plain = [AttendParameters(budget=budget) for budget in budgets]
        bytes_ = [reading(one, long, code, len(centroids), element).left[0] for one in plain]
        left.append(np.array(bytes_) / (long[0] * snapshot.context.row))
    return np.mean(errors, axis=0), np.mean(left, axis=0), max(lookups)
