"""What codes cost in recall and save in bytes, on the attention trace that the package ships.

::

    python bench/codes.py      # half a minute; results in bench/results/codes.json

Trained on one document, searched on another; a budget of keys is scanned, and where keys are stored beside
their codes, `k_factor` candidates a result are scored exactly. Every byte is counted: see `SearchStatistics`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import saapindex as sx
from saapindex.learn import Trace, read_trace
from saapindex.learn.curves import recall

RESULTS = Path(__file__).parent / "results"
DATA = Path(sx.__file__).parent / "data"
NLIST, K = 256, 10
BUDGETS = (0.05, 0.2, 1.0)
STORAGE = ("Flat", "SQfp16", "Bits4", "Bits2", "Bits1", "Bits4,RFlat", "Bits2,RFlat", "Bits1,RFlat")
FACTORS = (1, 2, 4, 8, 16)


def measure(storage: str, train: Trace, test: Trace) -> list[dict[str, Any]]:
    """Return recall and bytes of one way to store keys, at each budget and factor."""
    queries, at = train.head_queries(0)
    params = sx.IndexParameters(max_position=int(test.query_positions.max()) + 1)
    keys = train.keys[0].astype(np.float32)
    index = sx.index_factory(keys.shape[1], f"SAAP{NLIST},{storage}", rope=train.rope, params=params)
    index.train(keys, xq_train=queries, positions=train.key_positions, positions_xq=at)
    searched = test.keys[0].astype(np.float32)
    index.add(searched)
    asked, places = test.head_queries(0)
    truth = np.argsort(-(asked @ searched.T), axis=1, kind="stable")[:, :K]
    rows = []
    for budget in BUDGETS:
        for factor in FACTORS if index.params.refine else (None,):
            stats = sx.SearchStatistics()
            search = sx.SearchParameters(budget=budget, k_factor=factor)
            _, ids = index.search(asked, K, params=search, positions=places, stats=stats)
            rows.append(
                {
                    "index": index.factory_string,
                    "budget": budget,
                    "k_factor": factor,
                    "recall@10": round(float(recall(ids, truth)), 4),
                    "bytes a query": round(stats.nbytes / stats.nq),
                    "bytes held a key": round(index.nbytes / index.ntotal, 1),
                }
            )
    return rows


def main() -> None:
    """Measure, print and write down."""
    train, test = (read_trace(DATA / f"{name}.safetensors") for name in ("train", "test"))
    rows = [row for storage in track(STORAGE) for row in measure(storage, train, test)]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    result = {"keys": int(test.keys.shape[1]), "queries": len(test.head_queries(0)[0]), "rows": rows}
    (RESULTS / "codes.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
