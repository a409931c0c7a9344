"""Settings of the ladder, other texts and lengths, and the paper's training: commands of `fidelity.py`."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_data import (
    BUDGETS,
    DEVICE,
    FEW,
    FEW_QUERIES,
    LONG,
    RESULTS,
    SHORT,
    YOUNG,
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

from saapindex.codebook import Codebook
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.evaluation import Protocol, Record, measure, take_snapshot, training_sequence
from saapindex.learn.peers import PEERS, Peer
from saapindex.learn.peers.ladder import Ladder, peers_from_codebook
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.train import train as train_codebook
from saapindex.params import default_nlist
from saapindex.progress import track


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
