"""A selection for FlashInfer's paged decode: one table of pages for every KV head.

FlashInfer gives all heads of a request one table. Here each KV head of a sequence is a request of its own,
over a view of the same cache that has a single head: what a head selected is read and nothing else. Pages
that are selected whole (those of the window among them) are read as pages, all other tokens as pages of one
token; the two parts are joined by ``merge_state``, so every key counts once.
"""

from __future__ import annotations

import math
from typing import Any

from saapindex.adapters._tensors import as_tensor, chosen_columns
from saapindex.arrays import ArrayLike
from saapindex.attention import Selection
from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.params import check_choice, check_integer

import torch  # isort: skip  # after _tensors, which says what to install

try:
    import flashinfer
except ImportError as error:
    raise MissingDependencyError("flashinfer-python", "FlashInfer's decode", "flashinfer") from error

__all__ = ["PagedDecode"]

_WORKSPACE = 128 << 20


class PagedDecode:
    """Attention of one token of each sequence to what was selected in a paged cache.

    `plan` does the host's work, once a step for each selection; `run` is the hot call.

    Parameters
    ----------
    batch, q_heads, kv_heads, d
        Shape of the queries, and KV heads.
    page_size
        Tokens of a page.
    layout
        Of the cache. ``"HND"``: (pages, kv_heads, page_size, d), each head reads whole pages of its own.
        ``"NHD"``: (pages, page_size, kv_heads, d), pages that all heads selected are read whole.
        ``"lists"``: (pages, page_size, d), each page is one head's, see `AttentionIndex.list_order`.
    dtype, device
        Of queries and cache.
    scale
        Of the logits, by default ``1 / sqrt(d)``.
    cuda_graph
        Whether `run` is captured: then the buffers stay where they are, and `plan` is called between replays.
    most
        Tokens that a KV head may select, for those buffers.
    use_tensor_cores
        As FlashInfer's.

    Raises
    ------
    InvalidInputError
        On a layout that is not supported, or heads that do not fit.
    """

    def __init__(
        self,
        batch: int,
        q_heads: int,
        kv_heads: int,
        d: int,
        page_size: int,
        *,
        layout: str = "HND",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        scale: float | None = None,
        cuda_graph: bool = False,
        most: int | None = None,
        use_tensor_cores: bool = False,
    ) -> None:
        check_choice("layout", layout, ("HND", "NHD", "lists"))
        for name, value in (("batch", batch), ("kv_heads", kv_heads), ("page_size", page_size)):
            check_integer(name, value, 1)
        if q_heads < 1 or q_heads % kv_heads:
            raise InvalidInputError(f"q_heads is {q_heads}, expected a multiple of the {kv_heads} KV heads")
        if cuda_graph and most is None:
            raise InvalidInputError("most is None, expected the tokens that a KV head may select in a graph")
        self.shape, self.page_size, self.layout = (batch, q_heads, kv_heads, d), page_size, layout
        self.dtype, self.device = dtype, torch.device(device)
        self.scale = 1 / math.sqrt(d) if scale is None else scale
        self._graph = cuda_graph
        self._shared = layout == "NHD"
        streams = batch * kv_heads
        whole = batch if self._shared else streams
        room = 0 if most is None else most
        self._pages = self._wrapper(whole, whole * (-(-room // page_size) + 1), use_tensor_cores)
        self._singles = self._wrapper(streams, streams * room, use_tensor_cores)
        self._parts = False, False

    def _wrapper(self, requests: int, room: int, use_tensor_cores: bool) -> Any:
        space = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=self.device)
        buffers: dict[str, Any] = {}
        if self._graph:
            sizes = {"indptr": requests + 1, "indices": max(room, 1), "last_page_len": requests}
            buffers = {
                f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=self.device)
                for name, size in sizes.items()
            }
        how = {"use_cuda_graph": self._graph, "use_tensor_cores": use_tensor_cores, "backend": "fa2"}
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", **how, **buffers)

    def plan(self, selection: Selection, tables: ArrayLike, *, order: ArrayLike | None = None) -> None:
        """Say what the next runs read.

        Parameters
        ----------
        selection
            What `AttentionIndex.select` returned.
        tables
            int, (batch, most): the page of the cache that holds each page of a sequence, whatever beyond its
            end; (batch, kv_heads, most) in layout ``"lists"``.
        order
            int, (batch, kv_heads, most * page_size): the position that each place of the pages holds, -1 for
            none; by default the places are the positions.

        Raises
        ------
        InvalidInputError
            If the tables do not fit, or do not hold what is selected.
        """
        batch, q_heads, heads, d = self.shape
        table = as_tensor(tables, "tables", self.device).long()
        wanted = (batch, heads) if self.layout == "lists" else (batch,)
        if tuple(table.shape[:-1]) != wanted or tuple(selection.ids.shape[:2]) != (batch, heads):
            raise InvalidInputError(
                f"tables have shape {tuple(table.shape)} for a selection of {tuple(selection.ids.shape[:2])} "
                f"sequences and heads, expected ({', '.join(map(str, wanted))}, pages) for {(batch, heads)}"
            )
        count, size = table.shape[-1], self.page_size
        chosen = chosen_columns(selection, count * size, self.device, order=order)
        chosen = chosen.reshape(batch, heads, count, size)
        whole = chosen.all(3)
        if self._shared:
            whole = whole.all(1, keepdim=True).expand_as(whole)
        single = chosen & ~whole[..., None]
        h, lane = torch.arange(heads, device=self.device)[:, None], torch.arange(size, device=self.device)
        pages = table if self.layout == "lists" else table[:, None].expand(batch, heads, count)
        if self.layout == "HND":
            pages = pages * heads + h
        rows = pages[..., None] * size + lane
        if self._shared:
            rows = rows * heads + h[..., None]
            pages, whole = pages[:, 0], whole[:, 0]
        kinds = (
            (self._pages, whole.reshape(-1, count), pages, size, heads if self._shared else 1),
            (self._singles, single.reshape(batch * heads, -1), rows, 1, 1),
        )
        used = []
        for wrapper, kept, numbers, length, of in kinds:
            counts = kept.sum(1)
            used.append(self._graph or bool(counts.any()))
            if not used[-1]:
                continue
            indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            indices = numbers.reshape(kept.shape)[kept].int()
            last = torch.full((len(counts),), length, dtype=torch.int32)
            types = {"q_data_type": self.dtype, "kv_data_type": self.dtype}
            shape = (q_heads * of // heads, of, d, length)
            wrapper.plan(indptr.cpu(), indices, last, *shape, sm_scale=self.scale, **types)
        self._parts = (used[0], used[1])

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to what was planned.

        Parameters
        ----------
        q
            (batch, q_heads, d).
        k, v
            The cache, contiguous, in the layout given.

        Returns
        -------
        out, lse : (batch, q_heads, d), and float32 (batch, q_heads): log of the sum of ``exp(logit)``
        """
        batch, q_heads, heads, d = self.shape
        grouped = q.reshape(batch * heads, q_heads // heads, d)
        found = []
        if self._parts[0]:
            size = self.page_size
            views = [x.view(-1, size, heads if self._shared else 1, d) for x in (k, v)]
            whole = q if self._shared else grouped
            out, lse = self._pages.run(whole, (views[0], views[1]), return_lse=True)
            found.append((out.reshape(grouped.shape), lse.reshape(grouped.shape[:2])))
        if self._parts[1]:
            single = [x.view(-1, 1, 1, d) for x in (k, v)]
            found.append(self._singles.run(grouped, (single[0], single[1]), return_lse=True))
        if not found:
            return torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
        out, lse = found[0] if len(found) == 1 else flashinfer.merge_state(*found[0], *found[1])
        return out.reshape(q.shape), lse.reshape(q.shape[:2]) * math.log(2)
