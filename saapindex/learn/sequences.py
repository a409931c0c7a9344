"""The traces that a training reads: which sequences and layers, that they fit, and their tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saapindex.errors import InvalidInputError
from saapindex.files import read_header
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.traces import TraceHeader, find_traces, read_trace, read_trace_header

if TYPE_CHECKING:
    import torch

    from saapindex.learn.layer_job import LayerJob

__all__ = ["Sequences", "split_sequences"]

# Of the memory of a GPU, what the traces of layers trained together may take.
_MEMORY_SHARE = 0.05
# Beyond so many heads a GPU gains nothing from more.
_HEADS_TOGETHER = 64


def split_sequences(
    names: Iterable[str], held_out: int | Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return the sequences to train on and those that are held out, by name.

    Parameters
    ----------
    names
        Of all sequences.
    held_out
        Names, or a number: the last so many in order of name. Default: one in six, at least one.

    Raises
    ------
    InvalidInputError
        If a name is unknown or either side is empty.

    Examples
    --------
    >>> split_sequences(["a", "b", "c"])
    (['a', 'b'], ['c'])
    """
    known = sorted(names)
    if held_out is None:
        held_out = max(1, len(known) // 6)
    kept_back = known[len(known) - held_out :] if isinstance(held_out, int) else list(held_out)
    unknown = sorted(set(kept_back) - set(known))
    if unknown:
        raise InvalidInputError(f"held_out names {unknown}, expected some of {known}")
    used = [name for name in known if name not in kept_back]
    if not used or not kept_back:
        raise InvalidInputError(
            f"{len(used)} sequences to train on and {len(kept_back)} held out, expected at least one of "
            f"each: the traces are of {known}"
        )
    return used, kept_back


@dataclass(frozen=True)
class Sequences:
    """Traces of several sequences, found and checked, not yet read.

    Attributes
    ----------
    train, held_out
        Names of the sequences.
    layers
        Numbers of the layers that are trained, rising.
    paths, headers
        By name of the sequence, then by layer.
    """

    train: list[str]
    held_out: list[str]
    layers: list[int]
    paths: Mapping[str, Mapping[int, Path]]
    headers: Mapping[str, Mapping[int, TraceHeader]]

    @classmethod
    def find(
        cls,
        folder: str | os.PathLike[str],
        *,
        held_out: int | Sequence[str] | None = None,
        sequences: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Sequences:
        """Find the traces of a training; see `saapindex.learn.train.train` for the parameters.

        Raises
        ------
        InvalidInputError
            If a sequence or a layer is missing, or layers differ between sequences.
        """
        found = find_traces(folder)
        unknown = sorted(set(sequences or ()) - found.keys())
        if unknown:
            raise InvalidInputError(f"sequences {unknown} have no traces, expected some of {sorted(found)}")
        names = split_sequences(sequences or found, held_out)
        paths = {name: found[name] for part in names for name in part}
        common = sorted(set.intersection(*(set(by_layer) for by_layer in paths.values())))
        missing = sorted(set(layers or ()) - set(common))
        if missing or not common:
            raise InvalidInputError(f"layers {missing} are not in every sequence, expected some of {common}")
        numbers = sorted(set(layers or common))
        headers = {
            name: {number: read_trace_header(by_layer[number]) for number in numbers}
            for name, by_layer in paths.items()
        }
        result = cls(*names, numbers, paths, headers)
        for number in numbers:
            result._check(number)
        return result

    def _check(self, number: int) -> None:
        """Refuse a layer whose traces are not of one attention layer."""
        first, *others = ((name, by_layer[number]) for name, by_layer in self.headers.items())
        for name, header in others:
            for what, ours, theirs in zip(_MUST_AGREE, _layer_of(first[1]), _layer_of(header), strict=True):
                if ours != theirs:
                    raise InvalidInputError(
                        f"layer {number}: {what} is {ours} in {first[0]} and {theirs} in {name}, expected "
                        "traces of one model and one context length"
                    )

    def model(self) -> dict[str, Any]:
        """Return name and fingerprint of the model.

        Raises
        ------
        InvalidInputError
            If the traces are of several.
        """
        result = {}
        for ours, theirs in (("model_id", "model"), ("weights_hash", "weights")):
            headers = (header for by_layer in self.headers.values() for header in by_layer.values())
            seen = {header.info.get(theirs) for header in headers}
            if len(seen) != 1:
                raise InvalidInputError(
                    f"the traces are of several models: {theirs} is {', '.join(sorted(map(repr, seen)))}"
                )
            result[ours] = seen.pop()
        return result

    def groups(self, together: int | None, device: torch.device) -> Iterator[list[int]]:
        """Cut the layers into runs of alike ones that are trained together.

        Parameters
        ----------
        together
            Layers at most; None for 1 on a CPU, and on a GPU what fits.
        device
            Of the training.
        """
        if together is None:
            together = self._fitting(device)
        group: list[int] = []
        for number in self.layers:
            if group and (len(group) >= together or self._shape(number) != self._shape(group[0])):
                yield group
                group = []
            group.append(number)
        yield group

    def _fitting(self, device: torch.device) -> int:
        if device.type != "cuda":
            return 1
        import torch

        # Of all memory, not of what is free: or layers that another process trains were grouped otherwise.
        _, memory = torch.cuda.mem_get_info(device)
        headers = [by_layer[self.layers[0]] for by_layer in self.headers.values()]
        floats = sum(h.d * (2 * h.kv_heads * h.n + h.q_heads * h.m) for h in headers)
        by_heads = _HEADS_TOGETHER // headers[0].kv_heads
        return max(1, min(by_heads, int(_MEMORY_SHARE * memory / (4 * floats))))

    def _shape(self, number: int) -> list[Any]:
        """What layers that are trained together have in common."""
        headers = (by_layer[number] for by_layer in self.headers.values())
        return [(*_layer_of(header), header.n, header.m) for header in headers]

    def fingerprint(self, number: int) -> list[Any]:
        """Return the checksums of the traces of a layer, which JSON can hold."""
        headers = [(name, read_header(by_layer[number])[1]) for name, by_layer in sorted(self.paths.items())]
        sums = [[name, header.get("checksum"), header.get("row_checksums")] for name, header in headers]
        return [self.train, self.held_out, sums]

    def read(self, group: Sequence[int], settings: TrainingSettings, device: torch.device) -> LayerJob:
        """Read the traces of some layers, their heads one after the other."""
        from saapindex.learn.contexts import Context
        from saapindex.learn.layer_job import LayerJob

        contexts = {}
        for name in (*self.train, *self.held_out):
            parts = []
            for number in group:
                trace = read_trace(self.paths[name][number])
                parts.append(
                    Context.of(
                        trace, name, sinks=settings.sinks, max_queries=settings.max_queries, device=device
                    )
                )
            contexts[name] = Context.stack(parts)
        return LayerJob(
            layers=group,
            head_numbers=trace.heads,
            train=[contexts[name] for name in self.train],
            held_out=[contexts[name] for name in self.held_out],
            rope=trace.rope,
            scale=trace.scale,
            softcap=trace.softcap,
            settings=settings,
        )


_MUST_AGREE = ("heads", "query heads", "size of a head", "rope", "scale", "softcap")


def _layer_of(header: TraceHeader) -> tuple[Any, ...]:
    info = header.info
    return (header.heads, header.q_heads, header.d, header.rope, info.get("scale"), info.get("softcap"))
