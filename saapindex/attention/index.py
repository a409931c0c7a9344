"""`AttentionIndex`: the keys and values of one layer, attended to sparsely."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saapindex.arrays import ArrayLike, give_back, integers
from saapindex.attention.batch import Batch
from saapindex.attention.layer import LayerCodebook
from saapindex.attention.selecting import select
from saapindex.attention.selection import Selection
from saapindex.attention.storage import read_index, write_index
from saapindex.attention.store import AttentionStore
from saapindex.attention.tensors import queries, returned
from saapindex.backends.base import Floats, Ints
from saapindex.backends.paged import Scaling
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

__all__ = ["AttentionIndex"]


class AttentionIndex(AttentionStore):
    """Sparse attention over every KV head of a layer, for several sequences at once.

    The first keys (sinks) and the recent ones (the window) are attended to exactly. Keys that leave the
    window enter the lists of the codebook in batches. A query visits the lists that promise most, reads the
    codes of their keys, fetches the best keys with their values, and lets all others count by estimates.

    Parameters
    ----------
    codebook
        What was learned for the layer.
    batch
        Number of sequences.
    window, sinks
        Keys that are always attended to, besides the current one: recent ones at least, and first ones.
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``; by default that of the first keys.
    flush
        Keys leave the window so many at a time.
    adapt
        Lloyd steps that fit the centroids to the keys that first enter the lists; 0 for none.
    dense_below
        Sequences shorter than this are attended to densely, and their keys enter no list.
    params
        What `attend` and `select` read where they are not told.
    scale, softcap
        Of the logits, by default those of the codebook.
    sink_logits
        (q_heads,), learned logits that take part in each head's softmax without a value (GPT-OSS).
    backend
        ``"cpu"`` (numba, all cores) or ``"reference"`` (NumPy): what works on the host.
    device
        ``"cpu"``, or ``"cuda"`` (the current device) or ``"cuda:1"``: where keys are kept and attended to.

    Raises
    ------
    InvalidInputError
        On parameters out of their range.
    MissingDependencyError
        If CUDA is asked for without CuPy.

    Notes
    -----
    One thread at a time may use an index and its forks.

    Examples
    --------
    >>> from saapindex.attention import fit_layer
    >>> rng = np.random.default_rng(0)
    >>> k, v = rng.standard_normal((2, 1, 2, 3000, 32), dtype=np.float32)  # (batch, kv_heads, n, d)
    >>> q = rng.standard_normal((1, 6, 32), dtype=np.float32)
    >>> codebook = fit_layer(k[0], np.repeat(q[0], 50, axis=0).reshape(6, 50, 32), nlist=16)
    >>> index = AttentionIndex(codebook, window=127, dense_below=1000)
    >>> index.add(k, v)
    >>> out, lse = index.attend(q, budget=0.2)
    >>> out.shape, lse.shape
    ((1, 6, 32), (1, 6))
    >>> index.select(q, nprobe=4).ids.shape[:2]
    (1, 2)
    """

    def attend(
        self,
        q: ArrayLike,
        *,
        budget: float | None = None,
        nprobe: int | None = None,
        top_p: float | None = None,
        params: AttendParameters | None = None,
        positions: ArrayLike | None = None,
        near: bool = True,
        k: ArrayLike | None = None,
        v: ArrayLike | None = None,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Attend to the keys that were added, the newest among them.

        Parameters
        ----------
        q
            (batch, q_heads, d), the newest token of each sequence; or (batch, q_heads, t, d), the last `t`,
            each of which sees the keys up to its own. Query head `j` belongs to KV head ``j // (q_heads /
            kv_heads)``.
        budget, nprobe, top_p
            What to read, in place of what `params` says; see `AttendParameters`. A budget of 1 is dense.
        params
            In place of those of the index.
        positions
            int, (batch, t): the last key that each query sees, by default its own. Below zero it sees none.
            Where a query lies before the window, all are attended to densely.
        near
            Whether to attend to sinks and window; without, only to the lists, for another runtime that
            attends to those and joins the parts by `merge`. `sink_logits` belong to the near part.
        k, v
            (batch, kv_heads, t, d): keys and values to `add` first, as to FlashAttention's
            ``flash_attn_with_kvcache``. On a device a token is added by the launch that attends.

        Returns
        -------
        out : the shape of `q`, in its precision; zero where there is no key
        lse : the same without the last dimension, float32: log of the sum of ``exp(logit)``

        Raises
        ------
        InvalidInputError
            On a wrong shape, or values that are not finite. The index is as it was.
        """
        wanted = self._parameters(params, budget, nprobe, top_p)
        if k is not None or v is not None:
            if k is None or v is None:
                raise InvalidInputError(f"{'k' if k is None else 'v'} is None, expected k and v together")
            return self._add_and_attend(q, wanted, positions, near, k, v)
        if self._device is not None and self._batch is not None:
            return self._attend_on_device(q, wanted, positions, near)
        if self._batch is not None:
            self.ops.announce_step()
        out: Floats
        lse: Floats
        x, g = self._grouped(q)
        t, heads = x.shape[1], self.codebook.heads
        if self._batch is None:
            out, lse = np.zeros_like(x), np.full(x.shape[:3], -np.inf, np.float32)
        else:
            batch = self.host_batch
            newest = positions is None and t == 1  # seen by none of the queries that are attended to densely
            last = batch.newest if newest else self._last(positions, t)
            sparse = wanted.budget != 1 and batch.is_long and (newest or not batch.any_early(last))
            out, lse = self._attend(batch, x, last, wanted if sparse else None, near)
        if near and self.sink_logits is not None:
            out, lse = self._with_sinks(out, lse, g)
        shape: tuple[int, ...] = self.batch, heads * g
        if len(q.shape) == 4:
            out = out.reshape(self.batch, heads, t, g, -1).transpose(0, 1, 3, 2, 4)
            lse = lse.reshape(self.batch, heads, t, g).transpose(0, 1, 3, 2)
            shape = *shape, t
        outs, lses = out.reshape(*shape, self.codebook.d), lse.reshape(shape)
        return returned(outs, q, own_precision=True), returned(lses, q)

    def _add_and_attend(
        self,
        q: ArrayLike,
        wanted: AttendParameters,
        positions: ArrayLike | None,
        near: bool,
        k: ArrayLike,
        v: ArrayLike,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Add, when all that is given is known to be right, and attend."""
        if self._device is not None and self._batch is not None:
            with self._current(k):
                new = self._new(k, v, str(self._dtype))
                if self._batch.known:
                    self._check_end(self._batch.lengths + new[0].shape[2])
            return self._attend_on_device(q, wanted, positions, near, new)
        x, _ = self._grouped(q)
        if positions is not None:
            integers(positions, "positions", (self.batch, x.shape[1]))
        self.add(k, v)
        return self.attend(q, params=wanted, positions=positions, near=near)

    def _attend_on_device(
        self,
        q: ArrayLike,
        wanted: AttendParameters,
        positions: ArrayLike | None,
        near: bool,
        new: Any = None,
    ) -> tuple[ArrayLike, ArrayLike]:
        from saapindex.attention.device_attend import attend_on_device

        self._check_heads(q)
        with self._current(q):
            return attend_on_device(
                self._batch,  # type: ignore[arg-type]
                q,
                self._device,  # type: ignore[arg-type]
                self._scaling,
                wanted,
                positions=positions,
                near=near,
                sink_logits=self.sink_logits,
                new=new,
            )

    def _attend(
        self, batch: Batch, x: Floats, last: Ints, wanted: AttendParameters | None, near: bool
    ) -> tuple[Floats, Floats]:
        """Attend as `wanted`, or densely without it."""
        around = batch.near if near else batch.nothing_near
        pages = batch.keeping.pool.pages
        if wanted is None:
            return self.ops.attend_all(x, last, around, batch.lists, pages, self._scaling)
        lists = batch.lists_for(wanted)
        code, reading = self.codebook.code.view, batch.reading(wanted)
        return self.ops.attend_lists(x, last, around, lists, pages, code, self._scaling, reading)

    def select(
        self,
        q: ArrayLike,
        *,
        budget: float | None = None,
        nprobe: int | None = None,
        top_p: float | None = None,
        params: AttendParameters | None = None,
        out: Selection | None = None,
    ) -> Selection:
        """Choose the keys to attend to, for another implementation of attention.

        On a device nobody waits: rows are as wide as ever can be selected in the room that `reserve` made, so
        a selection can be captured in a graph and replayed while the context grows.

        Parameters
        ----------
        q
            (batch, q_heads, d), the newest token of each sequence.
        budget, nprobe, top_p, params
            As for `attend`.
        out
            An earlier selection of this index on a device, with the same limits: its arrays are written
            anew, and no memory is taken.

        Returns
        -------
        Selection
            What each KV head should fetch besides the sinks and the window.

        Raises
        ------
        InvalidInputError
            On a wrong shape, values that are not finite (on the host), or an `out` that does not fit.
        """
        if len(getattr(q, "shape", ())) != 3:
            raise InvalidInputError(f"q has shape {getattr(q, 'shape', None)}, expected (batch, q_heads, d)")
        wanted = self._parameters(params, budget, nprobe, top_p)
        shape = self.batch, self.codebook.heads
        if self._device is not None and self._batch is not None:
            return self._select_on_device(q, wanted, out)
        if out is not None:
            raise InvalidInputError("out is given, expected None for an index on the host or without keys")
        x, _ = self._grouped(q)
        if self._batch is None:
            none, zeros = np.empty((*shape, 0), np.int64), np.zeros(self.batch, np.int64)
            parts = [none, np.zeros(shape, np.int64), none]
            start, ends = zeros + self.sinks, zeros
        else:
            batch = self.host_batch
            how = batch.reading(wanted)
            found = select(batch, x, self._scaling, how, everything=wanted.budget == 1)
            parts = [part.reshape(*shape, *part.shape[1:]) for part in found]
            start, ends = batch.first.copy(), self.lengths
        ids, lengths, partitions, start, ends = (give_back(part, q) for part in (*parts, start, ends))
        return Selection(ids, lengths, partitions, self.sinks, start, ends)

    def _select_on_device(self, q: ArrayLike, wanted: AttendParameters, out: Selection | None) -> Selection:
        from saapindex.attention.device_select import select_on_device

        self._check_heads(q)
        with self._current(q):
            return select_on_device(self._batch, q, self._device, self._scaling, wanted, out)  # type: ignore[arg-type]

    @property
    def _scaling(self) -> Scaling:
        return Scaling(self.scale, self.softcap or 0.0)

    def _parameters(
        self,
        params: AttendParameters | None,
        budget: float | None,
        nprobe: int | None,
        top_p: float | None,
    ) -> AttendParameters:
        asked = self.params if params is None else params, budget, nprobe, top_p, self._device
        if self._asked is None or any(map(operator.is_not, asked, self._asked[0])):
            self._asked = asked, self._resolved(*asked[:4])
        return self._asked[1]

    def _resolved(
        self, params: AttendParameters, budget: float | None, nprobe: int | None, top_p: float | None
    ) -> AttendParameters:
        """Return what to read, checked."""
        if not isinstance(params, AttendParameters):
            raise InvalidInputError(f"params is a {type(params).__name__}, expected AttendParameters")
        given = {"budget": budget, "nprobe": nprobe, "top_p": top_p}
        given = {name: value for name, value in given.items() if value is not None}
        params = params.replace(**given) if given else params
        if self._device is None:
            return params
        if params.slopes:
            raise InvalidInputError(
                "slopes is True, expected None or False on a device: its kernels do without"
            )
        return params.replace(slopes=False)

    def _grouped(self, q: ArrayLike) -> tuple[NDArray[np.float32], int]:
        """Return queries as (S, t, g, d), and `g`."""
        heads, d = self.codebook.heads, self.codebook.d
        single = len(getattr(q, "shape", ())) == 3
        shape = (self.batch, None, d) if single else (self.batch, None, None, d)
        x = queries(q, "q", shape, self.ops)
        self._check_heads(x)
        streams, g = self.batch * heads, x.shape[1] // heads
        if single:
            return x.reshape(streams, 1, g, d), g
        x = x.reshape(streams, g, x.shape[2], d).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(x), g

    def _check_heads(self, q: ArrayLike) -> None:
        count, heads = tuple(getattr(q, "shape", ()))[1:2], self.codebook.heads
        if not count or not count[0] or count[0] % heads:
            raise InvalidInputError(
                f"q has {count[0] if count else 0} query heads, expected a multiple of the {heads} KV heads"
            )
        if self.sink_logits is not None and count[0] != len(self.sink_logits):
            raise InvalidInputError(
                f"q has {count[0]} query heads, expected the {len(self.sink_logits)} of sink_logits"
            )

    def _last(self, positions: ArrayLike | None, t: int) -> Ints:
        """Return the last position that each query sees, (S, t)."""
        if positions is None:
            last = self.lengths[:, None] - t + np.arange(t)
        else:
            last = integers(positions, "positions", (self.batch, t))
        return np.repeat(last, self.codebook.heads, axis=0)

    def _with_sinks(self, out: Floats, lse: Floats, g: int) -> tuple[Floats, Floats]:
        """Let a learned logit of each query head take part in the softmax."""
        logits = np.tile(np.asarray(self.sink_logits).reshape(-1, 1, g), (self.batch, 1, 1))
        total = np.logaddexp(lse, logits)
        return out * np.exp(lse - total)[..., None], total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the keys and lists to `path`, whole or not at all; a file that is there is replaced.

        The codebook is not in the file, only its checksum. Sequences that share pages share them in the file.
        """
        write_index(self if self._device is None else self.to("cpu"), Path(path))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        codebook: LayerCodebook,
        *,
        backend: str = "cpu",
        device: str = "cpu",
    ) -> Self:
        """Read the index at `path`, which was saved with the same `codebook`, to `device`.

        Raises
        ------
        CodebookMismatchError
            If it was saved with another codebook.
        FileFormatError
            If the file is truncated, foreign, newer than this release, or altered.
        OSError
            If it cannot be read at all.
        """
        settings, build = read_index(Path(path), codebook)
        index = cls(codebook, backend=backend, **settings)
        index._batch = build(index)
        return index if device == "cpu" else index.to(device)
