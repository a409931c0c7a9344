"""The library's own method in the evaluation: it reads and returns what `AttentionIndex` does."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from saapindex.attention import AttentionIndex, fit_layer  # noqa: E402
from saapindex.errors import InvalidInputError, NotTrainedError  # noqa: E402
from saapindex.learn.kmeans import query_metric  # noqa: E402
from saapindex.learn.peers import PEERS, Context, Queries, ladder  # noqa: E402
from saapindex.learn.peers.ladder import Ladder, Learned  # noqa: E402
from saapindex.params import AttendParameters  # noqa: E402
from saapindex.partition import View  # noqa: E402

pytestmark = pytest.mark.torch
D, GROUP, NLIST, N = 32, 3, 8, 640


@pytest.fixture(scope="module")
def problem():
    """Clustered keys, values that go with them, queries, and a codebook of one head."""
    rng = np.random.default_rng(0)
    centers, skew = 2 * rng.standard_normal((12, D)), 0.9 ** np.arange(D)
    labels = rng.integers(12, size=N)
    keys = (centers[labels] + rng.standard_normal((N, D)) * skew).astype(np.float32)
    values = (centers[(labels + 3) % 12] + rng.standard_normal((N, D))).astype(np.float32)
    queries = rng.standard_normal((GROUP, 1, D)).astype(np.float32)
    asked = rng.standard_normal((GROUP, 100, D)).astype(np.float32)
    return keys, values, queries, fit_layer(keys[None], asked, NLIST, words=2, backend="reference")


def context_of(keys, values):
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (keys, values))
    return Context(*tensors, torch.arange(len(keys)), None, D**-0.5, element=4, window=0)


def peer_of(codebook, **settings):
    learned = Learned(
        View(),
        torch.from_numpy(codebook.centroids[0]),
        torch.from_numpy(codebook.metric[0]).float(),
        False,
        codebook.code.head(0),
    )
    return Ladder(adapt=0, **settings).learned(lambda n: learned)


def output(read, context, queries):
    """Attention over what was read and what was estimated, (g, d)."""
    logits = (queries.x[:, 0] @ context.keys.T) * context.scale
    logits, values = [logits.masked_fill(~read.keys[0], -torch.inf)], [context.values]
    if read.log_weights is not None:
        logits.append(read.log_weights[:, 0])
        values.append(read.values)
    weights = torch.softmax(torch.cat(logits, 1), 1)
    moved = 0.0
    if read.shift is not None:
        moved = weights[:, len(context.keys) :].sum(1, keepdim=True) * read.shift[:, 0]
    return weights @ torch.cat(values) + moved


@pytest.mark.parametrize(
    "how",
    [{}, {"remainder": False}, {"refine": False}, {"refine": False, "remainder": False}, {"policy": "max"}],
)
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_it_reads_and_returns_what_the_index_does(problem, monkeypatch, how, budget):
    from saapindex.attention import limits

    monkeypatch.setattr(ladder, "_LIST_EXTRA", limits.LIST_EXTRA)
    keys, values, queries, codebook = problem
    index = AttentionIndex(
        codebook, window=16, sinks=0, flush=16, adapt=0, dense_below=0, dtype="float32", backend="reference"
    )
    index.add(keys[None, None], values[None, None])
    params = AttendParameters(budget=budget, **how)
    chosen = index.select(queries[None, :, 0], params=params)
    first = int(np.asarray(chosen.window_start)[0])
    context = context_of(keys[:first], values[:first])
    peer = peer_of(codebook, **how)
    peer.build(context)
    asked = Queries(torch.from_numpy(queries), torch.tensor([N]))
    (read,) = peer.reads(asked, [budget * first * context.row])
    assert set(np.flatnonzero(read.keys[0])) == set(np.asarray(chosen.ids)[0, 0][: int(chosen.lengths[0, 0])])
    assert float(read.bytes[0]) <= budget * first * context.row
    out, _ = index.attend(queries[None, :, 0], params=params, near=False)
    np.testing.assert_allclose(output(read, context, asked), out[0], atol=2e-3)


def test_everything_is_read_at_a_large_budget(problem):
    keys, values, queries, codebook = problem
    peer = peer_of(codebook)
    peer.build(context_of(keys, values))
    asked = Queries(torch.from_numpy(queries), torch.tensor([N]))
    read = peer.read(asked, 3 * N * peer.context.row)
    assert read.keys.all()
    statistics = NLIST * (2 * D + 8) + 2 * codebook.code.coded[0] * (D + 4)
    assert float(read.bytes[0]) == statistics + N * (4 * 2 + 1) + N * peer.context.row


def test_it_learns_by_itself_and_is_listed(problem):
    keys, values, queries, _ = problem
    context, asked = context_of(keys, values), Queries(torch.from_numpy(queries), torch.tensor([N]))
    peer = PEERS["ladder"](nlist=NLIST, words=2)
    with pytest.raises(NotTrainedError, match="call fit first"):
        peer.build(context)
    peer.fit([context], [Queries(torch.randn(GROUP, 50, D), torch.arange(N, N + 50))])
    peer.build(context)
    few, many = peer.reads(asked, [0.3 * N * context.row, 0.9 * N * context.row])
    assert few.keys.sum() < many.keys.sum()
    dense = torch.softmax((asked.x[:, 0] @ context.keys.T) * context.scale, 1) @ context.values
    error = [(output(read, context, asked) - dense).norm() / dense.norm() for read in (few, many)]
    assert error[1] < error[0] < 0.3


def test_a_metric_of_unit_queries_does_not_see_their_length():
    x = torch.randn(1, 40, 4)
    scaled = x * torch.rand(1, 40, 1)
    torch.testing.assert_close(query_metric(x, unit=True), query_metric(scaled, unit=True))


@pytest.mark.parametrize("bad", [{"nlist": 0}, {"words": 0}, {"adapt": -1}, {"scan_share": 1.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Ladder(**bad)
