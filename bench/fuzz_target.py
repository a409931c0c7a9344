"""The fuzz target for reading files: bytes say which valid file is damaged, and how.

Damage is done to the bytes, or to tensors and header, with checksums that fit again, so that what lies behind
the checksums is reached too. A file is then refused with `FileFormatError`, or it is read: then, if its
checksums were not made anew, it holds what it held before; and in any case it can be searched, added to and
written again.

As a target of libFuzzer::

    python bench/fuzz_target.py -max_total_time=600     # needs atheris
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import saapindex as sx
import saapindex.file_parts
import saapindex.index.storage
from saapindex.files import read_file, write_file
from saapindex.learn.traces import Trace, read_trace, write_trace
from saapindex.partition import MLPRouter

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
D, NLIST, N = 8, 4, 60
VALUES: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        7,
        15,
        17,
        2**31,
        2**62,
        2**63 - 1,
        -(2**63),
        10**30,
        0.5,
        1e300,
        float("nan"),
        float("inf"),
    ),
    *(True, None, "", "key", "mlp", "float16", [], [1], {}, {"a": 1}, [[[]]], "\ud800"),
)
DTYPES = ("f4", "f8", "f2", "i8", "i4", "u4", "u1", "?")


@dataclasses.dataclass(frozen=True)
class Seed:
    """A valid file: its bytes, its parts, and how it is read, looked at and used."""

    content: bytes
    tensors: dict[str, NDArray[Any]]
    header: dict[str, Any]
    read: Callable[[Path], Any]
    show: Callable[[Any], Any]
    use: Callable[[Any, Path], None]


def _use_index(index: sx.IndexSAAP, path: Path) -> None:
    x = np.linspace(-1, 1, 5 * index.d, dtype=np.float32).reshape(5, index.d)
    if index.is_trained:
        index.search(x, 3)
        index.search(x, 70, params=sx.SearchParameters(nprobe=index.nlist))
        index.range_search(x, 0.5)
        index.add(x)
        index.remove_ids([0, 1])
        index.search(x, 3)
    sx.write_index(index, path)
    sx.read_index(path)


def _index_of(storage: str, metric: int = 0, router: str = "mean") -> sx.IndexSAAP:
    rng = np.random.default_rng(0)
    params = sx.IndexParameters(niter=1, view="unrotated")
    index = sx.index_factory(D, f"SAAP{NLIST},{storage}", metric, params=params, rope=sx.Rope(dim=4))
    x = rng.standard_normal((N, D)).astype(np.float32)
    index.train(x, xq_train=x)
    if router == "mlp":
        index.router = MLPRouter(
            rng.standard_normal((3, D)), np.zeros(3), rng.standard_normal((NLIST, 3)), np.zeros(NLIST)
        )
    index.add(x)
    return index


def _show_index(index: sx.IndexSAAP) -> Any:
    lists = index._state.lists
    rows = lists.rows()
    parts = (*lists.stored.keys(rows), lists.ids[rows], lists.positions[rows], lists.sizes)
    codes = lists.stored.codes(rows) or ()
    return [part.tobytes() for part in (*parts, *codes)], index.params, index.nprobe, index.rope


def _make_trace(path: Path) -> None:
    keys = np.ones((2, 6, 4), np.float16)
    write_trace(path, Trace(keys, keys, keys, np.arange(6), np.arange(6)))


def _use_trace(trace: Trace, path: Path) -> None:
    trace.head_queries(0)
    write_trace(path, trace)


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """Make the valid files."""
    made: list[Seed] = []
    kinds: list[tuple[Callable[[Path], None], Any, Any, Any]] = []
    for make in (
        lambda: _index_of("Flat"),
        lambda: _index_of("SQfp16", router="mlp"),
        lambda: _index_of("Bits2", metric=1),
        lambda: _index_of("Bits4,RFlat"),
        lambda: sx.IndexSAAP(D, NLIST),
    ):
        for flags in (0, sx.IO_FLAG_MMAP):
            kinds.append(
                (
                    lambda path, make=make: sx.write_index(make(), path),  # type: ignore[misc]
                    lambda path, flags=flags: sx.read_index(path, flags),
                    _show_index if flags == 0 else lambda index: None,
                    _use_index,
                )
            )
    kinds.append((_make_trace, read_trace, lambda trace: trace.keys.tobytes(), _use_trace))
    with tempfile.TemporaryDirectory() as folder:
        for write, read, show, use in kinds:
            path = Path(folder) / "seed"
            write(path)
            header = json.loads(_metadata(path.read_bytes()))
            known = {"format": header["format"], "version": header["version"]}
            tensors, header = read_file(path, **known)
            made.append(Seed(path.read_bytes(), tensors, header, read, show, use))
    return tuple(made)


def _metadata(data: bytes) -> str:
    found: str = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["saapindex"]
    return found


class _Bytes:
    """Takes numbers from bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def left(self) -> bool:
        return self.place < len(self.data)

    def number(self, below: int) -> int:
        size = 1 if below <= 256 else 4
        part = self.data[self.place : self.place + size]
        self.place += size
        return int.from_bytes(part, "little") % max(below, 1)

    def one_of(self, things: Any) -> Any:
        return things[self.number(len(things))] if len(things) else None


def _damage_bytes(seed: Seed, source: _Bytes) -> bytes:
    data = bytearray(seed.content)
    while source.left():
        what, place = source.number(5), source.number(len(data) or 1)
        # Half of the damage goes to the header, where the structure is.
        if source.number(2):
            place %= 8 + int.from_bytes(seed.content[:8], "little")
        if what == 0:
            del data[place:]
        elif what == 1:
            data[place:place] = bytes([source.number(256)])
        elif what == 2:
            del data[place : place + 1 + source.number(16)]
        elif place < len(data):
            data[place] = source.number(256)
    return bytes(data)


def _damage_parts(seed: Seed, source: _Bytes, path: Path) -> None:
    tensors, header = {**seed.tensors}, json.loads(json.dumps(seed.header))
    while source.left():
        what = source.number(8)
        name = source.one_of(sorted(tensors))
        if what < 3:
            _damage_header(header, source)
        elif name is None or what == 3:
            tensors.pop(name, None)
        else:
            tensors[name] = _damaged(tensors[name], what, source, tensors)
    kind = {"format": seed.header["format"], "version": seed.header["version"]}
    kind = {key: header.pop(key, value) for key, value in kind.items()}
    stored = {name: x.view("u2") if x.dtype == np.dtype("V2") else x for name, x in tensors.items()}
    apart = [name for name in ("vectors", "exact", "words", "exponents", "norms", "ids") if name in stored]
    write_file(path, stored, header, **kind, apart=apart if source.number(4) else ())


def _damage_header(header: dict[str, Any], source: _Bytes) -> None:
    inner = header.get(source.one_of(("params", "rope", "router", "header")))
    target = inner if isinstance(inner, dict) and inner and source.number(2) else header
    key = source.one_of(sorted(target))
    if source.number(4) == 0:
        target.pop(key, None)
    elif key is not None:
        target[key] = source.one_of(VALUES)


def _damaged(x: NDArray[Any], what: int, source: _Bytes, tensors: dict[str, NDArray[Any]]) -> NDArray[Any]:
    if what == 4:
        return x[: source.number(len(x) + 1)] if x.ndim else x
    if what == 5:
        with np.errstate(all="ignore"):
            return x.astype(source.one_of(DTYPES))
    if what == 6:
        other: NDArray[Any] = tensors[source.one_of(sorted(tensors))]
        more: NDArray[Any] = np.repeat(x, 2, axis=0) if x.ndim else x
        shaped: NDArray[Any] = source.one_of((x.reshape(-1), x.T, x[None], more, other))
        return shaped
    x = x.copy()
    if x.size and x.dtype.kind in "fiu":
        info = np.finfo(x.dtype) if x.dtype.kind == "f" else np.iinfo(x.dtype)
        value = source.one_of((0, 1, info.max, info.min, np.nan if x.dtype.kind == "f" else 9))
        x.reshape(-1)[source.number(x.size)] = value
    return x


def one_input(data: bytes) -> str:
    """Damage a file as `data` says, and read it; return what came of it, or raise what must not be.

    Returns
    -------
    str
        ``"refused"``, ``"unchanged"`` or ``"accepted"``.
    """
    source = _Bytes(data)
    seed, raw = source.one_of(seeds()), bool(source.number(2))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, np.errstate(all="ignore"):
        path = Path(folder) / "file"
        if raw:
            path.write_bytes(_damage_bytes(seed, source))
        else:
            try:
                _damage_parts(seed, source, path)
            except (ValueError, TypeError, UnicodeEncodeError):
                return "refused"  # not even writing takes it
        try:
            made = seed.read(path)
        except sx.FileFormatError:
            return "refused"
        if raw and seed.show(made) is not None:
            # White space and the case of escapes may change.
            if seed.show(made) != _known(seeds().index(seed)):
                raise AssertionError("altered content was read as if it were whole")
            return "unchanged"
        try:
            seed.use(made, path)
        except sx.SaapIndexError:
            return "accepted"
        return "accepted"


@functools.cache
def _known(number: int) -> Any:
    seed = seeds()[number]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        path.write_bytes(seed.content)
        return seed.show(seed.read(path))


def main() -> None:
    """Hand the target to libFuzzer."""
    import atheris

    warnings.simplefilter("ignore")
    os.fsync = lambda fd: None  # inputs are many, and none outlives the process
    for number in range(len(seeds())):
        one_input(bytes([number]))  # compiles what is compiled on first use
    atheris.instrument_func(one_input)
    for module in (saapindex.files, saapindex.file_parts, saapindex.index.storage):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
