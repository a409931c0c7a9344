"""The codebook of a layer on a device: how keys are assigned and coded there, and centroids fitted."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.device_cut import wide
from saapindex.attention.layer import ADAPT_POINTS, LayerCodebook
from saapindex.backends.cuda.append_state import Forms
from saapindex.backends.cuda.assign import accumulate, assign_heads, prepare
from saapindex.backends.cuda.attend import DeviceCode
from saapindex.backends.cuda.halves import fragments, halves
from saapindex.errors import InvalidInputError
from saapindex.partition import View
from saapindex.partition.kmeans import assignment_form

__all__ = ["DeviceBook"]

Array = Any  # cupy.ndarray, or numpy.ndarray where there is no device


class DeviceBook:
    """What kernels read of a `LayerCodebook`.

    Parameters
    ----------
    codebook
        Of the layer.
    xp
        ``cupy``, on whose current device the arrays are made; or ``numpy``.
    """

    def __init__(self, codebook: LayerCodebook, xp: Any) -> None:
        self.codebook, self.xp = codebook, xp
        found = [self._form(h, codebook.centroids[h]) for h in range(codebook.heads)]
        forms, bias = (np.stack(part) for part in zip(*found, strict=True))
        code, turns = codebook.code, _turns(codebook.views)
        parts, unit = halves(forms, np)
        forward, step = fragments(code.forward[:, :, : 32 * code.words], code.step[:, : 32 * code.words])
        self.forms = Forms(
            forms=xp.asarray(forms),
            bias=xp.asarray(bias),
            parts=xp.asarray(parts),
            unit=xp.asarray(unit),
            forward=xp.asarray(forward),
            step=xp.asarray(step),
            base=xp.asarray(code.base),
            widths=xp.asarray(code.widths.astype(np.int32)),
            turns=None if turns is None else xp.asarray(turns[0]),
            amplitudes=None if turns is None else xp.asarray(turns[1]),
            interleaved=turns is not None and turns[2],
        )

    @cached_property
    def code(self) -> DeviceCode:
        """The codes, as attention reads them."""
        codebook = self.codebook
        return DeviceCode.of(codebook.code.view, codebook.code.coded, self.xp, codebook.shares)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(array.nbytes for array in (*self.forms[:-1], *self.code) if array is not None)

    def _form(self, head: int, centroids: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        metric = self.codebook.metric
        return assignment_form(centroids, None if metric is None else metric[head], self.codebook.spherical)

    def own_forms(self, centroids: Array) -> tuple[Array, Array]:
        """Return forms and bias for centroids of one sequence, (H, L, d) on the device."""
        found = [self._device_form(h, centroids[h]) for h in range(self.codebook.heads)]
        return tuple(self.xp.stack(part) for part in zip(*found, strict=True))

    def _device_form(self, head: int, centroids: Array) -> tuple[Array, Array]:
        """`assignment_form` on the device."""
        if self.codebook.spherical:
            return centroids, self.xp.zeros(len(centroids), np.float32)
        exact = centroids.astype(np.float64)
        forms = exact if self._metric is None else exact @ self._metric[head]
        return forms.astype(np.float32), (-(forms * exact).sum(axis=1) / 2).astype(np.float32)

    @cached_property
    def _metric(self) -> Any:
        return None if self.codebook.metric is None else self.xp.asarray(self.codebook.metric)

    @property
    def by_tensor_cores(self) -> bool:
        """Whether `assign` can be used: where keys are assigned as they are, on a device."""
        return self.xp is not np and self.forms.turns is None and self.codebook.d % 8 == 0

    def assign(self, keys: Array, own: tuple[Array, Array] | None = None) -> Array:
        """Return the list of each key, int32 (H, n), on tensor cores: for many keys.

        Parameters
        ----------
        keys
            (H, n, d), as stored.
        own
            Forms and bias of the sequence, (H, L, d) and (H, L), by default those of the codebook.
        """
        forms, bias = own or (self.forms.forms, self.forms.bias)
        return assign_heads(keys, prepare(forms, bias))[0].astype(np.int32)

    def view(self, keys: Array, head: int, positions: Array) -> Array:
        """Return keys of a head, float32 (n, d), as they are assigned."""
        turns, amplitudes = self.forms.turns, self.forms.amplitudes
        if turns is None or amplitudes is None:
            return keys
        xp, pairs = self.xp, turns.shape[1]
        turn = positions[:, None].astype(np.float64) * turns[head]
        angle, factor = 2 * math.pi * (turn - xp.rint(turn)), amplitudes[head]
        cosine, sine = (
            (xp.cos(angle) * factor).astype(np.float32),
            (xp.sin(angle) * factor).astype(np.float32),
        )
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        if self.forms.interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        seen = keys.copy()
        seen[:, first] = keys[:, first] * cosine - keys[:, second] * sine
        seen[:, second] = keys[:, second] * cosine + keys[:, first] * sine
        return seen

    def adapt(self, keys: Array, first: int, niter: int) -> Array:
        """Return centroids of one sequence after Lloyd steps on its entering keys: see `LayerCodebook.adapt`.

        Parameters
        ----------
        keys
            (H, m, d) as stored, at positions from `first` up.
        niter
            Steps.

        Returns
        -------
        (H, L, d) float32
        """
        xp, book, rng = self.xp, self.codebook, np.random.default_rng(0)
        step = max(1, keys.shape[1] // (ADAPT_POINTS * book.nlist))
        positions = xp.arange(first, first + keys.shape[1])[::step]
        moved = xp.asarray(book.centroids).copy()
        if book.spherical:
            moved = _unit(moved, xp)
        for h in range(book.heads):
            x = keys[h, ::step]
            if not (self.by_tensor_cores and x.dtype.itemsize == 2):
                x = self.view(wide(xp.ascontiguousarray(x), xp), h, positions)
            for _ in range(niter):
                labels, best = self._nearest(x, h, moved[h])
                sums, counts = self._sums(x, labels)
                mean = (sums / xp.maximum(counts, 1)[:, None]).astype(np.float32)
                moved[h] = xp.where((counts > 0)[:, None], mean, moved[h])
                empty = xp.flatnonzero(counts == 0)
                if len(empty):
                    seen = wide(x, xp)
                    norms = (seen * self._device_form(h, seen)[0]).sum(axis=1)
                    error = xp.sqrt(norms) - best if book.spherical else xp.maximum(norms - 2 * best, 0)
                    moved[h, empty] = seen[xp.asarray(_draw(error, len(empty), rng))]
                if book.spherical:
                    moved[h] = _unit(moved[h], xp)
        return moved

    def _nearest(self, x: Array, head: int, centroids: Array) -> tuple[Array, Array]:
        """Return the list of each key, (n, d), and its score."""
        forms, bias = self._device_form(head, centroids)
        if self.by_tensor_cores:
            labels, best = assign_heads(x[None], prepare(forms[None], bias[None]))
            return labels[0], best[0]
        scores = x @ forms.T + bias
        labels = scores.argmax(axis=1)
        return labels, self.xp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]

    def _sums(self, x: Array, labels: Array) -> tuple[Array, Array]:
        """Return the sum of the keys of each list, (L, d) float64, and how many they are."""
        if self.xp is not np:
            found: tuple[Array, Array] = accumulate(x, labels, self.codebook.nlist)
            return found
        sums = np.zeros((self.codebook.nlist, x.shape[1]))
        np.add.at(sums, labels, x.astype(np.float64))
        return sums, np.bincount(labels, minlength=self.codebook.nlist)


def _draw(weights: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw rows with a chance in proportion to their weight, as `kmeans` does on the host."""
    host = weights.get() if hasattr(weights, "get") else weights
    host = np.maximum(host.astype(np.float64), 0)
    total = host.sum()
    chances = host / total if total > 0 and np.isfinite(total) else None
    return rng.choice(len(host), count, p=chances)


def _unit(x: Array, xp: Any) -> Array:
    norms = xp.sqrt((x * x).sum(axis=-1, keepdims=True))
    return xp.where(norms > 0, x / xp.where(norms > 0, norms, 1), 0).astype(np.float32)


def _turns(views: Any) -> tuple[NDArray[np.float64], NDArray[np.float32], bool] | None:
    """Return what the views of all heads do to the pairs of a key: turns a position, factors and layout."""
    moving: list[View] = [view for view in views if view.needs_positions]
    if not moving:
        return None
    layouts = {(view.rope.layout, view.rope.dim) for view in moving if view.rope is not None}
    if len(layouts) > 1:
        raise InvalidInputError(
            f"heads of one layer have embeddings of layouts {sorted(layouts)}, expected one"
        )
    [(layout, dim)] = layouts
    turns, factors = np.zeros((len(views), dim // 2)), np.ones((len(views), dim // 2), np.float32)
    for h, view in enumerate(views):
        if view.needs_positions:
            undone = view.rope.wavelengths < (view.cutoff if view.kind == "windowed" else math.inf)
            turns[h] = np.where(undone, -view.rope.frequencies / (2 * math.pi), 0.0)
            factors[h] = np.where(undone, 1.0 / view.rope.attention_factor, 1.0)
    return turns, factors, layout == "interleaved"
