"""What heads take of a budget, as training measures it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saapindex.attention import HeadShares, LayerCodebook
from saapindex.codebook import Codebook
from saapindex.learn.shares import (
    ERRORS,
    LEFT,
    LOOKUP_CODES,
    LOOKUP_WEIGHT,
    LOOKUPS,
    LOST,
    OTHERS,
    RATE,
    TOKENS,
    best_weights,
    share_out,
)
from saapindex.learn.traces import find_traces, read_trace, write_trace
from saapindex.learn.train import train

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from saapindex.learn.evaluation import Protocol, take_snapshot  # noqa: E402
from saapindex.learn.evaluation.measures import query_errors  # noqa: E402
from saapindex.learn.peers.ladder import peers_from_codebook  # noqa: E402


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(0.2, 2.5)), min_size=2, max_size=12),
    st.floats(0.0, 0.9),
)
def test_weights_are_the_best_there_are(heads, least):
    """No two heads can trade bytes and lower the mean error."""
    errors, powers = np.array(heads).T
    weights = best_weights(errors, powers, np.full(len(heads), least))
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    assert (weights >= least - 1e-9).all()
    assert (weights <= 4).all()

    def total(w):
        return float((errors * np.maximum(w, 1e-9) ** -powers).sum())

    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.choice(len(heads), 2, replace=False)
        step = min(0.05, weights[one] - least, 4 - weights[other])
        moved = weights.copy()
        moved[one] -= step
        moved[other] += step
        assert total(moved) >= total(weights) * (1 - 1e-6)


def test_too_many_that_ask_for_more_share_alike():
    found = best_weights(np.ones(4), np.ones(4), np.full(4, 2.0))
    np.testing.assert_allclose(found, 1)


def test_each_head_was_measured_as_the_index_reads(folder, codebook, by_error):
    layer = codebook.layer(4)
    make = peers_from_codebook(codebook, scan_share=by_error.scan_share)
    for head in range(2):
        parts = []
        for name in ("text-2", "text-3"):
            trace = read_trace(find_traces(folder)[name][4])
            snapshot = take_snapshot(trace, head, Protocol(window=20, span=200, max_queries=128))
            peer = make(4, head)
            peer.build(snapshot.context)
            parts.append([float(query_errors(peer, snapshot, b)[0].mean()) for b in (0.5, 0.2)])
        np.testing.assert_allclose(layer.extra[ERRORS][head], np.mean(parts, axis=0), rtol=1e-3)
    left = layer.extra[LEFT]
    assert (left[:, 0] < 0.5).all()
    assert (left[:, 1] < left[:, 0]).all()


def test_the_codebook_says_what_heads_take(codebook, tmp_path):
    every = [LayerCodebook.of(codebook.layer(n), 400).shares for n in codebook.layers]
    weights = np.concatenate([shares.weights for shares in every])
    assert weights.mean() == pytest.approx(1, abs=1e-3)
    for number, shares in zip(codebook.layers, every, strict=True):
        rate, lost = np.moveaxis(codebook.layer(number).extra[LOOKUPS], 2, 0)
        asks = ((rate >= RATE) & (lost >= LOST)).any(axis=1)
        np.testing.assert_allclose(shares.codes, np.where(asks, LOOKUP_CODES, 0))
    codebook.save(tmp_path / "book.safetensors")
    again = LayerCodebook.of(Codebook.load(tmp_path / "book.safetensors").layer(4), 400).shares
    np.testing.assert_array_equal(again.weights, every[-1].weights)


def test_heads_that_look_things_up_take_more(codebook):
    layers = {number: codebook.layer(number) for number in codebook.layers}
    # (head, sequence, rate and error): the second head of layer 1 loses lookups in the second sequence.
    asks = {number: np.zeros((2, 2, 2), np.float32) for number in (1, 4)}
    asks[1][1, 1] = 0.3
    asks[1][0, 0, 0] = asks[4][0, 1, 1] = 0.3  # looks up and loses nothing; hardly looks up
    plain = {
        number: dataclasses.replace(layer, extra={**layer.extra, LOOKUPS: asks[number]})
        for number, layer in layers.items()
    }
    found = {number: HeadShares.of(layer.extra, 400) for number, layer in share_out(plain).items()}
    assert found[1].weights[1] >= LOOKUP_WEIGHT - 1e-3
    assert found[1].codes.tolist() == [0.0, LOOKUP_CODES]
    assert not found[4].codes.any()
    assert np.concatenate([shares.weights for shares in found.values()]).mean() == pytest.approx(1, abs=1e-3)


def test_a_length_has_the_heads_that_look_things_up_in_what_is_no_longer(codebook):
    """A head that does so in a short sequence also counts at greater lengths, and not the other way round."""
    plain = {}
    for number in codebook.layers:
        extra = dict(codebook.layer(number).extra)
        extra[TOKENS] = np.array([[400, 100]] * 2, np.int64)
        extra[LOOKUPS] = np.zeros((2, 2, 2), np.float32)
        if number == 1:
            extra[LOOKUPS][0, 0] = extra[LOOKUPS][1, 1] = (
                0.3  # the first in the long one, the second in the short
            )
        plain[number] = dataclasses.replace(codebook.layer(number), extra=extra)
    layer = share_out(plain)[1]
    named = {n: (HeadShares.of(layer.extra, n).codes > 0).tolist() for n in (10, 199, 200, 1000)}
    assert named == {10: [False, True], 199: [False, True], 200: [True, True], 1000: [True, True]}
    every = [HeadShares.of(layer.extra, 100) for layer in share_out(plain).values()]
    for name in ("weights", "scarce"):
        assert np.concatenate([getattr(one, name) for one in every]).mean() == pytest.approx(1, abs=1e-3)
    least, most, _ = every[0].asks
    assert every[0].weights[1] == least >= LOOKUP_WEIGHT - 1e-3
    assert every[0].scarce[1] == most == max(one.scarce.max() for one in every)
    assert most == pytest.approx(4 - 3 * OTHERS)


def test_without_the_measurement_all_take_the_same(folder, codebook, by_error):
    judged = train(folder, dataclasses.replace(by_error, judge="recall"), held_out=2)
    assert all(LayerCodebook.of(judged.layer(n), 400).shares is None for n in judged.layers)
    both = {1: codebook.layer(1), 4: judged.layer(4)}
    assert share_out(both)[4].extra.keys() == judged.layer(4).extra.keys()


def test_lookups_are_measured_in_each_sequence(tmp_path, make_trace, by_error):
    """Also in a short one, whose errors count for nothing else."""
    for seed in range(4):
        (tmp_path / f"text-{seed}").mkdir()
        trace = make_trace(seed, 1, n=150 if seed == 3 else 400, m=60)
        if seed == 3:  # every query of the first head asks for one key that no other is like
            keys, queries = np.array(trace.keys), np.array(trace.queries)
            keys[:, 5] = 20 * keys[:, 5] / np.linalg.norm(keys[:, 5], axis=-1, keepdims=True)
            queries[:] = 0
            queries[: queries.shape[0] // 2] = keys[0, 5]
            trace = dataclasses.replace(trace, keys=keys, queries=queries)
        write_trace(tmp_path / f"text-{seed}" / "layer-01.safetensors", trace)
    settings = dataclasses.replace(by_error, nlist=(2, 6))
    found = {}
    for held in (["text-2"], ["text-2", "text-3"]):
        found[len(held)] = train(tmp_path, settings, held_out=held, sequences=["text-0", "text-1", *held])
    lookups = found[2].layer(1).extra[LOOKUPS]
    assert lookups.shape == (2, 2, 2)
    assert lookups[0, 1, 0] == 1.0
    assert lookups[1, 1].tolist() == [0.0, 0.0]
    for name in (ERRORS, LEFT):
        np.testing.assert_allclose(found[2].layer(1).extra[name], found[1].layer(1).extra[name])
    heads = [head["errors"] for head in found[2].report["heads"]]
    assert all(by.keys() <= {"text-2", "text-2, lookups"} for head in heads for by in head.values())
    assert heads == [head["errors"] for head in found[1].report["heads"]]
