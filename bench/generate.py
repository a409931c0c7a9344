"""How well and how fast a language model generates through the index, next to dense attention.

The codebook comes from ``saapindex capture`` and ``saapindex train``, with the same context and rope scaling.
Options of all commands stand first::

    python bench/generate.py --at 0.05 --at 0.02 MODEL codebook.safetensors perplexity a.txt b.txt
    python bench/generate.py --at "nprobe=32,remainder=false" MODEL codebook.safetensors retrieval a.txt
    python bench/generate.py MODEL codebook.safetensors speed a.txt --length 32000

What a step may read (``--at``) is a budget in bytes, or fields of `AttendParameters`, or a published method
that is simulated, see ``bench/peers.py``: ``quest=0.05,page=64`` or ``saap=0.05,file=saap.safetensors``. A
small run: ``--context 1024 --window 127 --dense-below 0``, and ``perplexity --steps 16``. With ``--read-on
cuda`` prompts are read on a GPU and the rest happens where ``--device`` says, so that decoding on a few cores
can be timed without waiting for them to read prompts; ``--prompts FOLDER`` keeps what a prompt became, for a
later run that begins with the same. Each command writes
``bench/results/generate-<command>.json``; ``bench/generate_plots.py`` joins and draws them.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from generate_setup import DENSE, Bench, console, parse_method
from peers import PeerCache, PeerMethod
from retrieval import TASKS, Question
from rich.table import Table
from transformers import StaticCache

from saapindex.codebook import Codebook
from saapindex.commands.capture import parse_rope_scaling
from saapindex.learn.models import load_model
from saapindex.learn.texts import text_name

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
WARM_UP = 3
"""Steps before those that are timed."""

Text = Annotated[Path, typer.Argument(help="A text that the codebook was not trained on.", exists=True)]
Chunk = Annotated[int, typer.Option(help="Tokens of a step; 1 is what generation does.", min=1, max=32)]


@app.callback()
def common(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.")],
    codebook: Annotated[Path, typer.Argument(help="Its codebook.", exists=True)],
    at: Annotated[list[str] | None, typer.Option(help="Default: 0.02 and 0.05.")] = None,
    context: Annotated[int, typer.Option(help="Tokens that the model is stretched to.")] = 32768,
    rope_scaling: Annotated[str, typer.Option(help="How, as for ``saapindex capture``.")] = "ntk",
    window: Annotated[int, typer.Option(help="Recent tokens that are always read.")] = 2047,
    dense_below: Annotated[int, typer.Option(help="Shorter contexts are dense.")] = 4096,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a prompt read at a time; 0: all.")] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    read_on: Annotated[str | None, typer.Option(help="Device that reads prompts; default: the same.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder that keeps what prompts became.")] = None,
    dtype: Annotated[str, typer.Option(help="What the model computes in.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="Of the index, on the host.")] = "cpu",
    index_on: Annotated[str, typer.Option(help="Device of the index, cpu or cuda.")] = "cpu",
    nlist: Annotated[int | None, typer.Option(help="Lists; default: what suits a context.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Load what all commands need."""
    torch.set_grad_enabled(False)
    methods = {text: parse_method(text) for text in at or ("0.02", "0.05")}
    scaling = parse_rope_scaling(rope_scaling)
    settings: dict[str, Any] = {"context": context, "rope_scaling": scaling, "dtype": dtype}
    loaded = load_model(model, device=device, **settings)
    reader = load_model(model, device=read_on, **settings).model if read_on else None
    ctx.obj = Bench(
        loaded.model,
        loaded.tokenizer,
        Codebook.load(codebook),
        {
            "window": window,
            "dense_below": dense_below,
            "backend": backend,
            "device": index_on,
            "nlist": nlist,
        },
        methods,
        context,
        rope_scaling,
        prefill_chunk,
        out,
        reader,
        prompts,
    )


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)


@app.command()
def perplexity(
    ctx: typer.Context,
    texts: Annotated[list[Path], typer.Argument(help="Texts the codebook was not trained on.", exists=True)],
    steps: Annotated[int, typer.Option(help="Tokens that are decoded, the last of the context.")] = 2048,
    chunk: Chunk = 1,
) -> None:
    """Read all but the last tokens of a text densely, decode the rest, compare what the model expects."""
    bench: Bench = ctx.obj
    results = []
    for path in texts:
        tokens, start = bench.tokens(path, bench.context), time.perf_counter()
        begun = bench.context - steps - 1
        caches = bench.caches(bench.read(tokens[:begun]))
        prefilled = time.perf_counter() - start
        sums: dict[str, dict[str, list[torch.Tensor]]] = {
            name: {"nll": [], "kl": [], "same": []} for name in caches
        }
        place = begun
        for said in bench.follow(tokens[begun:-1], caches, chunk):
            dense = said[DENSE]
            after = torch.tensor(tokens[place + 1 : place + 1 + len(dense)], device=dense.device)
            place += len(dense)
            for name, logs in said.items():
                sums[name]["nll"].append(-logs.gather(1, after[:, None])[:, 0])
                sums[name]["kl"].append((dense.exp() * (dense - logs)).sum(dim=1))
                sums[name]["same"].append((dense.argmax(1) == logs.argmax(1)).float())
        found = {}
        for name, lists in sums.items():
            nll, kl, same = (torch.cat(lists[part]).double() for part in ("nll", "kl", "same"))
            more = nll - torch.cat(sums[DENSE]["nll"]).double()
            found[name] = {
                "perplexity": nll.mean().exp().item(),
                "above_dense": more.mean().exp().item() - 1,
                "standard_error": (more.std() / math.sqrt(steps)).item(),
                "kl": kl.mean().item(),
                "same_token": same.mean().item(),
            }
            if isinstance(caches[name], PeerCache):
                found[name]["bytes"] = caches[name].share_read
        seconds = time.perf_counter() - start
        results.append({"text": text_name(path), "prefill_s": prefilled, "seconds": seconds, "found": found})
        columns = ["perplexity", "above dense", "standard error", "KL", "same token"]
        rows = [[name, *list(values.values())[: len(columns)]] for name, values in found.items()]
        _table(text_name(path), ["", *columns], rows)
        bench.write("perplexity", steps=steps, chunk=chunk, texts=results)


@app.command()
def retrieval(
    ctx: typer.Context,
    text: Text,
    task: Annotated[list[str] | None, typer.Option(help="needle or key-value; default: both.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; default 8192, 16384, 32000.")] = None,
    depths: Annotated[int, typer.Option(help="Places, from the beginning to the window.", min=1)] = 8,
    samples: Annotated[int, typer.Option(help="Of each place.", min=1)] = 2,
    first: Annotated[int, typer.Option(help="Number of the first sample.", min=0)] = 0,
    chunk: Chunk = 1,
) -> None:
    """Ask for something that lies deep in a context, which is read densely; question and answer are not.

    An answer is right if every one of its tokens is the likeliest, which is when greedy search finds it.
    """
    bench: Bench = ctx.obj
    lengths, results = length or [8192, 16384, 32000], []
    haystack = bench.tokens(text, max(lengths))
    for name, size in ((name, size) for name in task or TASKS for size in lengths):
        reach = max(0.0, 1 - (bench.settings["window"] + 64) / size)
        scores: dict[str, list[tuple[bool, float]]] = {}
        for seed in range(first, first + samples):
            places = [reach * place / max(depths - 1, 1) for place in range(depths)]
            asked = [(depth, TASKS[name](bench.tokenizer, haystack, size, depth, seed)) for depth in places]
            for context, group in itertools.groupby(asked, lambda pair: pair[1].context):
                read = bench.caches(bench.read(context))
                for depth, question in group:
                    found = _answer(bench, question, copy.deepcopy(read), chunk)
                    results.append(
                        {"task": name, "length": size, "depth": depth, "seed": seed, "found": found}
                    )
                    for method, one in found.items():
                        scores.setdefault(method, []).append((one["right"], one["log_probability"]))
        rows: list[list[Any]] = [
            [method, f"{sum(r for r, _ in pairs)}/{len(pairs)}", statistics.mean(x for _, x in pairs)]
            for method, pairs in scores.items()
        ]
        _table(f"{name}, {size} tokens", ["", "right", "mean log-probability"], rows)
        bench.write("retrieval", chunk=chunk, questions=results)


def _answer(bench: Bench, asked: Question, caches: dict[str, Any], chunk: int) -> dict[str, dict[str, Any]]:
    """Ask a question of each cache, and hear how likely the right answer is."""
    said = list(bench.follow([*asked.question, *asked.answer[:-1]], caches, chunk))
    answer, found = torch.tensor(asked.answer, device=bench.model.device), {}
    for method in caches:
        logs = torch.cat([part[method] for part in said])[-len(answer) :]
        likely = logs.gather(1, answer[:, None]).sum().item()
        found[method] = {"right": torch.equal(logs.argmax(dim=1), answer), "log_probability": likely}
    return found


@app.command()
def speed(
    ctx: typer.Context,
    text: Text,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; default 8192, 16384, 32000.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens that are timed.", min=1)] = 32,
    batch: Annotated[int, typer.Option(help="Sequences side by side.", min=1)] = 1,
) -> None:
    """Time decoding, a token at a time.

    Dense attention is timed with `DynamicCache`, which transformers uses by default and which copies all it
    holds in every step, and with `StaticCache`, which does not. Steps alternate.
    """
    bench: Bench = ctx.obj
    lengths, more, results = length or [8192, 16384, 32000], steps + WARM_UP, []
    tokens = bench.tokens(text, max(lengths) + more)
    for size in lengths:
        read = bench.read(tokens[:size])
        read.batch_repeat_interleave(batch)
        after = torch.tensor([tokens[size : size + more]] * batch, device=bench.model.device)
        caches: dict[str, Any] = {"dense, dynamic": copy.deepcopy(read)}
        if not any(read.is_sliding):  # whose prompt is gone
            static = caches["dense, static"] = StaticCache(
                config=bench.model.config, max_cache_len=size + more
            )
            for number, layer in enumerate(read.layers):
                static.update(layer.keys, layer.values, number)
        start = time.perf_counter()
        indexed = bench.indexed(read, batch)
        made = time.perf_counter() - start
        del read
        for name, params in bench.methods.items():
            if isinstance(params, PeerMethod):
                raise typer.BadParameter(f"{name} is simulated, which says nothing about speed")
            caches[name] = copy.deepcopy(indexed)
            caches[name].params = params
        found = _timed(bench, after, caches)
        for name in bench.methods:
            found[name] |= {"indexing_s": made, "memory": asdict(caches[name].memory())}
        results.append({"length": size, "found": found})
        rows = [
            [name, x["ms"], x["fastest_ms"], x["tokens_per_s"], x["times_faster"]["dense, dynamic"]]
            for name, x in found.items()
        ]
        columns = ["", "ms a token", "fastest", "tokens/s", "x dense, dynamic"]
        _table(f"{size} tokens, batch {batch}", columns, rows)
    bench.write("speed", steps=steps, batch=batch, lengths=results)


def _timed(bench: Bench, tokens: torch.Tensor, caches: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Feed (batch, steps) tokens one by one to all caches in turn; the median time of a step of each.

    In turn, so that what else the machine does weighs on all alike; ratios are medians over the steps.
    """
    spent: dict[str, list[float]] = {name: [] for name in caches}
    for place in range(tokens.shape[1]):
        for name, cache in caches.items():
            start = time.perf_counter()
            step = bench.step(tokens[:, place : place + 1], cache, name in bench.methods)
            step.argmax(dim=-1).cpu()  # waits for a GPU
            spent[name].append(1000 * (time.perf_counter() - start))
    found: dict[str, dict[str, Any]] = {}
    for name, times in spent.items():
        middle = statistics.median(times[WARM_UP:])
        pairs = {base: zip(spent[base][WARM_UP:], times[WARM_UP:], strict=True) for base in spent}
        found[name] = {
            "ms": middle,
            "fastest_ms": min(times[WARM_UP:]),
            "tokens_per_s": 1000 * len(tokens) / middle,
            "times_faster": {
                base: statistics.median(x / y for x, y in pairs[base])
                for base in spent
                if base not in bench.methods
            },
        }
    return found


if __name__ == "__main__":
    app()
