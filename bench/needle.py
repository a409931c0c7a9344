"""Where a hidden sentence is lost: on the way to its list, or among the keys whose codes are read.

::

    python bench/needle.py MODEL codebook.safetensors manual.txt --saap saap1024 --saap saap256

The model reads a text of 8k tokens with a sentence hidden in it, and answers what it said. Wherever a query
of the answer puts a fifth of its attention or more on it, this looks up which share of the long-range
keys routing ranks before the list of the key that is wanted (`lists`), which share codes rank before it
(`codes`), and how often methods fetch the key and how far their output is from dense attention (`methods`).
Writes ``bench/results/needle.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peers import load_saap
from retrieval import needle

from saapindex.attention import LayerCodebook
from saapindex.codebook import Codebook
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.capture import capture_tokens
from saapindex.learn.evaluation import Protocol, Snapshot, take_snapshot
from saapindex.learn.models import load_model
from saapindex.learn.peers import PEERS, Peer
from saapindex.learn.peers.base import Queries
from saapindex.learn.peers.cluster import cluster, nearest
from saapindex.learn.peers.ladder import Ladder, Learned, peers_from_codebook
from saapindex.learn.peers.select import pooled
from saapindex.learn.peers.views import unrotate
from saapindex.learn.texts import cut_sequences, read_text
from saapindex.partition import View

RESULTS = Path(__file__).parent / "results"
WINDOW, PLACES = 2047, (3, 5)
"""Two of the eight places at which ``generate.py retrieval`` asks."""
SHARE = 0.2
"""Attention that a query must put on the sentence."""
SAID_BEFORE = 12
"""Tokens of the sentence before the number that count as part of it."""

Found = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries of one KV head that look for the sentence.

    Attributes
    ----------
    wanted
        For each such query: its row, the head of the group that looks for it, and the key it wants.
    """

    layer: int
    head: int
    snapshot: Snapshot
    wanted: list[tuple[int, int, int]]


def depths(length: int) -> list[float]:
    """Return the depths of `PLACES` in a text of `length` tokens."""
    reach = 1 - (WINDOW + 64) / length
    return [reach * place / 7 for place in PLACES]


def capture(model: str, text: Path, context: int, length: int, folder: Path) -> list[Path]:
    """Write the traces of each depth, and where the sentence is, unless they are there."""
    places = [folder / f"{depth:.2f}" for depth in depths(length)]
    if all((place / "needle.json").exists() for place in places):
        return places
    loaded = load_model(model, context=context, rope_scaling="ntk")
    haystack = cut_sequences(loaded.tokenizer, read_text(text), length, 1)[0]
    for depth, place in zip(depths(length), places, strict=True):
        asked = needle(loaded.tokenizer, haystack, length, depth, 0)
        tokens, n = [*asked.context, *asked.question, *asked.answer[:-1]], len(asked.answer)
        found = capture_tokens(
            loaded.model, tokens, layers=range(loaded.model.config.num_hidden_layers),
            query_positions=np.arange(len(tokens) - n, len(tokens)),
        )  # fmt: skip
        place.mkdir(parents=True, exist_ok=True)
        for number, trace in found.items():
            write_trace(place / f"layer-{number:02d}.safetensors", trace)
        at = next(i for i in range(len(tokens)) if tokens[i : i + n] == asked.answer)
        (place / "needle.json").write_text(json.dumps([at - SAID_BEFORE, at + n]))
    return places


def cases(places: list[Path]) -> Iterator[Case]:
    """Yield the heads that look for the sentence."""
    for place in places:
        first, last = json.loads((place / "needle.json").read_text())
        for path in sorted(place.glob("layer-*.safetensors")):
            trace = read_trace(path)
            for head in trace.heads:
                snapshot = take_snapshot(trace, head, Protocol())
                wanted = _wanted(trace, snapshot, first, last)
                if wanted:
                    yield Case(int(trace.info["layer"]), head, snapshot, wanted)


def _wanted(trace: Trace, snapshot: Snapshot, first: int, last: int) -> list[tuple[int, int, int]]:
    context, queries = snapshot.context, snapshot.queries
    keys = torch.cat([context.keys, snapshot.near_keys])
    at = torch.cat([context.positions, snapshot.near_positions])
    logits = (queries.x @ keys.T * context.scale).masked_fill(at > queries.positions[:, None], -torch.inf)
    weights = torch.softmax(logits, -1)[..., : len(context.keys)]
    inside = (context.positions >= first) & (context.positions < last)
    found = []
    for row in range(len(queries.positions)):
        mass = (weights[:, row] * inside).sum(-1)
        head = int(mass.argmax())
        if mass[head] >= SHARE:
            found.append((row, head, int((weights[head, row] * inside).argmax())))
    return found


def before(case: Case, scores: torch.Tensor, sizes: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Return the share of the keys that lie in lists of a better score than the wanted key's."""
    ranked = pooled(scores.masked_fill(sizes == 0, -torch.inf))
    total = float(sizes.sum())
    return [float(sizes[ranked[row] > ranked[row, labels[key]]].sum()) / total for row, _, key in case.wanted]


def means(x: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return the mean of the rows in each list."""
    sums = torch.zeros(len(sizes), x.shape[1]).index_add_(0, labels, x)
    return sums / sizes.clamp(min=1)[:, None]


def routings(case: Case, trained: dict[str, dict[tuple[int, int], Any]]) -> Iterator[tuple[str, list[float]]]:
    """Yield the place of the wanted list under partitions and routers."""
    context, queries = case.snapshot.context, case.snapshot.queries
    keys, x, scale = context.keys, queries.x, context.scale
    bare = unrotate(keys, context.positions, context.rope), unrotate(x, queries.positions, context.rope)
    for nlist in (64, 256, 1024):
        labels = nearest(keys, cluster(keys, nlist, 5))
        sizes = torch.bincount(labels, minlength=nlist)
        scores = x @ means(keys, labels, sizes).T * scale
        yield f"rotated, {nlist} lists in context, mean", before(case, scores, sizes, labels)
    for peers in trained.values():
        peer = peers[case.layer, case.head]
        state = peer.state_dict()
        labels = nearest(bare[0], state["centroids"], spherical=True)
        sizes = torch.bincount(labels, minlength=peer.nlist)
        name = f"un-rotated, {peer.nlist} lists"
        scores = x @ means(keys, labels, sizes).T * scale
        yield f"{name}, mean of keys", before(case, scores, sizes, labels)
        scores = bare[1] @ means(bare[0], labels, sizes).T * scale
        yield f"{name}, mean of un-rotated keys", before(case, scores, sizes, labels)
        yield f"{name}, SAAP's classifier", before(case, peer.predict(queries, context.rope), sizes, labels)


def fetched(case: Case, peer: Peer, budget: float) -> list[tuple[float, float]]:
    """Return for each wanted key whether it was fetched, and the error of the output."""
    context, queries, snapshot = case.snapshot.context, case.snapshot.queries, case.snapshot
    hidden = snapshot.near_positions > queries.positions[:, None]
    near = (queries.x @ snapshot.near_keys.T * context.scale).masked_fill(hidden, -torch.inf)
    far = queries.x @ context.keys.T * context.scale
    asked = Queries(queries.x, queries.positions, near.amax(-1))
    read = peer.read(asked, budget * len(context.keys) * context.row)
    logits, values = [near, far.masked_fill(~read.keys, -torch.inf)], [snapshot.near_values, context.values]
    dense = torch.softmax(torch.cat([near, far], -1), -1) @ torch.cat(values)
    if read.log_weights is not None and read.values is not None:
        logits, values = [*logits, read.log_weights], [*values, read.values]
    out = torch.softmax(torch.cat(logits, -1), -1) @ torch.cat(values)
    error = (out - dense).norm(dim=-1) / dense.norm(dim=-1)
    return [(float(read.keys[row, key]), float(error[head, row])) for row, head, key in case.wanted]


def unrotated(book: Codebook, peers: dict[tuple[int, int], Any], case: Case, share: float) -> Peer:
    """Return the ladder with SAAP's un-rotated partition in place of the codebook's."""
    layer, context = book.layer(case.layer), case.snapshot.context
    code = LayerCodebook.of(layer, len(context.keys)).code.head(list(layer.heads or ()).index(case.head))
    centroids = peers[case.layer, case.head].state_dict()["centroids"]
    learned = Learned(View("unrotated", rope=context.rope), centroids, None, True, code)
    return Ladder(scan_share=share).learned(lambda n: learned)


def main(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.")],
    codebook: Annotated[Path, typer.Argument(exists=True)],
    text: Annotated[Path, typer.Argument(exists=True)],
    saap: Annotated[list[Path], typer.Option(help="What bench/peers.py wrote.", exists=True)],
    traces: Annotated[Path, typer.Option()] = Path("needle-traces"),
    context: Annotated[int, typer.Option(help="Tokens that the model is stretched to.")] = 32768,
    length: Annotated[int, typer.Option(help="Tokens of the text.")] = 8192,
    out: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Look for the sentence as routing, codes and methods do."""
    torch.set_grad_enabled(False)
    places = capture(model, text, context, length, traces)
    book = Codebook.load(codebook)
    trained = {path.stem: load_saap(path, "cpu", {}) for path in saap}
    shares = (0.3, 0.6, 0.9)
    makers = {share: peers_from_codebook(book, scan_share=share) for share in shares}
    lists: Found = {}
    codes: list[float] = []
    results: dict[str, list[tuple[float, float]]] = {}
    heads: list[str] = []
    for case in cases(places):
        heads.append(f"{case.layer}.{case.head}")
        print(heads[-1], flush=True)
        for name, shares_before in routings(case, trained):
            lists.setdefault(name, []).extend(shares_before)
        methods: dict[str, Peer] = {}
        for share in shares:
            methods[f"saapindex, {share:.0%} on codes"] = makers[share](case.layer, case.head)
        coarse = min(trained.values(), key=lambda peers: peers[case.layer, case.head].nlist)
        for share in shares[:2]:
            name = f"saapindex, SAAP's un-rotated lists, {share:.0%} on codes"
            methods[name] = unrotated(book, coarse, case, share)
        for peers in trained.values():
            peer = peers[case.layer, case.head]
            methods[f"SAAP, {peer.nlist} lists"] = peer
            peer.count_router = False
        methods["Quest, pages of 64"] = PEERS["quest"](page=64)  # type: ignore[call-arg]
        for name, method in methods.items():
            method.build(case.snapshot.context)
            for budget in (0.02, 0.05):
                results.setdefault(f"{name}, {budget:.0%}", []).extend(fetched(case, method, budget))
        own: Any = methods[f"saapindex, {shares[0]:.0%} on codes"]
        queries = case.snapshot.queries
        projected = queries.x @ own._code.inverse
        squares = case.snapshot.context.scale**2 / 2 * projected**2
        ranked = pooled(own._estimates(projected, queries, squares))
        codes += [float((ranked[row] > ranked[row, key]).float().mean()) for row, _, key in case.wanted]
        base = (queries.x @ own._anchors.T) * case.snapshot.context.scale
        spread = ((squares @ own._code.spread)[..., None] * own._spread).clamp(max=3.0)
        own_lists = before(case, base + spread, own._sizes, own._labels)
        lists.setdefault(f"codebook, {len(own._sizes)} lists, mean and spread", []).extend(own_lists)

    def quantiles(values: list[float]) -> dict[str, float]:
        return {f"{share:.0%}": float(np.quantile(values, share)) for share in (0.5, 0.75, 0.9)}

    content = {
        "length": length,
        "depths": depths(length),
        "heads": heads,
        "queries": len(codes),
        "lists": {name: quantiles(values) for name, values in lists.items()},
        "codes": quantiles(codes),
        "methods": {
            name: {"fetched": np.mean([f for f, _ in pairs]), "error": np.median([e for _, e in pairs])}
            for name, pairs in results.items()
        },
    }
    (out / "needle.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    typer.run(main)
