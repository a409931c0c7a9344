"""The inverted lists of one sequence: their pages, and the statistics that attention reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.layer import LayerCodebook
from saapindex.backends.base import LANES, Ints, Ops
from saapindex.backends.paged import widened
from saapindex.backends.reference.codes import scales
from saapindex.codes import quantise_rows
from saapindex.codes.slopes import SLOPE_KEYS, fit_slopes
from saapindex.lists.paged import PagePool, PageSet
from saapindex.lists.ragged import ranges

__all__ = ["Table"]

# Fewer entering keys a list than this say too little about a context to move its centroids by.
ADAPT_FROM = 16


@dataclass(frozen=True, eq=False)
class Table:
    """Lists of all `H` KV heads of a sequence; a value, so a change makes a new one.

    The keys of a list stand in the order of their positions. Lists are numbered through: list `j` of head
    `h` is ``h * nlist + j``, and ``J = H * nlist``.

    Attributes
    ----------
    held
        int32 pages, list by list; those of a list are all full but the last.
    sizes, coded
        int64, (J,): keys in each list, and how many there were when its anchor was last set.
    anchors, anchor_scales
        int8 (J, d) and float32 (J,): the mean key at that time, which codes are relative to.
    sums, means, mean_scales
        float32 (J, d), int8 (J, d), float32 (J,): of the values in the list.
    squares
        float32, (J,): sum of the squared scales of the codes.
    slopes
        float32, (H, R, d): what the codes of keys say of their values, see `fit_slopes`.
    fitted
        Keys of each head when the slopes were last fitted.
    centroids
        float32, (H, nlist, d): of this context; None where the offline ones are used.
    """

    held: PageSet
    sizes: Ints
    coded: Ints
    anchors: NDArray[np.int8]
    anchor_scales: NDArray[np.float32]
    sums: NDArray[np.float32]
    means: NDArray[np.int8]
    mean_scales: NDArray[np.float32]
    squares: NDArray[np.float32]
    slopes: NDArray[np.float32]
    fitted: int
    centroids: NDArray[np.float32] | None

    @classmethod
    def empty(cls, codebook: LayerCodebook, pool: PagePool) -> Table:
        """Return lists without keys."""
        count, d = codebook.heads * codebook.nlist, codebook.d
        floats, whole = np.zeros(count, np.float32), np.zeros(count, np.int64)
        rows, codes = np.zeros((count, d), np.float32), np.zeros((count, d), np.int8)
        slopes = np.zeros((codebook.heads, codebook.code.step.shape[1], d), np.float32)
        return cls(
            held=pool.allocate((0,)),
            sizes=whole,
            coded=whole,
            anchors=codes,
            anchor_scales=floats,
            sums=rows,
            means=codes,
            mean_scales=floats,
            squares=floats,
            slopes=slopes,
            fitted=0,
            centroids=None,
        )

    @property
    def page_counts(self) -> Ints:
        """Pages of each list, (J,)."""
        return -(-self.sizes // LANES)

    @property
    def starts(self) -> Ints:
        """Place of the first page of each list in `held`, (J,)."""
        counts = self.page_counts
        return np.cumsum(counts) - counts

    @property
    def nbytes(self) -> int:
        """Bytes of statistics and tables."""
        parts = (getattr(self, name) for name in self.__dataclass_fields__)
        arrays = (part for part in parts if isinstance(part, np.ndarray))
        return int(self.held.pages.nbytes + sum(array.nbytes for array in arrays))

    def rows(self, first: Ints, last: Ints) -> Ints:
        """Return the rows of keys ``first[j] : last[j]`` of each list, list by list."""
        place = ranges(first, last - first)
        lists = np.repeat(self.starts, last - first)
        rows: Ints = self.held.pages[lists + place // LANES].astype(np.int64) * LANES + place % LANES
        return rows

    def count_before(self, pool: PagePool, position: int) -> Ints:
        """Return how many keys of each list stand before `position`, (J,)."""
        ids = pool.pages.take("ids", self.rows(np.zeros_like(self.sizes), self.sizes))
        lists = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return np.bincount(lists[ids < position], minlength=len(self.sizes)).astype(np.int64)

    def between(self, pool: PagePool, first: int, last: int, heads: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return keys and values at positions ``first : last``, (H, n, d) each, all in the lists."""
        rows = self.rows(self.count_before(pool, first), self.count_before(pool, last))
        # Each head has every position once, so sorting by position within a head makes them a rectangle.
        ids = pool.pages.take("ids", rows).reshape(heads, last - first)
        rows = np.take_along_axis(rows.reshape(heads, -1), np.argsort(ids, axis=1), axis=1)
        owners = np.repeat(np.arange(heads), last - first)
        keys, values = (pool.vectors(field, rows.reshape(-1), owners) for field in ("keys", "values"))
        return keys.reshape(*rows.shape, keys.shape[1]), values.reshape(*rows.shape, values.shape[1])

    def before(self, codebook: LayerCodebook, pool: PagePool, position: int, *, ops: Ops) -> Table:
        """Return the lists without keys at `position` and beyond."""
        sizes = self.count_before(pool, position)
        if not sizes.any():
            return Table.empty(codebook, pool)
        counts, old = -(-sizes // LANES), self.starts
        kept = replace(
            self,
            held=PageSet(pool, self.held.pages[ranges(old, counts)]),
            sizes=sizes,
            coded=np.minimum(self.coded, sizes),
        )
        changed = sizes < self.sizes
        rows = kept.rows(np.zeros_like(sizes), np.where(changed, sizes, 0))
        lists = np.repeat(np.arange(len(sizes)), np.where(changed, sizes, 0))
        values = pool.vectors("values", rows, lists // codebook.nlist)
        sums, _ = ops.accumulate(widened(values), lists, len(sizes))
        squares = _squares(codebook, lists, pool.pages.take("exponents", rows))
        return replace(
            kept,
            sums=np.where(changed[:, None], sums, self.sums).astype(np.float32),
            squares=np.where(changed, squares, self.squares),
        )._with_means(changed)

    def _with_means(self, changed: NDArray[np.bool_]) -> Table:
        means, mean_scales = self.means.copy(), self.mean_scales.copy()
        exact = self.sums[changed] / np.maximum(self.sizes[changed], 1)[:, None]
        means[changed], mean_scales[changed] = quantise_rows(exact)
        return replace(self, means=means, mean_scales=mean_scales)

    def entered(
        self,
        codebook: LayerCodebook,
        pool: PagePool,
        keys: NDArray[Any],
        values: NDArray[Any],
        first: int,
        *,
        adapt: int,
        ops: Ops,
    ) -> Table:
        """Return the lists with the keys and values, (H, m, d), of positions from `first` up.

        A list whose size has doubled since its anchor was set gets a new one, and new codes in new pages.
        If the lists are empty, `adapt` Lloyd steps fit the centroids to the entering keys. When the keys have
        doubled since the slopes were fitted, they are fitted again.
        """
        heads, m, d = keys.shape
        nlist, total = codebook.nlist, len(self.sizes)
        positions = np.arange(first, first + m)
        seen = codebook.view(widened(keys), positions, ops)
        centroids = self.centroids
        if adapt and m >= ADAPT_FROM * nlist and not self.sizes.any():
            centroids = codebook.adapt(seen, adapt, ops)
        labels = codebook.assign(seen, centroids, ops) + nlist * np.arange(heads)[:, None]
        flat = labels.reshape(-1)
        counts = np.bincount(flat, minlength=total)
        sizes = self.sizes + counts
        refreshed = (counts > 0) & (sizes >= 2 * self.coded)
        stay = self._staying(pool, counts > 0, refreshed)

        # All that must be written: old keys that move, then new ones; by list, in order of position.
        moving = self.sizes - stay
        source = self.rows(stay, self.sizes)
        lists = np.concatenate([np.repeat(np.arange(total), moving), flat])
        order = np.argsort(lists, kind="stable")
        lists, entering = lists[order], order >= len(source)
        new = {"keys": keys.reshape(-1, d), "values": values.reshape(-1, d), "ids": np.tile(positions, heads)}
        owners = np.repeat(np.arange(total) // nlist, moving)
        old = {name: pool.vectors(name, source, owners) for name in ("keys", "values")}
        old["ids"] = pool.pages.take("ids", source)
        written = {name: np.concatenate([old[name], part])[order] for name, part in new.items()}
        exact = widened(written["keys"])
        anchors, anchor_scales = self.anchors.copy(), self.anchor_scales.copy()
        key_sums, written_counts = ops.accumulate(exact, lists, total)
        mean = key_sums[refreshed] / written_counts[refreshed, None]
        anchors[refreshed], anchor_scales[refreshed] = quantise_rows(mean)
        residuals = exact - anchors[lists] * anchor_scales[lists, None]
        ends = np.searchsorted(lists, nlist * np.arange(1, heads))
        coded = [
            ops.encode(part[None], codebook.code.view.head(h))
            for h, part in enumerate(np.split(residuals, ends))
        ]
        words, exponents = (np.concatenate([part[i][0] for part in coded]) for i in range(2))

        grown = self._with_room(pool, stay, sizes)
        pool.write(grown.rows(stay, sizes), **written, words=words, exponents=exponents)
        fresh = entering | refreshed[lists]
        squares = _squares(codebook, lists[fresh], exponents[fresh])
        value_sums, _ = ops.accumulate(widened(written["values"])[entering], lists[entering], total)
        return (
            replace(
                grown,
                coded=np.where(refreshed, sizes, self.coded),
                anchors=anchors,
                anchor_scales=anchor_scales,
                sums=(self.sums + value_sums).astype(np.float32),
                squares=np.where(refreshed, 0, self.squares).astype(np.float32) + squares,
                centroids=centroids,
            )
            ._with_means(counts > 0)
            .with_slopes(codebook, pool)
        )

    def with_slopes(self, codebook: LayerCodebook, pool: PagePool) -> Table:
        """Return the lists with slopes fitted to their keys, if these have doubled since the last time."""
        heads, nlist = codebook.heads, codebook.nlist
        count = int(self.sizes.sum()) // heads
        if count < 2 * self.fitted or not count:
            return self
        step = max(1, count // SLOPE_KEYS)
        slopes = np.empty_like(self.slopes)
        for h in range(heads):
            own = np.arange(len(self.sizes)) // nlist == h
            ends = np.where(own, self.sizes, 0)
            rows, lists = self.rows(np.zeros_like(ends), ends), np.repeat(np.arange(len(ends)), ends)
            chosen = pool.pages.take("ids", rows) % step == 0
            rows, lists = rows[chosen], lists[chosen]
            words, exponents = (pool.pages.take(field, rows) for field in ("codes", "exponents"))
            values = pool.vectors("values", rows, np.full(len(rows), h))
            y = codebook.code.head(h).decode(words[None], exponents[None])[0]
            means = self.means[lists] * self.mean_scales[lists, None]
            used = int(codebook.code.coded[h])
            slopes[h, used:] = 0
            slopes[h, :used] = fit_slopes(y[:, :used], widened(values) - means)
        return replace(self, slopes=slopes, fitted=count)

    def _staying(self, pool: PagePool, touched: NDArray[np.bool_], refreshed: NDArray[np.bool_]) -> Ints:
        """Return how many keys of each list stay where they are.

        None of a list that is coded anew; and the last page of a touched list moves if another has filled
        it further.
        """
        stay, lane = self.sizes.copy(), self.sizes % LANES
        open_ = np.flatnonzero(touched & (lane > 0))
        pages = self.held.pages[self.starts[open_] + self.sizes[open_] // LANES]
        taken = open_[pool.filled[pages] != lane[open_]]
        stay[taken] -= lane[taken]
        stay[refreshed] = 0
        return stay

    def _with_room(self, pool: PagePool, stay: Ints, sizes: Ints) -> Table:
        """Return lists with room for `sizes` keys, of which `stay` are in the pages they were in."""
        old, new = -(-stay // LANES), -(-sizes // LANES)
        fresh = pool.allocate((int((new - old).sum()),))
        pages = np.empty(int(new.sum()), np.int32)
        starts = np.cumsum(new) - new
        pages[ranges(starts, old)] = self.held.pages[ranges(self.starts, old)]
        pages[ranges(starts + old, new - old)] = fresh.pages
        return replace(self, held=PageSet(pool, pages), sizes=sizes)


def _squares(codebook: LayerCodebook, lists: Ints, exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Sum of the squared scales of the codes in each list, float32 (J,)."""
    base = codebook.code.base[lists // codebook.nlist]
    total = codebook.heads * codebook.nlist
    return np.bincount(lists, scales(exponents, base) ** 2, total).astype(np.float32)
