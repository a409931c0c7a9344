"""Evaluation: what a search finds, against the share of the keys that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saapindex.learn.routers import membership
from saapindex.learn.search_peers import Peer

__all__ = ["Curve", "GroundTruth", "exact_curve", "ground_truth", "measure", "recall"]


@dataclass(frozen=True)
class GroundTruth:
    """What exact attention does.

    Attributes
    ----------
    ids
        int64, (q, k): the `k` keys of the largest inner product, best first.
    weights
        float32, (q, n): softmax weights over all keys.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def ground_truth(
    queries: NDArray[np.float32], keys: NDArray[np.float32], k: int, scale: float
) -> GroundTruth:
    """Score every key for every query; q times n floats are held.

    Examples
    --------
    >>> truth = ground_truth(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 1, 1.0)
    >>> truth.ids.tolist(), truth.weights.round(2).tolist()
    ([[0], [1]], [[0.73..., 0.27...], [0.27..., 0.73...]])
    """
    scores = queries @ keys.T
    ids = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, ids, axis=1), axis=1)
    scores *= np.float32(scale)
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return GroundTruth(np.take_along_axis(ids, order, axis=1), scores)


def recall(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Return the mean share of the true ids, (q, k), that are among `ids`, (q, any).

    Examples
    --------
    >>> recall(np.array([[3, 1]]), np.array([[1, 2]]))
    0.5
    """
    return float((ids[:, :, None] == truth[:, None, :]).any(axis=1).mean())


@dataclass(frozen=True)
class Curve:
    """Quality against cost, one point for each number of lists visited.

    Attributes
    ----------
    keys
        Mean share of the keys read, rising.
    recall
        Mean share of the true nearest keys found (recall@k).
    mass
        Mean share of the attention mass that the keys read hold.
    """

    keys: NDArray[np.float64]
    recall: NDArray[np.float64]
    mass: NDArray[np.float64]

    def at(self, share: float) -> tuple[float, float]:
        """Return recall and mass where `share` of the keys is read, between points by a straight line.

        Examples
        --------
        >>> Curve(np.array([0.1, 0.2]), np.array([0.4, 0.6]), np.array([0.5, 0.9])).at(0.15)
        (0.5, 0.7)
        """
        keys = np.concatenate([[0.0], self.keys])
        found, held = (
            float(np.interp(share, keys, np.concatenate([[0.0], line]))) for line in (self.recall, self.mass)
        )
        return found, held


def measure(
    peer: Peer,
    queries: NDArray[np.float32],
    positions: NDArray[np.int64],
    truth: GroundTruth,
    nprobes: Sequence[int],
) -> Curve:
    """Search `queries` with each number of lists and compare with the truth.

    Parameters
    ----------
    peer
        Trained and filled.
    queries, positions
        (q, d) and (q,).
    truth
        Of the same queries over the same keys.
    nprobes
        Numbers of lists to visit, rising.
    """
    labels, k = peer.labels, truth.ids.shape[1]
    sizes = np.bincount(labels, minlength=peer.nlist)
    mass = truth.weights @ membership(labels, peer.nlist)
    points = []
    for nprobe in nprobes:
        ids, lists = peer.search(queries, positions, k, nprobe)
        visited = lists >= 0
        found = recall(ids, truth.ids)
        read = np.where(visited, sizes[lists], 0).sum(axis=1).mean() / len(labels)
        held = np.where(visited, np.take_along_axis(mass, np.maximum(lists, 0), axis=1), 0).sum(axis=1).mean()
        points.append((read, found, held))
    return Curve(*np.array(points, np.float64).T)


def exact_curve(truth: GroundTruth, shares: Sequence[float]) -> Curve:
    """Return what reading just the best keys would give, if finding them were free."""
    n = truth.weights.shape[1]
    best = -np.sort(-truth.weights, axis=1)
    held = np.cumsum(best, axis=1).mean(axis=0)
    counts = [max(1, round(share * n)) for share in shares]
    k = truth.ids.shape[1]
    return Curve(
        np.array(counts) / n,
        np.array([min(1.0, count / k) for count in counts]),
        held[np.array(counts) - 1].astype(np.float64),
    )
