"""What a capture has to do: which sequences and layers, what headers say, and which files are missing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saapindex.errors import InvalidInputError
from saapindex.learn.layers import Layer, Layers
from saapindex.learn.models import LoadedModel, decoder_of, weights_hash
from saapindex.learn.texts import cut_sequences, read_text, text_name, tokens_hash, with_copies
from saapindex.learn.traces import read_trace_header
from saapindex.rope_scaling import whole_number

__all__ = ["Settings", "Stretch", "check_space", "choose_layers", "cut_texts", "missing_layers", "read_texts"]


@dataclass(frozen=True)
class Settings:
    """How every sequence of a capture is read and kept; the parameters of `saapindex.learn.capture.capture`.

    Raises
    ------
    InvalidInputError
        If one is out of range.
    """

    context: int
    queries: int | str = 4096
    sequences: int = 1
    dtype: str = "float16"
    seed: int = 0
    copies: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("context", 1), ("sequences", 1), ("seed", 0)):
            whole_number(getattr(self, name), name, minimum=minimum)
        if self.queries != "all":
            if isinstance(self.queries, str):
                raise InvalidInputError(
                    f"queries is {self.queries!r}, expected a number of positions, or 'all'"
                )
            whole_number(self.queries, "queries", minimum=1)
        if not isinstance(self.copies, bool):
            raise InvalidInputError(f"copies is {self.copies!r}, expected True or False")
        if self.dtype not in ("float16", "bfloat16"):
            raise InvalidInputError(f"dtype is {self.dtype!r}, expected 'float16' or 'bfloat16'")

    @property
    def query_count(self) -> int | None:
        """Query positions that are sampled, or None for all."""
        return None if isinstance(self.queries, str) else self.queries

    def info(self) -> dict[str, Any]:
        """Return what headers say of these settings."""
        sampled = self.query_count is not None and self.query_count < self.context
        return {
            **({"copies": True} if self.copies else {}),
            "context": self.context,
            "queries": self.queries if sampled else "all",
            "seed": self.seed if sampled or self.copies else None,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Stretch:
    """A sequence to be read.

    Attributes
    ----------
    name
        Of its folder.
    tokens
        Token ids.
    info
        What headers say of the text.
    """

    name: str
    tokens: list[int]
    info: Mapping[str, Any]


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Read texts; return them by name.

    Raises
    ------
    InvalidInputError
        If there are none, one cannot be read, or two have the same name.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise InvalidInputError(f"texts is {os.fspath(paths)!r}, expected a list of files and folders")
    if not paths:
        raise InvalidInputError("texts is empty, expected at least one file or folder")
    sources: dict[str, Path] = {}
    for path in map(Path, paths):
        other = sources.setdefault(text_name(path), path)
        if other is not path:
            raise InvalidInputError(
                f"texts {other} and {path} have the same name, {text_name(path)!r}, which their traces take: "
                "rename one, or capture them into different folders"
            )
    return {name: read_text(path) for name, path in sources.items()}


def cut_texts(tokenizer: Any, texts: Mapping[str, str], settings: Settings) -> list[Stretch]:
    """Cut each text into as many sequences as are wanted, or as it holds.

    Raises
    ------
    InvalidInputError
        If a text is shorter than one sequence.
    """
    stretches = []
    for name, text in texts.items():
        cut = cut_sequences(tokenizer, text, settings.context, settings.sequences)
        if not cut:
            raise InvalidInputError(
                f"the text {name!r} has fewer tokens than one sequence, expected at least {settings.context}"
            )
        text_hash = hashlib.sha256(text.encode()).hexdigest()
        for number, tokens in enumerate(cut):
            if settings.copies:
                tokens = with_copies(tokens, seed=settings.seed)
            info = {
                "text": name,
                "text_hash": text_hash,
                "sequence": number,
                "tokens_hash": tokens_hash(tokens),
            }
            stretches.append(Stretch(f"{name}-{number}" + "-copies" * settings.copies, tokens, info))
    return stretches


def choose_layers(layers: str | Collection[int], found: Layers) -> list[int]:
    """Return the layers that are wanted, in order.

    Raises
    ------
    InvalidInputError
        If one does not exist or cannot be captured, or none can.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise InvalidInputError(f"layers is {layers!r}, expected numbers, or 'all'")
        if not found.usable:
            reasons = sorted(set(found.left_out.values()))
            raise InvalidInputError(f"the model has no layer of full attention, only {'; '.join(reasons)}")
        return sorted(found.usable)
    chosen = sorted({whole_number(layer, "layer", minimum=0) for layer in layers})
    if not chosen or chosen[-1] >= found.count:
        raise InvalidInputError(f"layers are {chosen}, expected some of 0 to {found.count - 1}")
    refused = [f"{layer} ({found.left_out[layer]})" for layer in chosen if layer in found.left_out]
    if refused:
        raise InvalidInputError(
            f"layers {', '.join(refused)} cannot be captured, expected layers of full attention: "
            f"{', '.join(map(str, found.usable)) or 'there are none'}"
        )
    return chosen


def model_info(model: LoadedModel, layers: int) -> dict[str, Any]:
    """Return what headers say of the model."""
    return {
        "model": model.name,
        "weights": weights_hash(model.model),
        "layers": layers,
        "compute_dtype": str(decoder_of(model.model).dtype).removeprefix("torch."),
    }


def layer_info(number: int, layer: Layer) -> dict[str, Any]:
    """Return what headers say of a layer."""
    return {
        "layer": number,
        "heads": list(range(layer.kv_heads)),
        "kv_heads": layer.kv_heads,
        "q_heads": layer.q_heads,
        "scale": layer.scale,
        "softcap": layer.softcap,
    }


def layer_file(folder: Path, number: int) -> Path:
    """Return the file of a layer in the folder of a sequence."""
    return folder / f"layer-{number:02d}.safetensors"


def missing_layers(folder: Path, expected: Mapping[int, tuple[Mapping[str, Any], Layer]]) -> list[int]:
    """Return the layers that have no file in `folder` yet; files are whole, or they are not there.

    Parameters
    ----------
    folder
        Of a sequence.
    expected
        Of each layer: what the header is to say, and the layer.

    Raises
    ------
    InvalidInputError
        If a file is there that was captured with other settings.
    FileFormatError
        If a file is there that is no trace.
    """
    missing = []
    for number, (info, layer) in expected.items():
        path = layer_file(folder, number)
        if not path.exists():
            missing.append(number)
            continue
        header = read_trace_header(path)
        there, now = {**header.info, "rope": header.rope}, {**info, "rope": layer.rope}
        other = [
            f"{name} was {there.get(name)} and is {now.get(name)} now"
            for name in sorted({*there, *now})
            if there.get(name) != now.get(name)
        ]
        if other:
            raise InvalidInputError(
                f"{path} was captured with other settings: {'; '.join(other)}. Capture into another folder, "
                f"or delete {folder}"
            )
    return missing


def check_space(out: Path, layers: Sequence[Layer], settings: Settings) -> None:
    """Refuse to start what the disk has no room for.

    Parameters
    ----------
    out
        Folder, which need not exist yet.
    layers
        Of each file that will be written, its layer.
    settings
        Of the capture.

    Raises
    ------
    InvalidInputError
        If less space is free than the files need.
    """
    count = min(settings.query_count or settings.context, settings.context)
    needed = sum(
        2 * layer.d * (2 * layer.kv_heads * settings.context + layer.q_heads * count) for layer in layers
    )
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InvalidInputError(
            f"{there} has {free / 1e9:.1f} GB free, expected at least {needed / 1e9:.1f} GB for "
            f"{len(layers)} traces: keep fewer layers, sequences or queries"
        )
