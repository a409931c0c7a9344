"""What files and indexes survive: damaged files, kill -9, full disks, folders without rights, many writers.

::

    python bench/trust.py                       # about 25 minutes; results in bench/results/trust.json
    python bench/trust.py --fuzz-seconds 10 --rounds 5 --no-write

Fuzzing is libFuzzer's, by the package atheris, which is not a dependency: without it the same target is given
random bytes, and the results say so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import saapindex as sx

RESULTS = Path(__file__).parent / "results"
D, BATCH = 8, 10
NOBODY = 65534
app = typer.Typer(add_completion=False)
console = Console()
Result = dict[str, Any]
_start = multiprocessing.get_context("fork")


def keys(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same keys everywhere: key `i` says its id."""
    return np.repeat(np.arange(n, dtype=np.float32)[:, None], D, axis=1)


def new_index(n: int = 0) -> sx.IndexSAAP:
    """A trained index of `n` keys, on the backend that starts no threads."""
    rng = np.random.default_rng(0)
    index = sx.IndexSAAP(D, 4, params=sx.IndexParameters(niter=1), backend="reference")
    x = rng.standard_normal((100, D)).astype(np.float32)
    index.train(x, xq_train=x)
    index.add(keys(n))
    return index


def whole(path: Path) -> int:
    """Read the index at `path` both ways; return how many keys it has, all of which are right."""
    for flags in (0, sx.IO_FLAG_MMAP):
        index = sx.read_index(path, flags, backend="reference")
        found = index.reconstruct_n()
        if not (found == keys(index.ntotal)).all():
            raise AssertionError("a file was read with keys that nobody wrote")
    return index.ntotal


def fuzz(seconds: int, seed: int) -> Result:
    """Damage files for so many seconds."""
    target = Path(__file__).with_name("fuzz_target.py")
    if importlib.util.find_spec("atheris") is None:
        return _fuzz_at_random(seconds, seed)
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, str(target), f"-max_total_time={seconds}", f"-seed={seed + 1}"]
        command += ["-max_len=64", "-len_control=0", "-timeout=300", f"-artifact_prefix={corpus}/", corpus]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = re.findall(r"Done (\d+) runs", done.stderr)
        faults = re.findall(r"Uncaught Python exception.*\n.*|==\d+== ERROR.*", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        kept = len(list(Path(corpus).iterdir()))
    if done.returncode or not runs:
        raise SystemExit(f"fuzzing found a fault:\n{done.stderr[-5000:]}")
    return {
        "inputs": int(runs[-1]),
        "driver": "libFuzzer (atheris)",
        "edges covered": int(covered[-1]),
        "inputs of new coverage": kept,
        "seconds": seconds,
        "faults": len(faults),
    }


def _fuzz_at_random(seconds: int, seed: int) -> Result:
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzz_target

    rng, end, runs = random.Random(seed), time.monotonic() + seconds, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < end:
            fuzz_target.one_input(rng.randbytes(rng.randint(1, 64)))
            runs += 1
    return {"inputs": runs, "driver": "random bytes", "seconds": seconds, "faults": 0}


def _adds_and_writes(path: Path, pipe: Connection) -> None:
    """Add a batch, write, say how many keys are safe; without end."""
    index = sx.read_index(path, backend="reference")
    while True:
        n = index.ntotal
        index.add(keys(n + BATCH)[n:])
        sx.write_index(index, path)
        pipe.send(index.ntotal)


def kills(rounds: int, seed: int) -> Result:
    """Kill -9 a process that adds and writes, at random moments; nothing it said was written is lost."""
    rng, lost, leftovers, written = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        sx.write_index(new_index(), path)
        safe = 0
        for _ in range(rounds):
            if safe > 3000:
                sx.write_index(new_index(), path)
                safe = 0
            here, there = _start.Pipe(duplex=False)
            process = _start.Process(target=_adds_and_writes, args=(path, there))
            process.start()
            there.close()
            time.sleep(rng.uniform(0, 0.15))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            with contextlib.suppress(EOFError, OSError):
                while here.poll():
                    safe, written = here.recv(), written + 1
            held = whole(path)
            lost += held < safe or held % BATCH != 0
            safe = held
            leftovers += len([part for part in Path(folder).iterdir() if part != path])
            for part in Path(folder).iterdir():
                if part != path:
                    part.unlink()
    return {
        "kills": rounds,
        "writes that were confirmed": written,
        "unfinished parts": leftovers,
        "lost": lost,
    }


def full_disks(rounds: int, seed: int) -> Result:
    """Write where the disk ends at a random byte: the system's error, the old index, nothing left over."""
    rng, refused, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        sx.write_index(new_index(BATCH), path)
        larger = new_index(500)
        size = len(sx.serialize_index(larger))
        for _ in range(rounds):
            code = _forked(lambda: _write_limited(larger, path, rng.randrange(size)))
            refused += code == 0
            wrong += code != 0 or whole(path) != BATCH or len(list(Path(folder).iterdir())) != 1
    return {"full disks": rounds, "refused with the system's error": refused, "wrong": wrong}


def _write_limited(index: sx.IndexSAAP, path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        sx.write_index(index, path)
    except OSError:
        return
    raise AssertionError("a write succeeded on a full disk")


def tmpfs(rounds: int) -> Result:
    """Write to a file system of half the size that is needed, where one may be mounted."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            return {"file systems that were full": 0, "why": "none may be mounted here"}
        try:
            path = Path(folder) / "index"
            sx.write_index(new_index(BATCH), path)
            larger = new_index(3000)
            for _ in range(rounds):
                try:
                    sx.write_index(larger, path)
                    wrong += 1
                except OSError:
                    wrong += whole(path) != BATCH or len(list(Path(folder).iterdir())) != 1
        finally:
            subprocess.run(["umount", folder], check=True)
    return {"file systems that were full": rounds, "wrong": wrong}


def no_rights(rounds: int) -> Result:
    """Write to a folder without the right to, as another user where this one may do everything."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        sx.write_index(new_index(BATCH), path)
        os.chmod(folder, 0o555)
        larger = new_index(50)
        try:
            for _ in range(rounds):
                wrong += _forked(lambda: _write_without_rights(larger, path)) != 0
                wrong += whole(path) != BATCH or len(list(Path(folder).iterdir())) != 1
        finally:
            os.chmod(folder, 0o755)
    return {"folders without rights": rounds, "wrong": wrong}


def _write_without_rights(index: sx.IndexSAAP, path: Path) -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        sx.write_index(index, path)
    except PermissionError:
        return
    raise AssertionError("a write succeeded without the right to it")


def _forked(call: Callable[[], None]) -> int:
    """Run `call` in a process of its own; return 0 if it returned."""
    process = _start.Process(target=call)
    process.start()
    process.join()
    return process.exitcode if process.exitcode is not None else -1


def _writes(path: Path, n: int, rounds: int) -> None:
    index = new_index(n)
    for _ in range(rounds):
        sx.write_index(index, path)


def many_writers(rounds: int, writers: int = 4) -> Result:
    """Several processes write different indexes to one name: every reader gets one of them, whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        sx.write_index(new_index(BATCH), path)
        counts = [BATCH * (i + 1) for i in range(writers)]
        processes = [_start.Process(target=_writes, args=(path, n, rounds)) for n in counts]
        for process in processes:
            process.start()
        reads = wrong = 0
        while any(process.is_alive() for process in processes) or not reads:
            wrong += whole(path) not in counts
            reads += 1
        wrong += any(process.exitcode for process in processes)
        wrong += len(list(Path(folder).iterdir())) != 1
    return {"writers": writers, "writes": writers * rounds, "reads meanwhile": reads, "wrong": wrong}


@app.command()
def main(
    fuzz_seconds: Annotated[int, typer.Option(help="Seconds of fuzzing.")] = 1200,
    rounds: Annotated[int, typer.Option(help="Faults of each kind.")] = 300,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    write: Annotated[bool, typer.Option(help="Write the results.")] = True,
) -> None:
    """Try everything, print what was survived and write it down; fail if anything was not."""
    warnings.simplefilter("ignore")
    results = {
        "kill -9 while adding and writing": kills(rounds, seed),
        "disk full at a random byte": full_disks(rounds, seed),
        "full file system": tmpfs(min(rounds, 50)),
        "folder without rights": no_rights(min(rounds, 50)),
        "concurrent writers": many_writers(max(1, rounds // 3)),
        "damaged files": fuzz(fuzz_seconds, seed),
    }
    table = Table("fault", "tried", "outcome")
    for name, result in results.items():
        (what, tried), *rest = result.items()
        table.add_row(name, f"{tried} {what}", ", ".join(f"{key}: {value}" for key, value in rest))
    console.print(table)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "trust.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any(result.get(key) for result in results.values() for key in ("lost", "wrong", "faults")):
        raise SystemExit("something was lost, or wrong")


if __name__ == "__main__":
    app()
