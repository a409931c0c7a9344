"""An index beside the paged cache of a runtime, against an `AttentionIndex` that holds the same keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from saapindex.attention import AttendParameters, AttentionIndex, PagedCache, SlotIndex
from saapindex.errors import InvalidInputError

HEADS, D, PAGE, PAGES = 2, 16, 16, 60
SMALL = {"window": 20, "sinks": 1, "flush": 16, "dense_below": 0, "backend": "reference"}


class Runtime:
    """A paged cache with its own table of slots for each sequence, as serving engines have them."""

    def __init__(self, rng, layout="HND", dtype=np.float32, alternating=False):
        shape = (PAGES, HEADS, PAGE, D) if layout == "HND" else (PAGES, PAGE, HEADS, D)
        self.rng, self.layout = rng, layout
        if alternating:  # keys and values of a page side by side
            pool = np.full((PAGES, HEADS, 2 * PAGE, D), np.nan, dtype)
            self.keys, self.values = pool[:, :, :PAGE], pool[:, :, PAGE:]
        else:
            self.keys, self.values = (np.full(shape, np.nan, dtype) for _ in range(2))
        self.free = list(rng.permutation(PAGES))
        self.tables, self.lengths = {}, {}

    def cache(self):
        return PagedCache(self.keys, self.values, layout=self.layout)

    def slots(self, name):
        at = np.arange(self.lengths[name])
        return np.array(self.tables[name], np.int64)[at // PAGE] * PAGE + at % PAGE

    def room(self, name, n):
        """Pages that `n` more tokens need beyond those there are."""
        return -(-(self.lengths.get(name, 0) + n) // PAGE) - len(self.tables.get(name, ()))

    def write(self, name, keys, values):
        """Append (heads, n, d); return the new slots."""
        n = keys.shape[1]
        table = self.tables.setdefault(name, [])
        self.lengths.setdefault(name, 0)
        table += [self.free.pop() for _ in range(self.room(name, n))]
        self.lengths[name] += n
        new = self.slots(name)[self.lengths[name] - n :]
        self.put(new, keys, values)
        return new

    def put(self, slots, keys, values):
        page, lane = np.divmod(slots, PAGE)
        for pool, x in ((self.keys, keys), (self.values, values)):
            pool = pool if self.layout == "HND" else pool.swapaxes(1, 2)
            pool[page, :, lane] = x.swapaxes(0, 1)

    def move(self, name, page):
        """Copy a page of a sequence elsewhere."""
        to = self.free.pop()
        old = self.tables[name][page]
        self.keys[to], self.values[to] = self.keys[old], self.values[old]
        self.tables[name] = [*self.tables[name][:page], to, *self.tables[name][page + 1 :]]
        self.collect()

    def collect(self):
        """Pages that nobody has become free, and are overwritten at once."""
        held = {page for table in self.tables.values() for page in table}
        freed = [p for p in range(PAGES) if p not in held and p not in self.free]
        self.keys[freed], self.values[freed] = np.nan, np.nan
        self.free += freed


def machine(draw, codebook, layout, alternating, backend):
    class Machine(RuleBasedStateMachine):
        @initialize(
            window=st.sampled_from([0, 1, 20, 33]),
            sinks=st.sampled_from([0, 1, 17]),
            flush=st.sampled_from([1, 16, 40]),
            dense_below=st.sampled_from([0, 90]),
            adapt=st.sampled_from([0, 1]),
            seed=st.integers(0, 99),
        )
        def start(self, seed, **how):
            self.rng, self.how = np.random.default_rng(seed), {**how, "backend": backend}
            self.runtime = Runtime(self.rng, layout, alternating=alternating)
            self.index = SlotIndex(codebook, self.runtime.cache(), **self.how)
            self.held, self.count = {}, 0

        def pick(self, number):
            names = sorted(self.held)
            return names[number % len(names)]

        @rule(n=st.integers(0, 90))
        def begin(self, n):
            if self.runtime.room("new", n) > len(self.runtime.free) or len(self.held) > 3:
                return
            self.count += 1
            self.held[self.count] = AttentionIndex(codebook, dtype="float32", **self.how)
            self.grow(self.count, n)

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9), n=st.integers(0, 60))
        def extend(self, number, n):
            self.grow(self.pick(number), n)

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9), steps=st.integers(1, 20))
        def decode(self, number, steps):
            for _ in range(steps):
                self.grow(self.pick(number), 1)

        def grow(self, name, n):
            self.own_last_page(name)
            if self.runtime.room(name, n) > len(self.runtime.free):
                return
            keys, values = draw(self.rng, 1, n)
            self.index.append(name, self.runtime.write(name, keys[0], values[0]))
            self.held[name].add(keys, values)

        def own_last_page(self, name):
            """Copy on write: a page that is not full and that another sequence has too."""
            table = self.runtime.tables.get(name, [])
            shared = [p for other, t in self.runtime.tables.items() if other != name for p in t]
            if table and table[-1] in shared and self.runtime.lengths[name] % PAGE and self.runtime.free:
                self.runtime.move(name, len(table) - 1)
                self.index.remap(name, self.runtime.slots(name))

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9))
        def fork(self, number):
            if len(self.held) > 3:
                return
            old = self.pick(number)
            self.count += 1
            self.index.fork(old, self.count)
            self.runtime.tables[self.count] = list(self.runtime.tables[old])
            self.runtime.lengths[self.count] = self.runtime.lengths[old]
            self.held[self.count] = self.held[old].fork()

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9), back=st.integers(0, 70))
        def truncate(self, number, back):
            name = self.pick(number)
            n = max(0, self.runtime.lengths[name] - back)
            self.index.truncate(name, n)
            self.held[name].truncate(n)
            self.runtime.lengths[name] = n
            self.runtime.tables[name] = self.runtime.tables[name][: -(-n // PAGE)]
            self.runtime.collect()

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9), page=st.integers(0, 9))
        def move(self, number, page):
            name = self.pick(number)
            if self.runtime.tables[name] and self.runtime.free:
                self.runtime.move(name, page % len(self.runtime.tables[name]))
                self.index.remap(name, self.runtime.slots(name))

        @precondition(lambda self: self.held)
        @rule(number=st.integers(0, 9))
        def free(self, number):
            name = self.pick(number)
            self.index.free(name)
            del self.held[name], self.runtime.tables[name], self.runtime.lengths[name]
            self.runtime.collect()

        @invariant()
        def is_the_index_that_holds_the_keys(self):
            if not getattr(self, "held", None):
                return
            assert self.index.names == sorted(self.held)
            names = list(self.rng.permutation(sorted(self.held)))
            q = self.rng.standard_normal((len(names), 6, D)).astype(np.float32)
            found = {how: self.index.attend(q, names, **dict([how])) for how in HOW}
            selection, slots = self.index.select(q, names, budget=0.3)
            for b, name in enumerate(names):
                other = self.held[name]
                assert self.index.length(name) == other.lengths[0]
                for how, (out, lse) in found.items():
                    known, known_lse = other.attend(q[b : b + 1], **dict([how]))
                    np.testing.assert_allclose(out[b], known[0], atol=2e-4)
                    np.testing.assert_allclose(lse[b], known_lse[0], atol=2e-4)
                expected = other.select(q[b : b + 1], budget=0.3)
                most = expected.ids.shape[2]
                np.testing.assert_array_equal(selection.ids[b, :, :most], expected.ids[0])
                there = selection.ids[b] >= 0
                own = self.runtime.slots(name)
                np.testing.assert_array_equal(slots[b][there], own[selection.ids[b][there]])
                assert (slots[b][~there] == -1).all()

        def teardown(self):
            if hasattr(self, "index"):
                pool = self.index._keeping.pool
                for name in self.index.names:
                    self.index.free(name)
                self.index._view.reset()
                assert pool.used == 0

    return Machine


HOW = [("budget", 1.0), ("budget", 0.3), ("nprobe", 2)]


@pytest.mark.parametrize(
    ("layout", "alternating", "backend"),
    [("HND", False, "reference"), ("NHD", False, "reference"), ("HND", True, "cpu")],
)
def test_any_order_of_changes(data, codebook, layout, alternating, backend):
    case = machine(data, codebook, layout, alternating, backend).TestCase
    case.settings = settings(deadline=None, max_examples=12, stateful_step_count=20, derandomize=True)
    case("runTest").runTest()


@pytest.fixture
def filled(data, codebook):
    rng = np.random.default_rng(0)
    runtime = Runtime(rng)
    index = SlotIndex(codebook, runtime.cache(), **SMALL)
    for name, n in (("a", 300), ("b", 100)):
        keys, values = data(rng, 1, n)
        index.append(name, runtime.write(name, keys[0], values[0]))
    return index, runtime


def test_queries_of_several_tokens_and_without_the_near_part(filled, codebook):
    index, runtime = filled
    other = AttentionIndex(codebook, batch=2, dtype="float32", **SMALL)
    cache, heads = runtime.cache(), np.arange(HEADS)[:, None]
    padded = np.zeros((2, 2, HEADS, 300, D), np.float32)
    for b, name in enumerate("ab"):
        for i, field in enumerate(("keys", "values")):
            x = cache.take(field, runtime.slots(name), heads)
            padded[i, b, :, 300 - x.shape[1] :] = x
    other.add(*padded, lengths=[300, 100])
    q = np.random.default_rng(1).standard_normal((2, 6, 5, D)).astype(np.float32)
    far = np.array([[0, 10, 200, 298, -1], [9, 20, 40, 98, 99]])
    for how in ({"budget": 1.0}, {"budget": 0.3}, {"positions": far}, {"near": False}):
        for ours, theirs in zip(index.attend(q, ["a", "b"], **how), other.attend(q, **how), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # The same index goes on with other sequences.
    (alone, _), (both, _) = index.attend(q[:1], ["a"], budget=0.3), index.attend(q, ["a", "b"], budget=0.3)
    np.testing.assert_allclose(alone[0], both[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_caches_in_half_precision(dtype, data, codebook):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    pool = torch.zeros((2, PAGES, HEADS, PAGE, D), dtype=getattr(torch, dtype))
    keys, values = (torch.from_numpy(x[0]).to(pool.dtype) for x in data(rng, 1, 300))
    for part, x in zip(pool, (keys, values), strict=True):
        part.swapaxes(0, 1).reshape(HEADS, -1, D)[:, :300] = x
        part[:] = 0
        part.transpose(0, 1)[:, : 304 // PAGE] = torch.nn.functional.pad(x, (0, 0, 0, 4)).reshape(
            HEADS, -1, PAGE, D
        )
    index = SlotIndex(codebook, PagedCache(*pool), **SMALL)
    index.append(0, np.arange(300))
    other = AttentionIndex(codebook, **SMALL)
    other.add(keys[None], values[None])
    q = torch.from_numpy(rng.standard_normal((1, 6, D), dtype=np.float32)).to(pool.dtype)
    for budget in (0.3, 1.0):
        out, _ = index.attend(q, [0], budget=budget)
        assert out.dtype == pool.dtype
        torch.testing.assert_close(out, other.attend(q, budget=budget)[0])


def test_memory_beside_the_cache(make_codebook):
    """At the sizes of real models, what is held beside the runtime's cache is at most 15 % of it."""
    d, heads, n = 64, 3, 12_288
    codebook, rng = make_codebook(heads=heads, d=d, nlist=48, words=3), np.random.default_rng(0)
    pool = rng.standard_normal((2, n // 32, heads, 32, d)).astype(np.float16)
    index = SlotIndex(codebook, PagedCache(*pool))
    index.append("a", rng.permutation(n))
    held = index.memory()
    assert held.plain == pool.nbytes
    assert held.overhead < 0.15
    assert held.total == held.pages + held.statistics


def test_says_what_is_wrong_and_stays_as_it_was(filled, codebook):
    index, runtime = filled
    q = np.ones((1, 6, D), np.float32)
    before = index.attend(q, ["a"], budget=0.3)
    free = runtime.free[0] * PAGE
    for function, message in (
        (lambda: index.append("a", [PAGES * PAGE]), "slots hold 960, expected less than 960"),
        (lambda: index.append("a", [-1]), "slots holds -1, expected at least 0"),
        (lambda: index.append("a", [free]), "the keys of 'a' are not finite in the cache"),
        (lambda: index.append("a", [0.5]), "slots has dtype float64, expected integers"),
        (lambda: index.remap("a", [1, 2]), "2 slots for 300 tokens"),
        (lambda: index.truncate("c", 1), "there is no sequence 'c'"),
        (lambda: index.truncate("a", -1), "n holds -1"),
        (lambda: index.free("c"), "there is no sequence 'c'"),
        (lambda: index.fork("a", "b"), "there is a sequence 'b' already"),
        (lambda: index.attend(q, "a"), "names are 'a', expected a list of some"),
        (lambda: index.attend(q, ["a", "b"]), r"q has shape \(1, 6, 16\), expected \(2, any, 16\)"),
        (lambda: index.select(q, []), "names are"),
        (lambda: SlotIndex(codebook, index.cache, batch=2), "batch is given, which comes from"),
        (lambda: SlotIndex(codebook, index.cache, window=-1), "window is -1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            function()
    assert index.names == ["a", "b"]
    assert "a" in index
    assert "c" not in index
    assert repr(index) == "SlotIndex(kv_heads=2, d=16, lengths={'a': 300, 'b': 100})"
    for ours, theirs in zip(index.attend(q, ["a"], params=AttendParameters(budget=0.3)), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_layouts_that_are_not_supported(codebook):
    pool = np.zeros((2, 4, HEADS, PAGE, D), np.float32)
    for keys, values, message in (
        (pool[0], pool[1, :2], "keys have shape .* values .*, expected the same of both"),
        (pool[0].swapaxes(2, 3), pool[1].swapaxes(2, 3), "this layout is not supported"),
        (pool[0, :, :, :9], pool[1, :, :, :9], "have 121 rows in all, expected a multiple of 16"),
        (pool[0, 0], pool[1, 0], "keys are float32 of shape .*, expected float32 of four dimensions"),
        (pool[0], pool[1].astype(np.float16), "values are float16 of shape"),
        (pool[0].astype(float), pool[1].astype(float), "keys are float64, expected one of float16"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            PagedCache(keys, values)
    with pytest.raises(InvalidInputError, match="layout is 'NDH'"):
        PagedCache(*pool, layout="NDH")
    with pytest.raises(InvalidInputError, match="the cache has 16 KV heads of 16 dimensions, the codebook 2"):
        SlotIndex(codebook, PagedCache(*pool, layout="NHD"))
