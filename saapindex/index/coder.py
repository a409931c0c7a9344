"""The codes of an index: anchors of its lists, and transform codes of what remains of a key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saapindex.backends.base import CodedLists, Floats, Ints, Ops
from saapindex.codes import TransformCode, fit_codes
from saapindex.lists import InvertedLists, KeyCodes
from saapindex.params import IndexParameters
from saapindex.partition import Partition
from saapindex.partition.kmeans import query_metric

__all__ = ["Coder", "code_words", "train_coder"]

# Keys that codes are fitted to.
_SAMPLE = 1 << 16


def code_words(d: int, bits: int) -> int:
    """Return the words of 32 bits that hold `bits` bits for each of `d` dimensions.

    Examples
    --------
    >>> code_words(128, 2), code_words(20, 1), code_words(64, 0)
    (8, 1, 0)
    """
    return -(-d * bits // 32)


@dataclass(frozen=True, eq=False)
class Coder:
    """Turns keys into codes, and back.

    Attributes
    ----------
    anchors
        float32, (nlist, d): a key is coded relative to the anchor of its list.
    code
        Codes of one head.
    l2
        Whether codes have norms, which distances need.
    """

    anchors: NDArray[np.float32]
    code: TransformCode
    l2: bool

    @cached_property
    def turned(self) -> NDArray[np.float32]:
        """Anchors as codes see queries, (nlist, R)."""
        return (self.anchors @ self.code.fields.inverse).astype(np.float32, copy=False)

    def encode(self, x: NDArray[np.float32], labels: Ints, ops: Ops) -> KeyCodes:
        """Return the codes of keys `x`, (n, d), of lists `labels`."""
        residuals = x - self.anchors[labels]
        words, exponents = self.code.encode(residuals[None], ops)
        norms = np.einsum("ij,ij->i", residuals, residuals)[:, None] if self.l2 else np.zeros((len(x), 0))
        return KeyCodes(words[0], exponents[0, :, None], norms.astype(np.float32))

    def decode(self, codes: KeyCodes, labels: Ints) -> NDArray[np.float32]:
        """Return what is left of the keys, float32 (n, d)."""
        y = self.code.decode(codes.words[None], codes.exponents[None, :, 0])[0]
        decoded: NDArray[np.float32] = self.anchors[labels] + y @ self.code.inverse[0].T
        return decoded

    def view(self, lists: InvertedLists, allowed: NDArray[np.uint16] | None = None) -> CodedLists:
        """Return the lists as kernels see them."""
        stored = lists.stored
        return CodedLists(
            stored.words,
            stored.exponents,
            stored.norms,
            lists.ids,
            lists.offsets,
            lists.sizes,
            self.anchors,
            self.turned,
            self.code.fields,
            allowed,
        )

    def moved(self, x: NDArray[np.float32], labels: Ints, ops: Ops) -> Coder:
        """Return the coder with anchors at the means of keys `x` of lists `labels`."""
        return replace(self, anchors=_means(x, labels, self.anchors, ops))


def _means(x: NDArray[np.float32], labels: Ints, otherwise: Floats, ops: Ops) -> NDArray[np.float32]:
    """Return the mean of each list, and what is `otherwise` of lists without keys."""
    sums, counts = ops.accumulate(x, labels, len(otherwise))
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], otherwise)
    return means.astype(np.float32)


def train_coder(
    keys: NDArray[np.float32],
    key_positions: Ints,
    queries: NDArray[np.float32] | None,
    query_positions: Ints | None,
    partition: Partition,
    params: IndexParameters,
    *,
    l2: bool,
    ops: Ops,
) -> Coder | None:
    """Fit the codes that `params` asks for, if any.

    Codes see keys as they are given, rotated, whatever the view of the partition. Where the partition was
    trained on keys that were moved to other positions, so are the codes.

    Parameters
    ----------
    keys, key_positions, queries, query_positions
        As for `train_partition`.
    partition
        The trained partition.
    params
        Bits, augmentation and seed.
    l2
        Whether scores are distances.
    """
    words = code_words(keys.shape[1], params.bits)
    if not words:
        return None
    rng = np.random.default_rng(params.seed)
    limit = partition.nlist * params.max_points_per_centroid
    if len(keys) > limit:
        sample = np.sort(rng.choice(len(keys), limit, replace=False))
        keys, key_positions = keys[sample], key_positions[sample]
    view, last = partition.view, partition.max_position
    if view.rope is not None and params.augment and last is not None:
        target = rng.integers(last, size=len(keys))
        keys, key_positions = view.rope.rerotate(keys, key_positions, target, ops=ops), target
        if queries is not None and query_positions is not None:
            target = rng.integers(last, size=len(queries))
            queries = view.rope.rerotate(queries, query_positions, target, ops=ops)
    labels = partition.assign(view.apply(keys, key_positions, ops), ops)
    anchors = _means(keys, labels, np.broadcast_to(keys.mean(axis=0), partition.centroids.shape), ops)
    rows = np.sort(rng.choice(len(keys), min(len(keys), _SAMPLE), replace=False))
    euclidean = l2 or queries is None
    metric = np.eye(keys.shape[1]) if euclidean else query_metric(queries)  # type: ignore[arg-type]
    return Coder(anchors, fit_codes((keys[rows] - anchors[labels[rows]])[None], metric[None], words), l2)
