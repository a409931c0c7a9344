"""Which lists to visit, and which of the visited keys to fetch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.common import Floats, Ints
from saapindex.backends.paged import Code, PagedLists, Reading, Scaling, widened
from saapindex.backends.reference.codes import CORRECTION, capped


def logsumexp(x: Floats, axis: int) -> Floats:
    """Log of the sum of exponentials; minus infinity where there is nothing.

    Examples
    --------
    >>> logsumexp(np.array([[0.0, 0.0], [-np.inf, -np.inf]]), 1).round(3)
    array([0.693,  -inf])
    """
    peak = x.max(axis=axis, keepdims=True, initial=-np.inf)
    safe = np.where(np.isfinite(peak), peak, 0).astype(x.dtype)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(x - safe).sum(axis=axis, keepdims=True)) + safe
    result: Floats = total.squeeze(axis)
    return result


def log_sizes(sizes: Ints, dtype: np.dtype[Any]) -> Floats:
    """Return the log of the sizes of lists, minus infinity for an empty one."""
    with np.errstate(divide="ignore"):
        logs: Floats = np.log(sizes.astype(dtype))
    return logs


def rank_lists(queries: Floats, lists: PagedLists, code: Code, scaling: Scaling) -> tuple[Floats, Floats]:
    """See `Ops.rank_lists`."""
    dtype, heads = queries.dtype, len(code.step)
    logits = np.empty((*queries.shape[:3], lists.sizes.shape[1]), dtype)
    for s, q in enumerate(queries):
        anchors = widened(lists.anchors[s], dtype) * lists.anchor_scales[s][:, None].astype(dtype)
        u = q @ code.inverse[s % heads].astype(dtype)
        variance = scaling.scale**2 / 2 * (u**2 @ code.spread[s % heads].astype(dtype))
        second = np.minimum(variance[..., None] * lists.spreads[s].astype(dtype), CORRECTION)
        found = capped(scaling.scale * (q @ anchors.T) + second, scaling.softcap)
        logits[s] = np.where(lists.sizes[s] > 0, found, -np.inf)
    return logits, logsumexp(logits + log_sizes(lists.sizes, dtype)[:, None, None], 3)


def pooled(weights: Floats, policy: str) -> Floats:
    """Return log weights of a group, (g, n), as those of everybody who ranks, (rankers, n)."""
    if policy == "sum":
        return logsumexp(weights, 0)[None]
    return weights.max(axis=0, keepdims=True) if policy == "max" else weights


def select_lists(logits: Floats, norms: Floats, sizes: Ints, reading: Reading) -> Ints:
    """See `Ops.select_lists`."""
    taken = np.zeros((*logits.shape[:2], logits.shape[3]), np.int64)
    for s, i in np.ndindex(*taken.shape[:2]):
        if not sizes[s].any():
            continue
        weights = logits[s, i] - norms[s, i][:, None]
        logs = log_sizes(sizes[s], logits.dtype)
        ranks = pooled(weights + logs if reading.by_mass else weights, reading.policy)
        masses = np.exp(pooled(weights + logs, reading.policy))
        for rank, mass in zip(ranks, masses, strict=True):
            order = np.argsort(-rank, kind="stable")
            count = sizes[s][order]
            limit = reading.scan[s] // len(ranks)
            end = np.cumsum(count)
            if reading.nprobe:
                visit = np.where(np.arange(len(order)) < reading.nprobe, count, 0)
            elif reading.top_p:
                share = mass[order] / mass.sum()
                visit = np.where(np.cumsum(share) - share < reading.top_p, count, 0)
            elif reading.refine:
                visit = np.where(end <= limit, count, 0)
            else:
                visit = np.clip(limit - (end - count), 0, count)
            taken[s, i, order] = np.maximum(taken[s, i, order], visit)
    return taken


def select_keys(estimates: Floats, norms: Floats, ids: Ints, limits: Ints, policy: str) -> NDArray[np.bool_]:
    """See `Ops.select_keys`."""
    kept = np.zeros(ids.shape, np.bool_)
    for s, i in np.ndindex(*limits.shape):
        found = np.flatnonzero(estimates[s, i].max(axis=0, initial=-np.inf) > -np.inf)
        if not len(found):
            continue
        scores = pooled(estimates[s, i][:, found] - norms[s, i][:, None], policy)
        for score in scores:
            best = np.lexsort((ids[s, i, found], -score))[: limits[s, i] // len(scores)]
            kept[s, i, found[best]] = True
    return kept
