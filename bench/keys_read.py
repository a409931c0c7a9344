"""What bounds the speed-up over Faiss's IVFFlat: the keys that each must read for a recall, without a clock.

An inverted file spends its time on the centroids and on the keys of the lists it visits. So the ratio of keys
read, at one number of lists, is the speed-up that the partition and the router can give; what is
beyond it comes from the code alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pareto import least
from pareto_data import Dataset
from pareto_methods import Built, make_ivf, make_saap

TARGETS = (0.9, 0.99)


def _reads(built: Built, data: Dataset, k: int) -> list[float | None]:
    """Keys read a query at each target, None where it is not reached."""
    found = least(built, data.queries, data.truth(k), TARGETS)
    reads = []
    for target in TARGETS:
        value = next((value for value, reached in found.items() if reached >= target), None)
        reads.append(None if value is None else built.read(data.queries, k, value))
    return reads


def measure(data: Dataset, nlists: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the keys that ours and the better of Faiss's two partitions read, for k of 10 and 100."""
    rows = []
    for nlist in nlists:
        ours = make_saap(data, storage="Flat", nlist=nlist)
        peers = [make_ivf(data, storage="Flat", nlist=nlist, plain=plain) for plain in (False, True)]
        for k in (10, 100):
            mine, theirs = _reads(ours, data, k), [_reads(peer, data, k) for peer in peers]
            for i, target in enumerate(TARGETS):
                known = [reads[i] for reads in theirs if reads[i] is not None]
                best = min((read for read in known if read is not None), default=None)
                rows.append(
                    {
                        "data": data.name,
                        "kind": data.kind,
                        "keys": len(data.keys),
                        "lists": nlist,
                        "k": k,
                        "recall": target,
                        "saapindex": mine[i],
                        "Faiss IVFFlat": best,
                    }
                )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over data sets of one kind, and the ratio."""
    out = []
    for kind, nlist, k, target in dict.fromkeys((r["kind"], r["lists"], r["k"], r["recall"]) for r in rows):
        alike = [r for r in rows if (r["kind"], r["lists"], r["k"], r["recall"]) == (kind, nlist, k, target)]
        known = [r for r in alike if r["saapindex"] is not None and r["Faiss IVFFlat"] is not None]
        pairs = np.array([[r["saapindex"], r["Faiss IVFFlat"]] for r in known], float)
        ours, theirs = np.exp(np.log(pairs).mean(axis=0)) if known else (np.nan, np.nan)
        ratios = pairs[:, 1] / pairs[:, 0] if known else np.array([np.nan])
        out.append(
            {
                "kind": kind,
                "lists": nlist,
                "k": k,
                "recall": target,
                "data sets": f"{len(known)} of {len(alike)}",
                "saapindex": float(ours),
                "Faiss IVFFlat": float(theirs),
                "times fewer": float(theirs / ours),
                "least": float(ratios.min()),
                "most": float(ratios.max()),
            }
        )
    return out
