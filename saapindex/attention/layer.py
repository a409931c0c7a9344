"""What an attention index needs to know about one layer of a model, learned offline."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, as_numpy, integers
from saapindex.attention.shares import HeadShares
from saapindex.backends import get_ops
from saapindex.backends.base import Floats, Ints, Ops
from saapindex.codebook_layer import CodebookLayer
from saapindex.codes import TransformCode, fit_codes
from saapindex.errors import InvalidInputError
from saapindex.params import ViewName, check_integer, default_nlist
from saapindex.partition import View, kmeans
from saapindex.partition.kmeans import assignment_form, query_metric
from saapindex.rope import Rope

__all__ = ["LayerCodebook", "fit_layer"]

# Lloyd steps on a context look at no more than this many keys a list: more hardly move the centroids.
ADAPT_POINTS = 64
# Words of a code that the kernels of attention take.
_WORDS = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerCodebook:
    """Partition and codes of the `H` KV heads of a layer.

    Attributes
    ----------
    centroids
        float32, (H, nlist, d), each head's in its view.
    code
        Codes of the heads.
    scale
        Of the logits.
    metric
        float64, (H, d, d): the query-aware metric in which keys are assigned; None for the Euclidean.
    spherical
        Whether keys are assigned by inner product to unit centroids; excludes `metric`.
    views
        What of the rotation is undone before keys are assigned, one for each head; by default nothing.
    softcap
        Of the logits; None for none.
    max_position
        Positions below this are known; None where they do not matter.
    shares
        What each head takes of a budget; None for an even split.

    Raises
    ------
    InvalidInputError
        If shapes or values do not fit each other.
    """

    centroids: NDArray[np.float32]
    code: TransformCode
    scale: float
    metric: NDArray[np.float64] | None = None
    spherical: bool = False
    views: Sequence[View] = ()
    softcap: float | None = None
    max_position: int | None = None
    shares: HeadShares | None = None

    def __post_init__(self) -> None:
        if self.centroids.ndim != 3 or self.centroids.dtype != np.float32:
            raise InvalidInputError(
                f"centroids are {self.centroids.dtype} of shape {self.centroids.shape}, expected float32 of "
                "(heads, nlist, d)"
            )
        heads, nlist, d = self.centroids.shape
        if not heads or not nlist or (self.code.heads, self.code.d) != (heads, d):
            raise InvalidInputError(
                f"centroids have shape {self.centroids.shape}, but the codes are for {self.code.heads} heads "
                f"of {self.code.d} dimensions"
            )
        if self.code.words > _WORDS:
            raise InvalidInputError(f"codes have {self.code.words} words, expected at most {_WORDS}")
        if self.metric is not None and (self.spherical or self.metric.shape != (heads, d, d)):
            raise InvalidInputError(
                f"metric has shape {self.metric.shape}, expected {(heads, d, d)}, or None if spherical"
            )
        for name in ("centroids", "metric"):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                raise InvalidInputError(f"{name} hold NaN or infinity, expected finite values")
        views = tuple(self.views) or (View(),) * heads
        if len(views) != heads:
            raise InvalidInputError(f"{len(views)} views for {heads} KV heads, expected one for each")
        object.__setattr__(self, "views", views)
        if self.shares is not None:
            self.shares.check(heads)
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name} is {value!r}, expected a number above 0")

    @classmethod
    def of(cls, layer: CodebookLayer, n: int) -> LayerCodebook:
        """Return what a trained codebook holds for one layer, with the lists that suit contexts of `n` keys.

        Raises
        ------
        InvalidInputError
            If the layer was trained without codes.
        """
        nlist = min(layer.nlists, key=lambda count: abs(math.log2(count / default_nlist(n))))
        names = [field.name for field in fields(TransformCode)]
        missing = [name for name in names if f"codes.{nlist}.{name}" not in layer.extra]
        if missing:
            raise InvalidInputError(
                f"layer {layer.layer} of the codebook has no codes for {nlist} lists, expected one that "
                "saapindex.learn.train made with all of its stages"
            )
        return cls(
            centroids=layer.centroids[nlist].astype(np.float32),
            code=TransformCode(**{name: layer.extra[f"codes.{nlist}.{name}"] for name in names}).rounded(),
            scale=layer.scale,
            metric=None if layer.metric is None else layer.metric.astype(np.float64),
            spherical=layer.spherical,
            views=layer.views,
            softcap=layer.softcap,
            max_position=layer.max_position,
            shares=HeadShares.of(layer.extra, n),
        )

    @property
    def heads(self) -> int:
        """Number of KV heads."""
        return len(self.centroids)

    @property
    def nlist(self) -> int:
        """Lists of each head."""
        return int(self.centroids.shape[1])

    @property
    def d(self) -> int:
        """Dimension of keys."""
        return int(self.centroids.shape[2])

    def view(self, keys: NDArray[np.float32], positions: Ints, ops: Ops) -> NDArray[np.float32]:
        """Return keys, (H, n, d), as they are assigned."""
        if not any(view.needs_positions for view in self.views):
            return keys
        seen = [
            view.apply(np.ascontiguousarray(k), positions, ops)
            for view, k in zip(self.views, keys, strict=True)
        ]
        return np.stack(seen)

    def assign(self, seen: NDArray[np.float32], centroids: NDArray[np.float32] | None, ops: Ops) -> Ints:
        """Return the list of each key, (H, n), given in its view, by these or by the offline centroids."""
        labels = np.empty(seen.shape[:2], np.int64)
        for h, x in enumerate(seen):
            form = assignment_form(
                (self.centroids if centroids is None else centroids)[h], self._metric(h), self.spherical
            )
            labels[h], _ = ops.assign(np.ascontiguousarray(x), *form)
        return labels

    def adapt(self, seen: NDArray[np.float32], niter: int, ops: Ops) -> NDArray[np.float32]:
        """Return centroids after `niter` Lloyd steps on a context's own keys, (H, n, d), in their view."""
        step = max(1, seen.shape[1] // (ADAPT_POINTS * self.nlist))
        rng = np.random.default_rng(0)
        moved = [
            kmeans(
                np.ascontiguousarray(x[::step]),
                self.nlist,
                ops=ops,
                rng=rng,
                metric=self._metric(h),
                spherical=self.spherical,
                niter=niter,
                start=self.centroids[h],
            )
            for h, x in enumerate(seen)
        ]
        return np.stack(moved)

    def _metric(self, head: int) -> NDArray[np.float64] | None:
        return None if self.metric is None else self.metric[head]

    def fingerprint(self) -> str:
        """Return a checksum of everything, to tell whether a saved index belongs to this codebook."""
        digest = hashlib.blake2b(digest_size=16)
        tensors: dict[str, Any] = {"centroids": self.centroids, "metric": self.metric, **self.code.tensors()}
        tensors |= {} if self.shares is None else self.shares._asdict()
        for name, tensor in sorted(tensors.items()):
            if tensor is not None:
                digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
                digest.update(np.ascontiguousarray(tensor).data)
        views = [(view.kind, view.cutoff, view.rope and view.rope.to_dict()) for view in self.views]
        digest.update(repr((self.scale, self.softcap, self.spherical, self.max_position, views)).encode())
        return digest.hexdigest()


def fit_layer(
    keys: ArrayLike,
    queries: ArrayLike,
    nlist: int,
    *,
    words: int = 3,
    positions: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    rope: Rope | None = None,
    view: ViewName = "rotated",
    cutoff: float = 1000.0,
    scale: float | None = None,
    softcap: float | None = None,
    niter: int = 10,
    seed: int = 1234,
    backend: str = "cpu",
) -> LayerCodebook:
    """Learn partition and codes of a layer from keys and queries at hand.

    Training over whole models, with positions moved over the range to be served, is `saapindex.learn`'s.

    Parameters
    ----------
    keys
        (H, n, d), as the model caches them, ``n >= nlist``.
    queries
        (H * g, m, d): those of the `g` query heads that share KV head `h` from row ``h * g`` on.
    nlist
        Lists of each head; about one for 256 keys to be served is good.
    words
        32-bit words of a key's code.
    positions, query_positions
        int, (n,) and (m,), by default 0 to n - 1 and `n`; they matter where the view undoes a rotation.
    rope, view, cutoff
        The embedding of the model, and what of it is undone before keys are assigned.
    scale
        Of the logits, by default ``1 / sqrt(d)``.
    softcap
        Of the logits.
    niter, seed
        Of k-means.
    backend
        ``"cpu"`` or ``"reference"``.

    Raises
    ------
    InvalidInputError
        On arrays of wrong shape, or fewer keys than lists.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> keys, queries = rng.standard_normal((2, 500, 16)), rng.standard_normal((4, 100, 16))
    >>> codebook = fit_layer(keys, queries, 8, words=1)
    >>> codebook.heads, codebook.nlist, codebook.d
    (2, 8, 16)
    """
    x, q = (_trained_on(value, name) for value, name in ((keys, "keys"), (queries, "queries")))
    heads, n, d = x.shape
    check_integer("nlist", nlist, 1)
    check_integer("words", words, 1)
    if words > _WORDS:
        raise InvalidInputError(f"words is {words}, expected at most {_WORDS}")
    if q.shape[2] != d or not len(q) or len(q) % heads or not q.shape[1]:
        raise InvalidInputError(
            f"queries have shape {q.shape}, expected (a multiple of {heads}, m, {d}) with m > 0"
        )
    if n < nlist:
        raise InvalidInputError(f"{n} keys for {nlist} lists, expected at least as many")
    at = np.arange(n) if positions is None else integers(positions, "positions", (n,), minimum=0)
    q_at = np.full(q.shape[1], n)
    if query_positions is not None:
        q_at = integers(query_positions, "query_positions", (q.shape[1],), minimum=0)
    ops, rng, seen_in = get_ops(backend), np.random.default_rng(seed), View(view, cutoff, rope)
    groups = q.reshape(heads, -1, d)
    asked = np.tile(q_at, len(q) // heads)
    centroids, metrics, residuals, plain = [], [], [], []
    for k, group in zip(x, groups, strict=True):
        seen = seen_in.apply(k, at, ops)
        metric = query_metric(seen_in.apply(group, asked, ops))
        found = kmeans(seen, nlist, ops=ops, rng=rng, metric=metric, niter=niter)
        labels, _ = ops.assign(seen, *assignment_form(found, metric, False))
        sums, counts = ops.accumulate(k, labels, nlist)
        residuals.append(k - (sums / np.maximum(counts, 1)[:, None])[labels])
        centroids.append(found)
        metrics.append(metric)
        plain.append(query_metric(group))
    return LayerCodebook(
        centroids=np.stack(centroids),
        code=fit_codes(np.stack(residuals), np.stack(plain), words),
        scale=d**-0.5 if scale is None else scale,
        metric=np.stack(metrics),
        views=(seen_in,) * heads,
        softcap=softcap,
    )


def _trained_on(value: ArrayLike, name: str) -> NDArray[np.float32]:
    array: Floats = as_numpy(value, name)
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise InvalidInputError(
            f"{name} are {array.dtype} of shape {array.shape}, expected finite floats of (heads, n, d)"
        )
    return np.ascontiguousarray(array, np.float32)
