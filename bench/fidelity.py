"""How close methods come to dense attention, on traces of the real model. Results go to ``bench/results``.

::

    python bench/texts.py KERNEL PYTHON SOURCES --out texts      # see there
    python bench/fidelity.py capture SmolLM2-135M-Instruct.Q4_1.gguf texts
    python bench/fidelity.py train        # a codebook of 30 KV heads: 12 sequences, 2 held out
    python bench/fidelity.py compare      # every method, 4 test sequences
    python bench/fidelity.py attend       # AttentionIndex.attend; --no-slopes, --whole: as on a GPU
    python bench/fidelity.py ablate       # without one part at a time
    python bench/fidelity.py sweep        # lists, width of codes, how bytes are split: 8k, 32k and 128k
    python bench/fidelity.py shift        # other texts, and from 8k to 32k and 128k
    python bench/fidelity.py paper        # the paper's setting against training data

A GPU is used where there is one: everything together takes about twenty minutes on an H100.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from fidelity_data import (
    ALL,
    BUDGETS,
    CONTEXTS,
    DEVICE,
    RESULTS,
    WHOLE_BUDGETS,
    Layers,
    Out,
    Traces,
    files,
    held_out,
    means,
    numbers,
    show,
    split,
    write,
)
from fidelity_settings import paper, shift, sweep
from numpy.typing import NDArray
from rich.console import Console

from saapindex.attention import AttentionIndex, LayerCodebook
from saapindex.codebook import Codebook
from saapindex.files import write_whole
from saapindex.learn import Trace, read_trace
from saapindex.learn.capture import capture as capture_traces
from saapindex.learn.evaluation import (
    MODES,
    OWN,
    Protocol,
    Record,
    Report,
    evaluate,
    measure,
    take_snapshot,
)
from saapindex.learn.evaluation.page import html_page
from saapindex.learn.evaluation.plots import pareto_png
from saapindex.learn.models import load_model
from saapindex.learn.peers import PEERS
from saapindex.learn.peers.ladder import peers_from_codebook
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.train import train as train_codebook
from saapindex.params import AttendParameters
from saapindex.progress import track

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


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


@app.command()
def attend(
    traces: Traces = Path("traces"),
    out: Out = RESULTS,
    layers: Layers = ALL,
    backend: str = "cpu",
    whole: Annotated[bool, typer.Option(help="Read whole lists and no codes, as is usual on a GPU.")] = False,
    slopes: Annotated[bool, typer.Option(help="Without them is what a GPU does that reads codes.")] = True,
) -> None:
    """Measure what `AttentionIndex.attend` returns, the heads of a group together, on the test sequences."""
    params = AttendParameters(refine=False if whole else None, slopes=None if slopes and not whole else False)
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
    parameters = {"parameters": dataclasses.asdict(params), "seconds": time.perf_counter() - start}
    kind = "-whole" if whole else "" if slopes else "-no-slopes"
    write(out, f"attend-fidelity{kind}.json", {**content, **parameters, "rows": rows})
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


for command in (sweep, shift, paper):
    app.command()(command)

if __name__ == "__main__":
    app()
