"""vLLM's server with and without sparse attention: speed, fidelity and memory, under concurrent requests.

Run it with the Python of an environment that has vLLM's CPU wheel and saapindex; the codebook comes from
``saapindex capture`` and ``saapindex train``, the model is a folder in the format of transformers::

    python bench/serve_vllm.py MODEL codebook.safetensors TEXT

Every server reads the same prompts of different lengths at once; then it is asked again, and these passes,
whose prompts come from the prefix cache, are timed, the servers in turn. Writes ``bench/results/vllm.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import socket
import statistics
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
    """A server: its process, its address, and what it logs."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def wait(self, patience: float = 1200) -> None:
        """Wait until it answers."""
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.ask("/health")
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"the server did not start:\n{self.log.read_text(errors='replace')[-6000:]}"
                )
            time.sleep(1)

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

    def worked(self) -> float:
        """Return the processor seconds that the workers of the server have taken, which a busy machine leaves
        as they are.
        """
        ticks = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
                if int(fields[3]) == self.process.pid and b"orker" in (folder / "cmdline").read_bytes():
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def held(self) -> tuple[float, float] | None:
        """Return what the indices held at the last word, and the cache beside, in MiB."""
        found = _HELD.findall(self.log.read_text(errors="replace"))
        return (float(found[-1][0]), float(found[-1][1])) if found else None


@contextlib.contextmanager
def serve(model: Path, environment: dict[str, str], *options: str) -> Iterator[Server]:
    """Start vLLM's OpenAI-compatible server on a free port of this machine, and end it afterwards."""
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
        try:
            yield Server(process, f"http://127.0.0.1:{port}", log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask_all(server: Server, prompts: list[list[int]], count: int) -> tuple[list[Any], tuple[float, float]]:
    """Send all prompts at once; return the completions, and the seconds that they took: of the clock, and of
    the processor.
    """
    start, worked = time.perf_counter(), server.worked()
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: server.complete(prompt, count), prompts))
    return found, (time.perf_counter() - start, server.worked() - worked)


def run(server: Server, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Send all prompts at once, twice; return what came back, and what the server counted."""
    server.wait()
    first, _ = ask_all(server, prompts, count)
    again, (seconds, worked) = ask_all(server, prompts, count)
    return {
        "completions": first,
        "same_again": [a[0] == b[0] for a, b in zip(first, again, strict=True)],
        "seconds": [seconds],
        "processor_seconds": [worked],
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
    lengths: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "7000,5500,4500,3000",
    rounds: Annotated[int, typer.Option(help="Passes that are timed.", min=1)] = 3,
    count: Annotated[int, typer.Option(help="Tokens that each request asks for.")] = 32,
    budgets: Annotated[str, typer.Option(help="Shares of the bytes.")] = "1.0,0.05",
    window: Annotated[int, typer.Option(help="Recent tokens that are always attended to.")] = 2047,
    dtype: Annotated[str, typer.Option(help="Of the model and its cache.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="Of the index: cpu or reference.")] = "cpu",
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
    asked: dict[str, dict[str, str]] = {"alone": {}}
    for budget in budgets.split(","):
        given = {"CODEBOOK": str(codebook.resolve()), "BUDGET": budget, "WINDOW": str(window)}
        given["BACKEND"] = backend
        asked[budget] = {f"SAAPINDEX_{name}": value for name, value in given.items()}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serve(model, how, *options)) for name, how in asked.items()}
        results = {name: run(server, prompts, count) for name, server in servers.items()}
        for _ in range(rounds - 1):  # one after the other, so that all meet the same load of the machine
            for name, server in servers.items():
                seconds, worked = ask_all(server, prompts, count)[1]
                results[name]["seconds"].append(seconds)
                results[name]["processor_seconds"].append(worked)
        for name, server in servers.items():
            results[name]["held_mib"] = server.held()
    alone = results["alone"]
    for name, found in results.items():
        found |= agreement(found["completions"], alone["completions"]) if name != "alone" else {}
        found["tokens_per_second"] = count * len(prompts) / statistics.median(found["seconds"])
        pairs = zip(alone["seconds"], found["seconds"], strict=True)
        found["speed_beside_alone"] = statistics.median(a / b for a, b in pairs)
        least = [min(each["processor_seconds"]) for each in (alone, found)]
        found["processor_beside_alone"] = least[1] / least[0] if least[0] else None
    for found in results.values():
        del found["completions"]
        typer.echo(json.dumps(found))
    import vllm

    machine = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[1],
        "machine": platform.machine(),
        "vllm": vllm.__version__,
    }
    settings = {"lengths": sizes, "count": count, "dtype": dtype, "window": window, "blocks": blocks}
    settings["backend"] = backend
    out.write_text(
        json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
