"""Attention: exact over given keys, estimated over the rest, and the merging of the two."""

from __future__ import annotations

import numpy as np

from saapindex.backends.common import Floats, Ints
from saapindex.backends.paged import Code, Near, PagedLists, Pages, Scaling, widened
from saapindex.backends.reference.codes import capped, expected
from saapindex.backends.reference.select import log_sizes, logsumexp


def _softmax(logits: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Output and log-sum-exp of each row of logits, (m, n), over values, (n, d)."""
    lse = logsumexp(logits, 1)
    safe = np.where(np.isfinite(lse), lse, 0)[:, None]
    out: Floats = np.exp(logits - safe) @ values
    return out, lse


def attend_rows(queries: Floats, rows: Ints, pages: Pages, scaling: Scaling) -> tuple[Floats, Floats, Floats]:
    """See `Ops.attend_rows`."""
    out = np.zeros_like(queries)
    lse, peaks = (np.full(queries.shape[:3], -np.inf, queries.dtype) for _ in range(2))
    for s, i in np.ndindex(*rows.shape[:2]):
        seen = rows[s, i][rows[s, i] >= 0]
        if not len(seen):
            continue
        keys, values = (widened(pages.take(field, seen), queries.dtype) for field in ("keys", "values"))
        logits = capped(scaling.scale * (queries[s, i] @ keys.T), scaling.softcap)
        out[s, i], lse[s, i] = _softmax(logits, values)
        peaks[s, i] = logits.max(axis=1)
    return out, lse, peaks


def estimate_rest(
    queries: Floats,
    logits: Floats,
    rest: Ints,
    estimates: Floats,
    rows: Ints,
    labels: Ints,
    bounds: Floats,
    lists: PagedLists,
    pages: Pages,
    code: Code,
    scaling: Scaling,
) -> tuple[Floats, Floats]:
    """See `Ops.estimate_rest`."""
    dtype, heads = logits.dtype, len(code.step)
    out, lse = np.empty((*logits.shape[:3], lists.means.shape[2]), dtype), np.empty_like(bounds)
    for s, i in np.ndindex(*rest.shape[:2]):
        means = widened(lists.means[s], dtype) * lists.mean_scales[s][:, None].astype(dtype)
        seen = labels[s, i] >= 0
        whole = np.minimum(logits[s, i], bounds[s, i][:, None]) + log_sizes(rest[s, i], dtype)
        single = np.minimum(estimates[s, i][:, seen], bounds[s, i][:, None])
        both = np.concatenate([whole, single], axis=1)
        lse[s, i] = logsumexp(both, 1)
        weights = np.exp(both - np.where(np.isfinite(lse[s, i]), lse[s, i], 0)[:, None])
        codes = pages.take("codes", rows[s, i][seen]), pages.take("exponents", rows[s, i][seen])
        y = expected(queries[s, i], weights, lists.spreads[s], *codes, code, s % heads, scaling.scale)
        values = np.concatenate([means, means[labels[s, i][seen]]])
        out[s, i] = weights @ values + y @ lists.slopes[s, : y.shape[1]].astype(dtype)
    return out, lse


def merge(outs: Floats, lses: Floats) -> tuple[Floats, Floats]:
    """See `Ops.merge`."""
    lse = logsumexp(lses, 0)
    weights = np.exp(lses - np.where(np.isfinite(lse), lse, 0))
    out: Floats = (weights[..., None] * outs).sum(axis=0)
    return out, lse


def attend_all(
    queries: Floats, positions: Ints, near: Near, lists: PagedLists, pages: Pages, scaling: Scaling
) -> tuple[Floats, Floats]:
    """See `Ops.attend_all`."""
    out, lse = np.empty_like(queries), np.empty(queries.shape[:3], queries.dtype)
    for s, q in enumerate(queries):
        close, _ = near.rows(s)
        rows = np.concatenate([close, lists.rows(s, lists.sizes[s])[0]])
        keys, values = (widened(pages.take(field, rows), q.dtype) for field in ("keys", "values"))
        hidden = pages.take("ids", rows) > positions[s][:, None]
        logits = capped(scaling.scale * (q @ keys.T), scaling.softcap)
        logits = np.where(hidden[:, None], -np.inf, logits).astype(q.dtype)
        flat_out, flat_lse = _softmax(logits.reshape(lse[s].size, len(rows)), values)
        out[s], lse[s] = flat_out.reshape(q.shape), flat_lse.reshape(lse[s].shape)
    return out, lse
