"""The operations that every backend offers, and their shapes.

Shapes: `n` keys, `q` queries, `d` dimensions, `nlist` lists, `p` probed lists a query, `k` results a
query. The reference computes in the precision of its inputs; the other backends in float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.attention_ops import AttentionOps
from saapindex.backends.common import LANES, Floats, Ints

__all__ = ["LANES", "CodedLists", "FieldCode", "Floats", "Ints", "Lists", "Ops", "QuickSearch", "to_blocks"]


def to_blocks(x: Floats) -> Floats:
    """Arrange rows in blocks: (n, d) to (blocks, d, LANES), zero where there are no more rows.

    Row `r` is ``blocks[r // LANES, :, r % LANES]``.

    Examples
    --------
    >>> to_blocks(np.ones((17, 3))).shape
    (2, 3, 16)
    """
    padded = np.zeros((-(-len(x) // LANES) * LANES, x.shape[1]), x.dtype)
    padded[: len(x)] = x
    return np.ascontiguousarray(padded.reshape(-1, LANES, x.shape[1]).transpose(0, 2, 1))


class Lists(NamedTuple):
    """Inverted lists as the kernels see them: list `j` is rows ``offsets[j] : offsets[j] + sizes[j]``.

    Attributes
    ----------
    vectors
        float32 or float16, (blocks, d, LANES); rows outside every list are undefined.
    ids
        (blocks * LANES,) int64.
    offsets, sizes
        (nlist,) int64; every offset is a multiple of `LANES`.
    allowed
        (blocks,) uint16: bit `i` is set where lane `i` may be read. Other keys are passed over and not
        counted. None where all may be read.
    """

    vectors: Floats
    ids: Ints
    offsets: Ints
    sizes: Ints
    allowed: NDArray[np.uint16] | None = None

    def rows(self, rows: Ints) -> Floats:
        """Return the keys at `rows`, (n, d)."""
        keys: Floats = self.vectors[rows // LANES, :, rows % LANES]
        return keys


QuickSearch: TypeAlias = Callable[[NDArray[np.float32], int, int], tuple[Floats, Ints] | None]
"""What `Ops.prepare` returns."""


class FieldCode(NamedTuple):
    """How the codes of one head are read.

    Attributes
    ----------
    inverse
        (d, R): ``u = q @ inverse``.
    step, half
        (R,): field `r` stands for ``scale * step[r] * (field - half[r])``.
    widths
        (W,) int64, bits of the fields of each word.
    scales
        (256,), the scale of each exponent.
    """

    inverse: Floats
    step: Floats
    half: Floats
    widths: Ints
    scales: Floats


class CodedLists(NamedTuple):
    """Inverted lists of codes: what a key is at is ``anchors[j]`` and a coded residual to it.

    Attributes
    ----------
    words
        (blocks, W, LANES) uint32, the fields of each key's code.
    exponents
        (blocks, 1, LANES) uint8, its scale.
    norms
        (blocks, 1, LANES) float32, squared norm of the residual, for distances; (blocks, 0, LANES) otherwise.
    ids, offsets, sizes, allowed
        As in `Lists`.
    anchors
        (nlist, d).
    turned
        (nlist, R), ``anchors @ inverse``.
    code
        How fields and scales are read.
    """

    words: NDArray[np.uint32]
    exponents: NDArray[np.uint8]
    norms: Floats
    ids: Ints
    offsets: Ints
    sizes: Ints
    anchors: Floats
    turned: Floats
    code: FieldCode
    allowed: NDArray[np.uint16] | None = None


class Ops(AttentionOps):
    """One backend. Every method is a pure function of its arguments."""

    name: str

    @abstractmethod
    def rotate(
        self, x: Floats, positions: Ints, frequencies: Floats, scale: Floats, interleaved: bool
    ) -> Floats:
        """Rotate pair `i` of each row by the angle ``position * frequencies[i]``, times ``scale[i]``.

        Parameters
        ----------
        x
            (n, d); ``2 * len(frequencies) <= d`` and the dimensions beyond are copied.
        positions
            (n,) int64; may be negative.
        frequencies
            (pairs,) float64, radians per position. A negative frequency undoes a rotation; a zero
            one leaves its pair where it is.
        scale
            (pairs,) float64, factor on each rotated pair (1 for plain RoPE).
        interleaved
            Whether pair `i` is dimensions ``(2i, 2i + 1)``; otherwise ``(i, i + pairs)``.

        Returns
        -------
        ndarray
            (n, d), new, in the dtype of `x`. Angles are formed in float64.
        """

    @abstractmethod
    def assign(self, x: Floats, centroids: Floats, bias: Floats) -> tuple[Ints, Floats]:
        """Find for each row the centroid of the largest ``x . c_j + bias[j]``.

        With ``bias = -|c|^2 / 2`` that is the nearest centroid; with zero, the largest inner
        product. Of equal scores the lowest `j` wins.

        Parameters
        ----------
        x
            (n, d).
        centroids, bias
            (nlist, d) and (nlist,); at least one.

        Returns
        -------
        labels : (n,) int64
        scores : (n,)
        """

    @abstractmethod
    def accumulate(self, x: Floats, labels: Ints, nlist: int) -> tuple[NDArray[np.float64], Ints]:
        """Sum the rows of each label.

        Returns
        -------
        sums : (nlist, d) float64
        counts : (nlist,) int64
        """

    @abstractmethod
    def route(self, features: Floats, table: Floats, bias: Floats, p: int) -> tuple[Ints, Floats]:
        """Take the `p` best lists of each query by ``features . table_j + bias[j]``, best first.

        Of equal scores the lowest list comes first.

        Parameters
        ----------
        features
            (q, h).
        table
            (blocks, h, LANES): one row a list, in blocks as `to_blocks` makes them.
        bias
            (nlist,); minus infinity for a list that must not be visited.
        p
            1 to nlist.

        Returns
        -------
        lists : (q, p) int64, -1 where no more list may be visited
        scores : (q, p), minus infinity there
        """

    @abstractmethod
    def scan(
        self, queries: Floats, lists: Lists, probes: Ints, limits: Ints, k: int, l2: bool
    ) -> tuple[Floats, Ints]:
        """Score every key of the probed lists and keep the `k` best of each query.

        Parameters
        ----------
        queries
            (q, d).
        lists
            The inverted lists.
        probes
            (q, p) int64, lists to visit in this order; -1 is passed over.
        limits
            (q,) int64, keys to read at most for each query; the list that crosses it is read in part.
        k
            At least 1.
        l2
            Squared Euclidean distance, smallest first, instead of the inner product, largest first.

        Returns
        -------
        scores : (q, k), best first; minus infinity (infinity for L2) where there are fewer keys
        ids : (q, k) int64; -1 there. Of equal scores the lowest id comes first.
        """

    def search(
        self,
        features: Floats,
        queries: Floats,
        table: Floats,
        bias: Floats,
        p: int,
        lists: Lists,
        k: int,
        l2: bool,
    ) -> tuple[Floats, Ints]:
        """Route to `p` lists and scan them whole: `route`, then `scan`, which see for shapes."""
        probes, _ = self.route(features, table, bias, p)
        limits = np.full(len(queries), len(lists.ids), np.int64)
        return self.scan(queries, lists, probes, limits, k, l2)

    def prepare(self, table: Floats, bias: Floats, lists: Lists, l2: bool) -> QuickSearch | None:
        """Return `search` for a few queries at a time, which are their own features; None if there is none.

        What it returns takes queries (q, d), float32 and C-contiguous, `p` and `k`, and answers as `search`;
        it answers None, having done nothing, if queries are not finite. It holds on to the arrays.
        """
        return None

    @abstractmethod
    def range_scan(
        self, queries: Floats, lists: Lists, probes: Ints, limits: Ints, radius: float, l2: bool
    ) -> tuple[Ints, Floats, Ints]:
        """Collect every key of the probed lists that is better than `radius` (strictly).

        Returns
        -------
        lims : (q + 1,) int64, results of query `i` are ``lims[i] : lims[i + 1]``
        scores : (lims[-1],), in the order of the scan
        ids : (lims[-1],) int64
        """

    @abstractmethod
    def scan_coded(
        self,
        queries: Floats,
        lists: CodedLists,
        probes: Ints,
        limits: Ints,
        k: int,
        l2: bool,
        as_rows: bool,
    ) -> tuple[Floats, Ints]:
        """Estimate the score of every key of the probed lists from its code and keep the `k` best.

        With ``a = u * step``, ``u = q @ inverse`` (of the query's residual to the anchor for L2), rounded to
        8 bits as ``a8 = round(a / factor)``, ``factor = max|a| / 127``, the estimate of ``q . residual`` is
        ``e = factor * scale * sum a8 (field - half)``. An inner product is ``q . anchor + e``, a
        distance ``|q - anchor|^2 - 2 e + norm``.

        Parameters
        ----------
        queries
            (q, d).
        lists
            The coded lists.
        probes, limits, k, l2
            As in `scan`.
        as_rows
            Return rows in the place of ids; of equal scores the lowest row comes first.

        Returns
        -------
        scores : (q, k), best first; minus infinity (infinity for L2) where there are fewer keys
        ids : (q, k) int64; -1 there
        """

    @abstractmethod
    def range_scan_coded(
        self, queries: Floats, lists: CodedLists, probes: Ints, limits: Ints, radius: float, l2: bool
    ) -> tuple[Ints, Floats, Ints]:
        """Collect every key whose estimate is better than `radius` (strictly): see `range_scan`."""

    @abstractmethod
    def rescore(
        self, queries: Floats, vectors: Floats, ids: Ints, rows: Ints, k: int, l2: bool
    ) -> tuple[Floats, Ints]:
        """Score a few keys of each query exactly, and keep the `k` best.

        Parameters
        ----------
        queries
            (q, d).
        vectors
            float32 or float16, (blocks, LANES, d): row `r` is ``vectors[r // LANES, r % LANES]``.
        ids
            (blocks * LANES,) int64.
        rows
            (q, c) int64, -1 for none.
        k, l2
            As in `scan`.

        Returns
        -------
        scores, ids
            As from `scan`.
        """
