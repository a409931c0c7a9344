"""Training of learned routers: attention mass per list, predicted from the query. Needs torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saapindex import arrays
from saapindex.arrays import ArrayLike
from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.index import IndexSAAP
from saapindex.params import RankBy, check_choice, check_integer
from saapindex.partition import LinearRouter, MLPRouter

__all__ = ["attention_mass", "membership", "train_router"]

# Queries whose logits over all keys are held at once.
_CHUNK = 512


def membership(labels: NDArray[np.int64], nlist: int) -> NDArray[np.float32]:
    """Return which key is in which list as 0 and 1, (n, nlist): a product with it sums keys by list.

    Examples
    --------
    >>> membership(np.array([1, 0]), 3).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    member = np.zeros((len(labels), nlist), np.float32)
    member[np.arange(len(labels)), labels] = 1
    return member


def attention_mass(
    queries: NDArray[np.float32],
    query_positions: NDArray[np.int64],
    keys: NDArray[np.float32],
    key_positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    nlist: int,
    *,
    scale: float,
    window: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the share of the long-range attention of each query that falls on each list.

    Parameters
    ----------
    queries, query_positions
        (q, d) and (q,), rotated.
    keys, key_positions, labels
        (n, d), (n,) and (n,): the keys and their lists.
    nlist
        Number of lists.
    scale
        Of the logits.
    window
        Only keys further back than this many positions count.

    Returns
    -------
    mass : float32 (q, nlist)
        Rows sum to 1, or to 0 where a query sees no such key.
    sizes : int64 (q, nlist)
        Keys of each list that the query sees.

    Examples
    --------
    >>> q, k = np.ones((1, 2), np.float32), np.ones((4, 2), np.float32)
    >>> mass, sizes = attention_mass(
    ...     q, np.array([9]), k, np.arange(4), np.array([0, 0, 0, 1]), 2, scale=1.0, window=3)
    >>> mass.tolist(), sizes.tolist()
    ([[0.75, 0.25]], [[3, 1]])
    """
    member = membership(labels, nlist)
    mass = np.empty((len(queries), nlist), np.float32)
    sizes = np.empty((len(queries), nlist), np.int64)
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        seen = key_positions < query_positions[rows, None] - window
        logits = np.where(seen, (queries[rows] @ keys.T) * np.float32(scale), -np.inf)
        top = logits.max(axis=1, keepdims=True, initial=-np.inf)
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
        mass[rows] = weights @ member
        mass[rows] /= np.maximum(mass[rows].sum(axis=1, keepdims=True), np.float32(1e-30))
        sizes[rows] = seen.astype(np.float32) @ member
    return mass, sizes


def train_router(
    index: IndexSAAP,
    keys: ArrayLike,
    queries: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    positions_xq: ArrayLike | None = None,
    kind: Literal["linear", "mlp"] | None = None,
    predicts: RankBy | None = None,
    window: int = 2047,
    hidden: int = 256,
    epochs: int = 40,
    patience: int = 5,
    seed: int = 1234,
    show: bool | None = None,
) -> float:
    """Train a router on the attention of `queries` over `keys`, and put it into `index`.

    The loss is the cross-entropy between the mass that each list receives and the softmax over lists
    of what the router predicts. The last tenth of the positions is held out and stops the training; the best
    weights on it are kept.

    Parameters
    ----------
    index
        With a trained partition.
    keys, queries
        (n, d) and (q, d), rotated where the index has a `Rope`.
    positions, positions_xq
        int, (n,) and (q,); by default 0 to n - 1, and n + `window`, where every key is in sight.
    kind
        ``"linear"`` or ``"mlp"``; by default what ``index.params.router`` says.
    predicts
        ``"mass"`` of a list, as in the paper, or per ``"key"`` (conditioned on the sizes of the lists, so
        that contexts which fill the lists differently can share a router); by default what the index
        ranks by.
    window
        Keys no further back than this are not looked for.
    hidden
        Width of the hidden layer of ``"mlp"``.
    epochs, patience
        Passes at most, and passes without improvement after which training stops.
    seed
        Of the initial weights and of the order.
    show
        Show progress; by default ``index.verbose``.

    Returns
    -------
    float
        The loss on the held-out queries, in nats.

    Raises
    ------
    MissingDependencyError
        Without torch.
    InvalidInputError
        On bad arrays, or if no query sees a key beyond the window.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("torch", "training a router", "learn") from error
    kind = kind or ("mlp" if index.params.router == "mlp" else "linear")
    predicts = predicts or index.params.rank
    check_choice("kind", kind, ("linear", "mlp"))
    check_choice("predicts", predicts, ("key", "mass"))
    check_integer("window", window, 0)
    for name, value in (("hidden", hidden), ("epochs", epochs), ("patience", patience)):
        check_integer(name, value, 1)
    x, q = arrays.vectors(keys, "keys", index.d), arrays.vectors(queries, "queries", index.d)
    at, at_q = np.arange(len(x)), np.full(len(q), len(x) + window, np.int64)
    if positions is not None:
        at = arrays.integers(positions, "positions", (len(x),), minimum=0)
    if positions_xq is not None:
        at_q = arrays.integers(positions_xq, "positions_xq", (len(q),), minimum=0)
    partition, ops = index.partition, index.ops
    labels = partition.assign(partition.view.apply(x, at, ops), ops)
    mass, sizes = attention_mass(q, at_q, x, at, labels, index.nlist, scale=index.scale, window=window)
    useful = mass.sum(axis=1) > 0.5
    if useful.sum() < 2:
        raise InvalidInputError(
            f"no query sees keys more than {window} positions back, so there is nothing to learn"
        )
    features = partition.view.apply(q, at_q, ops)[useful]
    held_out = at_q[useful] > np.quantile(at_q[useful], 0.9)
    if not held_out.any():
        held_out = np.arange(len(held_out)) % 10 == 0

    weights, loss = _fit(
        (features, mass[useful], sizes[useful]),
        held_out,
        conditioned=predicts == "key",
        hidden=hidden if kind == "mlp" else 0,
        epochs=epochs,
        patience=patience,
        seed=seed,
        show=index.verbose if show is None else show,
    )
    index.router = (
        MLPRouter(**weights, predicts=predicts)
        if kind == "mlp"
        else LinearRouter(**weights, predicts=predicts)
    )
    return loss


def _fit(
    data: tuple[NDArray[Any], ...], held_out: NDArray[np.bool_], *, show: bool, **settings: Any
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Train on features, masses and sizes as the one head of a layer; return weights and held-out loss."""
    import torch

    from saapindex.learn.fit_routers import FitSettings, fit_router
    from saapindex.learn.masses import RouterData

    def part(rows: NDArray[np.bool_]) -> RouterData:
        features, mass, sizes = (torch.from_numpy(array[rows].astype(np.float32)) for array in data)
        # Every query has a snapshot of the lists of its own.
        return RouterData.without_means(
            features[None, None], mass[None, None], sizes.log()[None], torch.arange(len(features))
        )

    fit = FitSettings(on_mean=False, learning_rate=1e-3, **settings)
    router, loss = fit_router(part(~held_out), part(held_out), fit, show=show)
    return {name: tensor[0, 0].numpy() for name, tensor in router.parameters().items()}, float(loss)
