"""Published methods inside generation: what a step of attention would return, had it read as they do.

A simulation that is exact in its results and says nothing about speed: each KV head asks its
`saapindex.learn.peers.Peer` which keys to read, and attends to sinks, window and these. Run as a script, it
trains SAAP as published for every KV head of some traces::

    python bench/peers.py traces/train saap.safetensors --held-out hwmon-0
"""

from __future__ import annotations

import contextlib
import copy
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from two_looks import TwoLooks

from saapindex.codebook import Codebook
from saapindex.learn import read_trace
from saapindex.learn.evaluation import training_sequence
from saapindex.learn.layers import Layer
from saapindex.learn.peers import PEERS, Peer
from saapindex.learn.peers.base import Context, Queries
from saapindex.learn.peers.ladder import Ladder, peers_from_codebook
from saapindex.learn.peers.paper import SAAP
from saapindex.learn.traces import find_traces
from saapindex.progress import track

__all__ = ["PeerCache", "PeerMethod", "peer_attention"]

NAME = "saapindex-bench-peers"
_HANDLE = "_peer_layer"
_PAGE = 16
"""Keys leave the window in whole pages of this many, as those of `AttentionIndex` do."""

Make = Callable[[int, int], Peer]
"""Gives the method for a layer and KV head."""


@dataclass(frozen=True)
class PeerMethod:
    """A published method at a budget: ``quest=0.05,page=64``.

    Attributes
    ----------
    name
        ``"saap"``, ``"ladder"`` and ``"looks"`` come from files, others are made with `settings`.
    budget
        Share of the long-range bytes.
    settings
        Arguments of the method; of SAAP, the ``file`` that `main` wrote, and perhaps ``count_router``.
    """

    name: str
    budget: float
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a method; None if `text` names none."""
        first, *rest = (part.strip().partition("=") for part in text.split(","))
        if first[0] not in (*PEERS, TwoLooks.name):
            return None
        settings: dict[str, Any] = {}
        for name, _, value in rest:
            try:
                settings[name] = json.loads(value)
            except json.JSONDecodeError:
                settings[name] = value
        return cls(first[0], float(first[2]), settings)

    def maker(self, codebook: Codebook, device: Any) -> Make:
        """Return what makes the method for a layer and KV head."""
        settings = dict(self.settings)
        if self.name in ("ladder", TwoLooks.name):
            kind = Ladder if self.name == "ladder" else TwoLooks
            return peers_from_codebook(codebook, device=device, kind=kind, **settings)
        if self.name == "saap":
            trained = load_saap(Path(settings.pop("file")), device, settings)
            return lambda layer, head: copy.copy(trained[layer, head])
        return lambda layer, head: PEERS[self.name](**settings)


class PeerLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, and the methods of its KV heads."""

    def __init__(self, number: int, keys: Any, values: Any, rope: Any, scale: float, **options: Any) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.number, self.rope, self.scale = number, rope, scale
        self.make: Make = options["make"]
        self.window, self.sinks, self.flush = (options[name] for name in ("window", "sinks", "flush"))
        self.budget = 1.0
        self.start, self.queries = self.sinks, 0
        self.bytes = torch.zeros((), device=keys.device)
        self.peers: list[Peer] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # tensors and methods are replaced, never changed

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values, and return all."""
        keys, values = super().update(key_states, value_states)
        setattr(keys, _HANDLE, weakref.ref(self))
        return keys, values

    def build(self) -> None:
        """Let keys leave the window as `AttentionIndex` does, and show the methods those that have left."""
        length, kept = self.keys.shape[2], self.window + _PAGE
        if length - self.start < kept + self.flush:
            return
        self.start = self.sinks + (length - kept - self.sinks) // _PAGE * _PAGE
        positions = torch.arange(self.sinks, self.start, device=self.keys.device)
        self.peers = []
        for head, (keys, values) in enumerate(zip(self.keys[0], self.values[0], strict=True)):
            far, seen = (x[self.sinks : self.start].float() for x in (keys, values))
            peer = self.make(self.number, head)
            size = keys.element_size()
            peer.build(Context(far, seen, positions, self.rope, self.scale, size, self.window))
            self.peers.append(peer)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Return the output for the newest tokens, (1, t, q_heads, d)."""
        self.build()
        t, length = query.shape[2], self.keys.shape[2]
        positions = torch.arange(length - t, length, device=query.device)
        at = torch.arange(length, device=query.device)
        at = torch.cat([at[: self.sinks], at[self.start :]])
        heads = self.keys.shape[1]
        outs = []
        for head, x in enumerate(query[0].float().reshape(heads, -1, t, query.shape[3])):
            keys, values = (part[0, head, at].float() for part in (self.keys, self.values))
            near = (x @ keys.T).mul_(self.scale).masked_fill_(at > positions[:, None], -torch.inf)
            logits, rows = [near], [values]
            if self.peers:
                peer = self.peers[head]
                context = peer.context
                total = len(context.keys) * context.row
                read = peer.read(Queries(x, positions, near.amax(-1)), self.budget * total)
                far = (x @ context.keys.T).mul_(self.scale).masked_fill_(~read.keys, -torch.inf)
                logits.append(far)
                rows.append(context.values)
                if read.log_weights is not None and read.values is not None:
                    logits.append(read.log_weights)
                    rows.append(read.values)
                self.bytes = self.bytes + read.bytes.sum() / total
                self.queries += t
            outs.append(torch.softmax(torch.cat(logits, -1), -1) @ torch.cat(rows))
        return torch.cat(outs).transpose(0, 1)[None].to(query.dtype).contiguous()


class PeerCache(Cache):  # type: ignore[misc]
    """A cache of one sequence, whose prompt was read densely into another cache.

    Parameters
    ----------
    read
        What it was read into: plain keys and values in every layer.
    layers
        What `saapindex.learn.layers.inspect_layers` says of the model.
    options
        ``make``, ``window``, ``sinks`` and ``flush``.
    """

    def __init__(self, read: Cache, layers: Mapping[int, Layer], **options: Any) -> None:
        made = []
        for number, layer in enumerate(read.layers):
            about = layers[number]
            made.append(PeerLayer(number, layer.keys, layer.values, about.rope, about.scale, **options))
        super().__init__(layers=made)
        for layer in self.layers:
            layer.build()

    def at(self, budget: float) -> Self:
        """Return a copy that reads at most this share of the long-range bytes."""
        twin = copy.deepcopy(self)
        for layer in twin.layers:
            layer.budget = budget
        return twin

    @property
    def share_read(self) -> float:
        """Bytes read as a share of the long-range bytes, mean over queries and KV heads."""
        asked: int = sum(layer.queries for layer in self.layers)
        return float(sum(layer.bytes for layer in self.layers)) / max(asked, 1)


@contextlib.contextmanager
def peer_attention(model: Any) -> Iterator[None]:
    """Let the decoder of `model` attend as the methods of its `PeerCache` do."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    layer: PeerLayer = getattr(key, _HANDLE)()
    return layer.attend(query), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def load_saap(path: Path, device: Any, changes: Mapping[str, Any]) -> dict[tuple[int, int], SAAP]:
    """Read what `main` wrote: one file, or a folder of files with some layers each."""
    found: dict[tuple[int, int], SAAP] = {}
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(part, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
            names = sorted({tuple(map(int, name.split(".")[:2])) for name in file.keys()})  # noqa: SIM118
            for layer, head in names:
                prefix = f"{layer}.{head}."
                state = {
                    name.removeprefix(prefix): file.get_tensor(name).float().to(device)
                    for name in file.keys()  # noqa: SIM118
                    if name.startswith(prefix)
                }
                found[layer, head] = SAAP(**{**settings, **changes}).load_state_dict(state)
    return found


def main(
    traces: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="File that is written.")],
    held_out: Annotated[str, typer.Option(help="Sequence that stops the training.")],
    leave_out: Annotated[str, typer.Option(help="Sequence that is not used.")] = "",
    layers: Annotated[str, typer.Option(help="Numbers with commas between; default: all.")] = "",
    nlist: Annotated[int, typer.Option()] = 1024,
    hidden: Annotated[int, typer.Option()] = 128,
    window: Annotated[int, typer.Option()] = 2047,
) -> None:
    """Train SAAP as published for every KV head, and write it in half precision."""
    from saapindex.learn.evaluation import Protocol

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"nlist": nlist, "hidden": hidden}
    found = find_traces(traces)
    names = [name for name in sorted(found) if name not in (held_out, leave_out)] + [held_out]
    chosen = [int(part) for part in layers.split(",")] if layers else sorted(found[held_out])
    tensors: dict[str, torch.Tensor] = {}
    protocol = Protocol(window=window)
    for layer in track(chosen, "training SAAP", show=True):
        sequences = [read_trace(found[name][layer]) for name in names]
        for head in sequences[0].heads:
            pairs = [training_sequence(trace, head, protocol, device=device) for trace in sequences]
            peer = SAAP(**settings)
            peer.fit([context for context, _ in pairs], [queries for _, queries in pairs])
            for name, tensor in peer.state_dict().items():
                tensors[f"{layer}.{head}.{name}"] = tensor.half().cpu().contiguous()
    save_file(tensors, out, {"settings": json.dumps(settings), "sequences": json.dumps(names)})


if __name__ == "__main__":
    typer.run(main)
