"""Published methods on cases whose answers are known, their bytes counted by hand."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saapindex as sx
from saapindex.learn import attention_mass
from saapindex.learn.peers import PEERS, Context, Queries
from saapindex.rope import YarnScaling

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ROPE = sx.Rope(theta=1000.0, dim=16)
SMALL = {
    "a2ats": {"words": 16, "parts": 2},
    "faiss": {"nlist": 8},
    "faiss-context": {"nlist": 8},
    "hisa": {"block": 7, "bits": 8},
    "magicpig": {"bits": 3, "tables": 10},
    "quest": {"page": 4},
    "retroinfer": {"cluster": 8},
    "saap": {"nlist": 8, "hidden": 16, "epochs": 3},
    "sale": {"block": 3},
}


def context_of(keys, values=None, rope=None, positions=None, scale=1.0, window=0):
    keys = torch.as_tensor(keys, dtype=torch.float32)
    values = keys if values is None else torch.as_tensor(values, dtype=torch.float32)
    at = torch.arange(len(keys)) if positions is None else torch.as_tensor(positions)
    return Context(keys, values, at, rope, scale, window=window)


def queries_of(x, position=10**6):
    x = torch.as_tensor(x, dtype=torch.float32)
    x = x if x.dim() == 3 else x[None]
    return Queries(x, torch.full((x.shape[1],), position))


def random_case(n=203, d=16, g=3, m=5, seed=0, rope=ROPE):
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(n, d, generator=draw) for _ in range(2))
    x = 2 * torch.randn(g, m, d, generator=draw)
    context = context_of(keys, values, rope, scale=d**-0.5, window=20)
    return context, Queries(x, torch.arange(m) * 7 + n + 20)


def ready(name, context, **arguments):
    """A peer with small settings, fitted where it learns, and built."""
    if "faiss" in name:
        pytest.importorskip("faiss")
    peer = PEERS[name](**{**SMALL.get(name, {}), **arguments})
    if peer.offline:
        trains = [random_case(seed=seed, d=context.keys.shape[1], rope=context.rope) for seed in (1, 2)]
        peer.fit([train for train, _ in trains], [queries for _, queries in trains])
    peer.build(context)
    return peer


def fetched(read):
    return [row.nonzero()[:, 0].tolist() for row in read.keys]


# What every method must keep to


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("g", [1, 3])
def test_a_read_keeps_its_contract(name, g):
    context, queries = random_case(g=g)
    peer = ready(name, context)
    n, row = len(context.keys), context.row
    budgets = [0.02 * n * row, 0.3 * n * row, 0.7 * n * row]
    for budget, again in zip(budgets, peer.reads(queries, budgets), strict=True):
        read = peer.read(queries, budget)
        assert (read.keys.shape, read.keys.dtype) == ((5, n), torch.bool)
        assert (read.bytes.shape, read.bytes.dtype) == ((5,), torch.float32)
        full = read.keys.sum(1) * row
        assert (read.bytes >= full).all()
        # Above the budget only what must be read before any key is.
        assert ((read.bytes <= budget * (1 + 1e-6)) | (full == 0)).all()
        assert (read.log_weights is None) == (read.values is None)
        if read.log_weights is not None:
            assert read.log_weights.shape == (g, 5, len(read.values))
            assert not read.log_weights.isnan().any()
        for field in dataclasses.fields(read):
            one, other = getattr(read, field.name), getattr(again, field.name)
            assert (one is None and other is None) or torch.equal(one, other), field.name


@pytest.mark.parametrize("name", sorted({*PEERS} - {"hyperattention", "magicpig", "window"}))
def test_a_budget_for_everything_reads_everything(name):
    context, queries = random_case()
    peer = ready(name, context)
    assert peer.read(queries, 4.0 * len(context.keys) * context.row).keys.all()


@pytest.mark.parametrize("name", PEERS)
def test_one_key_is_enough(name):
    if "faiss" in name:
        pytest.importorskip("faiss")
    context, queries = random_case(n=1, m=2)
    arguments = {"a2ats": {"words": 2}, "faiss-context": {"nlist": 1}}.get(name, {})
    peer = ready(name, context, **arguments)
    assert peer.read(queries, 1e6).keys.shape == (2, 1)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("n", [600, 100_000])
def test_settings_can_be_constructed(name, n):
    if "faiss" in name:
        pytest.importorskip("faiss")
    assert all(PEERS[name](**setting).name for setting in PEERS[name].settings(n))


@pytest.mark.parametrize("name", PEERS)
def test_order_of_calls_is_checked(name):
    if "faiss" in name:
        pytest.importorskip("faiss")
    peer = PEERS[name]()
    context, queries = random_case()
    with pytest.raises(sx.NotTrainedError, match="call build first"):
        next(iter(peer.reads(queries, [1e4])))
    if peer.offline:
        with pytest.raises(sx.NotTrainedError, match="call fit first"):
            peer.build(context)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quest", {"page": 0}, "page is 0"),
        ("saap", {"nlist": 0}, "nlist is 0"),
        ("sale", {"block": 1.5}, "block is 1.5"),
        ("hisa", {"bits": 1}, "bits is 1"),
        ("a2ats", {"words": 1}, "words is 1"),
        ("magicpig", {"bits": 16}, "at most 15 and 254"),
        ("retroinfer", {"segment": 0}, "segment is 0"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(sx.InvalidInputError, match=message):
        PEERS[name](**arguments)


@pytest.mark.parametrize(("name", "arguments"), [("saap", {"nlist": 900}), ("a2ats", {"words": 900})])
def test_too_few_training_keys_are_refused(name, arguments):
    context, queries = random_case()
    with pytest.raises(sx.InvalidInputError, match="900, expected at most the 203 keys"):
        PEERS[name](**arguments).fit([context], [queries])


def test_the_registry_is_light():
    code = "import sys; from saapindex.learn.peers import PEERS; list(PEERS); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert "nothing" not in PEERS
    code = (
        "import sys; sys.modules['torch'] = None\nfrom saapindex.learn.peers import PEERS\n"
        "try: PEERS['quest']\nexcept ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'saapindex[learn]'" in result.stdout


# Each method by hand


def test_exact_takes_the_largest_weights_of_the_group():
    context = context_of(np.eye(4) * 5)  # a row is 2 * 4 * 2 = 16 bytes
    peer = ready("exact", context)
    read = peer.read(queries_of([[4.0, 3, 2, 1]]), 2 * 16 + 15)
    assert fetched(read) == [[0, 1]]
    assert read.bytes.tolist() == [32]
    # One head puts all on key 3; the other wavers between 0 and 1: the sure one wins.
    both = queries_of([[[0.0, 0, 0, 2]], [[1.0, 0.9, 0, 0]]])
    assert fetched(peer.read(both, 16)) == [[3]]


def test_random_keys_are_as_many_as_paid_for():
    context, queries = random_case()
    peer = ready("random", context)
    read = peer.read(queries, 10.5 * context.row)
    assert read.keys.sum(1).tolist() == [10] * 5
    assert len({tuple(row) for row in fetched(read)}) == 5


def test_window_reads_nothing():
    context, queries = random_case()
    read = ready("window", context).read(queries, 1e9)
    assert not read.keys.any()
    assert not read.bytes.any()


def test_quest_ranks_pages_by_their_bound():
    # With q = (1, 1) page 0 is bounded by 1 + 1, though its keys have 1; page 1 by 1.5; page 2 is short.
    keys = [[1, 0], [0, 1], [1.5, 0], [1.5, 0], [-5, -5]]
    peer = ready("quest", context_of(keys), page=2)
    bounds, page = 3 * 2 * 2 * 2, 2 * 8
    read = peer.read(queries_of([[1.0, 1], [1, -1], [-1, -1]]), bounds + page)
    assert fetched(read) == [[0, 1], [2, 3], [4]]
    assert read.bytes.tolist() == [40, 40, 32]
    assert peer.read(queries_of([[1.0, 1]]), bounds + page - 1).bytes.tolist() == [bounds]
    free = ready("quest", context_of(keys), page=2, count_bounds=False)
    assert free.read(queries_of([[1.0, 1]]), page).bytes.tolist() == [16]


def test_retroinfer_fetches_estimates_and_leaves_out():
    # Three clusters of two equal keys each, so that means are exact.
    keys = np.repeat([[1.0, 0], [-1, 0], [0, 3]], 2, axis=0)
    values = np.arange(12.0).reshape(6, 2)
    # Means 3 * 4 bytes; a cluster of two keys 16; statistics of one cluster 2 * 2 + 2 = 6.
    peer = ready("retroinfer", context_of(keys, values), cluster=2, estimation=6 / 22)
    read = peer.read(queries_of([[2.0, 0]]), 12 + 16 + 6)
    assert fetched(read) == [[0, 1]]
    assert read.bytes.tolist() == [34]
    estimated = (read.log_weights[0, 0] > -math.inf).nonzero()[:, 0].tolist()
    assert len(estimated) == 1  # (0, 3), whose logit 0 is the second
    assert read.log_weights[0, 0, estimated[0]] == pytest.approx(math.log(2))
    assert read.values[estimated[0]].tolist() == [9, 10]


def test_sale_scans_everything_first():
    keys = [[7.0, 0, 0, 0], [0, 7, 0, 0], [-7, 0, 0, 0], [0, -7, 0, 0], [0, 0, 3.5, 0], [0, 0, -3.5, 0]]
    scan, row = 6 * (4 / 2 + 2), 16
    single = ready("sale", context_of(keys), block=1)
    read = single.read(queries_of([[0.0, 7, 1, 0]]), scan + 2 * row)
    assert fetched(read) == [[1, 4]]
    assert read.bytes.tolist() == [56]
    blocks = ready("sale", context_of(keys), block=2)
    read = blocks.read(queries_of([[0.0, 7, 1, 0]]), scan + 2 * row + 31)
    assert fetched(read) == [[0, 1]]
    read = blocks.read(queries_of([[0.0, 7, 1, 0]]), 10)
    assert (fetched(read), read.bytes.tolist()) == ([[]], [24])


def test_hisa_looks_into_the_best_blocks_alone():
    # Block means along q: 2, 1.5, 0. The best key of all hides in block 2.
    keys = [[2.0, 0], [2, 0], [3, 0], [0, 0], [9, 0], [-9, 0]]
    code, row = 2 + 2, 8  # 8 bits a dimension and a scale
    budget = 3 * code + 4 * code + 2 * row
    peer = ready("hisa", context_of(keys), block=2, bits=8, scan=0.5)
    read = peer.read(queries_of([[1.0, 0]]), budget)
    assert fetched(read) == [[0, 2]] or fetched(read) == [[1, 2]]
    assert read.bytes.tolist() == [budget]
    assert fetched(peer.read(queries_of([[1.0, 0]]), 3 * code + 2 * code + 3 * row - 1)) == [[0, 1]]


def test_a2ats_estimates_logits_by_words():
    draw = np.random.default_rng(0)
    words = draw.standard_normal((4, 8)).astype(np.float32)
    keys = np.repeat(words, 5, axis=0)
    context = context_of(keys)
    peer = PEERS["a2ats"](words=4, parts=1)
    peer.fit([context], [queries_of(draw.standard_normal((50, 8)))])
    peer.build(context)
    x = draw.standard_normal((3, 8)).astype(np.float32)
    fixed = 20 * 2 / 8 + 4 * 8 * 2  # 2 bits for 20 keys, and the codebook
    read = peer.read(queries_of(x), fixed + 5 * context.row)
    best = (x @ words.T).argmax(axis=1)
    assert fetched(read) == [list(range(5 * i, 5 * i + 5)) for i in best]
    assert read.bytes.tolist() == [69 + 160] * 3


def test_a2ats_is_exact_at_its_constant_distance():
    context, queries = random_case(n=64, g=1, m=1)
    at = torch.full((64,), 1000)
    context = dataclasses.replace(context, positions=at)
    queries = Queries(queries.x, torch.tensor([1000 + 300]))
    peer = PEERS["a2ats"](words=64, distance=300)
    peer.fit([context], [queries_of(torch.randn(80, 16, generator=torch.Generator().manual_seed(0)))])
    peer.build(context)
    exact = ready("exact", context)
    count = 7 * context.row
    ours, truth = peer.read(queries, 64 * 6 / 8 + 64 * 16 * 2 + count), exact.read(queries, count)
    assert fetched(ours) == fetched(truth)


def test_magicpig_estimates_without_bias():
    # Mean over many draws of the estimated sum of exp(logit), against the truth.
    draw = torch.Generator().manual_seed(0)
    context = context_of(torch.randn(60, 4, generator=draw), scale=0.5)
    queries = queries_of(torch.randn(2, 3, 4, generator=draw))
    logits = (queries.x @ context.keys.T) * context.scale
    truth = logits.exp().sum(-1)[:1]
    for heads in (slice(0, 1), slice(0, 2)):
        some = Queries(queries.x[heads], queries.positions)
        sums = []
        for seed in range(60):
            peer = ready("magicpig", context, bits=2, tables=6, seed=seed)
            read = peer.read(some, 1e9)
            kept = logits[heads].exp().masked_fill(~read.keys, 0).sum(-1)
            sums.append(kept + read.log_weights.exp().sum(-1))
        # Heads of a group are not independent, so that the weights of their union are not quite right.
        share = float((torch.stack(sums).mean(0)[:1] / truth).mean())
        assert share == pytest.approx(1, abs=0.06 if heads.stop == 1 else 0.12)


def test_magicpig_by_collisions_takes_the_lower_of_equals():
    keys = [[1.0, 0], [1, 0], [-1, 0], [-1, 0]]
    peer = ready("magicpig", context_of(keys), bits=1, tables=2, estimate=False)
    codes = 2 * 4 * 1 / 8  # the codes of 4 keys in 2 tables are less than their ids
    read = peer.read(queries_of([[1.0, 0], [-1, 0]]), codes + 8)
    assert fetched(read) == [[0], [2]]
    assert read.bytes.tolist() == [9, 9]


def test_hyperattention_weighs_its_sample():
    context, queries = random_case(g=1)
    peer = ready("hyperattention", context, sample=1.0)
    n = len(context.keys)
    read = peer.read(queries, (n // 2) * context.row + 8)
    assert (read.keys.sum(1) == n // 2).all()
    logits = (queries.x @ context.keys.T) * context.scale
    weight = read.log_weights.exp() / logits.exp()
    assert torch.allclose(weight[0][read.keys], torch.tensor(n / (n // 2) - 1), rtol=1e-4)
    # Without a sample, keys that point as the query does come before all others.
    same = context_of(torch.cat([context.keys, queries.x[0, :1].expand(6, -1)]))
    peer = ready("hyperattention", same, bits=12, sample=0.0)
    one = Queries(queries.x[:, :1], queries.positions[:1])
    assert set(fetched(peer.read(one, 6 * same.row + 8))[0]) == set(range(n, n + 6))


def test_faiss_visits_the_lists_that_faiss_visits():
    faiss = pytest.importorskip("faiss")
    context, queries = random_case(n=400, g=1, m=4, rope=None)
    keys, x = context.keys.numpy(), queries.x[0].numpy()
    for quantizer in ("ip", "l2"):
        peer = ready("faiss-context", context, nlist=8, quantizer=quantizer)
        centroids = peer._router.reconstruct_n(0, 8)
        coarse = faiss.IndexFlatIP(16)
        coarse.add(centroids)
        index = faiss.IndexIVFFlat(coarse, 16, 8, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        labels = peer._assigner.search(keys, 1)[1][:, 0]
        index.add_core(400, faiss.swig_ptr(keys), None, faiss.swig_ptr(labels))
        index.nprobe = 3
        for i, ids in enumerate(index.search(x, 400)[1]):
            visited = set(ids[ids >= 0].tolist())
            one = Queries(queries.x[:, i : i + 1], queries.positions[i : i + 1])
            budget = 8 * 16 * 4 + len(visited) * context.row
            read = peer.read(one, budget)
            assert set(fetched(read)[0]) == visited
            assert read.bytes.tolist() == [budget]
            cut = peer.read(one, budget - context.row)
            assert cut.keys.sum() == len(visited) - 1


def test_faiss_in_half_precision_and_its_absence(monkeypatch):
    pytest.importorskip("faiss")
    context, queries = random_case()
    read = ready("faiss-context", context, centroid_element=2).read(queries, 0.0)
    assert read.bytes.tolist() == [8 * 16 * 2] * 5
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(sx.MissingDependencyError, match="faiss-cpu"):
        PEERS["faiss"]()


def test_unrotated_faiss_does_not_see_positions():
    pytest.importorskip("faiss")
    context, queries = random_case()
    moved = ROPE.rerotate(context.keys, context.positions, context.positions + 500)
    later = dataclasses.replace(context, keys=moved, positions=context.positions + 500)
    x = ROPE.rerotate(queries.x.flatten(0, 1), queries.positions.repeat(3), queries.positions.repeat(3) + 500)
    asked = Queries(x.view(3, 5, 16), queries.positions + 500)
    budget = 60 * context.row
    one = ready("faiss-context", context, unrotated=True).read(queries, budget)
    other = ready("faiss-context", later, unrotated=True).read(asked, budget)
    assert torch.equal(one.keys, other.keys)


def test_saap_learns_where_the_mass_is():
    draw = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 16, generator=draw), dim=1)

    def sequence(seed):
        draw = torch.Generator().manual_seed(seed)
        keys = 3 * centres.repeat(40, 1) + 0.1 * torch.randn(320, 16, generator=draw)
        seen = torch.randint(8, (400,), generator=draw)
        return context_of(keys, scale=1.0), queries_of((3 * centres[seen])[None])

    trains = [sequence(seed) for seed in (1, 2)]
    peer = PEERS["saap"](nlist=8, hidden=32, epochs=12)
    peer.fit([context for context, _ in trains], [queries for _, queries in trains])
    context, queries = sequence(3)
    peer.build(context)
    assert peer.router_bytes == 2 * (16 * 32 + 32 + 32 * 8 + 8)
    budget = peer.router_bytes + 96 * context.row
    read = peer.read(queries, budget)
    shares = torch.softmax(queries.x[0] @ context.keys.T, 1)
    assert (shares * read.keys).sum(1).mean() > 0.9
    assert (read.bytes == peer.router_bytes + 96 * context.row).all()
    peer.count_router = False
    assert (peer.read(queries, 96.0 * context.row).keys == read.keys).all()


def test_saap_needs_queries_that_see_keys():
    context, queries = random_case()
    with pytest.raises(sx.InvalidInputError, match="no training query sees a key"):
        PEERS["saap"](nlist=4).fit([context], [Queries(queries.x, torch.zeros(5, dtype=torch.int64))])


# What they share


@pytest.mark.parametrize(
    "rope",
    [
        sx.Rope(theta=500.0, dim=16),
        sx.Rope(theta=500.0, dim=8, layout="interleaved"),
        sx.Rope(dim=12, scaling=YarnScaling(factor=4.0, original_max_position=64)),
    ],
)
def test_views_are_those_of_rope(rope):
    from saapindex.learn.peers.views import turn, unrotate

    draw = np.random.default_rng(0)
    x, at = draw.standard_normal((63, 16)).astype(np.float32), draw.integers(100_000, size=63)
    undone = unrotate(torch.from_numpy(x)[None], torch.from_numpy(at), rope)[0]
    np.testing.assert_allclose(undone, rope.unrotate(x, at), atol=1e-6)
    moved = turn(torch.from_numpy(x), torch.from_numpy(5 - at), rope)
    np.testing.assert_allclose(moved, rope.rerotate(x, at, np.full(63, 5)), atol=1e-6)
    assert unrotate(undone, torch.from_numpy(at), None) is undone


@given(window=st.integers(0, 60), seed=st.integers(0, 50), g=st.sampled_from([1, 3]))
def test_list_mass_is_attention_mass(window, seed, g):
    from saapindex.learn.peers.mass import list_mass

    context, queries = random_case(n=63, d=8, g=g, m=7, seed=seed, rope=None)
    context = dataclasses.replace(context, window=window)
    at = torch.arange(7) * 12
    labels = torch.arange(63) % 5
    mass, seen = list_mass(context, Queries(queries.x, at), labels, 5)
    expected, sizes = attention_mass(
        queries.x.flatten(0, 1).numpy(), at.repeat(g).numpy(), context.keys.numpy(), np.arange(63),
        labels.numpy(), 5, scale=context.scale, window=window,
    )  # fmt: skip
    np.testing.assert_allclose(mass.flatten(0, 1), expected, atol=1e-5)
    np.testing.assert_array_equal(seen.repeat(g), sizes.sum(axis=1))


@given(
    n=st.integers(1, 60),
    nlist=st.integers(1, 9),
    count=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_lists_are_read_in_order_and_the_last_is_cut(n, nlist, count, seed):
    from saapindex.learn.peers.select import fill_lists, list_ranks

    draw = np.random.default_rng(seed)
    labels, scores = draw.integers(nlist, size=n), draw.standard_normal((3, nlist)).astype(np.float32)
    ranks, sizes = list_ranks(torch.from_numpy(labels), nlist)
    keys = fill_lists(torch.from_numpy(scores), torch.from_numpy(labels), ranks, sizes, count)
    for row, score in zip(keys, scores, strict=True):
        order = [i for j in np.argsort(-score, kind="stable") for i in np.flatnonzero(labels == j)]
        assert row.nonzero()[:, 0].tolist() == sorted(order[:count])


@given(u=st.integers(1, 40), budget=st.integers(0, 100), seed=st.integers(0, 99))
def test_units_are_taken_while_they_fit(u, budget, seed):
    from saapindex.learn.peers.select import fill

    draw = np.random.default_rng(seed)
    scores, costs = draw.integers(5, size=(2, u)), draw.integers(1, 9, size=u)
    taken = fill(torch.from_numpy(scores).float(), torch.from_numpy(costs), budget)
    for row, score in zip(taken, scores, strict=True):
        expected, spent = set(), 0
        for unit in np.argsort(-score, kind="stable"):
            spent += costs[unit]
            if spent > budget:
                break
            expected.add(unit)
        assert set(row.nonzero()[:, 0].tolist()) == expected


def test_best_takes_what_there_is():
    from saapindex.learn.peers.select import best

    scores = torch.tensor([[1.0, -math.inf, 3.0], [1.0, 2.0, 3.0]])
    assert best(scores, 9).tolist() == [[True, False, True], [True, True, True]]
    assert best(scores, torch.tensor([0, 2])).tolist() == [[False] * 3, [False, True, True]]
    assert not best(scores, 0).any()


def test_pooling_is_safe_for_far_and_for_no_weights():
    from saapindex.learn.peers.select import pooled

    logits = torch.tensor([[[0.0, -500.0, -400.0]], [[0.0, -300.0, -math.inf]]])
    assert pooled(logits).argsort(dim=1, descending=True).tolist() == [[0, 1, 2]]
    assert (pooled(torch.full((2, 1, 3), -math.inf)) == -math.inf).all()
