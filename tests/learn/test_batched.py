"""What all heads do at once is what each head would do alone: views, k-means, masses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx
from saapindex.backends import get_ops
from saapindex.errors import InvalidInputError
from saapindex.learn import attention_mass
from saapindex.partition import View
from saapindex.partition.kmeans import assignment_form, kmeans, query_metric

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from saapindex.learn import kmeans as batched  # noqa: E402
from saapindex.learn import masses, scoring  # noqa: E402
from saapindex.learn.contexts import Context, Snapshot, snapshots  # noqa: E402
from saapindex.learn.head_views import HeadViews  # noqa: E402

OPS = get_ops("reference")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [16, 12])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("n", [0, 1, 63])
def test_each_head_has_its_own_view(layout, dim, moved, n):
    rope = sx.Rope(
        theta=300.0, dim=dim, layout=layout, scaling=sx.rope.YarnScaling(factor=4.0, original_max_position=64)
    )
    views = [View("rotated", rope=rope), View("unrotated", rope=rope), View("windowed", 50.0, rope)]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, n, 16)).astype(np.float32)
    at, to = rng.integers(100_000, size=n), rng.integers(100_000, size=n)
    heads = HeadViews.of(views, rope)
    seen = heads.apply(torch.from_numpy(x), torch.from_numpy(at), torch.from_numpy(to) if moved else None)
    for head, view in enumerate(views):
        for member in range(2):
            rows = x[head, member]
            where = at
            if moved and view.kind != "unrotated":
                rows, where = rope.rerotate(rows, at, to, ops=OPS), to
            np.testing.assert_allclose(seen[head, member], view.apply(rows, where, OPS), atol=2e-5)
    assert heads.keeps_rotation.tolist() == [True, False, True]


def test_without_a_rope_every_view_is_the_identity():
    heads = HeadViews.of([View("unrotated")] * 2, None)
    x, at = torch.randn(2, 5, 8).half(), torch.arange(5)
    assert torch.equal(heads.apply(x, at, at + 3), x.float())
    assert not heads.keeps_rotation.any()


def test_long_inputs_are_turned_in_blocks(monkeypatch, rope):
    heads = HeadViews.of([View("unrotated", rope=rope)], rope)
    x, at = torch.randn(1, 50, 16), torch.arange(50)
    whole = heads.apply(x, at)
    monkeypatch.setattr("saapindex.learn.head_views._CHUNK", 7)
    assert torch.equal(heads.apply(x, at), whole)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("aware", [False, True])
def test_kmeans_is_that_of_one_head(blobs, spherical, aware):
    if spherical and aware:
        return
    x = np.stack([blobs(300, 10, seed) for seed in range(3)])
    metrics = np.stack([query_metric(blobs(50, 10, 9 + seed)) for seed in range(3)])
    start = x[:, :7].copy()
    metric = torch.from_numpy(metrics).float() if aware else None
    ours = batched.kmeans(
        torch.from_numpy(x), 7, metric=metric, spherical=spherical, niter=5, start=torch.from_numpy(start)
    )
    for head in range(3):
        alone = kmeans(
            x[head], 7, ops=OPS, rng=np.random.default_rng(0), metric=metrics[head] if aware else None,
            spherical=spherical, niter=5, start=start[head],
        )  # fmt: skip
        np.testing.assert_allclose(ours[head], alone, atol=1e-4)
        labels = OPS.assign(x[head], *assignment_form(alone, metrics[head] if aware else None, spherical))[0]
        forms = batched.assignment_form(ours, metric, spherical=spherical)
        np.testing.assert_array_equal(batched.assign(torch.from_numpy(x), *forms)[0][head], labels)


def test_a_head_does_not_depend_on_its_neighbours(blobs):
    x = torch.stack([torch.from_numpy(blobs(200, 6, seed)) for seed in range(4)])
    x[2] = x[2, :1]  # all of one point: every other part is empty
    together = batched.kmeans(x, 9, seed=3)
    for head in range(4):
        torch.testing.assert_close(batched.kmeans(x[head : head + 1], 9, seed=3)[0], together[head])


def test_empty_parts_are_refilled():
    x = torch.tensor([[[0.0], [0.1], [0.2], [10.0], [20.0]]])
    centroids = batched.kmeans(x, 3, start=torch.full((1, 3, 1), 0.1), niter=6)
    assert centroids.flatten().sort().values.tolist() == pytest.approx([0.1, 10.0, 20.0], abs=1e-6)


def test_the_metric_is_the_second_moment(blobs):
    queries = np.stack([blobs(70, 6, seed) for seed in range(2)])
    found = batched.query_metric(torch.from_numpy(queries), shrinkage=0.1)
    for head in range(2):
        np.testing.assert_allclose(
            found[head], query_metric(queries[head], shrinkage=0.1), rtol=1e-5, atol=1e-6
        )
    unit = batched.query_metric(torch.from_numpy(queries * [[[1.0]], [[9.0]]]), unit=True)
    lengths = np.linalg.norm(queries, axis=2, keepdims=True)
    np.testing.assert_allclose(unit[1], query_metric(queries[1] / lengths[1]), rtol=1e-4, atol=1e-5)
    assert torch.equal(batched.query_metric(torch.zeros(1, 3, 4)), torch.eye(4)[None])


def context_of(rng, n, m, heads=2, group=3, d=8):
    keys = torch.from_numpy(rng.standard_normal((heads, n, d)).astype(np.float32))
    queries = torch.from_numpy(rng.standard_normal((heads, group, m, d)).astype(np.float32))
    at = torch.arange(1, n + 1)
    return Context("a", keys, queries, at, torch.from_numpy(np.sort(rng.integers(n // 2, n + 9, m))))


@given(
    window=st.integers(0, 9),
    count=st.integers(1, 5),
    softcap=st.sampled_from([None, 0.8]),
    seed=st.integers(0, 99),
)
def test_masses_are_those_of_attention(window, count, softcap, seed):
    rng = np.random.default_rng(seed)
    context = context_of(rng, 63, 20)
    moments = snapshots(context, window=window, count=count)
    partitions = [(torch.from_numpy(rng.integers(nlist, size=(2, 63))), nlist) for nlist in (4, 100)]
    found = masses.list_masses(context, moments, partitions, scale=0.7, softcap=softcap)
    assert sum(moment.last - moment.first for moment in moments) == 20
    for (labels, nlist), mass in zip(partitions, found, strict=True):
        assert mass.shape == (2, 3, 20, nlist)
        for moment in moments:
            assert moment.n_keys == int(
                (context.key_positions < context.query_positions[moment.first] - window).sum()
            )
            for head in range(2):
                keys = context.keys[head, : moment.n_keys]
                queries = context.queries[head, 1, moment.first : moment.last]
                logits = 0.7 * queries @ keys.mT
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = torch.softmax(logits.double(), dim=1).numpy()
                own = labels[head, : moment.n_keys].numpy()
                expected = np.stack([np.bincount(own, row, nlist) for row in weights])
                np.testing.assert_allclose(mass[head, 1, moment.first : moment.last], expected, atol=1e-6)


def test_masses_are_those_of_the_reference_too():
    context = context_of(np.random.default_rng(0), 50, 9)
    labels = torch.arange(100).reshape(2, 50) % 7
    mass = masses.list_masses(context, [Snapshot(30, 0, 9)], [(labels, 7)], scale=1.0)[0]
    expected, _ = attention_mass(
        context.queries[1, 2].numpy(), np.full(9, 99), context.keys[1, :30].numpy(), np.arange(30),
        labels[1, :30].numpy(), 7, scale=1.0, window=0,
    )  # fmt: skip
    np.testing.assert_allclose(mass[1, 2], expected, atol=1e-5)


def test_blocks_of_queries_and_heads_do_not_show(monkeypatch):
    context = context_of(np.random.default_rng(0), 40, 11)
    arguments = context, [Snapshot(20, 0, 5), Snapshot(40, 5, 11)], [(torch.arange(80).reshape(2, 40) % 5, 5)]
    whole = masses.list_masses(*arguments, scale=1.0)[0]
    for limit in (1, 200, 1000):
        monkeypatch.setattr(masses, "_LOGITS_CPU", limit)
        torch.testing.assert_close(masses.list_masses(*arguments, scale=1.0)[0], whole)


def test_the_callers_precision_is_put_back():
    module = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(module, "fp32_precision") else "allow_tf32"
    before = getattr(module, name)
    context = context_of(np.random.default_rng(0), 9, 3)
    masses.list_masses(context, [Snapshot(9, 0, 3)], [(torch.zeros(2, 9).long(), 1)], scale=1.0)
    assert getattr(module, name) == before


def test_means_grow_with_the_lists():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 30, 4)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(6, size=(2, 30)))
    means, sizes = masses.list_means(x, labels, 7, [Snapshot(4, 0, 1), Snapshot(4, 1, 2), Snapshot(30, 2, 3)])
    for moment, n in enumerate((4, 4, 30)):
        for head in range(2):
            for number in range(7):
                rows = x[head, :n][labels[head, :n] == number]
                assert sizes[head, moment, number] == len(rows)
                expected = rows.mean(dim=0) if len(rows) else torch.zeros(4)
                torch.testing.assert_close(means[head, moment, number], expected, atol=1e-5, rtol=0)


def test_recall_reads_lists_in_order_of_mass_per_key():
    mass = torch.tensor([[[[0.5, 0.3, 0.2, 0.0]], [[0.1, 0.1, 0.8, 0.0]]]])  # one KV head of two query heads
    sizes = torch.tensor([[[10.0, 2.0, 8.0, 0.0]]])
    data = masses.RouterData.without_means(torch.zeros(1, 2, 1, 3), mass, sizes.log(), torch.zeros(1).long())
    # Per key .05, .15, .025 and .01, .05, .1: of 4 keys the first head reads list 1 and a fifth of list 0.
    alone = scoring.mass_recall(data.true_scores, data, share=0.2, shared=False)
    assert float(alone) == pytest.approx(((0.3 + 0.2 * 0.5) + (0.5 * 0.8)) / 2, abs=1e-6)
    # Together .06, .2, .125: list 1, then a quarter of list 2.
    shared = scoring.mass_recall(data.true_scores, data, share=0.2)
    assert float(shared) == pytest.approx(((0.3 + 0.25 * 0.2) + (0.1 + 0.25 * 0.8)) / 2, abs=1e-6)
    everything = scoring.mass_recall(lambda rows: torch.zeros(1, 2, 1, 4), data, share=1.0)
    assert float(everything) == pytest.approx(1.0, abs=1e-6)


def test_snapshots_share_the_queries_out():
    context = context_of(np.random.default_rng(1), 100, 21)
    moments = snapshots(context, window=5, count=4)
    assert [moment.first for moment in moments[1:]] == [moment.last for moment in moments[:-1]]
    assert (moments[0].first, moments[-1].last) == (0, 21)
    assert snapshots(context, window=1000, count=4) == []


def test_a_context_is_put_in_order_and_thinned(make_trace):
    trace = make_trace(0)
    shuffled = np.random.default_rng(0).permutation(len(trace.key_positions))
    mixed = type(trace)(
        trace.keys[:, shuffled], trace.values[:, shuffled], trace.queries, trace.key_positions[shuffled],
        trace.query_positions, trace.rope, trace.info,
    )  # fmt: skip
    context = Context.of(mixed, "a", sinks=2, max_queries=10)
    np.testing.assert_array_equal(context.keys, trace.keys[:, 2:])
    assert context.key_positions.tolist() == list(range(2, 400))
    assert context.queries.shape == (2, 3, 10, 16)
    assert context.query_positions[[0, -1]].tolist() == trace.query_positions[[0, -1]].tolist()
    assert context.thinned(10) is context


def test_contexts_refuse_what_does_not_fit():
    keys, at = torch.zeros(2, 5, 4), torch.arange(5)
    with pytest.raises(InvalidInputError, match=r"expected \(2, group, 5, 4\)"):
        Context("a", keys, torch.zeros(1, 3, 5, 4), at, at)
    with pytest.raises(InvalidInputError, match="3 positions for 5 keys"):
        Context("a", keys, torch.zeros(2, 3, 5, 4), torch.arange(3), at)
    with pytest.raises(InvalidInputError, match="positions fall"):
        Context("a", keys, torch.zeros(2, 3, 5, 4), at.flip(0), at)
    one = Context("a", keys, torch.zeros(2, 3, 5, 4), at, at)
    with pytest.raises(InvalidInputError, match="different positions"):
        Context.stack([one, Context("a", keys, torch.zeros(2, 3, 5, 4), at + 1, at)])
    assert Context.stack([one, one]).keys.shape == (4, 5, 4)
