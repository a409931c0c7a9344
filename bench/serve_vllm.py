"""vLLM's server with and without sparse attention: speed, fidelity and memory, under concurrent requests.

Run it with the Python of an environment that has vLLM's CPU wheel and saapindex; the codebook comes from
``saapindex capture`` and ``saapindex train``, the model is a folder in the format of transformers::

    python bench/serve_vllm.py MODEL codebook.safetensors TEXT

Every server reads the same prompts of different lengths at once, twice: the second pass, whose prompts come
from the prefix cache, is timed. Writes ``bench/results/vllm.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results" / "vllm.json"
_HELD = re.compile(r"saapindex holds ([\d.]+) MiB beside ([\d.]+) MiB")


class Server:
    """A running server: its address, and what it logs."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the answer to a request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=1800) as answer:
            text: str = answer.read().decode()
        return text

    def complete(self, prompt: list[int], count: int) -> tuple[list[str], list[float]]:
        """Return the tokens that greedy decoding adds to a prompt, and their log-probabilities."""
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": count,
            "min_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        found = json.loads(self.ask("/v1/completions", body))["choices"][0]["logprobs"]
        return found["tokens"], found["token_logprobs"]

    def metric(self, name: str) -> float:
        """Return the sum of a counter."""
        lines = self.ask("/metrics").splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(_total)?[{{ ]", line)
        )

    def held(self) -> tuple[float, float] | None:
        """Return what the indices held at the last word, and the cache beside, in MiB."""
        found = _HELD.findall(self.log.read_text(errors="replace"))
        return (float(found[-1][0]), float(found[-1][1])) if found else None


@contextlib.contextmanager
def serve(model: Path, environment: dict[str, str], *options: str, patience: float = 900) -> Iterator[Server]:
    """Run vLLM's OpenAI-compatible server on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *options]
    base = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SAAPINDEX_")}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env={**inherited, **base, **environment},
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", log)
        try:
            end = time.monotonic() + patience
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    server.ask("/health")
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(
                        f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}"
                    )
                time.sleep(1)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(server: Server, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Send all prompts at once, twice; return what came back and how fast."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        first = list(pool.map(lambda prompt: server.complete(prompt, count), prompts))
        start = time.perf_counter()
        again = list(pool.map(lambda prompt: server.complete(prompt, count), prompts))
        seconds = time.perf_counter() - start
    return {
        "completions": first,
        "same_again": [a[0] == b[0] for a, b in zip(first, again, strict=True)],
        "tokens_per_second": count * len(prompts) / seconds,
        "preemptions": server.metric("vllm:num_preemptions"),
        "prefix_cache_hits": server.metric("vllm:prefix_cache_hits"),
        "held_mib": server.held(),
    }


def agreement(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """Compare completions: tokens before the first difference, and log-probabilities of those."""
    same, gaps = [], []
    for (tokens, logs), (known, known_logs) in zip(ours, theirs, strict=True):
        n = next((i for i, (a, b) in enumerate(zip(tokens, known, strict=True)) if a != b), len(tokens))
        same.append(n)
        gaps += [abs(a - b) for a, b in zip(logs[:n], known_logs[:n], strict=True)]
    return {"tokens_alike": same, "logprob_gap": sum(gaps) / len(gaps) if gaps else None}


def main(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    codebook: Annotated[Path, typer.Argument(exists=True)],
    text: Annotated[Path, typer.Argument(help="A text that the codebook was not trained on.", exists=True)],
    lengths: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "7500,6000,5000,3000",
    count: Annotated[int, typer.Option(help="Tokens that each request asks for.")] = 64,
    budgets: Annotated[str, typer.Option(help="Shares of the bytes.")] = "1.0,0.05",
    window: Annotated[int, typer.Option(help="Recent tokens that are always attended to.")] = 2047,
    dtype: Annotated[str, typer.Option(help="Of the model and its cache.")] = "bfloat16",
    blocks: Annotated[int, typer.Option(help="Blocks of 128 tokens that the cache has; 0 for a GiB.")] = 0,
    out: Annotated[Path, typer.Option(help="Where to write.")] = RESULTS,
) -> None:
    """Compare vLLM alone with vLLM and the index."""
    from transformers import AutoTokenizer

    sizes = [int(n) for n in lengths.split(",")]
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(errors="replace"))["input_ids"]
    prompts = [tokens[i * 500 : i * 500 + n] for i, n in enumerate(sizes)]
    options = ["--max-model-len", "8192", "--dtype", dtype, "--enforce-eager"]
    options += ["--num-gpu-blocks-override", str(blocks)] if blocks else []
    with serve(model, {}, *options) as server:
        alone = run(server, prompts, count)
    results: dict[str, Any] = {"alone": alone}
    for budget in budgets.split(","):
        asked = {
            "SAAPINDEX_CODEBOOK": str(codebook),
            "SAAPINDEX_BUDGET": budget,
            "SAAPINDEX_WINDOW": str(window),
        }
        with serve(model, asked, *options) as server:
            results[budget] = run(server, prompts, count)
        results[budget] |= agreement(results[budget]["completions"], alone["completions"])
    for found in results.values():
        del found["completions"]
        typer.echo(json.dumps(found))
    import vllm

    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "vllm": vllm.__version__}
    settings = {"lengths": sizes, "count": count, "dtype": dtype, "window": window, "blocks": blocks}
    out.write_text(
        json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
