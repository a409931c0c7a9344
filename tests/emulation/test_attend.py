"""The decode kernel, emulated on the host, is the definition: exactly the same keys, the same output."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.attention import AttendParameters, AttentionIndex, fit_layer
from saapindex.attention.device_cut import near_places
from saapindex.attention.shares import HeadShares
from saapindex.attention.streams import to_streams
from saapindex.backends.cuda import step as launched
from saapindex.backends.cuda.attend import attend_streams
from saapindex.backends.cuda.chosen import Bits, Chosen, chosen_step, most_chosen
from saapindex.backends.cuda.whole import Shape, most_fetched, whole_shape, whole_shared
from saapindex.backends.paged import Scaling, widened

SPEC = importlib.util.spec_from_file_location("emulation", Path(__file__).parent / "emulation.py")
emulation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulation)

ELEMENTS = {"float16": 0, "bfloat16": 1, "float32": 2}
SCARCE = [0.5, 1.7], [0.0, 0.7], [0.2, 1.8], [0.3, 1.8, 0.7]
MACROS = "CLUSTER", "THREADS", "CHOOSERS", "STAGES"
WAYS = [
    {"budget": 0.2},
    {"budget": 0.1, "policy": "max"},
    {"budget": 0.3, "policy": "union"},
    {"budget": 0.2, "rank": "mass"},
    {"budget": 0.2, "refine": False},
    {"budget": 0.2, "remainder": False},
    {"budget": 0.9},
    {"budget": 0.01},
    {"budget": 1.0},
    {"nprobe": 3},
    {"nprobe": 2, "remainder": False},
    {"top_p": 0.6},
]


class Case:
    """An index on the host, and the same keys as the kernel sees them."""

    def __init__(
        self, d, group, heads, n, nlist, words, dtype, tokens, *, softcap=None, batch=1, shares=None
    ):
        rng = np.random.default_rng(0)
        centers = 1.5 * rng.standard_normal((heads, 12, d))
        k = centers[np.arange(heads)[:, None], rng.integers(0, 12, (heads, n))]
        k = np.broadcast_to(k + 0.5 * rng.standard_normal(k.shape), (batch, *k.shape)).astype(np.float32)
        v = rng.standard_normal(k.shape).astype(np.float32)
        self.q = 1.2 * rng.standard_normal((batch, heads * group, tokens, d)).astype(np.float32)
        near = self.q[0].repeat(20, axis=1)
        queries = near + 0.3 * rng.standard_normal(near.shape)
        book = fit_layer(k[0], queries, nlist, words=words, softcap=softcap, backend="reference")
        if shares is not None:
            book = dataclasses.replace(book, shares=HeadShares(*(np.float32(part) for part in shares)))
        small = {"window": 63, "sinks": 3, "dense_below": 0, "flush": 32, "backend": "reference"}
        self.index = AttentionIndex(book, batch=batch, dtype=dtype, **small)
        self.index.add(k, v)
        if batch > 1:
            self.index.truncate(n // 2, sequence=1)
        self.streams = to_streams(self.index._batch, fill=255)
        self.code = launched.DeviceCode.of(book.code.view, book.code.coded, np, book.shares)
        self.scaling = Scaling(book.scale, softcap or 0.0)
        self.macros = {"D": d, "G": group, "WORDS": words, "ELEMENT": ELEMENTS[dtype], "QUERY": 2}
        self.macros |= {"CAPPED": 1} if softcap else {}

    def builder(self, folder, threads):
        """What gives the kernel for the limits of a step."""

        @functools.cache
        def build(policy):
            macros = {**self.macros, "POLICY": launched.POLICIES[policy], "THREADS": threads}
            return emulation.build(folder, "attend", **macros)

        return lambda limits: build(limits.policy if self.macros["G"] > 1 else "sum")

    def wanted(self, x, params, near=True):
        """What the host attends to, by the reference."""
        last, sparse = self.index._last(None, x.shape[1]), None if params.budget == 1 else params
        return self.index._attend(self.index._batch, x, last, sparse, near)

    def limits(self, way):
        """A way as the reference takes it, and as the kernel does."""
        params = AttendParameters(slopes=False, **way)
        reading = self.index._batch.reading(params)
        limits = launched.Limits(
            params.budget or 0.0,
            params.scan_share,
            reading.nprobe,
            reading.top_p,
            reading.policy,
            reading.by_mass,
            reading.refine,
            reading.remainder,
            self.index.codebook.shares is not None,
            1.0 if self.index.codebook.shares is None else self.index.codebook.shares.most,
        )
        return params, limits, {"everything": params.budget == 1}

    def compare_on_device(self, cupy, blocks, ways):
        """The same on a GPU, with queries as keys are stored and in float32."""
        x, group = self.index._grouped(self.q)
        tokens = x.shape[1]
        streams, code = (
            type(held)(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in held))
            for held in (self.streams, self.code)
        )
        lists, d = streams.anchors.shape[1:]
        itemsize = streams.keys.dtype.itemsize
        shape = launched.launch_shape(len(x) * tokens, 132, d, group, self.macros["WORDS"], lists, itemsize)
        space = launched.Workspace.empty(
            streams, code, group, tokens, (min(blocks, shape[0]), shape[1]), cupy
        )
        for way in ways:
            params, limits, how = self.limits(way)
            for kind in {"float32", self.index.dtype}:
                asked, plain = queries_as(x, kind)
                want, want_lse = self.wanted(plain, params)
                for _ in range(2):
                    out = cupy.full(x.shape, np.nan, np.float32) if kind == "float32" else None
                    out = cupy.full(x.shape, 0x7FFF, np.uint16).view(asked.dtype) if out is None else out
                    lse = cupy.full(x.shape[:3], np.nan, np.float32)
                    common = cupy.asarray(asked), streams, code, self.scaling, limits, space, out, lse
                    attend_streams(*common, **how)
                    rough = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}[kind]
                    label = f"{way} {kind}"
                    found = widened(out.get(), np.float32)
                    np.testing.assert_allclose(found, want, rtol=max(rough, 1e-4), atol=rough, err_msg=label)
                    np.testing.assert_allclose(lse.get(), want_lse, rtol=1e-4, atol=1e-4, err_msg=label)
                    assert not any(x.any() for x in (space.counters, space.histogram, space.masses))

    def compare(self, run, blocks, threads, ways, listing=None):
        """The kernel and the reference agree, twice in a row, in each of these ways."""
        x, group = self.index._grouped(self.q)
        tokens, lists = x.shape[1], self.index.codebook.nlist
        space = launched.Workspace.empty(self.streams, self.code, group, tokens, (blocks, threads), np)
        shared = launched.shared_bytes(
            x.shape[3], group, self.macros["WORDS"], lists, threads, self.streams.keys.dtype.itemsize
        )
        for way in ways:
            params, limits, how = self.limits(way)
            want, want_lse = self.wanted(x, params)
            for _ in range(2):
                out, lse = np.full_like(x, np.nan), np.full(x.shape[:3], np.nan, np.float32)
                common = (x, self.streams, self.code, self.scaling, limits, space)
                argument = launched.step(*common, out, lse, **how)
                run(limits)(len(x) * tokens * blocks, threads, shared, argument)
                np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5, err_msg=str(way))
                np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4, err_msg=str(way))
                assert not space.counters.any()
                assert not space.histogram.any()
                assert not space.masses.any()
            if listing is not None:
                for _ in range(2):
                    out = self.choose(
                        run(limits), listing, common, limits, (len(x) * blocks, threads, shared), how
                    )
                    compare_selections(out, self.index.select(self.q[:, :, 0], params=params), str(way))

    def compare_whole(self, folder, shape, ways, *, holds=None, **more):
        """The kernel that reads whole lists, whose output is the same in every bit each time.

        `holds` is what a query holds that nobody would ask with, so that the kernel only has to end.
        """
        x, group = self.index._grouped(self.q)
        lists, d = self.streams.anchors.shape[1:]
        size = self.streams.keys.dtype.itemsize
        for way in ways:
            params, limits, _ = self.limits({"refine": False, **way})
            fetched = most_fetched(limits, lists, self.streams.pages.shape[1])
            shared = whole_shared(shape, d, group, lists, fetched, size, mixed=True)
            policy = launched.POLICIES[limits.policy] if group > 1 else 0
            macros = {key: value for key, value in self.macros.items() if key != "WORDS"} | more
            run = whole_kernel(folder, **macros, POLICY=policy, **dict(zip(MACROS, shape, strict=True)))
            if holds is None:
                want, want_lse = self.wanted(x, params)
            space = launched.Workspace.empty(self.streams, self.code, group, 1, (1, 32), np)
            before = None
            for _ in range(2):
                out, lse = np.full_like(x, np.nan), np.full(x.shape[:3], np.nan, np.float32)
                common = (x, self.streams, self.code, self.scaling, limits, space, out, lse)
                if holds is not None:
                    x[0, 0, 1, 3] = holds
                run(len(x) * shape.cluster, shape.threads, shared, launched.step(*common))
                if holds is not None:
                    continue
                np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5, err_msg=str(way))
                np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4, err_msg=str(way))
                assert before is None or (before == out).all()
                before = out

    def choose(self, run, listing, common, limits, shape, how):
        """What the kernels select, in the arrays of `Selection`."""
        bits, most = Bits.empty(self.streams, np), most_chosen(self.streams, limits, **how)
        count, batch, lists = len(self.streams.counts), len(self.streams.lengths), self.index.codebook.nlist
        sizes = (count, most), count, (count, lists), batch, batch
        out = Chosen(*(np.full(size, -7, np.int64) for size in sizes))
        wide = common[-1]._replace(bits=bits.bits, width=bits.bits.shape[1])
        run(*shape, launched.step(*common[:-1], wide, common[0], common[0], **how, deciding=True))
        argument = chosen_step(self.streams, bits, out, 132, **how)
        listing(count * int(argument["blocks"][0]), 64, 1024, argument)
        assert not any(array.any() for array in bits)
        return out


@functools.cache
def whole_kernel(folder, **macros):
    return emulation.build(folder, "attend_whole", **macros)


def queries_as(x, kind):
    """Queries of a type, bfloat16 by its bits, and what they are."""
    if kind == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    asked = x.astype(kind)
    return asked, asked.astype(np.float32)


def compare_selections(out, expected, way):
    """Padded rows of the kernels hold what the reference selects."""
    for name, wide in (("ids", out.ids), ("partitions", out.partitions)):
        want = np.asarray(getattr(expected, name)).reshape(len(wide), -1)
        np.testing.assert_array_equal(wide[:, : want.shape[1]], want, way)
        assert (wide[:, want.shape[1] :] == -1).all(), way
    np.testing.assert_array_equal(out.lengths, expected.lengths.reshape(-1), way)
    np.testing.assert_array_equal(out.starts, expected.window_start, way)
    np.testing.assert_array_equal(out.ends, expected.ends, way)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("cached", [True, False], ids=["in_shared_memory", "in_memory"])
def test_every_way(folder, monkeypatch, cached):
    if not cached:
        monkeypatch.setattr(launched, "_TABLE_MOST", 0)
    case = Case(16, 2, 2, 900, 8, 1, "float32", 1)
    run = case.builder(folder, 128)
    listing = emulation.build(folder, "chosen", THREADS=64)
    case.compare(run, 2, 128, WAYS if cached else WAYS[:5], listing)


@pytest.mark.parametrize(
    ("shape", "blocks", "threads", "options"),
    [
        ((64, 3, 1, 900, 16, 3, "float16", 1), 3, 128, {}),
        ((32, 1, 2, 700, 8, 2, "bfloat16", 2), 1, 128, {}),
        ((80, 8, 1, 500, 8, 3, "bfloat16", 1), 2, 64, {}),
        ((16, 4, 1, 700, 8, 2, "float32", 1), 2, 128, {"softcap": 5.0}),
        ((16, 2, 2, 700, 8, 1, "float32", 1), 2, 128, {"batch": 2}),
        ((16, 2, 2, 700, 8, 1, "float32", 1), 2, 128, {"shares": SCARCE}),
    ],
    ids=["odd_group", "several_tokens", "eight_heads", "softcap", "lengths", "shares"],
)
def test_shapes_and_types(folder, shape, blocks, threads, options):
    case = Case(*shape, **options)
    run = case.builder(folder, threads)
    ways = WAYS[:3] if case.macros["G"] > 1 else [WAYS[0], WAYS[1]]
    listing = emulation.build(folder, "chosen", THREADS=64) if shape[-1] == 1 else None
    case.compare(run, blocks, threads, [*ways, {"budget": 1.0}], listing)


@pytest.mark.parametrize(
    ("shape", "launch", "options"),
    [
        ((16, 2, 2, 900, 8, 1, "float32", 1), (2, 128, 64, 2), {}),
        ((64, 3, 1, 900, 17, 3, "float16", 1), (3, 96, 32, 3), {}),
        ((32, 4, 1, 700, 8, 2, "float32", 1), (8, 64, 32, 2), {"softcap": 5.0}),
        ((16, 2, 2, 700, 8, 1, "float32", 1), (1, 128, 64, 2), {"batch": 2}),
        ((80, 8, 1, 500, 8, 3, "bfloat16", 1), (2, 64, 32, 2), {}),
        ((128, 4, 1, 500, 8, 3, "bfloat16", 1), (16, 96, 64, 2), {}),
        ((16, 1, 1, 60, 8, 1, "float16", 1), (4, 64, 32, 2), {}),
        (
            (16, 2, 2, 700, 8, 1, "float32", 1),
            (2, 64, 32, 2),
            {"shares": ([0.5, 7], [0.0, 0.7], [0.2, 9], [7, 9, 0.7])},
        ),
    ],
    ids=[
        "every_way",
        "odd_group",
        "softcap",
        "lengths",
        "eight_heads",
        "more_blocks_than_lists",
        "no_lists",
        "shares",
    ],
)
def test_whole_lists(folder, shape, launch, options):
    case = Case(*shape, **options)
    ways = [way for way in WAYS if way.get("refine") is not False and way.get("budget") != 1]
    ways = [way for way in ways if way.get("policy") != "union" and (shape[1] > 1 or "policy" not in way)]
    case.compare_whole(folder, Shape(*launch), ways if shape[0] == 16 else ways[:3])
    if shape[-2] == "float32":  # as if there were many lists
        case.compare_whole(folder, Shape(*launch), ways[:1], FIRST=0, ROUNDS=1)


def test_equal_ranks(folder):
    """More lists in the bin of the cut than there is room for, of equal rank: in their own order."""
    case = Case(16, 2, 2, 900, 17, 1, "float32", 1)
    case.q[:] = 0
    for room in (1, 17):
        ways = [{"budget": 0.2}, {"nprobe": 3}, {"top_p": 0.6}]
        case.compare_whole(folder, Shape(2, 64, 32, 2), ways, OWN=room)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_that_are_no_numbers(folder, value):
    """The blocks of a cluster wait for each other: they must agree whatever a query holds."""
    case = Case(16, 2, 2, 900, 17, 1, "float32", 1)
    case.compare_whole(folder, Shape(2, 64, 32, 2), [{"budget": 0.2}, {"top_p": 0.6}], holds=value)


@pytest.mark.parametrize(("n", "near"), [(900, True), (900, False), (60, True)])
def test_token_of_the_step(folder, n, near):
    """A step adds its token first, in the ring and in the lengths."""
    case = Case(16, 2, 2, n, 8, 1, "float16", 1, batch=2)
    shape, rng = Shape(2, 128, 64, 2), np.random.default_rng(5)
    k, v = rng.standard_normal((2, 2, 2, 1, 16)).astype(np.float16)
    params, limits, _ = case.limits({"budget": 0.2, "refine": False})
    macros = {key: value for key, value in case.macros.items() if key != "WORDS"}
    run = whole_kernel(folder, **macros, POLICY=0, **dict(zip(MACROS, shape, strict=True)))
    fetched = most_fetched(limits, 8, case.streams.pages.shape[1])
    shared = whole_shared(shape, 16, 2, 8, fetched, 2, mixed=True)
    space = launched.Workspace.empty(case.streams, case.code, 2, 1, (1, 32), np)
    tickets, moved = np.zeros(2, np.uint32), np.array([3], np.int32)
    x = case.index._grouped(case.q)[0]
    out, lse = np.full_like(x, np.nan), np.full(x.shape[:3], np.nan, np.float32)
    old = case.streams.lengths.copy(), case.streams.near_keys.copy()
    for version in (2, 3):  # of arrays that have moved, and of these
        token = launched.NewToken(k, v, moved, version, tickets)
        common = x, case.streams, case.code, case.scaling, limits, space, out, lse
        run(4 * shape.cluster, shape.threads, shared, launched.step(*common, token=token, near=near))
        assert not tickets.any()
        if version == 2:
            np.testing.assert_array_equal(case.streams.lengths, old[0])
            np.testing.assert_array_equal(case.streams.near_keys, old[1])
    case.index.add(k, v)
    batch = case.index._batch
    want, want_lse = case.wanted(x, params, near)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)
    now = to_streams(batch, fill=255)
    np.testing.assert_array_equal(case.streams.lengths, now.lengths)
    for b, s in enumerate(batch.sequences):
        at = near_places(now, np.arange(min(s.length, case.index.sinks)))
        at = np.concatenate([at, near_places(now, np.arange(s.recent.start, s.length))])
        for stream in (2 * b, 2 * b + 1):
            np.testing.assert_array_equal(case.streams.near_keys[stream, at], now.near_keys[stream, at])
            np.testing.assert_array_equal(case.streams.near_values[stream, at], now.near_values[stream, at])


@pytest.mark.parametrize("units", [1, 4, 7, 8, 16, 64, 200])
@pytest.mark.parametrize("lists", [64, 1024, 4096, 16_384])
@pytest.mark.parametrize("budget", [0.05, 0.0])
def test_shapes_fit(units, lists, budget):
    limits = launched.Limits(budget=budget, nprobe=0 if budget else 32, refine=False)
    fetched = most_fetched(limits, lists, 9 * lists)
    shape = whole_shape(units, 132, 128, 4, lists, fetched, 2)
    if shape is None:
        assert lists * units > 100_000 or (not budget and (units > 8 or lists > 4096))
        return
    assert units * shape.cluster <= 132 or shape.cluster == 1
    assert whole_shared(shape, 128, 4, lists, fetched, 2) <= 227 * 1024
    assert whole_shape(units, 132, 72, 4, lists, fetched, 2) is None


@pytest.mark.parametrize("most", [0, 100, 5000])
@pytest.mark.parametrize("everything", [False, True])
def test_rows_of_any_bits(folder, most, everything):
    """Rows of several parts, more bits than there is room for, lists beyond a turn of a block."""
    rng = np.random.default_rng(most)
    streams, pages, lists = 4, 4000, 133
    shown = SimpleNamespace(
        sinks=3,
        pages=np.zeros((streams, pages), np.int32),
        counts=np.zeros(streams, np.int32),
        anchors=np.zeros((streams, lists, 1), np.int8),
        sizes=rng.integers(0, 2, (streams, lists), np.int32),
        lengths=np.array([9, 8], np.int32),
        first=np.array([5, 4], np.int32),
    )
    bits = Bits.empty(shown, np)
    positions = rng.random((streams, 3 + 16 * pages)) < np.array([[0], [0.001], [0.05], [1]])
    visited = rng.random((streams, lists)) < 0.5
    for row, at, some in zip(bits.bits, positions, visited, strict=True):
        words = np.zeros(32 * len(row), bool)
        words[: len(at)] = at
        words[32 * (len(row) - -(-lists // 32)) :][:lists] = some
        row[:] = np.packbits(words, bitorder="little").view(np.uint32)
    sizes = (streams, most), streams, (streams, lists), 2, 2
    out = Chosen(*(np.full(size, -7, np.int64) for size in sizes))
    argument = chosen_step(shown, bits, out, 132, everything=everything)
    assert argument["blocks"] > 2
    emulation.build(folder, "chosen", THREADS=64)(streams * int(argument["blocks"][0]), 64, 1024, argument)
    for s in range(streams):
        there = np.flatnonzero(positions[s])[:most]
        assert out.ids[s].tolist() == there.tolist() + [-1] * (most - len(there))
        assert out.lengths[s] == len(there)
        some = np.flatnonzero(shown.sizes[s] if everything else visited[s])
        assert out.partitions[s].tolist() == some.tolist() + [-1] * (lists - len(some))
    assert out.starts.tolist() == [5, 4]
    assert out.ends.tolist() == [9, 8]
    assert not any(array.any() for array in bits)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "blocks", "options"),
    [
        ((64, 3, 2, 3000, 24, 3, "float16", 1), 132, {}),
        ((128, 4, 2, 5000, 32, 6, "bfloat16", 1), 132, {}),
        ((128, 4, 2, 5000, 32, 6, "bfloat16", 2), 3, {}),
        ((80, 8, 1, 2000, 16, 3, "bfloat16", 1), 7, {}),
        ((96, 2, 2, 2000, 16, 4, "float16", 1), 16, {"batch": 2}),
        ((256, 4, 1, 2000, 16, 3, "bfloat16", 1), 132, {}),
        ((64, 3, 1, 2000, 16, 3, "float32", 2), 5, {}),
        ((128, 8, 1, 2000, 16, 3, "float32", 1), 132, {}),
        ((16, 1, 1, 900, 8, 1, "float16", 1), 1, {"softcap": 5.0}),
        ((64, 3, 2, 2000, 16, 3, "bfloat16", 1), 16, {"shares": SCARCE}),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_on_a_device(shape, blocks, options):
    cupy = pytest.importorskip("cupy")
    case = Case(*shape, **options)
    ways = WAYS if case.macros["G"] > 1 else [way for way in WAYS if "policy" not in way]
    case.compare_on_device(cupy, blocks, ways)
    case.compare_on_device(cupy, blocks, [{**way, "refine": False} for way in ways])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(64, 3, 2, 700, 24, 3, "float16", 1), (128, 4, 2, 700, 32, 6, "bfloat16", 1)]
)
def test_few_keys_on_a_device(shape):
    """Small enough to be watched by compute-sanitizer."""
    cupy = pytest.importorskip("cupy")
    whole = [{"budget": 0.2, "refine": False}, {"budget": 0.05, "refine": False}]
    Case(*shape).compare_on_device(cupy, 132, [{"budget": 0.2}, *whole])
