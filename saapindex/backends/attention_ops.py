"""The operations of sparse attention that every backend offers, and their shapes.

Shapes: `H` KV heads, `S` streams (`H` for each sequence), `t` tokens, `g` query heads that share a KV head,
`d` dimensions, `L` lists, `N` keys visited, `K` rows. Results are in the precision of the queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.common import Floats, Ints
from saapindex.backends.paged import Chosen, Code, Near, PagedLists, Pages, Reading, Scaling, Slots, widened

__all__ = ["AttentionOps"]


class AttentionOps(ABC):
    """The part of a backend that attends; see `saapindex.backends.paged` for what it reads."""

    def announce_step(self) -> None:  # noqa: B027, most backends have nothing to do
        """Say that a step will be called in a moment: threads that help may wake up meanwhile."""

    def as_floats(self, x: NDArray[Any]) -> tuple[Floats, bool]:
        """Return stored elements (bfloat16 as its bits) as float32, and whether all are finite."""
        floats = np.array(widened(x), np.float32)
        return floats, bool(np.isfinite(floats).all())

    @abstractmethod
    def encode(self, residuals: Floats, code: Code) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Code keys relative to their anchors.

        With ``y = r @ forward``, a field is ``clip(round(y / |y| / step + hi), 0, 2 hi)`` for
        ``hi = (2^b - 1) / 2``; local dimension ``4 s + c`` of a word with fields of `b` bits is
        ``(word >> (8 c + b s)) & (2^b - 1)``. With ``level = (field - hi) step``, the scale
        ``f = y . level / level . level`` is stored as the byte ``round(16 log2(f / base)) + 128``.

        Parameters
        ----------
        residuals
            (H, n, d).
        code
            Of `H` heads.

        Returns
        -------
        words : (H, n, W) uint32
        exponents : (H, n) uint8
        """

    @abstractmethod
    def rank_lists(
        self, queries: Floats, lists: PagedLists, code: Code, scaling: Scaling
    ) -> tuple[Floats, Floats]:
        """Estimate the logits of each list.

        A list counts for each of its keys as ``scale * q . anchor + min(scale^2 / 2 * spread * sum u^2 lam,
        3)``, capped as logits are: the second term is the second order of the mean of exp.

        Parameters
        ----------
        queries
            (S, t, g, d).

        Returns
        -------
        logits : (S, t, g, L), minus infinity for an empty list
        norms : (S, t, g), log of the estimated sum of ``exp(logit)`` over all keys in lists
        """

    @abstractmethod
    def select_lists(self, logits: Floats, norms: Floats, sizes: Ints, reading: Reading) -> Ints:
        """Choose what to visit: lists in order of rank.

        A list's rank is ``logsumexp_h(logit_h - norm_h)`` (`policy` ``"sum"``) or the maximum over `h`
        (``"max"``), plus the log of its size if `by_mass`. Equal ranks: the lower list first. Without
        `nprobe` and `top_p`, whole lists are visited while they fit into ``reading.scan``; without
        `refine`, the list that crosses it is visited in part. ``"union"`` does so for each head with an
        equal part of ``scan`` and joins what they visit.

        Parameters
        ----------
        logits, norms
            What `rank_lists` returns.
        sizes
            (S, L) int64.

        Returns
        -------
        ndarray
            (S, t, L) int64, keys of each list to visit, from its beginning.
        """

    @abstractmethod
    def scan_codes(
        self, queries: Floats, taken: Ints, lists: PagedLists, pages: Pages, code: Code, scaling: Scaling
    ) -> tuple[Floats, Ints, Ints]:
        """Estimate the logits of the keys that are visited, from their codes.

        With ``a = u * step * scale`` rounded to int8 by one factor `s` a query, ``s = max|a| / 127``, an
        estimate is ``scale * q . anchor + s * f * sum a8 (field - hi) + min(scale^2 / 2 * f^2 * sum u^2
        distortion, 3)``, capped as logits are. The integer sum is exact.

        Parameters
        ----------
        queries
            (S, t, g, d).
        taken
            (S, t, L), what `select_lists` returns.

        Returns
        -------
        estimates : (S, t, g, N), `N` the most that are visited; minus infinity beyond
        rows : (S, t, N) int64, list by list, -1 beyond
        labels : (S, t, N) int64, the list of each, -1 beyond
        """

    @abstractmethod
    def select_keys(
        self, estimates: Floats, norms: Floats, ids: Ints, limits: Ints, policy: str
    ) -> NDArray[np.bool_]:
        """Choose which of the visited keys to fetch: those of the largest weight.

        A key's weight is ``logsumexp_h(estimate_h - norm_h)`` (``"sum"``) or the maximum over `h`
        (``"max"``); of equal ones the lower id is kept. ``"union"``: each head keeps ``limit // g`` by its
        own estimates.

        Parameters
        ----------
        estimates, norms
            (S, t, g, N) and (S, t, g); minus infinity is never kept.
        ids
            (S, t, N) int64.
        limits
            (S, t) int64.

        Returns
        -------
        ndarray
            (S, t, N) bool.
        """

    @abstractmethod
    def attend_rows(
        self, queries: Floats, rows: Ints, pages: Pages, scaling: Scaling
    ) -> tuple[Floats, Floats, Floats]:
        """Attend exactly to the keys at `rows`.

        Parameters
        ----------
        queries
            (S, t, g, d).
        rows
            (S, t, K) int64; -1 is passed over.

        Returns
        -------
        out : (S, t, g, d), zero where there is no key
        lse : (S, t, g), log of the sum of ``exp(logit)``; minus infinity where there is no key
        peaks : (S, t, g), the largest logit; minus infinity where there is no key
        """

    @abstractmethod
    def estimate_rest(
        self,
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
        """Attend to what was not fetched: every key by its estimate, with the value that is expected of it.

        No estimate counts for more than its bound: on loose lists they would blow up. So a list has the
        weight ``W_j = rest_j * exp(min(logit_j, bound))`` and a visited key ``w_i = exp(min(estimate_i,
        bound))``.

        The expected value of a key is the mean of its list plus ``y @ slopes``. Of a visited key, `y` is what
        its code holds, ``f * (field - hi) * step``, plus ``scale * min(f^2, 3 / a) * distortion * u`` with
        ``a = scale^2 / 2 * sum u^2 distortion``: among the keys of one code, those on the side of the query
        weigh more. Of a list, it is ``scale * min(spread_j, 3 / b) * lam * u`` with ``b = scale^2 / 2 * sum
        u^2 lam`` alike. Both are the derivatives of the second-order terms of the estimates, and capped where
        these are (caps of logits are left out). Only three sums are needed, ``sum w_i f_i (field_i - hi)``,
        ``sum w_i min(f_i^2, 3 / a)`` and ``sum W_j min(spread_j, 3 / b)``, and one product with `slopes`.

        Parameters
        ----------
        queries
            (S, t, g, d).
        logits
            (S, t, g, L), for each of the `rest` keys of a list.
        rest
            (S, t, L) int64, keys of each list that were not visited.
        estimates, rows, labels
            (S, t, g, N), (S, t, N) and (S, t, N), of keys that were visited and not kept; estimates of minus
            infinity for the others, and rows and labels of -1 beyond.
        bounds
            (S, t, g), the largest logit that was computed exactly; infinity for no bound.

        Returns
        -------
        out : (S, t, g, d)
        lse : (S, t, g)
        """

    @abstractmethod
    def merge(self, outs: Floats, lses: Floats) -> tuple[Floats, Floats]:
        """Join attention over parts of the keys.

        Parameters
        ----------
        outs
            (parts, ..., d).
        lses
            (parts, ...); minus infinity for a part without keys.

        Returns
        -------
        out : (..., d), zero where no part has keys
        lse : (...)
        """

    @abstractmethod
    def attend_all(
        self, queries: Floats, positions: Ints, near: Near, lists: PagedLists, pages: Pages, scaling: Scaling
    ) -> tuple[Floats, Floats]:
        """Attend exactly to every key at or before the position of its query.

        Parameters
        ----------
        queries
            (S, t, g, d).
        positions
            (S, t) int64.

        Returns
        -------
        out : (S, t, g, d)
        lse : (S, t, g)
        """

    def attend_lists(
        self,
        queries: Floats,
        positions: Ints,
        near: Near,
        lists: PagedLists,
        pages: Pages,
        code: Code,
        scaling: Scaling,
        reading: Reading,
    ) -> tuple[Floats, Floats]:
        """Attend to the near keys exactly and to the lists sparsely: all of the operations above in their
        order.

        Rank lists, visit some, keep the best keys, attend exactly to near and kept ones, let the rest count
        by estimates that are bounded by the largest exact logit, merge.

        Parameters
        ----------
        queries
            (S, t, g, d).
        positions
            (S, t) int64; near keys beyond are not seen. Keys in lists are all seen.

        Returns
        -------
        out : (S, t, g, d)
        lse : (S, t, g)
        """
        chosen = self.choose_rows(queries, lists, pages, code, scaling, reading)
        exact = np.concatenate([near.all_rows(positions), chosen.rows], axis=-1)
        return self.attend_chosen(queries, exact, pages, chosen, lists, pages, code, scaling, reading)

    def attend_slots(
        self,
        queries: Floats,
        positions: Ints,
        near: Near,
        lists: PagedLists,
        pages: Pages,
        slots: Slots,
        code: Code,
        scaling: Scaling,
        reading: Reading | None,
    ) -> tuple[Floats, Floats]:
        """Do what `attend_lists` does, or without `reading` what `attend_all` does, where another runtime
        keeps keys and values: `pages` hold positions and codes, and near pages are not looked at.
        """
        ids = near.all_ids(positions)
        if reading is None:
            rows = lists.all_rows(np.repeat(lists.sizes[:, None], positions.shape[1], axis=1))
            stands = _ids(rows, pages)
            ids = np.concatenate([ids, np.where(stands <= positions[..., None], stands, -1)], axis=-1)
            out, lse, _ = self.attend_rows(queries, slots.rows(ids), slots.pages, scaling)
            return out, lse
        chosen = self.choose_rows(queries, lists, pages, code, scaling, reading)
        exact = slots.rows(np.concatenate([ids, _ids(chosen.rows, pages)], axis=-1))
        return self.attend_chosen(queries, exact, slots.pages, chosen, lists, pages, code, scaling, reading)

    def choose_rows(
        self,
        queries: Floats,
        lists: PagedLists,
        pages: Pages,
        code: Code,
        scaling: Scaling,
        reading: Reading,
    ) -> Chosen:
        """Rank lists, visit some, and keep the best keys: what `attend_lists` does before it fetches."""
        logits, norms = self.rank_lists(queries, lists, code, scaling)
        taken = self.select_lists(logits, norms, lists.sizes, reading)
        if reading.refine:
            estimates, rows, labels = self.scan_codes(queries, taken, lists, pages, code, scaling)
            limits = reading.keep(taken.sum(axis=-1))
            kept = self.select_keys(estimates, norms, _ids(rows, pages), limits, reading.policy)
            fetched = np.where(kept, rows, -1)
            estimates = np.where(kept[:, :, None], -np.inf, estimates).astype(queries.dtype)
        else:
            fetched = lists.all_rows(taken)
            rows = labels = np.empty((*taken.shape[:2], 0), np.int64)
            estimates = np.empty((*queries.shape[:3], 0), queries.dtype)
        return Chosen(fetched, logits, taken, estimates, rows, labels)

    def attend_chosen(
        self,
        queries: Floats,
        rows: Ints,
        keys: Pages,
        chosen: Chosen,
        lists: PagedLists,
        pages: Pages,
        code: Code,
        scaling: Scaling,
        reading: Reading,
    ) -> tuple[Floats, Floats]:
        """Attend exactly to the keys at `rows` of `keys`, and let what was not chosen count by estimates.

        The rows, (S, t, K), are of the chosen and the near keys, perhaps in other pages than those of the
        lists.
        """
        out, lse, peaks = self.attend_rows(queries, rows, keys, scaling)
        if not reading.remainder:
            return out, lse
        bounds = np.where(peaks > -np.inf, peaks, np.inf).astype(queries.dtype)
        rest = lists.sizes[:, None] - chosen.taken
        other, other_lse = self.estimate_rest(
            queries,
            chosen.logits,
            rest,
            chosen.estimates,
            chosen.visited,
            chosen.labels,
            bounds,
            lists,
            pages,
            code,
            scaling,
        )
        return self.merge(np.stack([out, other]), np.stack([lse, other_lse]))


def _ids(rows: Ints, pages: Pages) -> Ints:
    """Return the positions of the keys at `rows`; -1 stays."""
    ids = np.full(rows.shape, -1, np.int64)
    ids[rows >= 0] = pages.take("ids", rows[rows >= 0])
    return ids
