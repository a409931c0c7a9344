"""Capture of traces: what the attention of a transformers model sees while it reads texts.

Traces go to the disk layer by layer during one forward pass, so no more than the queries, keys and values of
one layer are held beside what the model needs, and a capture that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError
from saapindex.learn import capture_plan as plan
from saapindex.learn.attention_hook import Call, watched
from saapindex.learn.layers import Layer, inspect_layers
from saapindex.learn.models import LoadedModel, decoder_of, load_model
from saapindex.learn.texts import query_positions as sample_positions
from saapindex.learn.trace import Trace
from saapindex.learn.traces import write_trace
from saapindex.progress import track

if TYPE_CHECKING:
    import torch

__all__ = ["CaptureReport", "SequenceReport", "capture", "capture_tokens"]


@dataclass(frozen=True)
class SequenceReport:
    """What became of one sequence.

    Attributes
    ----------
    name
        Of its folder.
    written, present
        Layers that were written, and those that were there already.
    nbytes
        Size of their files.
    seconds
        That it took.
    """

    name: str
    written: list[int]
    present: list[int]
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did.

    Attributes
    ----------
    out
        Folder of the traces.
    info
        What the headers of all of them say: model, weights, context, queries, dtype.
    layers
        Layers that were wanted.
    left_out
        Why the other layers cannot be captured, by number. A layer that was not asked for is not here.
    sequences
        Each sequence.
    short
        Texts that held fewer sequences than were wanted: how many they held.
    seconds
        That it took, loading of the model included.
    """

    out: Path
    info: Mapping[str, Any]
    layers: list[int]
    left_out: Mapping[int, str]
    sequences: list[SequenceReport]
    short: Mapping[str, int]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(sequence.nbytes for sequence in self.sequences)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that JSON can hold."""
        return {**asdict(self), "out": str(self.out), "nbytes": self.nbytes}


def capture(
    model: str | os.PathLike[str] | LoadedModel,
    texts: Sequence[str | os.PathLike[str]],
    *,
    context: int,
    out: str | os.PathLike[str],
    layers: str | Collection[int] = "all",
    queries: int | str = 4096,
    sequences: int = 1,
    dtype: str = "float16",
    rope_scaling: str | Mapping[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    copies: bool = False,
    show: bool = False,
) -> CaptureReport:
    """Let a model read texts and write what its attention sees, one trace for each sequence and layer.

    Files are ``OUT/TEXT-SEQUENCE/layer-04.safetensors``, see `saapindex.learn.traces`. Each is written as the
    forward pass reaches its layer; run again, the same call goes on where it was interrupted.

    Parameters
    ----------
    model
        A Hub id, a folder, a GGUF file, or what `load_model` returned. Any decoder of transformers with a
        rotary embedding. Layers of full attention can be captured; local ones (sliding window, chunked,
        linear) are left out.
    texts
        Text files (``.gz`` is unpacked), and folders of text files, each of which is one text.
    context
        Tokens of a sequence.
    out
        Folder for the traces; made where it does not exist.
    layers
        Numbers of layers, or ``"all"`` of full attention.
    queries
        How many positions keep their queries, or ``"all"``. Of a number, 512 (or all of them, if there are
        no more) are among the last 2048 positions, where evaluation asks, and the rest is spread evenly over
        the positions before. Keys and values are kept in full.
    sequences
        Sequences to take from each text, one after another; as many as it holds, if it holds fewer.
    dtype
        ``"float16"`` or ``"bfloat16"``, for storage.
    rope_scaling
        How the rotary embedding is stretched to contexts beyond the model's own: ``"none"``, ``"ntk"``,
        ``"yarn"``, ``"linear"``, or a dict, see `saapindex.learn.models.stretched`.
    device
        Where the model runs. Default: ``"cuda"`` where there is one, else ``"cpu"``.
    seed
        Of the sampling of queries, and of what is repeated.
    copies
        Repeat passages in the second half of every sequence, which makes the model look them up: see
        `saapindex.learn.texts.with_copies`. The folder of a sequence is then called ``TEXT-SEQUENCE-copies``.
    show
        Whether progress is shown.

    Returns
    -------
    CaptureReport

    Raises
    ------
    InvalidInputError
        If an argument is wrong, a text is too short, a layer cannot be captured, the disk has too little
        room, or files are there that were captured with other settings. Nothing was written then. Also if
        keys, values or queries are not finite, or beyond what float16 holds.
    FileFormatError
        If a file is there that is no trace.
    MissingDependencyError
        If torch, transformers or gguf is needed and not installed.
    """
    start = time.perf_counter()
    settings = plan.Settings(context, queries, sequences, dtype, seed, copies)
    sources = plan.read_texts(texts)
    if isinstance(model, LoadedModel):
        if rope_scaling is not None or device is not None:
            raise InvalidInputError(
                "rope_scaling and device are of no use with a loaded model, expected None"
            )
        loaded = model
    else:
        loaded = load_model(model, context=context, rope_scaling=rope_scaling, device=device)
    found = inspect_layers(loaded.model, context)
    chosen = plan.choose_layers(layers, found)
    stretches = plan.cut_texts(loaded.tokenizer, sources, settings)
    common = {**plan.model_info(loaded, found.count), **settings.info()}
    jobs = []
    for stretch in stretches:
        expected = {
            number: ({**common, **stretch.info, **plan.layer_info(number, layer)}, layer)
            for number, layer in ((number, found.usable[number]) for number in chosen)
        }
        folder = Path(out) / stretch.name
        jobs.append(_Job(stretch, folder, expected, plan.missing_layers(folder, expected)))
    plan.check_space(Path(out), [found.usable[number] for job in jobs for number in job.missing], settings)
    positions = sample_positions(context, settings.query_count, seed=seed)
    steps = track(range(sum(len(job.missing) for job in jobs)), "Capturing traces", show=show)

    def step() -> None:
        next(steps, None)

    with contextlib.closing(steps):  # type: ignore[type-var]
        step()
        reports = [_run(job, loaded.model, positions, dtype, step) for job in jobs]
    held = {name: sum(stretch.info["text"] == name for stretch in stretches) for name in sources}
    return CaptureReport(
        out=Path(out),
        info=common,
        layers=chosen,
        left_out=found.left_out if isinstance(layers, str) else {},
        sequences=reports,
        short={name: count for name, count in held.items() if count < sequences},
        seconds=time.perf_counter() - start,
    )


def capture_tokens(
    model: Any, tokens: Sequence[int], *, layers: Collection[int], query_positions: NDArray[np.int64]
) -> dict[int, Trace]:
    """Let `model` read `tokens`, and return what the attention of some layers sees.

    Parameters
    ----------
    model
        A decoder of transformers with a rotary embedding.
    tokens
        Token ids, at least one.
    layers
        Numbers of layers of full attention.
    query_positions
        int64, (m,): positions whose queries are kept, rising.

    Returns
    -------
    dict
        Of each layer, a `Trace` in float16.

    Raises
    ------
    InvalidInputError
        If a layer or a position does not exist, or the layer cannot be captured.
    """
    found = inspect_layers(model, len(tokens))
    chosen = plan.choose_layers(layers, found)
    positions = np.asarray(query_positions)
    if len(positions) and not 0 <= positions.min() <= positions.max() < len(tokens):
        raise InvalidInputError(
            f"query positions reach from {positions.min()} to {positions.max()}, "
            f"expected 0 to {len(tokens) - 1}"
        )
    traces: dict[int, Trace] = {}

    def keep(call: Call) -> None:
        layer = found.usable[call.layer]
        info = {"layers": found.count, "context": len(tokens), **plan.layer_info(call.layer, layer)}
        traces[call.layer] = _trace(call, positions, layer, info, "float16")

    _read(model, tokens, chosen, keep)
    return traces


@dataclass(frozen=True)
class _Job:
    """A sequence, what its files are to say, and those that are missing."""

    stretch: plan.Stretch
    folder: Path
    expected: Mapping[int, tuple[Mapping[str, Any], Layer]]
    missing: list[int]


def _run(
    job: _Job, model: Any, positions: NDArray[np.int64], dtype: str, step: Callable[[], None]
) -> SequenceReport:
    """Read a sequence, unless all of its files are there, and write those that are missing."""
    start = time.perf_counter()

    def keep(call: Call) -> None:
        info, layer = job.expected[call.layer]
        trace = _trace(call, positions, layer, info, dtype)
        write_trace(plan.layer_file(job.folder, call.layer), trace, dtype=dtype)
        step()

    if job.missing:
        job.folder.mkdir(parents=True, exist_ok=True)
        _read(model, job.stretch.tokens, job.missing, keep)
    return SequenceReport(
        name=job.stretch.name,
        written=job.missing,
        present=[number for number in job.expected if number not in job.missing],
        nbytes=sum(plan.layer_file(job.folder, number).stat().st_size for number in job.expected),
        seconds=time.perf_counter() - start,
    )


class _Enough(Exception):
    """The last layer that is wanted has been seen."""


def _read(model: Any, tokens: Sequence[int], layers: Collection[int], keep: Callable[[Call], None]) -> None:
    """Run the decoder, without logits and without a cache, up to the attention of the last of `layers`."""
    import torch

    decoder, last = decoder_of(model), max(layers)

    def watch(call: Call) -> None:
        if call.layer in layers:
            keep(call)
        if call.layer == last:
            raise _Enough

    with torch.no_grad(), watched(decoder, watch), contextlib.suppress(_Enough):
        decoder(torch.tensor([list(tokens)], device=decoder.device), use_cache=False)


def _trace(
    call: Call, positions: NDArray[np.int64], layer: Layer, info: Mapping[str, Any], dtype: str
) -> Trace:
    """Return what one call of attention saw; bfloat16 in float32, which holds it exactly."""
    import torch

    def array(tensor: torch.Tensor, name: str) -> NDArray[Any]:
        whole = tensor.contiguous()
        narrow = whole if dtype == "bfloat16" else whole.to(torch.float16)
        if not torch.isfinite(narrow).all():
            what = "hold NaN or infinity, expected finite values: compute in another dtype"
            if torch.isfinite(whole).all():
                what = "reach beyond 65504, which float16 cannot hold: store them with dtype 'bfloat16'"
            raise InvalidInputError(f"layer {call.layer}: the {name} {what}")
        narrow = narrow.cpu()
        return (narrow.float() if dtype == "bfloat16" else narrow).numpy()

    queries, n = call.query[0], call.key.shape[2]
    if len(positions) < n:
        queries = queries[:, torch.from_numpy(positions).to(queries.device)]
    return Trace(
        keys=array(call.key[0], "keys"),
        values=array(call.value[0], "values"),
        queries=array(queries, "queries"),
        key_positions=np.arange(n),
        query_positions=positions,
        rope=layer.rope,
        info=info,
    )
