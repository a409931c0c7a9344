"""Requests of a paged runtime are told apart by their blocks: a small engine does all that vLLM does."""

from __future__ import annotations

import numpy as np
import pytest

from saapindex.adapters._vllm_requests import Requests, Row, Step, follow
from saapindex.adapters.vllm import Settings, register
from saapindex.errors import InvalidInputError, MissingDependencyError

SIZE, BLOCKS = 4, 24


class Engine:
    """Blocks with prefix caching, preemption, chunks of prompts, and rows in any order."""

    def __init__(self, rng):
        self.rng = rng
        self.cells = np.full(BLOCKS * SIZE, -1)
        self.free = list(range(BLOCKS))
        self.prefixes = {}  # tuple of tokens up to the end of a full block: its block
        self.requests = {}
        self.count = 0

    def holders(self, block):
        return sum(block in r["blocks"] for r in self.requests.values())

    def begin(self):
        stem = [list(range(100, 100 + 9)), list(range(200, 200 + 17)), []][self.rng.integers(3)]
        prompt = [*stem, *self.rng.integers(1000, 9999, self.rng.integers(1, 12)).tolist()]
        self.count += 1
        self.requests[self.count] = {"tokens": prompt, "blocks": [], "computed": 0}

    def admit(self, request):
        """Reuse full blocks that hold what the prompt begins with, all but its last token."""
        tokens = request["tokens"]
        for end in range(SIZE, len(tokens), SIZE):
            block = self.prefixes.get(tuple(tokens[:end]))
            if block is None:
                break
            if block in self.free:
                self.free.remove(block)
            request["blocks"].append(block)
            request["computed"] = end

    def release(self, request):
        blocks, request["blocks"], request["computed"] = request["blocks"], [], 0
        for block in reversed(blocks):
            if not self.holders(block):
                self.free.append(block)  # what it holds stays until another takes it

    def take(self):
        block = self.free.pop(0)
        self.prefixes = {key: b for key, b in self.prefixes.items() if b != block}
        return block

    def run(self, request):
        """Compute the next chunk of a request; None if there is no room."""
        if not request["blocks"]:
            self.admit(request)
        left = len(request["tokens"]) - request["computed"]
        m = min(left, int(self.rng.integers(1, 8)))
        n = request["computed"] + m
        missing = -(-n // SIZE) - len(request["blocks"])
        if missing > len(self.free):
            return None
        request["blocks"] += [self.take() for _ in range(missing)]
        at = np.arange(request["computed"], n)
        slots = np.array(request["blocks"])[at // SIZE] * SIZE + at % SIZE
        self.cells[slots] = np.array(request["tokens"])[at]
        request["computed"] = n
        for end in range(SIZE, n + 1, SIZE):
            self.prefixes.setdefault(tuple(request["tokens"][:end]), request["blocks"][end // SIZE - 1])
        if n == len(request["tokens"]):
            request["tokens"] = [*request["tokens"], int(self.rng.integers(1000, 9999))]
        return m


class Told:
    """What `follow` does to an index: the tokens that it would read at that time."""

    def __init__(self, engine):
        self.engine, self.held, self.appended = engine, {}, 0

    @property
    def names(self):
        return list(self.held)

    def __contains__(self, name):
        return name in self.held

    def length(self, name):
        return len(self.held[name])

    def extend(self, new):
        for name, slots in new.items():
            self.append(name, slots)

    def append(self, name, slots):
        self.appended += len(slots)
        self.held[name] = [*self.held.get(name, []), *self.engine.cells[slots].tolist()]

    def fork(self, name, new):
        self.held[new] = self.held[name]

    def truncate(self, name, n):
        self.held[name] = self.held[name][:n]

    def free(self, name):
        del self.held[name]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("idle", [0, 8])
def test_what_is_indexed_is_what_a_request_holds(seed, idle):
    rng = np.random.default_rng(seed)
    engine, requests = Engine(rng), Requests(SIZE, idle)
    told, computed = Told(engine), 0
    for _ in range(120):
        for _ in range(rng.integers(0, 2)):
            if len(engine.requests) < 5:
                engine.begin()
        for name in [*engine.requests]:
            if rng.random() < 0.03 or len(engine.requests[name]["tokens"]) > 40:  # done
                engine.release(engine.requests[name])
                del engine.requests[name]
            elif rng.random() < 0.05:  # preempted: all is computed again
                engine.release(engine.requests[name])
        rows = []
        for request in rng.permutation([*engine.requests.values()]).tolist():
            if rng.random() < 0.9 and (m := engine.run(request)):
                rows.append((request, m))
                computed += m
        most = max((len(r["blocks"]) for r, _ in rows), default=0) + 2
        blocks = np.full((len(rows), most), -7)
        for row, (request, _) in zip(blocks, rows, strict=True):
            row[: len(request["blocks"])] = request["blocks"]
        lengths = np.array([request["computed"] for request, _ in rows], np.int64)
        step = requests.step(blocks, lengths, np.array([m for _, m in rows], np.int64))
        follow(told, step)
        for row, (request, _) in zip(step.rows, rows, strict=True):
            n = request["computed"]
            assert told.held[row.name] == request["tokens"][:n]
            assert engine.cells[row.slots].tolist() == request["tokens"][:n]
        assert set(told.names) == set(step.alive)
        assert len({row.name for row in step.rows}) == len(step.rows)
        assert len(step.alive) <= len(rows) + idle
        for name, length in step.alive.items():
            assert told.length(name) == length
    if idle:
        assert told.appended <= 1.2 * computed  # little is indexed twice


def test_a_row_goes_on_forks_and_is_overwritten():
    requests = Requests(4)

    def step(*rows):
        blocks = np.zeros((len(rows), 4), np.int64)
        for i, (table, _, _) in enumerate(rows):
            blocks[i, : len(table)] = table
        return requests.step(blocks, np.array([n for _, n, _ in rows]), np.array([m for *_, m in rows]))

    first = step(([3, 5], 7, 7))
    assert (first.rows[0].name, first.rows[0].slots.tolist()) == (1, [12, 13, 14, 15, 20, 21, 22])
    again = step(([3, 5], 8, 1), ([3, 9], 6, 2))
    assert [(r.name, r.parent, r.shared) for r in again.rows] == [(1, -1, 0), (2, 1, 4)]
    assert again.alive == {1: 8, 2: 6}
    # The first is gone, and a third takes its second block: it keeps what it shares with the second.
    assert step(([3, 9], 7, 1), ([5], 3, 3)).alive == {1: 4, 2: 7, 3: 3}
    assert isinstance(first, Step)
    assert isinstance(first.rows[0], Row)


def test_settings_from_the_environment():
    assert Settings.of({"HOME": "x"}) is None
    found = Settings.of({"SAAPINDEX_CODEBOOK": "a", "SAAPINDEX_BUDGET": "0.1", "SAAPINDEX_WINDOW": "7"})
    assert found == Settings(codebook="a", budget=0.1, window=7)
    assert found.index()["window"] == 7
    with pytest.raises(InvalidInputError, match="SAAPINDEX_WINDOW is 'x', expected a number"):
        Settings.of({"SAAPINDEX_CODEBOOK": "a", "SAAPINDEX_WINDOW": "x"})
    with pytest.raises(InvalidInputError, match="SAAPINDEX_BUGDET is not known, expected SAAPINDEX_ and one"):
        Settings.of({"SAAPINDEX_BUGDET": "1"})


def test_without_vllm_it_says_what_to_install(monkeypatch):
    import sys

    register()  # nothing is asked for
    monkeypatch.setenv("SAAPINDEX_CODEBOOK", "codebook.safetensors")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'saapindex\[vllm\]'"):
        register()
