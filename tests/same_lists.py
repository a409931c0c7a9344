"""Lists of an index on a device, or of a kernel that is emulated, are those of the host."""

from __future__ import annotations

import numpy as np

from saapindex.backends.reference.codes import scales

STATISTICS = ("sizes", "coded", "anchors", "anchor_scales", "sums", "means", "mean_scales")


def same_lists(one, other):
    """Both batches hold the same keys in the same lists, with the same statistics and nearly all codes.

    Where rounding ties, few fields of codes may differ, and few exponents: by one step, or by what another
    field makes of a scale. The sums of the squared scales then differ by what these exponents say.
    """
    np.testing.assert_array_equal(one.lengths, other.lengths)
    for a, c in zip(one.sequences, other.sequences, strict=True):
        for x, y in zip(a.content(one.keeping), c.content(other.keeping), strict=True):
            np.testing.assert_array_equal(x, y)
        for name in STATISTICS:
            np.testing.assert_array_equal(getattr(a.lists, name), getattr(c.lists, name), name)
        rows = [t.lists.rows(np.zeros_like(t.lists.sizes), t.lists.sizes) for t in (a, c)]
        taken = {
            name: [i.keeping.pool.pages.take(name, r) for i, r in zip((one, other), rows, strict=True)]
            for name in ("ids", "codes", "exponents")
        }
        np.testing.assert_array_equal(*taken["ids"])
        for name in ("codes", "exponents"):
            x, y = taken[name]
            assert not x.size or np.mean(x != y) <= 0.01, name
        x, y = taken["exponents"]
        agree = np.equal(*taken["codes"]).all(axis=1)
        assert np.abs(x.astype(int) - y.astype(int))[agree].max(initial=0) <= 1
        book, lists = one.keeping.codebook, np.repeat(np.arange(len(a.lists.sizes)), a.lists.sizes)
        base = book.code.base[lists // book.nlist]
        change = np.bincount(lists, scales(y, base) ** 2 - scales(x, base) ** 2, len(a.lists.sizes))
        np.testing.assert_allclose(c.lists.squares, a.lists.squares + change, rtol=1e-5, atol=1e-6)
