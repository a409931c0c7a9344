"""How close methods come to dense attention, on traces of the real model. Results go to ``bench/results``.

::

    python bench/texts.py KERNEL PYTHON SOURCES --out texts      # see there
    python bench/fidelity.py capture SmolLM2-135M-Instruct.Q4_1.gguf texts
    python bench/fidelity.py train        # a codebook of 30 KV heads: 12 sequences, 2 held out
    python bench/fidelity.py compare      # every method, 4 test sequences
    python bench/fidelity.py attend       # the same through AttentionIndex.attend
    python bench/fidelity.py ablate       # without one part at a time
    python bench/fidelity.py sweep        # lists, width of codes, how bytes are split: 8k, 32k and 128k
    python bench/fidelity.py shift        # other texts, and from 8k to 32k and 128k
    python bench/fidelity.py paper        # the paper's setting against training data

A GPU is used where there is one: everything together takes about twenty minutes on an H100.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from saapindex.attention import AttentionIndex, LayerCodebook
from saapindex.codebook import Codebook
from saapindex.files import write_whole
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.capture import capture as capture_traces
from saapindex.learn.evaluation import (
    MODES,
    OWN,
    Protocol,
    Record,
    Report,
    evaluate,
    measure,
    summarise,
    take_snapshot,
    training_sequence,
)
from saapindex.learn.evaluation.page import html_page
from saapindex.learn.evaluation.plots import pareto_png
from saapindex.learn.evaluation.report import device_name, versions
from saapindex.learn.models import load_model
from saapindex.learn.peers import PEERS, Peer
from saapindex.learn.peers.ladder import Ladder, peers_from_codebook
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.train import train as train_codebook
from saapindex.params import AttendParameters, default_nlist
from saapindex.progress import track

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results"
LAYERS = tuple(range(1, 30, 3))
"""Ten layers of three KV heads each."""
ALL = ",".join(map(str, LAYERS))
FEW = "4,13,25"
"""Layers on which settings are compared."""
SHORT, LONG, YOUNG = 32768, 131072, 8192
CONTEXTS = {
    "train": SHORT,
    "valid": SHORT,
    "test": SHORT,
    "shift": SHORT,
    "train-long": LONG,
    "test-long": LONG,
}
"""Tokens of a sequence of each part of the texts."""
FEW_QUERIES = Protocol(max_queries=64)
BUDGETS = (0.02, 0.05, 0.1)
WHOLE_BUDGETS = (0.02, 0.05, 0.1, 0.15, 0.2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Traces = Annotated[Path, typer.Option(help="Folder of the traces.")]
Layers = Annotated[str, typer.Option(help="Numbers of layers with commas between.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def numbers(text: str) -> list[int]:
    """Read numbers with commas between."""
    return [int(part) for part in text.split(",")]


def files(traces: Path, part: str, layers: Iterable[int]) -> list[Path]:
    """Return the traces of one part, sequence by sequence."""
    return [
        path for layer in layers for path in sorted((traces / part).glob(f"*/layer-{layer:02d}.safetensors"))
    ]


def write(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a result with device and versions."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {**content, "device": device_name(torch.device(DEVICE)), "versions": versions()}
    (out / name).write_text(json.dumps(whole, indent=1) + "\n")


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of a result as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)


def means(records: Iterable[Record], *by: str) -> list[dict[str, Any]]:
    """Return mean error, recall and bytes of records that agree in some fields."""
    rows = []
    for summary in summarise(records, *by):
        part = dict(zip(by, summary.key, strict=True))
        more = {name: getattr(summary, name) for name in ("error", "error_p90", "mass", "recall_10", "bytes")}
        rows.append({**part, **more, "heads": summary.count})
    return rows


@app.command()
def capture(
    model: Path,
    texts: Path,
    out: Path = Path("traces"),
    layers: Layers = ALL,
    parts: Annotated[str, typer.Option(help="Folders of texts with commas between.")] = ",".join(CONTEXTS),
) -> None:
    """Capture sequences of 32k and 128k tokens, the rotary base raised for each ("NTK-aware")."""
    console = Console()
    for context, group in itertools.groupby(parts.split(","), CONTEXTS.__getitem__):
        loaded = load_model(model, context=context, rope_scaling="ntk")
        for part in group:
            # Held-out sequences lie with those of the training, which names them.
            folder = out / part.replace("valid", "train")
            found = sorted((texts / part).glob("*.txt.gz"))
            report = capture_traces(loaded, found, context=context, out=folder, layers=numbers(layers))
            console.print(f"{part}: {report.nbytes / 1e9:.1f} GB in {report.seconds:.0f} s")


def held_out(traces: Path) -> list[str]:
    """Return the names of the sequences that training holds out."""
    kernel = ("dev-tools", "hwmon")
    return sorted(path.name for path in (traces / "train").iterdir() if path.name.startswith(kernel))


def split(traces: Path, layers: Iterable[int]) -> tuple[list[Path], list[Path]]:
    """Return traces to train on, and those held out."""
    kept = set(held_out(traces))
    found = files(traces, "train", layers)
    return [p for p in found if p.parent.name not in kept], [p for p in found if p.parent.name in kept]


@app.command()
def train(traces: Traces = Path("traces"), out: Out = RESULTS, nlist: str = "128,256") -> None:
    """Train the codebook of all captured layers; write what its heads gained."""
    start = time.perf_counter()
    settings = TrainingSettings(nlist=numbers(nlist))
    codebook = train_codebook(traces / "train", settings, held_out=held_out(traces), show=True)
    seconds = time.perf_counter() - start
    codebook.save(traces / "codebook.safetensors")
    write(
        out, "codebook.json", {"seconds": seconds, "settings": settings.to_dict(), "report": codebook.report}
    )
    heads = codebook.report["heads"]
    rungs = {rung for head in heads for rung in next(iter(head["lists"].values()))["recall"]}
    rows = []
    for count in settings.nlist:
        lists = [
            head["lists"][str(count)] if str(count) in head["lists"] else head["lists"][count]
            for head in heads
        ]
        for rung in sorted(rungs):
            found = [part["recall"][rung] for part in lists if rung in part["recall"]]
            kept = sum(part["router"] == rung for part in lists)
            rows.append(
                {"nlist": count, "router": rung, "mass recall": sum(found) / len(found), "heads kept": kept}
            )
    show(f"{len(heads)} heads in {seconds:.0f} s", rows)


@app.command()
def compare(
    traces: Traces = Path("traces"),
    out: Out = RESULTS,
    layers: Layers = ALL,
    methods: str = "",
    tune: Layers = "13",
    name: str = "fidelity",
) -> None:
    """Compare every method on the test sequences, each at its best setting on a held-out one."""
    chosen = numbers(layers)
    trained, held = split(traces, chosen)
    codebook = traces / "codebook.safetensors"
    own = [OWN] if codebook.exists() else []
    wanted = methods.split(",") if methods else [*own, *PEERS]

    def part(names: list[str]) -> Report:
        return evaluate(
            files(traces, "test", chosen),
            [*trained, *held[1::2]],
            methods=names,
            codebook=codebook if codebook.exists() else None,
            budgets=BUDGETS,
            tune_layers=numbers(tune),
            show=False,
        )

    # Faiss keeps the CPU busy, the others the GPU.
    slow = [name for name in wanted if name.startswith("faiss")]
    groups = [names for names in (slow, [name for name in wanted if name not in slow]) if names]
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(part, groups))
    report = dataclasses.replace(
        reports[-1],
        records=[record for each in reports for record in each.records],
        held_out=[record for each in reports for record in each.held_out],
        seconds={name: seconds for each in reports for name, seconds in each.seconds.items()},
    )
    rows = means(report.records, "mode", "budget", "method", "setting")
    plot = pareto_png(report)
    content = {
        "protocol": dataclasses.asdict(report.protocol),
        "layers": chosen,
        "tuned_on_layers": numbers(tune),
        "tests": report.tests,
        "trains": report.trains,
        "skipped": report.skipped,
        "seconds": report.seconds,
        "rows": rows,
    }
    write(out, f"{name}.json", content)
    write_whole(out / f"{name}.png", plot)
    write_whole(out / f"{name}.html", html_page(report, plot).encode())
    show("error against dense attention", [row for row in rows if row["budget"] == 0.05])
    for mode, budget in itertools.product(MODES, BUDGETS):
        here = [row for row in rows if (row["mode"], row["budget"]) == (mode, budget)]
        print(mode, budget, {row["method"]: round(row["error"], 4) for row in here})


@app.command()
def attend(
    traces: Traces = Path("traces"),
    out: Out = RESULTS,
    layers: Layers = ALL,
    backend: str = "cpu",
    whole: Annotated[bool, typer.Option(help="Read whole lists and no codes, as is usual on a GPU.")] = False,
) -> None:
    """Measure what `AttentionIndex.attend` returns, the heads of a group together, on the test sequences."""
    params = AttendParameters(refine=False, slopes=False) if whole else AttendParameters()
    budgets = WHOLE_BUDGETS if whole else BUDGETS
    book, start = Codebook.load(traces / "codebook.safetensors"), time.perf_counter()
    protocol = Protocol()
    found: list[tuple[float, str, torch.Tensor]] = []
    for path in track(files(traces, "test", numbers(layers)), "attend", show=True):
        trace = read_trace(path)
        snapshot = take_snapshot(trace, 0, protocol)
        positions = snapshot.queries.positions
        n = len(trace.key_positions)
        # The lists end where the window of the first query begins, as in `compare`.
        window = n - int(positions[0]) + protocol.window
        codebook = LayerCodebook.of(book.layer(int(trace.info["layer"])), n)
        index = AttentionIndex(codebook, window=window, sinks=protocol.sinks, dense_below=0, backend=backend)
        index.add(trace.keys[None].astype(np.float16), trace.values[None].astype(np.float16))
        q = trace.queries[:, np.isin(trace.query_positions, positions.numpy())].astype(np.float32)
        dense = dense_output(trace, q, positions)
        for budget in budgets:
            given, _ = index.attend(
                q[None], params=params.replace(budget=budget), positions=positions.numpy()[None]
            )
            error = torch.from_numpy(np.asarray(given)[0]) - dense
            found.append((budget, path.parent.name, error.norm(dim=-1) / dense.norm(dim=-1)))
    rows = []
    for sequence in ("all", *sorted({name for _, name, _ in found})):
        for budget in budgets:
            parts = [e for b, name, e in found if b == budget and sequence in ("all", name)]
            errors = torch.cat([part.flatten() for part in parts])
            heads = sum(len(part) for part in parts)
            rows.append(
                {
                    "sequence": sequence,
                    "budget": budget,
                    "error": errors.mean().item(),
                    "error_p90": errors.quantile(0.9).item(),
                    "heads": heads,
                }
            )
    content = {"protocol": dataclasses.asdict(protocol), "layers": numbers(layers), "backend": backend}
    parameters = dataclasses.asdict(params)
    seconds = time.perf_counter() - start
    name = "attend-fidelity-whole.json" if whole else "attend-fidelity.json"
    write(out, name, {**content, "parameters": parameters, "seconds": seconds, "rows": rows})
    show("AttentionIndex.attend, in groups", rows)


@app.command()
def ablate(traces: Traces = Path("traces"), out: Out = RESULTS, layers: Layers = ALL) -> None:
    """Leave out one part at a time, in groups on the test sequences, and try other shares of the bytes."""
    cases: list[dict[str, Any]] = [
        {},
        *({name: False} for name in ("slopes", "correction", "remainder", "refine")),
        {"adapt": 0},
        *({"scan_share": share} for share in (0.2, 0.3, 0.5)),
        {"slopes": False, "scan_share": 0.3},
    ]
    records: list[Record] = []
    makers = [peers_from_codebook(traces / "codebook.safetensors", device=DEVICE, **case) for case in cases]
    paths = files(traces, "test", numbers(layers))
    for path, head in track(list(itertools.product(paths, range(3))), "ablate", show=True):
        trace = read_trace(path, heads=[head])
        moment = take_snapshot(trace, head, device=DEVICE, sequence=path.parent.name)
        for case, make in zip(cases, makers, strict=True):
            peer = make(int(trace.info["layer"]), head)
            peer.build(moment.context)
            label = " ".join(f"{key}={value}" for key, value in case.items())
            records += measure(peer, moment, BUDGETS, modes=["group"], setting=label)
    rows = means(records, "budget", "setting")
    write(out, "ablation.json", {"layers": numbers(layers), "rows": rows})
    show("in groups", rows)


def dense_output(trace: Trace, queries: NDArray[np.float32], positions: torch.Tensor) -> torch.Tensor:
    """Return dense attention of queries, (q_heads, m, d), at `positions`, by torch in float32."""
    group = len(queries) // len(trace.keys)
    keys, values = (
        torch.from_numpy(array.astype(np.float32)).repeat_interleave(group, 0)[None]
        for array in (trace.keys, trace.values)
    )
    seen = torch.from_numpy(trace.key_positions) <= positions[:, None]
    x = torch.from_numpy(queries)[None]
    return torch.nn.functional.scaled_dot_product_attention(
        x, keys, values, attn_mask=seen, scale=trace.scale
    )[0]


def young(trace: Trace, n: int) -> Trace:
    """Return the first `n` positions of a trace."""
    keys, asked = trace.key_positions < n, trace.query_positions < n
    return dataclasses.replace(
        trace, keys=trace.keys[:, keys], values=trace.values[:, keys], queries=trace.queries[:, asked],
        key_positions=trace.key_positions[keys], query_positions=trace.query_positions[asked],
        info={**trace.info, "context": n},
    )  # fmt: skip


def tries(middle: int) -> list[dict[str, Any]]:
    """Return the settings that `sweep` measures, around so many lists."""
    two = (middle, 2 * middle)
    return [
        *({"nlist": nlist} for nlist in (middle // 4, middle // 2, *two, 4 * middle)),
        *({"nlist": nlist, "words": words} for nlist in two for words in (1, 2, 4, 6)),
        *({"nlist": nlist, "scan_share": share} for nlist in two for share in (0.2, 0.3, 0.5, 0.6)),
        *({"nlist": middle, "adapt": steps} for steps in (0, 10)),
        *({"nlist": middle, name: False} for name in ("correction", "remainder", "refine", "unit")),
    ]


@app.command()
def sweep(traces: Traces = Path("traces"), out: Out = RESULTS, layers: Layers = "4,25") -> None:
    """Sweep lists, codes, split of the bytes and metric at 8k, 32k and 128k, on held-out sequences."""
    rows: list[dict[str, Any]] = []
    young_protocol = Protocol(window=1023, span=1024, max_queries=64)
    for context, protocol in ((YOUNG, young_protocol), (SHORT, FEW_QUERIES), (LONG, FEW_QUERIES)):
        records: list[Record] = []
        for layer, head in track(
            list(itertools.product(numbers(layers), range(3))), f"sweep at {context}", show=True
        ):
            if context == LONG:
                trained, tested = (
                    files(traces, "train-long", [layer]),
                    files(traces, "test-long", [layer])[:1],
                )
            else:
                trained, tested = split(traces, [layer])
            cut = [young(read_trace(path, heads=[head]), context) for path in trained]
            pairs = [training_sequence(trace, head, protocol, device=DEVICE) for trace in cut]
            cut = [young(read_trace(path, heads=[head]), context) for path in tested]
            moments = [take_snapshot(trace, head, protocol, device=DEVICE) for trace in cut]
            for setting in tries(default_nlist(context)):
                whole = {"adapt": 3, "words": 3, "scan_share": 0.4, **setting}
                label = " ".join(f"{key}={value}" for key, value in whole.items())
                records += run(Ladder(**whole), pairs, moments, label)
        rows += [{"context": context, **row} for row in means(records, "mode", "budget", "setting")]
    write(out, "sweep.json", {"layers": numbers(layers), "rows": rows})
    for context, budget in itertools.product((YOUNG, SHORT, LONG), BUDGETS):
        found = [
            row for row in rows if (row["context"], row["budget"], row["mode"]) == (context, budget, "group")
        ]
        best = sorted(found, key=lambda row: float(row["error"]))[:5]
        show(
            f"{context} at {budget}",
            [{key: row[key] for key in ("setting", "error", "mass", "bytes")} for row in best],
        )


def run(peer: Peer, pairs: Sequence[Any], moments: Sequence[Any], label: str) -> list[Record]:
    """Fit a method and measure it."""
    if pairs:
        peer.fit([context for context, _ in pairs], [queries for _, queries in pairs])
    records: list[Record] = []
    for moment in moments:
        peer.build(moment.context)
        records += measure(peer, moment, BUDGETS, setting=label)
    return records


@app.command()
def shift(traces: Traces = Path("traces"), out: Out = RESULTS, layers: Layers = FEW) -> None:
    """Test on source code and other languages; train at 8k and serve 32k and 128k, in every view."""
    chosen = numbers(layers)
    protocol = Protocol(max_queries=64)
    texts = []
    for part in ("test", "shift"):
        codebook = Codebook.load(traces / "codebook.safetensors")
        make = peers_from_codebook(codebook, device=DEVICE)
        for path, head in track(
            list(itertools.product(files(traces, part, chosen), range(3))), part, show=True
        ):
            trace = read_trace(path, heads=[head])
            moment = take_snapshot(trace, head, protocol, device=DEVICE, sequence=path.parent.name)
            peer = make(int(trace.info["layer"]), head)
            peer.build(moment.context)
            texts += measure(peer, moment, BUDGETS)
            exact = PEERS["exact"]()
            exact.build(moment.context)
            texts += measure(exact, moment, BUDGETS)
    text_rows = means(texts, "mode", "budget", "method", "sequence")
    show(
        "other texts, at 5 %", [row for row in text_rows if row["budget"] == 0.05 and row["mode"] == "group"]
    )

    rows = []
    for context, learn, test in ((SHORT, "train", "test"), (LONG, "train-long", "test-long")):
        short = traces / f"young-{learn}"
        for path in files(traces, learn, chosen):
            target = short / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_trace(target, young(read_trace(path), YOUNG))
        nlist = default_nlist(context)
        for view in ("rotated", "windowed", "unrotated"):
            cases = {"8k as it is": (short, 0), "8k moved": (short, 1), "full length": (traces / learn, 0)}
            for case, (folder, moved) in cases.items():
                settings = TrainingSettings(
                    nlist=(nlist,),
                    view=view,
                    augment=moved,
                    max_position=context,
                    routers=("mean",),
                    window=1023 if folder == short else 2047,
                )
                held = held_out(traces) if learn == "train" else 1
                codebook = train_codebook(folder, settings, layers=chosen, held_out=held, device=DEVICE)
                ways: list[dict[str, Any]] = [{"refine": False, "adapt": 0}, {"adapt": 0}, {"adapt": 3}]
                for parts in ways:
                    make = peers_from_codebook(codebook, device=DEVICE, **parts)
                    records: list[Record] = []
                    for path, head in itertools.product(files(traces, test, chosen), range(3)):
                        trace = read_trace(path, heads=[head])
                        moment = take_snapshot(trace, head, protocol, device=DEVICE)
                        peer = make(int(trace.info["layer"]), head)
                        peer.build(moment.context)
                        records += measure(peer, moment, [0.05], modes=["per_head"])
                    steps = (
                        "lists" if "refine" in parts else "ladder" + (", adapted" if parts["adapt"] else "")
                    )
                    (row,) = means(records, "mode")
                    rows.append({"context": context, "view": view, "trained": case, "steps": steps, **row})
    show("from 8k, at 5 %", rows)
    write(out, "shift.json", {"layers": chosen, "texts": text_rows, "positions": rows})


@app.command()
def paper(traces: Traces = Path("traces"), out: Out = RESULTS, layers: Layers = "13") -> None:
    """Train the paper's setting on more and more sequences, and for longer."""
    records: dict[tuple[int, int, int], list[Record]] = {}
    seconds: dict[tuple[int, int, int], float] = {}
    for layer, head in track(list(itertools.product(numbers(layers), range(3))), "paper", show=True):
        trained, held = split(traces, [layer])
        pairs = [
            training_sequence(read_trace(p, heads=[head]), head, device=DEVICE) for p in [*trained, *held[:1]]
        ]
        tests = files(traces, "test", [layer])
        moments = [take_snapshot(read_trace(p, heads=[head]), head, device=DEVICE) for p in tests]
        for count, queries, epochs in (
            (1, 4096, 60),
            (3, 4096, 60),
            (6, 4096, 60),
            (12, 4096, 60),
            (12, 1024, 60),
            (12, 4096, 10),
        ):
            start = time.perf_counter()
            peer = PEERS["saap"](nlist=1024, hidden=128, queries=queries, epochs=epochs, count_router=False)  # type: ignore[call-arg]
            found = run(peer, [*pairs[:count], pairs[-1]], moments, "")
            seconds[count, queries, epochs] = (
                seconds.get((count, queries, epochs), 0) + time.perf_counter() - start
            )
            records.setdefault((count, queries, epochs), []).extend(found)
    rows = [
        {
            "sequences": key[0],
            "queries a sequence": key[1],
            "epochs at most": key[2],
            "seconds": seconds[key],
            **row,
        }
        for key, found in records.items()
        for row in means(found, "mode", "budget")
    ]
    write(out, "paper.json", {"layers": numbers(layers), "rows": rows})
    show("the paper's setting, at 5 %", [row for row in rows if row["budget"] == 0.05])


if __name__ == "__main__":
    app()
