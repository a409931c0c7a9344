"""Scores of the keys in the probed lists, estimated from their codes."""

from __future__ import annotations

import numpy as np

from saapindex.backends.base import LANES, CodedLists, Floats, Ints
from saapindex.backends.reference.codes import unpack
from saapindex.backends.reference.scan import Visit, keep_best, keep_within, read_rows

_TINY = 1e-30


def rounded(a: Floats) -> tuple[Floats, Floats]:
    """Round rows, (n, R), to whole numbers of at most 127 in size: return them, and what they are to be
    multiplied by, (n, 1).
    """
    factor = np.maximum(np.abs(a).max(axis=1, keepdims=True, initial=0), _TINY) / 127
    return np.rint(a / factor), factor


def estimates(query: Floats, lists: CodedLists, rows: Ints, labels: Ints, l2: bool) -> Floats:
    """Return what codes say of the inner products with keys at `rows` of lists `labels`, or of distances."""
    dtype, code = query.dtype, lists.code
    inverse, step = code.inverse.astype(dtype), code.step.astype(dtype)
    # The list of each row, once, and what the query is to each of these lists.
    visited, place = np.unique(labels, return_inverse=True)
    anchors = lists.anchors[visited].astype(dtype)
    u = np.repeat(query[None] @ inverse, len(visited), axis=0)
    if l2:
        u -= lists.turned[visited].astype(dtype)
    a8, factor = rounded(u * step)
    centers = ((query - anchors) ** 2).sum(axis=1) if l2 else anchors @ query
    block, lane = rows // LANES, rows % LANES
    fields = unpack(lists.words[block, :, lane], code.widths)[:, : len(step)]
    levels = fields.astype(dtype) - code.half.astype(dtype)
    scale = code.scales.astype(dtype)[lists.exponents[block, 0, lane]]
    inner = factor[place, 0] * scale * (a8[place] * levels).sum(axis=1)
    found: Floats = centers[place] + inner
    if l2:
        found = centers[place] - 2 * inner + lists.norms[block, 0, lane].astype(dtype)
    return found


def _visit(queries: Floats, lists: CodedLists, probes: Ints, limits: Ints, l2: bool, as_rows: bool) -> Visit:
    def visit(i: int) -> tuple[Floats, Ints]:
        rows, labels = read_rows(lists, probes[i], limits[i])
        scores = estimates(queries[i], lists, rows, labels, l2)
        return scores, rows if as_rows else lists.ids[rows]

    return visit


def scan_coded(
    queries: Floats,
    lists: CodedLists,
    probes: Ints,
    limits: Ints,
    k: int,
    l2: bool,
    as_rows: bool,
) -> tuple[Floats, Ints]:
    """See `Ops.scan_coded`."""
    return keep_best(_visit(queries, lists, probes, limits, l2, as_rows), queries, k, l2)


def range_scan_coded(
    queries: Floats, lists: CodedLists, probes: Ints, limits: Ints, radius: float, l2: bool
) -> tuple[Ints, Floats, Ints]:
    """See `Ops.range_scan_coded`."""
    return keep_within(_visit(queries, lists, probes, limits, l2, False), queries, radius, l2)
