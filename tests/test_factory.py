"""Indexes from strings: what each string makes, what codes cost in recall, and the string back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import saapindex as sx
from saapindex.learn import read_trace

DATA = Path(sx.__file__).parent / "data"
METRICS = [sx.METRIC_INNER_PRODUCT, sx.METRIC_L2]
STRINGS = {
    "SAAP1024,Flat": (1024, 0, False, "float32"),
    "SAAP512,Bits2": (512, 2, False, "float32"),
    "SAAP4096,Bits1,RFlat": (4096, 1, True, "float32"),
    "SAAP64,Bits4,Refine(SQfp16)": (64, 4, True, "float16"),
    "IVF1024,Flat": (1024, 0, False, "float32"),
    "IVF16,SQfp16": (16, 0, False, "float16"),
    "IVF16,Bits2,RFlat": (16, 2, True, "float32"),
}


@pytest.mark.parametrize("text", STRINGS)
def test_what_a_string_makes_says_the_string(text):
    index = sx.index_factory(48, text)
    found = index.nlist, index.params.bits, index.params.refine, index.dtype.name
    assert found == STRINGS[text]
    assert index.factory_string == text
    assert index.params.query_aware == text.startswith("SAAP")
    assert index.params.router == ("mean" if text.startswith("SAAP") else "centroid")


def test_the_rest_is_given_beside_the_string():
    rope = sx.Rope(theta=500_000.0, dim=128)
    index = sx.index_factory(128, "SAAP512,Bits2", rope=rope)
    assert (index.d, index.nlist, index.rope) == (128, 512, rope)
    params = sx.IndexParameters(niter=3, bits=4)
    index = sx.index_factory(8, "SAAP2k,Flat", sx.METRIC_L2, params=params, backend="reference")
    assert (index.nlist, index.metric_type, index.params.niter, index.params.bits) == (2048, 1, 3, 0)
    assert index.ops.name == "reference"
    assert sx.index_factory(8, "IVF1M,Flat").nlist == 1 << 20
    assert sx.index_factory(8, "SAAP4,Flat", params="paper").params.router == "mlp"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Flat",
        "SAAP,Flat",
        "SAAP16",
        "SAAP16,Flat,RFlat",
        "SAAP16,Bits3",
        "saap16,Flat",
        "SAAP16,PQ8",
        "HNSW32",
        None,
        "SAAP16,Bits2,Refine(PQ8)",
        "SAAP16, Flat",
        "SAAP16,Flat\n",
        "SAAP-1,Flat",
        "SAAP0,Flat",
        "SAAP16,SQfp16,RFlat",
    ],
)
def test_other_strings_are_refused(text):
    with pytest.raises(sx.InvalidInputError, match=r"description is|nlist is 0"):
        sx.index_factory(16, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3, expected 0, 1, 2 or 4"),
        ({"bits": True}, "bits is True"),
        ({"refine": True}, "refine is given without bits"),
        ({"refine": 1}, "refine is 1, expected True or False"),
    ],
)
def test_parameters_that_make_no_sense(change, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        sx.IndexParameters(**change)


@pytest.mark.parametrize("k_factor", [0, 0.5, -1, np.inf, np.nan, "2", True, None])
def test_k_factors_that_make_no_sense(k_factor):
    index = sx.IndexSAAP(4, 2)
    with pytest.raises(sx.InvalidInputError, match="expected a finite number of at least 1"):
        index.k_factor = k_factor
    if k_factor is not None:
        with pytest.raises(sx.InvalidInputError, match="expected a finite number of at least 1"):
            sx.SearchParameters(k_factor=k_factor)
    assert index.k_factor == 4


def made(text, make, blobs, metric=sx.METRIC_INNER_PRODUCT, n=300, **settings):
    params = sx.IndexParameters(niter=2)
    index = sx.index_factory(16, text, metric, params=params, **settings)
    index.train(blobs(400, 16), xq_train=blobs(200, 16, seed=1))
    if n:
        index.add(blobs(n, 16))
    return index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", ["RFlat", "Refine(SQfp16)"])
def test_refining_everything_is_exact_search(make_index, blobs, exact, backend, metric, refine, same):
    index = made(f"SAAP4,Bits1,{refine}", make_index, blobs, metric, backend=backend)
    queries = blobs(9, 16, seed=2)
    scores, ids = index.search(queries, 5, params=sx.SearchParameters(nprobe=4, k_factor=60))
    keys = blobs(300, 16)
    keys = keys.astype(np.float16).astype(np.float32) if "fp16" in refine else keys
    truth, known = exact(queries, keys, 5, metric == sx.METRIC_L2)
    np.testing.assert_array_equal(ids, known)
    np.testing.assert_allclose(scores, truth, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(index.reconstruct_n(), keys)
    thresh = float(np.median(truth)) + 1e-3  # no score's own
    lims, best, found = index.range_search(queries, thresh, params=sx.SearchParameters(nprobe=4))
    whole, _ = exact(queries, keys, 300, metric == sx.METRIC_L2)
    inside = (whole < thresh) if metric == sx.METRIC_L2 else (whole > thresh)
    np.testing.assert_array_equal(np.diff(lims), inside.sum(axis=1))
    assert len(best) == len(found) == lims[-1]


@pytest.mark.parametrize("metric", METRICS)
def test_codes_alone_score_what_they_give_back(make_index, blobs, backend, metric):
    index = made("SAAP4,Bits4", make_index, blobs, metric, backend=backend)
    queries, full = blobs(9, 16, seed=2), sx.SearchParameters(nprobe=4)
    scores, ids = index.search(queries, 300, params=full)
    decoded = index.reconstruct_n()
    error = np.linalg.norm(decoded - blobs(300, 16), axis=1) / np.linalg.norm(blobs(300, 16), axis=1)
    assert 0 < np.median(error) < 0.1
    keys = decoded[ids]
    known = (keys * queries[:, None]).sum(axis=2)
    if metric == sx.METRIC_L2:  # the length of the residual is exact, so that the distance is an estimate
        known = ((keys - queries[:, None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(scores, known, rtol=0.08, atol=0.5)
    thresh = float(np.median(scores))
    lims, best, _ = index.range_search(queries, thresh, params=full)
    inside = (scores < thresh) if metric == sx.METRIC_L2 else (scores > thresh)
    np.testing.assert_array_equal(np.diff(lims), inside.sum(axis=1))
    np.testing.assert_array_equal(np.sort(best), np.sort(scores[inside]))


def test_codes_live(make_index, blobs, same):
    """Adding, removing, missing results, adapting, buffers: the contracts are those of flat keys."""
    index, queries = made("SAAP4,Bits2", make_index, blobs, n=0), blobs(9, 16, seed=2)
    full = sx.SearchParameters(nprobe=4)
    assert (index.search(queries, 3, params=full)[1] == -1).all()
    index.add(blobs(300, 16)[:3])
    scores, ids = index.search(queries, 5, params=full)
    assert (ids[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    index.add(blobs(300, 16)[3:])
    once = made("SAAP4,Bits2", make_index, blobs)
    same(index.search(queries, 9, params=full), once.search(queries, 9, params=full))
    gone = np.arange(0, 300, 3)
    assert index.remove_ids(gone) == 100
    left = np.setdiff1d(np.arange(300), gone)
    known = once.search(queries, 300, params=full)
    found = index.search(queries, 200, params=full)
    for i in range(9):
        kept = np.isin(known[1][i], left)
        np.testing.assert_array_equal(found[1][i], known[1][i][kept])
        np.testing.assert_array_equal(found[0][i], known[0][i][kept])
    D, I = np.empty((9, 4), np.float32), np.empty((9, 4), np.int64)  # noqa: E741
    index.search(queries, 4, params=full, D=D, I=I)
    same((D, I), index.search(queries, 4, params=full))
    with pytest.raises(sx.InvalidInputError, match="stores codes alone"):
        index.adapt()
    refined = made("SAAP4,Bits2,RFlat", make_index, blobs)
    refined.adapt(2)
    assert refined.ntotal == 300
    np.testing.assert_array_equal(refined.reconstruct_n(), blobs(300, 16))


@pytest.fixture(scope="module")
def traces():
    return read_trace(DATA / "train.safetensors"), read_trace(DATA / "test.safetensors")


def real(text, traces):
    """An index of one head's keys of a document, trained on another document."""
    train, test = traces
    queries, at = train.head_queries(0)
    params = sx.IndexParameters(max_position=12288, niter=5)
    index = sx.index_factory(64, text, rope=train.rope, params=params)
    keys = train.keys[0].astype(np.float32)
    index.train(keys, xq_train=queries, positions=train.key_positions, positions_xq=at)
    index.add(test.keys[0].astype(np.float32))
    return index


@pytest.mark.parametrize(
    ("storage", "least", "bytes_per_key"),
    [
        ("Bits4", 0.98 * 0.85, 33),
        ("Bits2", 0.70, 17),
        ("Bits1", 0.52, 9),
        ("Bits4,RFlat", 0.99, 33),
        ("Bits2,RFlat", 0.97, 17),
        ("Bits1,RFlat", 0.85, 9),
    ],
)
def test_recall_on_real_attention_against_flat(traces, storage, least, bytes_per_key):
    """At a fifth of the keys scanned; four candidates a result are refined."""
    test = traces[1]
    queries = np.ascontiguousarray(test.head_queries(0)[0][:300], np.float32)
    keys = test.keys[0].astype(np.float32)
    truth = np.argsort(-(queries @ keys.T), axis=1)[:, :10]

    def recall(ids):
        return np.mean([len({*row} & {*known}) for row, known in zip(ids, truth, strict=True)]) / 10

    params = sx.SearchParameters(budget=0.2)
    flat = recall(real("SAAP64,Flat", traces).search(queries, 10, params=params)[1])
    index, stats = real(f"SAAP64,{storage}", traces), sx.SearchStatistics()
    found = recall(index.search(queries, 10, params=params, stats=stats)[1])
    assert flat > 0.9
    assert least * flat < found <= flat
    per_query = stats.nbytes / stats.nq - index._routing.table.nbytes - 80
    refined = 40 * 64 * 4 if "RFlat" in storage else 0
    np.testing.assert_allclose(per_query, round(0.2 * 8192) * bytes_per_key + refined)
