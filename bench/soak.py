"""Many decode steps with everything that a runtime does in between, checked against dense attention.

::

    python bench/soak.py                  # 200,000 steps; results in bench/results/soak.json
    python bench/soak.py --steps 2000

Tokens are decoded one by one; between them tokens are taken back, contexts cut, beams reordered,
conversations forked and taken up again, indexes saved and loaded. On samples, dense attention and ids of
selections must be right; at the end, no page may be left over, and steps may take no longer than at the
beginning.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
import time
import weakref
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from saapindex.attention import AttendParameters, AttentionIndex, LayerCodebook, fit_layer
from saapindex.lists.paged import PagePool
from saapindex.progress import track

RESULTS = Path(__file__).parent / "results"
HEADS, GROUP, D, NLIST = 2, 2, 16, 8
LONGEST, BATCH, FORKS = 900, 3, 2
EXACT = 1e-3
Floats = NDArray[np.float32]
app = typer.Typer(add_completion=False)
console = Console()


@dataclasses.dataclass
class Conversation:
    """An index, and the plain keys and values of its sequences, each (heads, n, d)."""

    index: AttentionIndex
    keys: list[Floats]
    values: list[Floats]

    def fork(self) -> Conversation:
        """Return another that goes on from here."""
        return Conversation(self.index.fork(), list(self.keys), list(self.values))


@dataclasses.dataclass
class Tally:
    """What happened, and the worst that was seen."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    checks: int = 0
    worst: float = 0.0
    most_pages: int = 0

    def count(self, name: str) -> None:
        """Count one event."""
        self.counts[name] = self.counts.get(name, 0) + 1


class Soak:
    """The state of a run."""

    def __init__(self, codebook: LayerCodebook, backend: str, seed: int) -> None:
        self.rng, self.codebook, self.backend = np.random.default_rng(seed), codebook, backend
        index = AttentionIndex(
            codebook,
            batch=BATCH,
            window=40,
            sinks=1,
            flush=32,
            dense_below=150,
            dtype="float32",
            backend=backend,
        )
        empty = [np.empty((HEADS, 0, D), np.float32)] * BATCH
        self.now = Conversation(index, list(empty), list(empty))
        self.kept: list[Conversation] = []
        self.tally = Tally()
        self.pools: weakref.WeakSet[PagePool] = weakref.WeakSet()

    def step(self) -> float:
        """Do one step, and perhaps something else before; return the seconds that add and attend took."""
        self._disturb()
        batch = self.now.index.batch
        m = int(self.rng.integers(2, 60)) if self.rng.random() < 0.01 else 1
        keys, values = clustered(self.rng, batch, m)
        q = self.rng.standard_normal((batch, HEADS * GROUP, D), dtype=np.float32)
        start = time.perf_counter()
        self.now.index.add(keys, values)
        self.now.index.attend(q, budget=0.2)
        took = time.perf_counter() - start
        for b in range(batch):
            self.now.keys[b] = np.concatenate([self.now.keys[b], keys[b]], axis=1)
            self.now.values[b] = np.concatenate([self.now.values[b], values[b]], axis=1)
        return took

    def _disturb(self) -> None:
        chance, longest = self.rng.random(), max(x.shape[1] for x in self.now.keys)
        if longest > LONGEST:
            self._truncate("cut back", [int(self.rng.integers(0, LONGEST)) for _ in self.now.keys])
        elif chance < 0.05:
            back = int(self.rng.integers(1, 9))
            self._truncate("take back", [max(0, x.shape[1] - back) for x in self.now.keys])
        elif chance < 0.055:
            self._truncate("truncate", [int(self.rng.integers(0, x.shape[1] + 1)) for x in self.now.keys])
        elif chance < 0.075:
            order = self.rng.integers(0, len(self.now.keys), BATCH)
            self.now.index.reorder(order)
            self.now.keys = [self.now.keys[i] for i in order]
            self.now.values = [self.now.values[i] for i in order]
            self.tally.count("reorder")
        elif chance < 0.08:
            self.kept = [*self.kept, self.now.fork()][-FORKS:]
            self.tally.count("fork")
        elif chance < 0.085 and self.kept:
            self.kept, self.now = [*self.kept[1:], self.now], self.kept[0]
            self.tally.count("take up")
        elif chance < 0.0855:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "index.safetensors"
                self.now.index.save(path)
                self.now.index = AttentionIndex.load(path, self.codebook, backend=self.backend)
            self.tally.count("save and load")

    def _truncate(self, name: str, lengths: list[int]) -> None:
        kept = [min(n, x.shape[1]) for n, x in zip(lengths, self.now.keys, strict=True)]
        self.now.index.truncate(np.array(lengths))
        self.now.keys = [x[:, :n].copy() for x, n in zip(self.now.keys, kept, strict=True)]
        self.now.values = [x[:, :n].copy() for x, n in zip(self.now.values, kept, strict=True)]
        self.tally.count(name)

    def check(self) -> None:
        """Compare every conversation with dense attention over its plain keys and values."""
        for one in (self.now, *self.kept):
            index = one.index
            if index.lengths.tolist() != [x.shape[1] for x in one.keys]:
                raise SystemExit(f"lengths are {index.lengths}, expected {[x.shape[1] for x in one.keys]}")
            q = self.rng.standard_normal((index.batch, HEADS * GROUP, D), dtype=np.float32)
            everything = [np.ones((HEADS, x.shape[1]), np.bool_) for x in one.keys]
            self._compare(one, q, index.attend(q, budget=1.0), everything)
            params = AttendParameters(budget=0.4, remainder=False)
            selection = index.select(q, params=params)
            mask = selection.bool_mask(int(index.lengths.max()))
            chosen = [mask[b, :, : x.shape[1]] for b, x in enumerate(one.keys)]
            self._compare(one, q, index.attend(q, params=params), chosen)
            pool = index._batch.keeping.pool if index._batch else None
            if pool is not None:
                self.pools.add(pool)
                self.tally.most_pages = max(self.tally.most_pages, pool.used)
            self.tally.checks += 1

    def _compare(
        self, one: Conversation, q: Floats, found: tuple[Floats, Floats], seen: list[NDArray[np.bool_]]
    ) -> None:
        for b, (keys, values) in enumerate(zip(one.keys, one.values, strict=True)):
            known = dense(q[b], keys, values, seen[b], self.codebook.scale)
            error = float(np.abs(found[0][b] - known).max())
            self.tally.worst = max(self.tally.worst, error)
            if not error <= EXACT:
                raise SystemExit(f"wrong attention: off by {error} at lengths {one.index.lengths}")


def clustered(rng: np.random.Generator, batch: int, n: int) -> tuple[Floats, Floats]:
    """Keys around a few centres, and values."""
    centres = np.random.default_rng(0).standard_normal((HEADS, 12, D))
    keys = 2 * centres[np.arange(HEADS)[:, None], rng.integers(12, size=(batch, HEADS, n))]
    keys = keys + rng.standard_normal((batch, HEADS, n, D))
    return keys.astype(np.float32), rng.standard_normal((batch, HEADS, n, D), dtype=np.float32)


def dense(q: Floats, keys: Floats, values: Floats, seen: NDArray[np.bool_], scale: float) -> Floats:
    """Attention of one token in double precision."""
    if not keys.shape[1]:
        return np.zeros_like(q)
    logits = scale * np.einsum("hgd,hnd->hgn", q.reshape(HEADS, -1, D).astype(np.float64), keys)
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    out = np.einsum("hgn,hnd->hgd", weights, values) / weights.sum(axis=2)[..., None]
    result: Floats = out.reshape(-1, D).astype(np.float32)
    return result


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Decode steps.")] = 200_000,
    every: Annotated[int, typer.Option(help="Steps between checks.")] = 100,
    backend: Annotated[str, typer.Option(help="'cpu' or 'reference'.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Run, print what happened and write it down; fail if anything was wrong."""
    keys, _ = clustered(np.random.default_rng(1), 1, 2000)
    queries = np.random.default_rng(2).standard_normal((HEADS * GROUP, 200, D))
    soak = Soak(fit_layer(keys[0], queries, NLIST, words=2), backend, seed)
    times = np.empty(steps, np.float32)
    memory = [0, 0]
    for i in track(range(steps), "decoding"):
        times[i] = soak.step()
        if i % every == every - 1 or i == steps - 1:
            soak.check()
        if i in (steps // 10, steps - 1):
            memory[int(i == steps - 1)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tenth = max(1, steps // 10)
    soak.kept, soak.now.keys = [], []
    soak.now.index.reset()
    result = {
        "steps": steps,
        "backend": backend,
        "events": dict(sorted(soak.tally.counts.items())),
        "checks": soak.tally.checks,
        "largest error of exact attention": soak.tally.worst,
        "most pages": soak.tally.most_pages,
        "pages left over": sum(pool.used for pool in soak.pools),
        "median step, second tenth (us)": round(float(np.median(times[tenth : 2 * tenth])) * 1e6, 1),
        "median step, last tenth (us)": round(float(np.median(times[-tenth:])) * 1e6, 1),
        "largest resident set after a tenth (KiB)": memory[0],
        "largest resident set at the end (KiB)": memory[1],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("what", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    console.print(table)
    if result["pages left over"]:
        raise SystemExit("pages were left over")


if __name__ == "__main__":
    app()
