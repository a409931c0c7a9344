"""Views that are judged by the output of the index."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saapindex.errors import InvalidInputError
from saapindex.learn.report import TrainingReport
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.traces import find_traces, read_trace, write_trace
from saapindex.learn.train import train

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from saapindex.learn.evaluation import Protocol, measure, take_snapshot  # noqa: E402
from saapindex.learn.evaluation.measures import query_errors  # noqa: E402
from saapindex.learn.judging import chosen, log_errors  # noqa: E402
from saapindex.learn.peers.ladder import peers_from_codebook  # noqa: E402


def test_heads_take_the_view_of_the_least_error(codebook, by_error):
    report = TrainingReport.from_dict(codebook.report)
    assert TrainingReport.from_dict(report.to_dict()) == report
    for head in report.heads:
        assert head.errors.keys() == head.views.keys() == {"rotated", "unrotated", "windowed 30"}
        means = {}
        for view, by_sequence in head.errors.items():
            assert {"text-2", "text-3"} <= by_sequence.keys()
            parts = [[], []]
            for name, error in by_sequence.items():
                parts[name.endswith(", lookups")].append(np.log(error))
            means[view] = np.mean([np.mean(part) for part in parts if part])
        least = min(means.values())
        assert means[head.view] <= least + by_error.min_gain
        assert head.view == "rotated" or means[head.view] < means["rotated"] - by_error.min_gain


def test_the_error_is_that_of_the_index(folder, codebook, by_error):
    report = TrainingReport.from_dict(codebook.report)
    protocol = Protocol(window=20, span=200, max_queries=128)
    make = peers_from_codebook(codebook)
    trace = read_trace(find_traces(folder)["text-3"][4])
    for head in report.heads[2:]:
        snapshot = take_snapshot(trace, head.head, protocol)
        peer = make(4, head.head)
        peer.build(snapshot.context)
        found = measure(peer, snapshot, [by_error.share], modes=["group"])
        error = np.mean([record.error for record in found])
        assert head.errors[head.view]["text-3"] == pytest.approx(error, rel=1e-3)


def test_each_layer_takes_a_size_of_codes(folder, codebook, by_error):
    """Small codes leave room for more of them; that of the two which was judged better is kept."""
    settings = dataclasses.replace(by_error, view="rotated", words=(1, 8), share=0.3, scan_share=0.6)
    apart = {words: train(folder, dataclasses.replace(settings, words=words), held_out=2) for words in (1, 8)}
    both = train(folder, settings, held_out=2, layers_together=2)
    alone = train(folder, settings, held_out=2, layers=[4])
    protocol = Protocol(window=20, span=200, max_queries=128)
    for layer in both.layers:
        errors = {}
        for words, book in apart.items():
            parts = []
            for name in ("text-2", "text-3"):
                trace = read_trace(find_traces(folder)[name][layer])
                for head in range(2):
                    snapshot = take_snapshot(trace, head, protocol)
                    peer = peers_from_codebook(book, scan_share=0.6)(layer, head)
                    peer.build(snapshot.context)
                    found, peaks = query_errors(peer, snapshot, 0.3)
                    parts.append(torch.stack([found.mean(), found[peaks >= 0.2].mean()])[:, None])
            first, second = torch.stack(parts[:2], 1), torch.stack(parts[2:], 1)
            errors[words] = log_errors([torch.stack([first, second])[..., 0]]).mean()
        kept = both.layer(layer).extra["codes.6.widths"].shape[1]
        assert kept == min(errors, key=errors.get)
        same = apart[kept].layer(layer).extra["codes.6.step"]
        np.testing.assert_allclose(both.layer(layer).extra["codes.6.step"], same, rtol=1e-3, atol=1e-5)
    assert alone.layer(4).extra["codes.6.widths"].shape == both.layer(4).extra["codes.6.widths"].shape


def test_lookups_count_by_how_much_worse_they_get():
    nan = torch.nan
    one = torch.tensor([[[0.01, 0.01, 0.01], [nan, 0.1, nan]], [[0.01, 0.01, 0.01], [0.8, nan, nan]]])
    other = torch.tensor([[[0.02, 0.02, 0.02], [nan, 0.1, nan]], [[0.02, 0.02, 0.02], [0.1, nan, nan]]])
    assert chosen([one, other], 0.0) == [1, 0, 0]
    assert chosen([other, one], 0.0) == [0, 1, 1]
    assert chosen([one, one - 1e-5], 0.01) == [0, 0, 0]


def test_what_cannot_be_judged_is_named(tmp_path, make_trace, by_error):
    for seed in range(2):
        write_trace(tmp_path / f"text{seed}-layer0.safetensors", make_trace(seed, info={"softcap": 5.0}))
    with pytest.raises(InvalidInputError, match="logits are capped"):
        train(tmp_path, by_error)
    with pytest.raises(InvalidInputError, match="judge is 'guess'"):
        TrainingSettings(judge="guess")


def test_a_held_out_sequence_that_is_too_short_is_named(tmp_path, make_trace, by_error):
    for seed in range(2):
        write_trace(tmp_path / f"text{seed}-layer0.safetensors", make_trace(seed))
    settings = dataclasses.replace(by_error, window=199)
    with pytest.raises(
        InvalidInputError, match="no key lies more than 199 positions before the last queries"
    ):
        train(tmp_path, settings)
