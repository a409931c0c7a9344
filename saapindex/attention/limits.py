"""Budgets in bytes: how many codes and keys a step of attention may read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.shares import MOST_SEEN, HeadShares
from saapindex.backends.base import Ints
from saapindex.backends.paged import Reading
from saapindex.codes import TransformCode
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

__all__ = ["check_by_head", "reading", "takes_slopes"]

LIST_EXTRA = 8
"""Bytes of a list besides its anchor and mean value in int8: their scales, its size and its spread."""
MATRIX_EXTRA = 4
"""Bytes of a coded dimension besides its row of int8 in each of the matrices that take queries into the space
of the codes, and codes to values: its scale."""
SLOPES_MOST = 0.1
"""Share of the bytes that the matrix from codes to values may take: where it takes more, in short contexts at
small budgets, it costs more lookups than it is worth."""


def takes_slopes(
    params: AttendParameters, long: Ints, code: TransformCode, element: int
) -> NDArray[np.bool_]:
    """Return in which streams, (S,), keys that are not fetched take the values that their codes let expect.

    Examples
    --------
    >>> from saapindex.codes import fit_codes
    >>> code = fit_codes(np.random.default_rng(0).standard_normal((1, 200, 64)), np.eye(64)[None], words=3)
    >>> takes_slopes(AttendParameters(budget=0.02), np.array([6_000, 14_000]), code, element=2).tolist()
    [False, True]
    """
    if params.slopes is not None or params.budget is None:
        return np.full(len(long), params.slopes is not False)
    matrix = (code.d + MATRIX_EXTRA) * np.tile(code.coded, len(long) // code.heads)
    enough: NDArray[np.bool_] = matrix <= SLOPES_MOST * params.budget * long * 2 * code.d * element
    return enough


def reading(
    params: AttendParameters,
    long: Ints,
    code: TransformCode,
    nlist: int,
    element: int,
    shares: HeadShares | None = None,
) -> Reading:
    """Return what a step may read in each stream.

    A share of the bytes of the keys in lists and their values: first the statistics of all lists and the
    matrices of the codes, then codes up to `scan_share` of what is left, then keys and values. What is left
    is shared out among heads as the codebook says, if it does.

    Parameters
    ----------
    params
        Budget and ways.
    long
        (S,), keys in the lists of each stream; streams are the KV heads of each sequence.
    code, nlist
        Of the layer.
    element
        Bytes of a stored element.
    shares
        Of the heads, or None for an even split.

    Raises
    ------
    InvalidInputError
        If heads are to have shares of their own, and there are none.

    Examples
    --------
    >>> from saapindex.codes import fit_codes
    >>> code = fit_codes(np.random.default_rng(0).standard_normal((1, 200, 64)), np.eye(64)[None], words=3)
    >>> found = reading(AttendParameters(budget=0.05), np.array([30_000]), code, nlist=128, element=2)
    >>> found.scan.tolist(), found.keep(found.scan[:, None]).tolist()
    ([11011], [[838]])
    """
    d, row = code.d, 2 * code.d * element
    matrices = 1 + (takes_slopes(params, long, code, element) & params.remainder)
    coded = np.tile(code.coded, len(long) // code.heads)
    fixed = nlist * (2 * d + LIST_EXTRA) + matrices * (d + MATRIX_EXTRA) * coded
    left = np.maximum((params.budget or 0.0) * long * row - fixed, 0)
    codes = np.full(len(long), params.scan_share)
    if check_by_head(params, shares) and shares is not None:
        seen = np.minimum(long, MOST_SEEN) * code.nbytes_per_key
        every = (long * row).astype(np.float64)
        left, codes = shares.apply(left, every, seen.astype(np.float64), params.scan_share)
    scan = codes * left / code.nbytes_per_key if params.reads_codes() else left / row
    return Reading(
        scan.astype(np.int64),
        left.astype(np.int64),
        code.nbytes_per_key,
        row,
        nprobe=params.nprobe or 0,
        top_p=params.top_p or 0.0,
        policy=params.policy,
        by_mass=params.ranks_by_mass,
        refine=params.reads_codes(),
        remainder=params.remainder,
    )


def check_by_head(params: AttendParameters, shares: HeadShares | None) -> bool:
    """Return whether heads have shares of their own; refuse parameters that ask for what is not there."""
    if params.by_head and shares is None:
        raise InvalidInputError(
            "by_head is True, but the codebook says nothing of heads: expected None or False, or a codebook "
            "that was trained with judge='error'"
        )
    return shares is not None and params.by_head is not False
