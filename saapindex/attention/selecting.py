"""The stages of a step before keys are fetched: which lists are visited, and which keys chosen."""

from __future__ import annotations

import numpy as np

from saapindex.attention.batch import Batch
from saapindex.attention.selection import packed
from saapindex.backends.base import Floats, Ints
from saapindex.backends.paged import Reading, Scaling

__all__ = ["select"]


def select(
    batch: Batch, queries: Floats, scaling: Scaling, wanted: Reading, *, everything: bool
) -> tuple[Ints, Ints, Ints]:
    """Choose keys for queries, (S, 1, g, d).

    Returns
    -------
    ids : (S, most) int64, rising, -1 beyond
    lengths : (S,) int64
    partitions : (S, lists) int64, rising, -1 beyond
    """
    ops, pages, code = batch.keeping.ops, batch.keeping.pool.pages, batch.keeping.codebook.code.view
    lists = batch.lists
    if everything:
        taken = lists.sizes[:, None]
    else:
        logits, norms = ops.rank_lists(queries, lists, code, scaling)
        taken = ops.select_lists(logits, norms, lists.sizes, wanted)
    if everything or not wanted.refine:
        rows = lists.all_rows(taken)
        kept = rows >= 0
    else:
        estimates, rows, _ = ops.scan_codes(queries, taken, lists, pages, code, scaling)
        ids = _ids(batch, rows)
        limits = wanted.keep(taken.sum(axis=-1))
        kept = ops.select_keys(estimates, norms, ids, limits, wanted.policy)
    ids = np.where(kept, _ids(batch, rows), np.iinfo(np.int64).max)[:, 0]
    lengths = kept[:, 0].sum(axis=1)
    most = int(lengths.max(initial=0))
    ids = np.sort(ids, axis=1)[:, :most]
    ids = np.where(np.arange(most) < lengths[:, None], ids, -1)
    return ids, lengths, packed(taken[:, 0] > 0)[0]


def _ids(batch: Batch, rows: Ints) -> Ints:
    ids = np.full(rows.shape, -1, np.int64)
    ids[rows >= 0] = batch.keeping.pool.pages.take("ids", rows[rows >= 0])
    return ids
