"""What `bench/run.py pareto` searches: keys, queries to train with, and queries to be asked.

* **attention**: one KV head's keys, of one context, or of every captured context together; queries are of a
  text that no training query comes from, and more than a window beyond the keys of their own context.
* **text-to-image-like**: unit vectors with the two traits that cross-modal embeddings have: a gap between the
  means of the two modalities, and queries that vary along other directions than the keys (`cross_modal`).
* **in-distribution**: keys and queries are draws of one mixture of Gaussians on the unit sphere (`mixture`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from saapindex.learn import Trace, read_trace

Vectors = NDArray[np.float32]
WINDOW = 2048
KINDS = ("attention, one context", "attention, contexts together", "text-to-image-like", "in-distribution")


@dataclass(frozen=True)
class Dataset:
    """Keys, queries to train with and queries to ask, (n, d) each; the best are of the largest product."""

    name: str
    kind: str
    keys: Vectors
    train: Vectors
    queries: Vectors

    def truth(self, k: int) -> NDArray[np.int64]:
        """Ids of the `k` best keys of each query."""
        flat = faiss.IndexFlatIP(self.keys.shape[1])
        flat.add(self.keys)
        ids: NDArray[np.int64] = flat.search(self.queries, k)[1]
        return ids


def _some(x: Vectors, count: int, seed: int = 0) -> Vectors:
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(x[np.sort(rng.permutation(len(x))[:count])])


def _layers(traces: Path) -> list[str]:
    return sorted({path.name for path in traces.glob("test/*/layer-*.safetensors")})


def _read(traces: Path, part: str, layer: str) -> list[Trace]:
    return [read_trace(path) for path in sorted(traces.glob(f"{part}/*/{layer}"))]


def _cut(trace: Trace, head: int) -> tuple[Vectors, Vectors]:
    """Keys of one context, and the queries that are more than a window beyond them."""
    last = int(trace.query_positions.max()) + 1
    n = min(trace.keys.shape[1], last - last // 16 - WINDOW)
    queries, at = trace.head_queries(head)
    return trace.keys[head, :n].astype(np.float32), queries[at >= n + WINDOW]


def attention(
    traces: Path, heads: tuple[int, ...], queries: int, *, together: bool
) -> Iterator[Callable[[], Dataset]]:
    """Yield what makes a data set of each head of every captured layer: of one context, or of all together.

    `traces` is what ``saapindex capture`` wrote: ``traces/{train,test}/TEXT-N/layer-LL.safetensors``.
    """
    for head in heads:
        for layer in _layers(traces):
            yield partial(_attention, traces, layer, head, queries, together)


def _attention(traces: Path, layer: str, head: int, queries: int, together: bool) -> Dataset:
    trains, tests = _read(traces, "train", layer), _read(traces, "test", layer)
    if not trains:
        raise FileNotFoundError(f"{traces}/train holds no {layer}: no queries to train with")
    cuts = [_cut(test, head) for test in (tests if together else tests[:1])]
    keys, asked = [keys for keys, _ in cuts], np.concatenate([asked for _, asked in cuts])
    if together:
        keys += [train.keys[head].astype(np.float32) for train in trains]
    contexts = f"{len(keys)} contexts" if together else "one context"
    return Dataset(
        f"{layer.split('.')[0]} head {head}, {contexts}",
        KINDS[1] if together else KINDS[0],
        np.concatenate(keys),
        np.concatenate([train.head_queries(head)[0] for train in trains]),
        _some(asked, queries),
    )


def _unit(x: NDArray[np.float64]) -> Vectors:
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def cross_modal(count: int, d: int, seed: int, *, shift: float, which: int) -> Vectors:
    """Draw `count` unit vectors of a made-up embedding of two modalities, (count, d).

    A vector is ``C[topic] + S z + gap``, normalised: `topic` is one of 1,000 that both modalities share, `z`
    is Gaussian noise with a scale for each of `d` random directions (a power law), `gap` a modality's mean.
    At ``shift=0`` the vectors are of the keys' modality; at 1 the scales are dealt to the directions in
    another order, the topics are blurred to two fifths and the mean is the other modality's, as text is to
    images; between, all three are interpolated.

    Parameters
    ----------
    count, d
        Vectors and dimensions.
    seed
        Of the embedding; the same for keys and queries.
    shift
        From the keys' modality (0) to the queries' (1).
    which
        Of the draw: another number gives other vectors of the same distribution.
    """
    world = np.random.default_rng(seed)
    topics = world.standard_normal((1000, d))
    basis = np.linalg.qr(world.standard_normal((d, d)))[0]
    scales = np.arange(1, d + 1) ** -0.7
    scales *= np.sqrt(d / (scales**2).sum())
    other = world.permutation(scales)
    gaps = world.standard_normal((2, d))
    draw = np.random.default_rng([seed, which])
    noise = draw.standard_normal((count, d)) * ((1 - shift) * scales + shift * other)
    middle = (1 - 0.6 * shift) * topics[draw.integers(1000, size=count)]
    return _unit(middle + noise @ basis.T + (1 - shift) * gaps[0] + shift * gaps[1])


def text_to_image_like(keys: int, train: int, queries: int, d: int = 128, seed: int = 0) -> Dataset:
    """Keys of one modality of `cross_modal`, queries of the other."""
    return Dataset(
        f"text-to-image-like, {d} dimensions",
        KINDS[2],
        cross_modal(keys, d, seed, shift=0, which=0),
        cross_modal(train, d, seed, shift=1, which=1),
        cross_modal(queries, d, seed, shift=1, which=2),
    )


def mixture(count: int, d: int, seed: int, which: int) -> Vectors:
    """Draw `count` unit vectors of a mixture of 1,000 Gaussians, (count, d)."""
    centres = np.random.default_rng(seed).standard_normal((1000, d))
    draw = np.random.default_rng([seed, which])
    return _unit(centres[draw.integers(1000, size=count)] + 0.7 * draw.standard_normal((count, d)))


def in_distribution(keys: int, train: int, queries: int, d: int = 128, seed: int = 1) -> Dataset:
    """Keys and queries of one `mixture`."""
    return Dataset(
        f"in-distribution, {d} dimensions",
        KINDS[3],
        *(mixture(count, d, seed, which) for which, count in enumerate((keys, train, queries))),
    )
