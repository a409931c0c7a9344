"""vLLM's server with the plugin: a real model, several requests at once, prefix caching, preemption.

It runs in an environment that has vLLM's CPU wheel, where ``SAAPINDEX_TEST_VLLM`` names a model's folder
and its codebook, joined by a colon; elsewhere its absence is reported.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib

import pytest

pytestmark = pytest.mark.vllm
NAMED = os.environ.get("SAAPINDEX_TEST_VLLM", "")
BENCH = pathlib.Path(__file__).parents[2] / "bench" / "serve_vllm.py"
COUNT = 24
# Windows so short that all but the last of these prompts have keys in lists.
SMALL = {
    "SAAPINDEX_WINDOW": "127",
    "SAAPINDEX_DENSE_BELOW": "256",
    "SAAPINDEX_FLUSH": "32",
    "SAAPINDEX_ADAPT": "1",
}
# 17 blocks of 128 tokens, one of which is vLLM's own: too few for all requests, so some are preempted.
OPTIONS = [
    "--max-model-len",
    "2048",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--num-gpu-blocks-override",
    "17",
]


@pytest.fixture(scope="module")
def bench():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM's CPU wheel")
    if not NAMED:
        pytest.skip("needs SAAPINDEX_TEST_VLLM=MODEL:CODEBOOK")
    spec = importlib.util.spec_from_file_location("serve_vllm", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts(bench):
    """Prompts of 900, 700, 500 and 200 tokens, of which two begin alike."""
    from transformers import AutoTokenizer

    text = pathlib.Path(os.__file__).with_name("argparse.py").read_text()
    tokens = AutoTokenizer.from_pretrained(NAMED.split(":")[0])(text)["input_ids"]
    return [tokens[:900], tokens[:512] + tokens[1200:1388], tokens[2000:2500], tokens[3000:3200]]


@pytest.fixture(scope="module")
def served(bench, prompts):
    """What a server does under some settings of the environment: `served(**variables)`."""
    model, codebook = NAMED.split(":")
    known = {}

    def ask(**variables):
        key = tuple(variables.items())
        if key not in known:
            asked = {"SAAPINDEX_CODEBOOK": codebook, **SMALL, **variables} if variables else {}
            with bench.serve(pathlib.Path(model), asked, *OPTIONS) as server:
                known[key] = bench.run(server, prompts, COUNT)
        return known[key]

    return ask


def test_a_budget_of_one_is_vllm_alone(served):
    alone, whole = served(), served(SAAPINDEX_BUDGET="1.0")
    assert [tokens for tokens, _ in whole["completions"]] == [tokens for tokens, _ in alone["completions"]]
    for found in (alone, whole):
        assert all(found["same_again"])  # the second time the prompts come from the prefix cache
        assert found["prefix_cache_hits"] > 0
        assert found["preemptions"] > 0


def test_a_small_budget(served, bench):
    alone, sparse = served(), served(SAAPINDEX_BUDGET="0.2")
    agreed = bench.agreement(sparse["completions"], alone["completions"])
    assert agreed["tokens_alike"][-1] == COUNT  # shorter than what is attended to densely
    assert sum(agreed["tokens_alike"]) > COUNT * 2
    assert agreed["logprob_gap"] < 0.3
    assert sparse["preemptions"] > 0
    assert sparse["prefix_cache_hits"] > 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SAAPINDEX_BUGDET": "1"}, "SAAPINDEX_BUGDET is not known"),
        ({"SAAPINDEX_CODEBOOK": "nowhere"}, "nowhere"),
    ],
)
def test_a_server_that_cannot_start_says_why(variables, message, bench, prompts):
    model, codebook = NAMED.split(":")
    asked = {"SAAPINDEX_CODEBOOK": codebook, **variables}
    with (
        pytest.raises(RuntimeError, match=message),
        bench.serve(pathlib.Path(model), asked, *OPTIONS) as server,
    ):
        server.wait()


def test_other_releases_are_refused(bench, monkeypatch):
    import vllm

    from saapindex.adapters.vllm import TESTED, register
    from saapindex.errors import InvalidInputError

    monkeypatch.delenv("SAAPINDEX_TEST_VLLM", raising=False)  # no setting of the plugin
    monkeypatch.setenv("SAAPINDEX_CODEBOOK", "codebook.safetensors")
    monkeypatch.setattr(vllm, "__version__", "0.1.2")
    with pytest.raises(InvalidInputError, match=f"vLLM is 0.1.2, expected {TESTED}"):
        register()
