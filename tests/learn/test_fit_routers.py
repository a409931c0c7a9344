"""Learned routers of all heads: that they learn, start where they should and stop on their own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from saapindex.learn.fit_routers import FitSettings, cross_entropy, fit_router  # noqa: E402
from saapindex.learn.masses import RouterData  # noqa: E402
from saapindex.learn.scoring import mass_recall  # noqa: E402

HEADS, GROUP, NLIST, D = 3, 2, 10, 8


def data_of(seed, rows=300, twist=1.0):
    """Masses per key that depend on the query linearly, which the `mean` router knows but for a twist."""
    draws = torch.Generator().manual_seed(seed)
    weight, missing = (
        torch.randn(HEADS, 1, NLIST, D, generator=torch.Generator().manual_seed(7 + which))
        for which in (0, 1)
    )
    features = torch.randn(HEADS, GROUP, rows, D, generator=draws)
    sizes = torch.randint(0, 50, (HEADS, 3, NLIST), generator=draws)
    sizes[:, :, 0] = 0  # a list that is always empty
    sizes[:, :, 1] = 5
    snapshot = torch.randint(0, 3, (rows,), generator=draws)
    log_sizes = sizes.float().log()
    means = features @ weight.mT
    scores = means + twist * features @ missing.mT
    mass = torch.softmax(scores + log_sizes[:, snapshot][:, None], dim=-1)
    return RouterData(features, mass, means, log_sizes, snapshot)


TRAIN, HELD_OUT = data_of(0), data_of(1, rows=200)


def recall(scores, data=HELD_OUT):
    return mass_recall(scores, data, share=0.2, shared=False)


@pytest.mark.parametrize("hidden", [0, 48])
@pytest.mark.parametrize("on_mean", [False, True])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_a_router_learns_what_the_mean_misses(hidden, on_mean, per_query_head):
    settings = FitSettings(
        hidden=hidden, on_mean=on_mean, per_query_head=per_query_head, learning_rate=2e-2, epochs=14, batch=50
    )
    weights, loss = fit_router(TRAIN, HELD_OUT, settings)
    mean, best = recall(HELD_OUT.mean_scores), recall(HELD_OUT.true_scores)
    found = recall(lambda rows: weights.per_key(HELD_OUT, rows))
    assert (found > mean + 0.5 * (best - mean)).all()
    torch.testing.assert_close(cross_entropy(weights, HELD_OUT, slice(None)), loss, rtol=1e-4, atol=0)
    assert weights.weight.shape[1] == (GROUP if per_query_head else 1)


def test_a_router_on_the_mean_starts_at_the_mean_and_is_never_worse():
    for hidden in (0, 16):
        still = FitSettings(hidden=hidden, learning_rate=0.0, epochs=1)
        weights, loss = fit_router(TRAIN, HELD_OUT, still)
        torch.testing.assert_close(weights.scores(HELD_OUT, slice(None)), HELD_OUT.means)
        wild = FitSettings(hidden=hidden, learning_rate=10.0, epochs=2)
        assert (fit_router(TRAIN, HELD_OUT, wild)[1] <= loss).all()


def test_a_linear_router_starts_where_it_is_told():
    start = torch.randn(HEADS, NLIST, D)
    settings = FitSettings(on_mean=False, learning_rate=0.0, epochs=1)
    weights, _ = fit_router(TRAIN, HELD_OUT, settings, start=start)
    torch.testing.assert_close(weights.weight[:, 0], start)


def test_mass_of_whole_lists_can_be_predicted_as_well():
    settings = FitSettings(on_mean=False, conditioned=False, learning_rate=2e-2, epochs=12, batch=50)
    weights, loss = fit_router(TRAIN, HELD_OUT, settings)
    scores = weights.scores(HELD_OUT, slice(None))
    scores = scores.masked_fill(HELD_OUT.priors(slice(None)).isinf(), -1e4)
    expected = -(HELD_OUT.mass * torch.log_softmax(scores, -1)).sum(-1).mean(dim=(1, 2))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    chance = recall(lambda rows: torch.zeros(HEADS, GROUP, rows.stop - rows.start, NLIST))
    assert (recall(lambda rows: weights.per_key(HELD_OUT, rows)) > chance + 0.1).all()


def test_each_head_stops_on_its_own():
    """A head trained beside others ends with the weights that it has alone."""

    def head(data, at):
        part = slice(at, at + 1)
        return RouterData(
            data.features[part], data.mass[part], data.means[part], data.log_sizes[part], data.snapshot
        )

    settings = FitSettings(learning_rate=3e-2, epochs=12, patience=1, batch=50)
    together, loss = fit_router(TRAIN, HELD_OUT, settings)
    for at in range(HEADS):
        alone, own = fit_router(head(TRAIN, at), head(HELD_OUT, at), settings)
        torch.testing.assert_close(alone.weight[0], together.weight[at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own[0], loss[at], rtol=1e-5, atol=0)


def test_a_seed_decides_and_the_callers_random_numbers_go_on():
    settings = FitSettings(hidden=8, epochs=2)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append((fit_router(TRAIN, HELD_OUT, settings)[0].weight, torch.rand(1)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_contexts_are_joined_with_their_own_lists():
    both = RouterData.cat([TRAIN, HELD_OUT])
    assert both.rows == 500
    torch.testing.assert_close(both.priors(slice(300, 500)), HELD_OUT.priors(slice(None)))
    torch.testing.assert_close(both.priors(slice(0, 300)), TRAIN.priors(slice(None)))
