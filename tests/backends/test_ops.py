"""The backends as a whole: one interface, pure functions, every output element written."""

from __future__ import annotations

import importlib
import inspect
import itertools
import types

import numpy as np
import pytest

from saapindex.backends import get_ops
from saapindex.backends.attention_ops import AttentionOps
from saapindex.backends.base import LANES, CodedLists, FieldCode, Lists, Ops, to_blocks
from saapindex.backends.paged import Code, Reading, Scaling
from saapindex.codes import fit_codes
from saapindex.errors import InvalidInputError

OPERATIONS = sorted({name for name, _ in inspect.getmembers(Ops, inspect.isfunction)} - {"prepare"})
"""All but the one that returns a function, which `test_search` holds to `search`."""


@pytest.fixture(scope="session")
def arguments(paged):
    """Arguments for every operation, by its name: `arguments(n, d, nlist, p, k)`."""

    def make(**size):
        return {**of_search(**size), **of_attention(paged())}

    return make


def of_search(n=63, d=17, nlist=9, p=5, k=4):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    centroids = rng.standard_normal((nlist, d), dtype=np.float32)
    labels = rng.integers(nlist, size=n)
    sizes = rng.integers(n + 1, size=nlist)
    offsets = LANES * rng.integers(n // LANES + 1, size=nlist)
    lists = Lists(to_blocks(np.tile(x, (3, 1))), rng.permutation(3 * n + LANES), offsets, sizes)
    queries = rng.standard_normal((7, d), dtype=np.float32)
    probes = np.argsort(rng.random((7, nlist)), axis=1)[:, :p].copy()
    limits = rng.integers(n + 1, size=7)
    bias = rng.standard_normal(nlist, dtype=np.float32)
    code = fit_codes(x[None] if n else np.ones((1, 1, d)), np.eye(d)[None], 2).fields
    blocks = len(lists.vectors)
    coded = CodedLists(
        rng.integers(1 << 32, size=(blocks, 2, LANES), dtype=np.uint32),
        rng.integers(256, size=(blocks, 1, LANES), dtype=np.uint8),
        np.zeros((blocks, 0, LANES), np.float32),
        *lists[1:4],
        centroids,
        centroids @ code.inverse,
        code,
    )
    rows = rng.integers(-1, blocks * LANES or 1, (7, p)) if blocks else np.full((7, p), -1)
    exact = np.ascontiguousarray(lists.vectors.transpose(0, 2, 1))
    return {
        "accumulate": (x, labels, nlist),
        "assign": (x, centroids, bias),
        "range_scan": (queries, lists, probes, limits, 0.5, False),
        "rotate": (x, np.arange(n), 0.1 ** np.arange(4.0), np.ones(4), False),
        "range_scan_coded": (queries, coded, probes, limits, 0.5, False),
        "rescore": (queries, exact, lists.ids, rows, k, False),
        "scan_coded": (queries, coded, probes, limits, k, False, False),
        "scan": (queries, lists, probes, limits, k, False),
        "search": (queries, queries, to_blocks(centroids), bias, p, lists, k, False),
        "route": (queries, to_blocks(centroids), bias, p),
    }


def of_attention(made, t=2, g=3):
    rng, lists, pages, code, scaling = made.rng, made.lists, made.pages, made.code, Scaling(0.25)
    streams, nlist, d = lists.means.shape

    def floats(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    queries, positions = floats(streams, t, g, d), np.full((streams, t), made.total)
    taken = rng.integers(0, lists.sizes[:, None] + 1, (streams, t, nlist))
    logits, norms, bounds = floats(streams, t, g, nlist), floats(streams, t, g), floats(streams, t, g)
    estimates, ids = floats(streams, t, g, 40), rng.permutation(40) + np.zeros((streams, t, 1), np.int64)
    labels, limits = rng.integers(-1, nlist, (streams, t, 40)), rng.integers(0, 40, (streams, t))
    rows, long = lists.all_rows(taken), lists.sizes.sum(axis=1)
    some = np.where(labels >= 0, lists.all_rows(lists.sizes[:, None] + 0 * taken)[:, :, :40], -1)
    rest = queries, logits, taken, estimates, some, labels, bounds, lists, pages, code, scaling
    reading = Reading(long // 2, long * 20, 9, 128)
    choice = queries, lists, pages, code, scaling, reading
    chosen = get_ops("reference").choose_rows(*choice)
    return {
        "announce_step": (),
        "as_floats": (queries.astype(np.float16),),
        "attend_all": (queries, positions, made.near, lists, pages, scaling),
        "attend_chosen": (queries, rows, pages, chosen, lists, pages, code, scaling, reading),
        "attend_lists": (queries, positions, made.near, lists, pages, code, scaling, reading),
        "attend_rows": (queries, rows, pages, scaling),
        "attend_slots": (
            queries,
            positions,
            made.near,
            lists,
            pages,
            made.slots,
            code,
            scaling,
            reading,
        ),
        "choose_rows": choice,
        "encode": (floats(made.heads, 30, d), code),
        "estimate_rest": rest,
        "merge": (floats(3, 5, d), floats(3, 5)),
        "rank_lists": (queries, lists, code, scaling),
        "scan_codes": (queries, taken, lists, pages, code, scaling),
        "select_keys": (estimates, norms, ids, limits, "sum"),
        "select_lists": (logits, norms, lists.sizes, reading),
    }


def arrays_of(values):
    """Every array in (nested) tuples."""
    if isinstance(values, np.ndarray):
        return [values]
    return [array for value in values for array in arrays_of(value)] if isinstance(values, tuple) else []


def test_every_operation_has_arguments_here(arguments):
    assert sorted(arguments()) == OPERATIONS


def test_backends_are_made_once_and_know_their_name(backend):
    assert get_ops(backend) is get_ops(backend)
    assert get_ops(backend).name == backend


@pytest.mark.parametrize("name", ["gpu", "", None, 3])
def test_unknown_backend_is_refused(name):
    with pytest.raises(InvalidInputError, match="expected 'reference', 'cpu' or 'cuda'"):
        get_ops(name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_signatures_agree(backend, operation):
    declared = list(inspect.signature(getattr(Ops, operation)).parameters.values())[1:]
    found = inspect.signature(getattr(get_ops(backend), operation))
    assert list(found.parameters.values()) == declared
    assert found.return_annotation == inspect.signature(getattr(Ops, operation)).return_annotation


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_pure(backend, arguments, operation):
    inputs = arguments()[operation]
    before = [array.copy() for array in arrays_of(inputs)]
    outputs = arrays_of(getattr(get_ops(backend), operation)(*inputs))
    for array, copy in zip(arrays_of(inputs), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not any(np.shares_memory(out, array) for out in outputs for array in arrays_of(inputs))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtypes_and_shapes_agree(backend, arguments, operation):
    inputs = arguments()[operation]
    outputs = [arrays_of(getattr(get_ops(name), operation)(*inputs)) for name in ("reference", backend)]
    for reference, other in zip(*outputs, strict=True):
        assert (other.dtype, other.shape) == (reference.dtype, reference.shape)
        assert other.flags.c_contiguous


@pytest.mark.parametrize("operation", sorted({*OPERATIONS} - {"accumulate", "as_floats"}))
def test_reference_computes_in_the_precision_of_its_inputs(arguments, operation):
    def widened(value):
        if isinstance(value, Lists):
            return value._replace(vectors=value.vectors.astype(np.float64))
        if isinstance(value, (Code, CodedLists, FieldCode)):
            return type(value)._make(map(widened, value))
        return value.astype(np.float64) if getattr(value, "dtype", None) == np.float32 else value

    inputs = [widened(value) for value in arguments()[operation]]
    outputs = arrays_of(getattr(get_ops("reference"), operation)(*inputs))
    assert all(out.dtype.kind != "f" or out.dtype == np.float64 for out in outputs)


OF_SEARCH = ["assign", "range_scan", "rescore", "route", "scan", "scan_coded", "search"]
OF_ATTENTION = sorted(name for name, _ in inspect.getmembers(AttentionOps, inspect.isfunction))


@pytest.mark.parametrize(
    ("operation", "size"),
    [
        *itertools.product(OF_SEARCH, [{}, {"n": 0}, {"p": 1, "k": 1}, {"nlist": 1, "p": 1}, {"k": 99}]),
        *itertools.product(OF_ATTENTION, [{}]),
    ],
)
def test_every_output_element_is_written(monkeypatch, arguments, operation, size):
    inputs = arguments(**size)[operation]
    run = getattr(get_ops("cpu"), operation)
    expected = arrays_of(run(*inputs))

    def poisoned(shape, dtype=np.float64):
        return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else np.int64(-99).astype(dtype), dtype)

    numpy = types.SimpleNamespace(**{**vars(np), "empty": poisoned})
    for module in (
        "assign",
        "attend",
        "coded",
        "codes",
        "rescore",
        "route",
        "scan",
        "search",
        "select",
        "step",
        "widen",
    ):
        monkeypatch.setattr(importlib.import_module(f"saapindex.backends.cpu.{module}"), "np", numpy)
    for out, known in zip(arrays_of(run(*inputs)), expected, strict=True):
        np.testing.assert_array_equal(out, known)
        assert not np.isnan(out).any()
        assert not (out == -99).any()
