"""Data sets side by side, each measured by a process of its own on processors of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any


def run(commands: Sequence[Sequence[str]], files: Sequence[Path], jobs: int, limit: float) -> list[Any]:
    """Run each command, which writes a JSON file, `jobs` at a time; return what the files hold, in order.

    Each is told by ``--limit`` how many seconds are left.

    The processors that this process may use are dealt out in equal runs. Processes that have not ended after
    `limit` seconds are ended, and their files count for nothing.
    """
    cores = sorted(os.sched_getaffinity(0))
    width = max(1, len(cores) // jobs)
    free = [cores[i * width : (i + 1) * width] for i in range(min(jobs, len(cores)))]
    left, end = list(range(len(commands))), time.monotonic() + limit
    running: dict[subprocess.Popen[bytes], list[int]] = {}
    for file in files:
        file.unlink(missing_ok=True)
    while (left or running) and time.monotonic() < end:
        while left and free:
            number, own = left.pop(0), free.pop(0)
            child = subprocess.Popen(
                [sys.executable, *commands[number], "--limit", str(end - time.monotonic())],
                preexec_fn=partial(os.sched_setaffinity, 0, own),
            )
            running[child] = own
        for child in [child for child in running if child.poll() is not None]:
            free.append(running.pop(child))
        time.sleep(0.1)
    for child in running:
        child.kill()
        child.wait()
    return [json.loads(file.read_text()) for file in files if file.exists()]
