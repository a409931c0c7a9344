"""One selection through every adapter: what each reads beyond it, and how long it takes.

Keys are clustered random ones of Llama-3.1-8B's shape (32 query heads, 8 KV heads of 128 dimensions)::

    python bench/adapters.py                      # on a GPU; without one, small shapes on the CPU
    python bench/adapters.py --contexts 32768,131072

``error`` is that against dense attention over the selected keys, ``error_to_dense`` over all keys (which are
random here, so it says little about models). ``mbytes`` is everything that attention reads, for
`AttentionIndex.attend` statistics of lists and codes too; ``over_ideal`` is that over the bytes of the keys
and values selected. Times are medians; ``graph`` says whether calls were replayed from a CUDA graph. An
adapter that is not installed or does not run is listed with the reason. Writes
``bench/results/adapters.json``.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.attention.flex_attention import flex_attention

from saapindex.adapters import flex, sdpa
from saapindex.attention import AttendParameters, AttentionIndex, fit_layer
from saapindex.attention.limits import reading

RESULTS = Path(__file__).parent / "results" / "adapters.json"
_PAGE = 16


class Case:
    """A layer's cache, an index of it, and what was selected last."""

    def __init__(self, lengths: list[int], heads: int, g: int, d: int, device: str, sizes: list[int]) -> None:
        self.heads, self.g, self.d, self.device = heads, g, d, torch.device(device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        batch, n = len(lengths), max(lengths)
        gen = torch.Generator(device).manual_seed(0)
        centers = torch.randn(heads, 64, d, generator=gen, device=device)
        label = torch.randint(64, (batch, heads, n), generator=gen, device=device)
        noise = torch.randn(batch, heads, n, d, generator=gen, device=device)
        self.k = (centers[torch.arange(heads, device=device)[:, None], label] + noise).to(self.dtype)
        self.v = torch.randn(batch, heads, n, d, generator=gen, device=device).to(self.dtype)
        # Twice as long, so that attention has peaks.
        self.q = (2 * torch.randn(batch, heads * g, d, generator=gen, device=device)).to(self.dtype)
        keys = self.k[0, :, :16_384].float().cpu().numpy()
        sample = np.repeat(self.q[0].float().cpu().numpy()[:, None], 64, axis=1)
        sample += np.random.default_rng(0).standard_normal(sample.shape, dtype=np.float32)
        codebook = fit_layer(keys, sample, max(16, n // 256), words=6, niter=2, backend="reference")
        params = AttendParameters(slopes=False)  # as on a device
        how: dict[str, Any] = {"adapt": 0, "dense_below": 0, "params": params, "backend": "reference"}
        self.index = AttentionIndex(codebook, batch=batch, device=device, **how)
        shifted = [
            torch.stack([torch.roll(x[b], n - m, dims=1) for b, m in enumerate(lengths)])
            for x in (self.k, self.v)
        ]
        self.index.add(*shifted, lengths=lengths)
        host = self.index.to("cpu")
        self.orders = {size: host.list_order(size) for size in {_PAGE, *sizes}}
        self.sizes, self.n, self.batch = sizes, n, batch
        there = torch.arange(n, device=device) < torch.tensor(lengths, device=device)[:, None]
        self.held = None if bool(there.all()) else there[:, None, None]
        self.full = self.dense(self.held).float()
        self.compiled: dict[Any, Callable[..., torch.Tensor]] = {}
        torch._dynamo.reset()

    def select(self, how: dict[str, Any]) -> None:
        """Select, and attend densely to the same keys for comparison."""
        self.how = how
        self.selection = self.index.select(self.q, **how)
        mask = sdpa.attention_mask(self.selection, self.n, self.heads * self.g, device=self.device)
        self.selected = float(mask.sum() / (self.batch * self.heads * self.g))
        self.known = self.dense(mask).float()

    def own_bytes(self) -> float:
        """Bytes that the index itself reads for a KV head, on average: see `AttendParameters.budget`."""
        book, element = self.index.codebook, self.k.element_size()
        first = self.selection.window_start.cpu().numpy()
        long = np.repeat(first, self.heads) - self.index.sinks
        row = 2 * self.d * element
        dense = AttendParameters(budget=1.0, slopes=False)
        fixed = long * row - reading(dense, long, book.code, book.nlist, element).left
        codes = np.zeros(len(long), np.int64)
        if "budget" in self.how:  # keys are chosen by the codes of the lists that are visited
            visited = self.selection.partitions.cpu().numpy().reshape(len(long), -1)
            sizes = self.index.list_sizes.reshape(len(long), -1)
            taken = np.where(visited >= 0, np.take_along_axis(sizes, np.maximum(visited, 0), axis=1), 0)
            codes = taken.sum(axis=1) * book.code.nbytes_per_key
        return float((fixed + codes).mean()) + self.selected * row

    def dense(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of torch over the whole cache."""
        function = torch.nn.functional.scaled_dot_product_attention
        out = function(self.q[:, :, None], self.k, self.v, attn_mask=mask, enable_gqa=True)
        return out[:, :, 0]

    def time(self, call: Callable[[], Any], graph: bool) -> tuple[float, bool]:
        """Return the median of a call in microseconds, and whether it was captured."""
        if self.device.type == "cpu":
            call()
            return 1e6 * statistics.median(_clocked(call) for _ in range(5)), False
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            call = captured.replay
        spans = []
        for _ in range(30):
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            spans.append(1000 * start.elapsed_time(end))
        return statistics.median(spans), graph

    def row(
        self,
        granularity: str,
        read: float,
        call: Callable[[], torch.Tensor],
        *,
        graph: bool,
        exact: bool = True,
        nbytes: float | None = None,
    ) -> dict[str, Any]:
        """Measure one way to attend; `read` is keys read by a KV head, on average, and `nbytes` all bytes."""
        row = 2 * self.d * self.k.element_size()
        nbytes = read * row if nbytes is None else nbytes
        out = call().float()
        error = float((out - self.known).norm() / self.known.norm())
        if exact and error > 2e-2:
            raise RuntimeError(f"its error is {error:.2g}, so it is not timed")
        micros, captured = self.time(call, graph)
        return {
            "granularity": granularity,
            "keys_read": round(read, 1),
            "over_ideal": round(nbytes / (self.selected * row), 3),
            "mbytes": round(nbytes * self.heads * self.batch / 1e6, 3),
            "error": error,
            "error_to_dense": float((out - self.full).norm() / self.full.norm()),
            "micros": round(micros, 1),
            "graph": captured,
        }

    def rows(self) -> dict[str, dict[str, Any]]:
        """Measure every adapter."""
        found: dict[str, dict[str, Any]] = {}
        gpu, n = self.device.type == "cuda", self.n

        def measure(name: str, make: Callable[[], dict[str, Any]]) -> None:
            try:
                found[name] = make()
            except Exception as error:
                found[name] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}

        measure(
            "dense SDPA", lambda: self.row("all", n, lambda: self.dense(self.held), graph=gpu, exact=False)
        )
        measure("sdpa.attend", lambda: self.row("key", self.selected, self._gathered, graph=False))
        mask = sdpa.attention_mask(self.selection, n, self.heads * self.g, device=self.device)
        measure("sdpa.attention_mask", lambda: self.row("all", n, lambda: self.dense(mask), graph=gpu))
        for size in self.sizes:
            for lists in (False, True):
                name = f"flex, {'list' if lists else 'token'} order, blocks of {size}"
                measure(name, lambda size=size, lists=lists: self._flex(size, lists))  # type: ignore[misc]
        for layout, size in (("HND", _PAGE), ("NHD", _PAGE), ("NHD", 1), ("lists", _PAGE)):
            for cores in (False, True):
                name = f"flashinfer, {layout}, pages of {size}{', tensor cores' if cores else ''}"
                how = (layout, size, cores)
                measure(name, lambda how=how: self._flashinfer(*how))  # type: ignore[misc]
        measure("AttentionIndex.attend", self._attend)
        measure("AttentionIndex.select", self._select)
        return found

    def _gathered(self) -> torch.Tensor:
        out: torch.Tensor = sdpa.attend(self.q, self.k, self.v, self.selection)
        return out

    def _flex(self, size: int, lists: bool) -> dict[str, Any]:
        order = self.orders[size] if lists else None
        k, v = (x if order is None else flex.in_order(x, order) for x in (self.k, self.v))
        columns = k.shape[2]
        compiled = self.compiled.setdefault((size, lists), torch.compile(flex_attention, dynamic=False))
        start = time.perf_counter()
        blocks = flex.block_mask(
            self.selection, columns, self.g, order=order, block_size=size, device=self.device
        )
        planned = time.perf_counter() - start
        read = float(blocks.read.double().mean())
        found = self.row(
            f"blocks of {size}",
            read,
            lambda: flex.attend(self.q, k, v, blocks, attention=compiled),
            graph=self.device.type == "cuda",
        )
        return found | {"plan_micros": round(1e6 * planned, 1)}

    def _flashinfer(self, layout: str, size: int, cores: bool) -> dict[str, Any]:
        from saapindex.adapters.flashinfer import PagedDecode

        order = self.orders[size] if layout == "lists" else None
        k, v = (
            _paged(x if order is None else flex.in_order(x, order), layout, size) for x in (self.k, self.v)
        )
        shape = (self.batch, -1) if order is None else (self.batch, self.heads, -1)
        pages = len(k) if layout != "lists" else k.numel() // (size * self.d)
        tables = torch.arange(pages, device=self.device).reshape(shape)
        decode = PagedDecode(
            self.batch, self.heads * self.g, self.heads, self.d, size, layout=layout, dtype=self.dtype,
            device=self.device, cuda_graph=True, most=self.n, use_tensor_cores=cores,
        )  # fmt: skip
        decode.plan(self.selection, tables, order=order)
        start = time.perf_counter()
        decode.plan(self.selection, tables, order=order)
        torch.cuda.synchronize()
        planned = time.perf_counter() - start
        found = self.row("key", self.selected, lambda: decode.run(self.q, k, v)[0], graph=True)
        return found | {"plan_micros": round(1e6 * planned, 1)}

    def _attend(self) -> dict[str, Any]:
        def call() -> torch.Tensor:
            out: torch.Tensor = self.index.attend(self.q, **self.how)[0]
            return out

        gpu = self.device.type == "cuda"
        return self.row("key", self.selected, call, graph=gpu, exact=False, nbytes=self.own_bytes())

    def _select(self) -> dict[str, Any]:
        """Time what comes before an adapter: the selection, written to the same arrays again."""
        gpu = self.device.type == "cuda"
        out = self.index.select(self.q, **self.how) if gpu else None
        micros, captured = self.time(lambda: self.index.select(self.q, **self.how, out=out), gpu)
        return {"columns": int(self.selection.ids.shape[2]), "micros": round(micros, 1), "graph": captured}


def _paged(x: torch.Tensor, layout: str, size: int) -> torch.Tensor:
    """Lay (batch, kv_heads, n, d) out in pages, one sequence after the other."""
    n, d = x.shape[2:]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -n % size))
    x = padded.reshape(*x.shape[:2], -1, size, d)
    if layout == "lists":
        return x.reshape(-1, size, d).contiguous()
    by_page = x.permute(0, 2, 1, 3, 4) if layout == "HND" else x.permute(0, 2, 3, 1, 4)
    return by_page.flatten(0, 1).contiguous()


def _clocked(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(
    contexts: Annotated[str, typer.Option(help="Lengths; several of a batch are joined by +.")] = "",
    budget: Annotated[float, typer.Option(help="Share of the bytes.")] = 0.05,
    nprobe: Annotated[int, typer.Option(help="Lists that are taken whole, in a second selection.")] = 6,
    blocks: Annotated[str, typer.Option(help="Sizes of the blocks of FlexAttention.")] = "16,128",
    out: Annotated[Path, typer.Option(help="Where to write.")] = RESULTS,
) -> None:
    """Measure, print and write."""
    gpu = torch.cuda.is_available()
    device, shape = ("cuda", (8, 4, 128)) if gpu else ("cpu", (2, 4, 64))
    wanted = contexts or ("32768,131072,32768+20000+8192+3000" if gpu else "4096")
    results: dict[str, Any] = {}
    machine = {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
    for name in ("flashinfer", "cupy"):
        if importlib.util.find_spec(name) is not None:
            machine[name] = importlib.import_module(name).__version__
    settings = {"kv_heads": shape[0], "group": shape[1], "d": shape[2], "window": 2047, "sinks": 1}
    found = {"machine": machine, "settings": settings, "results": results}
    for text in wanted.split(","):
        case = Case(
            [int(part) for part in text.split("+")], *shape, device, [int(size) for size in blocks.split(",")]
        )
        for how in ({"budget": budget}, {"nprobe": nprobe}):
            case.select(how)
            name = f"{text}, {next(iter(how))}={next(iter(how.values()))}"
            results[name] = {"selected": round(case.selected, 1), "rows": case.rows()}
            for label, row in results[name]["rows"].items():
                typer.echo(f"{name:36} {label:44} {json.dumps(row)}")
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
