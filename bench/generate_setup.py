"""What the commands of `generate.py` compare: a model, its codebook, and caches that have read the same."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from peers import Make, PeerCache, PeerMethod, peer_attention
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import saapindex
from saapindex.adapters.transformers import SaapCache, sparse_attention
from saapindex.attention import AttendParameters
from saapindex.codebook import Codebook
from saapindex.learn.layers import Layer, inspect_layers
from saapindex.learn.texts import cut_sequences, read_text

console = Console()
RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
SINKS, FLUSH = 1, 256
"""What `SaapCache` keeps by default, and so do the published methods."""
KEPT = ("keys", "values")


@dataclass(frozen=True)
class Bench:
    """A model, its codebook, and what is compared."""

    model: Any
    tokenizer: Any
    codebook: Codebook
    settings: dict[str, Any]
    methods: dict[str, AttendParameters | PeerMethod]
    context: int
    rope_scaling: str
    prefill_chunk: int
    out: Path | None
    reader: Any = None
    """The model on the device that reads prompts, if that is another one."""
    prompts: Path | None = None
    """Where keys and values of prompts are kept."""

    def tokens(self, path: Path, count: int) -> list[int]:
        """Return the first `count` tokens of a text."""
        cut = cut_sequences(self.tokenizer, read_text(path), count, 1)
        if not cut:
            raise typer.BadParameter(f"{path} holds fewer than {count} tokens")
        return cut[0]

    def parts(self, tokens: list[int], size: int) -> Iterator[torch.Tensor]:
        """Yield tokens, (1, size) at a time, where the model is."""
        for start in range(0, len(tokens), size):
            yield torch.tensor([tokens[start : start + size]], device=self.model.device)

    def read(self, tokens: list[int]) -> SaapCache:
        """Return a cache that has read `tokens` densely."""
        cache = SaapCache(self.codebook, self.model.config, **self.settings)
        if self.reader is None and self.prompts is None:
            self._fill(self.model, tokens, cache)
            return cache
        for number, pair in enumerate(self._kept(tokens)):
            cache.update(*(x.to(self.model.device) for x in pair), number)
        return cache

    def _fill(self, model: Any, tokens: list[int], cache: Any) -> None:
        for part in self.parts(tokens, self.prefill_chunk or len(tokens)):
            model(part.to(model.device), past_key_values=cache, logits_to_keep=1)

    def _kept(self, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values of each layer, from the folder of prompts if they are there."""
        said = [self.codebook.weights_hash, self.context, self.rope_scaling, str(self.model.dtype), tokens]
        name = f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]}.safetensors"
        path = None if self.prompts is None else self.prompts / name
        if path is not None and path.exists():
            kept = load_file(path)
            return [(kept[f"{i}.keys"], kept[f"{i}.values"]) for i in range(len(kept) // 2)]
        model = self.reader or self.model
        filled = DynamicCache(config=model.config)
        self._fill(model, tokens, filled)
        pairs = [(layer.keys, layer.values) for layer in filled.layers]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            names = [
                (f"{i}.{name}", x) for i, pair in enumerate(pairs) for name, x in zip(KEPT, pair, strict=True)
            ]
            save_file({name: x.cpu().contiguous() for name, x in names}, path)
        return pairs

    def step(self, tokens: torch.Tensor, cache: Any, sparse: bool) -> torch.Tensor:
        """Return the logits of (batch, t) tokens."""
        switch = peer_attention if isinstance(cache, PeerCache) else sparse_attention
        with switch(self.model) if sparse else contextlib.nullcontext():
            logits: torch.Tensor = self.model(tokens, past_key_values=cache).logits
        return logits

    def indexed(self, cache: SaapCache, batch: int = 1) -> SaapCache:
        """Return a copy of a cache whose tokens are in the index already."""
        made = copy.deepcopy(cache)
        self.step(torch.zeros(batch, 1, dtype=torch.long, device=self.model.device), made, True)
        made.crop(-1)
        return made

    @cached_property
    def layers(self) -> Mapping[int, Layer]:
        """What the attention of each layer is like."""
        return inspect_layers(self.model, self.context).usable

    @cached_property
    def makers(self) -> dict[str, Make]:
        """What makes each published method."""
        peers = {name: method for name, method in self.methods.items() if isinstance(method, PeerMethod)}
        return {name: method.maker(self.codebook, self.model.device) for name, method in peers.items()}

    def caches(self, read: SaapCache) -> dict[str, Any]:
        """Return a copy of a cache for dense attention, and one for each method."""
        caches: dict[str, Any] = {DENSE: copy.deepcopy(read)}
        made: SaapCache | None = None
        built: dict[Any, PeerCache] = {}
        for name, method in self.methods.items():
            if isinstance(method, PeerMethod):
                kind = method.name, json.dumps(method.settings)
                if kind not in built:  # once for all budgets
                    keeping = {"window": self.settings["window"], "sinks": SINKS, "flush": FLUSH}
                    built[kind] = PeerCache(read, self.layers, make=self.makers[name], **keeping)
                caches[name] = built[kind].at(method.budget)
            else:
                made = made or self.indexed(read)  # which all budgets share
                caches[name] = copy.deepcopy(made)
                caches[name].params = method
        return caches

    def follow(
        self, tokens: list[int], caches: dict[str, Any], chunk: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Feed tokens, `chunk` at a time, to all caches; yield log-probabilities, (t, vocabulary)."""
        for part in self.parts(tokens, chunk):
            logits = {name: self.step(part, cache, name != DENSE) for name, cache in caches.items()}
            yield {name: found[0].float().log_softmax(dim=-1) for name, found in logits.items()}

    def write(self, name: str, **found: Any) -> None:
        """Write what was found, and what it was found with."""
        device = self.model.device
        chip = platform.processor() or platform.machine()
        described = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else chip,
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "saapindex": saapindex.__version__,
            "dtype": str(self.model.dtype),
            "model": self.codebook.model_id,
            "layers": list(SaapCache(self.codebook, self.model.config).served),
            "context": self.context,
            "rope_scaling": self.rope_scaling,
            **{name: value for name, value in self.settings.items() if name != "device"},
            "index": self.settings["device"],
            "methods": {name: asdict(params) for name, params in self.methods.items()},
        }
        path = self.out or RESULTS / f"generate-{name}.json"
        path.write_text(json.dumps({**described, **found}, indent=1) + "\n")
        console.print(f"wrote {path}")


def parse_method(text: str) -> AttendParameters | PeerMethod:
    """Read ``0.05``, ``nprobe=32,policy=max,remainder=false`` or ``quest=0.05,page=64``."""
    if peer := PeerMethod.parse(text):
        return peer
    if "=" not in text:
        return AttendParameters(budget=float(text))
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return AttendParameters(**values)
