"""What the commands of ``bench/run.py`` share: where results go, and what they were taken on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numba
from rich.console import Console

import saapindex

RESULTS = Path(__file__).parent / "results"
console = Console()


def machine(threads: int) -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    packages = ("numpy", "numba", "faiss-cpu", "safetensors")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "saapindex": saapindex.__version__,
        **{package: version(package) for package in packages},
    }


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def use_threads(threads: int) -> None:
    """Let Faiss and saapindex run on `threads` threads."""
    faiss.omp_set_num_threads(threads)
    numba.set_num_threads(threads)


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``bench/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
