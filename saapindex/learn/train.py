"""Training of a codebook from traces: partitions and routers of all layers and heads. Needs torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saapindex.codebook import Codebook
from saapindex.errors import FileFormatError, MissingDependencyError
from saapindex.learn.report import TrainingReport
from saapindex.learn.sequences import Sequences
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.shares import share_out
from saapindex.progress import track

if TYPE_CHECKING:
    import torch

    from saapindex.learn.layer_job import Stage

__all__ = ["default_stages", "train"]


def default_stages() -> tuple[Stage, ...]:
    """Return the steps of the training of a layer, in order."""
    from saapindex.learn.stage_codes import fit_layer_codes
    from saapindex.learn.stage_partitions import fit_partitions
    from saapindex.learn.stage_routers import fit_routers
    from saapindex.learn.stage_shares import measure_heads

    return (fit_partitions, fit_routers, fit_layer_codes, measure_heads)


def train(
    traces: str | os.PathLike[str],
    settings: TrainingSettings | None = None,
    *,
    held_out: int | Sequence[str] | None = None,
    sequences: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    layers_together: int | None = None,
    stages: Sequence[Stage] | None = None,
    show: bool = False,
) -> Codebook:
    """Train the codebook of a model on the traces of several sequences.

    Layers are trained one after the other, so no more than the traces of one are held; on a GPU several
    together where their heads are few. The seed fixes the result on one kind of device.

    Parameters
    ----------
    traces
        Folder, as `saapindex.learn.traces.find_traces` reads it.
    settings
        By default ``TrainingSettings()``.
    held_out
        Sequences that views, early stopping and rungs are judged by: names, or a number, the last so many in
        order of name. Default: one in six, at least one.
    sequences
        Names of the sequences to use; by default all.
    layers
        Numbers of the layers to train; by default all that every sequence has.
    device
        By default a GPU where there is one.
    checkpoints
        Folder, made if need be, that keeps every layer once it is trained; a later call with the same traces
        and settings takes them from there.
    layers_together
        Layers trained at once; by default 1 on a CPU, on a GPU what fits.
    stages
        Steps of the training of a layer; by default `default_stages`.
    show
        Whether to show progress.

    Returns
    -------
    Codebook
        Its `report` is a `TrainingReport` as a dict.

    Raises
    ------
    MissingDependencyError
        Without torch.
    InvalidInputError
        If the traces do not fit each other, or there are too few sequences.
    FileFormatError
        If a trace cannot be read.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "training a codebook", "learn") from error
    settings = settings or TrainingSettings()
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = Sequences.find(traces, held_out=held_out, sequences=sequences, layers=layers)
    model = data.model()
    steps = default_stages() if stages is None else tuple(stages)
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts: dict[int, Codebook] = {}
    for group in track(list(data.groups(layers_together, on)), "training layers", show=show):
        parts |= _train_group(group, data, settings, on, steps, folder)
    report = TrainingReport.join([TrainingReport.from_dict(parts[number].report) for number in data.layers])
    return Codebook(
        share_out({number: parts[number].layer(number) for number in data.layers}),
        **model,
        settings={**settings.to_dict(), "sequences": data.train, "held_out": data.held_out},
        report=report.to_dict(),
    )


def _train_group(
    group: Sequence[int],
    data: Sequences,
    settings: TrainingSettings,
    device: torch.device,
    stages: Sequence[Stage],
    folder: Path | None,
) -> dict[int, Codebook]:
    """Train some layers together, or take them from their checkpoints; each is a codebook of its own."""
    from saapindex.learn.layer_job import run_stages

    kept: dict[int, Codebook] = {}
    marks = {}
    if folder is not None:
        marks = {number: _mark(number, group, data, settings, device, stages) for number in group}
        found = {number: _checkpoint(folder, number, marks[number]) for number in group}
        kept = {number: part for number, part in found.items() if part is not None}
    if len(kept) == len(group):
        return kept
    job = data.read(group, settings, device)
    run_stages(job, stages)
    parts = {
        layer.layer: Codebook(
            {layer.layer: layer}, settings={"mark": marks.get(layer.layer)}, report=report.to_dict()
        )
        for layer, report in job.results()
    }
    if folder is not None:
        for number, part in parts.items():
            part.save(_path(folder, number))
    return parts


def _path(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:02d}.safetensors"


def _mark(
    number: int,
    group: Sequence[int],
    data: Sequences,
    settings: TrainingSettings,
    device: torch.device,
    stages: Sequence[Stage],
) -> str:
    """Fingerprint of all that decides what a layer becomes: a checkpoint of anything else is not used."""
    names = [f"{stage.__module__}.{stage.__qualname__}" for stage in stages]
    said = [settings.to_dict(), data.fingerprint(number), list(group), device.type, names]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _checkpoint(folder: Path, number: int, mark: str) -> Codebook | None:
    """Return the checkpoint of a layer if there is a whole one that has this mark."""
    path = _path(folder, number)
    if not path.exists():
        return None
    try:
        part = Codebook.load(path)
        part.layer(number)
    except FileFormatError:
        return None
    return part if part.settings.get("mark") == mark else None
