"""An evaluation: every method, on every head of every test sequence."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.learn.evaluation.measures import MODES, Mode, Record, measure
from saapindex.learn.evaluation.report import Report, device_name, versions
from saapindex.learn.evaluation.snapshot import Protocol, Snapshot, take_snapshot, training_sequence
from saapindex.learn.evaluation.summary import choose, keep
from saapindex.learn.peers import PEERS
from saapindex.learn.peers.base import Context, Peer, Queries
from saapindex.learn.traces import find_traces, read_trace, read_trace_header
from saapindex.progress import track

__all__ = ["OWN", "evaluate", "trace_files"]

OWN = "saapindex"
"""Name of the library's own method, which a codebook drives."""


@dataclass(frozen=True)
class _Candidate:
    """A method with one setting, to be made for each head; `make` takes layer and head."""

    name: str
    setting: str
    offline: bool
    make: Callable[[int, int], Peer]


def trace_files(paths: Sequence[Path]) -> dict[int, list[tuple[str, Path]]]:
    """Return the traces at `paths` by layer, each with the name of its sequence.

    Parameters
    ----------
    paths
        Traces, or folders of traces as `saapindex.learn.traces.find_traces` finds them.

    Raises
    ------
    FileFormatError
        If a file is no trace.
    InvalidInputError
        If a folder holds none, or no path is given.
    """
    found: dict[int, list[tuple[str, Path]]] = {}
    for path in paths:
        if path.is_dir():
            for sequence, layers in find_traces(path).items():
                for layer, file in layers.items():
                    found.setdefault(layer, []).append((sequence, file))
        else:
            layer = int(read_trace_header(path).info.get("layer", 0))
            name = re.sub(r"[-_.]?layer[-_]?\d+", "", path.stem) or path.resolve().parent.name
            found.setdefault(layer, []).append((name, path))
    if not found:
        raise InvalidInputError("no traces are given, expected files or folders")
    return dict(sorted(found.items()))


def evaluate(
    tests: Sequence[Path],
    trains: Sequence[Path] = (),
    *,
    methods: Sequence[str] | None = None,
    codebook: Path | None = None,
    budgets: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    modes: Sequence[Mode] = MODES,
    protocol: Protocol | None = None,
    heads: Sequence[int] | None = None,
    tune: bool = True,
    tune_layers: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    show: bool = True,
) -> Report:
    """Measure methods on test traces.

    Every setting of a method is measured on the last training sequence, fitted to the others (to the same
    where there is one alone). For each mode and budget the one with the smallest error is fitted to all
    training sequences and measured on the test sequences.

    Parameters
    ----------
    tests, trains
        Traces, or folders of traces.
    methods
        Names in `PEERS`, and ``"saapindex"`` for the codebook's own; by default all that can run.
    codebook
        What training saved.
    budgets
        Shares of the long-range bytes.
    modes
        Which of `MODES`.
    protocol
        Which queries, window and sinks.
    heads
        KV heads; all by default.
    tune
        Whether settings are chosen on training sequences; otherwise each method has its first.
    tune_layers
        Layers whose heads choose settings; all by default.
    device
        By default the GPU where there is one.
    show
        Show progress on stderr.

    Raises
    ------
    InvalidInputError
        If a name is unknown, or a method that is named lacks its codebook or its training traces, or a
        sequence is both trained on and tested.
    MissingDependencyError
        If a method that is named needs a package that is missing.
    """
    protocol = protocol or Protocol()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    test_files = trace_files(tests)
    train_files = trace_files(trains) if trains else {}
    _check_files(test_files, train_files)
    some = next(iter(test_files.values()))[:1]
    n = len(_snapshots(some, _heads(some[0][1], heads)[0], protocol, torch.device("cpu"))[0].context.keys)
    tune = tune and bool(train_files)
    candidates, skipped = _candidates(methods, codebook, bool(train_files), tune, n, device)
    bench = _Bench(test_files, train_files, protocol, heads, budgets, list(modes), device, show)
    held_out: list[Record] = []
    several = [candidate for candidate in candidates if candidate.setting]
    if tune and several:
        wrong = [layer for layer in tune_layers or () if layer not in test_files]
        if wrong:
            raise InvalidInputError(f"tune_layers has {wrong[0]}, expected some of {list(test_files)}")
        held_out = bench.run(several, "choosing settings", layers=tune_layers, held_out=True)
    chosen = choose(held_out)
    wanted = {(method, setting) for (method, *_), setting in chosen.items()}
    kept = [
        each for each in candidates if each not in several or not tune or (each.name, each.setting) in wanted
    ]
    records = bench.run(kept, "evaluating heads")
    return Report(
        records=keep(records, chosen),
        held_out=held_out,
        protocol=protocol,
        budgets=tuple(budgets),
        modes=tuple(modes),
        tests=_names(test_files),
        trains=_names(train_files),
        skipped=skipped,
        seconds=bench.seconds,
        device=device_name(device),
        versions=versions(),
    )


@dataclass
class _Bench:
    """The sequences, and what is done with every head of them."""

    tests: Mapping[int, Sequence[tuple[str, Path]]]
    trains: Mapping[int, Sequence[tuple[str, Path]]]
    protocol: Protocol
    heads: Sequence[int] | None
    budgets: Sequence[float]
    modes: Sequence[Mode]
    device: torch.device
    show: bool
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(
        self,
        candidates: Sequence[_Candidate],
        title: str,
        *,
        layers: Sequence[int] | None = None,
        held_out: bool = False,
    ) -> list[Record]:
        """Fit and measure candidates on every head: on the test sequences, or on the one that is held out."""
        records: list[Record] = []
        wanted = [layer for layer in self.tests if layers is None or layer in layers]
        work = [(layer, head) for layer in wanted for head in _heads(self.tests[layer][0][1], self.heads)]
        for layer, head in track(work, title, show=self.show):
            fitted = self.trains.get(layer, [])
            asked = fitted[-1:] if held_out else self.tests[layer]
            snapshots = _snapshots(asked, head, self.protocol, self.device)
            sequences: list[tuple[Context, Queries]] = []
            if any(candidate.offline for candidate in candidates):
                fitted = fitted[:-1] if held_out and len(fitted) > 1 else fitted
                traces = (read_trace(path, heads=[head]) for _, path in fitted)
                sequences = [
                    training_sequence(trace, head, self.protocol, device=self.device) for trace in traces
                ]
            for candidate in candidates:
                records += self._measure(candidate, candidate.make(layer, head), sequences, snapshots)
        return records

    def _measure(
        self,
        candidate: _Candidate,
        peer: Peer,
        sequences: Sequence[tuple[Context, Queries]],
        snapshots: Sequence[Snapshot],
    ) -> list[Record]:
        clock = self.seconds.setdefault(candidate.name, {"fit": 0.0, "build": 0.0, "measure": 0.0})
        records: list[Record] = []
        with _timed(clock, "fit", self.device):
            if candidate.offline:
                peer.fit([context for context, _ in sequences], [queries for _, queries in sequences])
        for snapshot in snapshots:
            with _timed(clock, "build", self.device):
                peer.build(snapshot.context)
            with _timed(clock, "measure", self.device):
                records += measure(
                    peer,
                    snapshot,
                    self.budgets,
                    modes=self.modes,
                    method=candidate.name,
                    setting=candidate.setting,
                )
        return records


def _candidates(
    methods: Sequence[str] | None,
    codebook: Path | None,
    trained: bool,
    tune: bool,
    n: int,
    device: torch.device,
) -> tuple[list[_Candidate], dict[str, str]]:
    """Every method with its settings; what is not asked for by name and cannot run is left out, with the
    reason.
    """
    names = list(methods) if methods is not None else [OWN, *PEERS]
    unknown = [name for name in names if name != OWN and name not in PEERS]
    if unknown:
        raise InvalidInputError(
            f"method is {unknown[0]!r}, expected one of {', '.join(map(repr, [OWN, *PEERS]))}"
        )
    candidates: list[_Candidate] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            candidates += _settings(name, codebook, trained, tune, n, device)
        except (InvalidInputError, MissingDependencyError) as error:
            if methods is not None:
                raise
            skipped[name] = str(error)
    return candidates, skipped


def _settings(
    name: str, codebook: Path | None, trained: bool, tune: bool, n: int, device: torch.device
) -> Iterator[_Candidate]:
    if name == OWN:
        if codebook is None:
            raise InvalidInputError(f"method {OWN!r} needs a codebook, none is given")
        ladder = importlib.import_module("saapindex.learn.peers.ladder")
        yield _Candidate(name, "", False, ladder.peers_from_codebook(codebook, device=device))
        return
    peer = PEERS[name]
    if peer.offline and not trained:
        raise InvalidInputError(f"method {name!r} learns offline and needs training traces, none are given")
    settings = peer.settings(n)
    for setting in settings if tune else settings[:1]:
        peer(**setting)  # what is missing shows before the work begins
        label = ", ".join(f"{key}={value}" for key, value in setting.items())
        yield _Candidate(name, label, peer.offline, _maker(peer, setting))


def _maker(peer: type[Peer], setting: Mapping[str, Any]) -> Callable[[int, int], Peer]:
    return lambda layer, head: peer(**setting)


def _heads(path: Path, heads: Sequence[int] | None) -> list[int]:
    known = read_trace_header(path).heads
    wrong = [head for head in heads or () if head not in known]
    if wrong:
        raise InvalidInputError(f"head is {wrong[0]}, expected one of the KV heads {known} of {path}")
    return list(heads or known)


def _snapshots(
    files: Sequence[tuple[str, Path]], head: int, protocol: Protocol, device: torch.device
) -> list[Snapshot]:
    return [
        take_snapshot(read_trace(path, heads=[head]), head, protocol, sequence=name, device=device)
        for name, path in files
    ]


def _check_files(
    tests: Mapping[int, Sequence[tuple[str, Path]]], trains: Mapping[int, Sequence[tuple[str, Path]]]
) -> None:
    known = {path.resolve() for files in trains.values() for _, path in files}
    for layer, files in tests.items():
        both = [path for _, path in files if path.resolve() in known]
        if both:
            raise InvalidInputError(
                f"{both[0]} is both trained on and tested, expected other sequences for testing"
            )
        if trains and layer not in trains:
            raise InvalidInputError(f"layer {layer} has test traces and no training traces")


def _names(files: Mapping[int, Sequence[tuple[str, Path]]]) -> list[str]:
    return list(dict.fromkeys(name for layer in files.values() for name, _ in layer))


@contextmanager
def _timed(clock: dict[str, float], part: str, device: torch.device) -> Iterator[None]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield
    clock[part] += now() - start
