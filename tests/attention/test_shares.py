"""Heads that take unequal shares of a budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saapindex.attention import AttentionIndex, HeadShares
from saapindex.attention.limits import reading
from saapindex.attention.shares import MOST_SEEN
from saapindex.errors import InvalidInputError
from saapindex.params import AttendParameters

ASKS = np.float32([1.5, 1.8, 0.75])
SHARES = HeadShares(np.float32([0.5, 1.5]), np.float32([0.0, 0.75]))
SMALL = {"window": 20, "flush": 16, "dense_below": 0, "dtype": "float32"}


@pytest.fixture
def uneven(make_codebook):
    return dataclasses.replace(make_codebook(), shares=SHARES)


def steps(codebook, data, params, backend="reference", **more):
    rng = np.random.default_rng(3)
    index = AttentionIndex(codebook, backend=backend, batch=2, **{**SMALL, **more})
    index.add(*data(rng, 2, 700))
    return index, index.attend(rng.standard_normal((2, 6, 16)).astype(np.float32), params=params)


def test_the_mean_over_heads_is_the_budget(uneven):
    """By hand: after statistics a head has its weight of what is left, and codes their share of that."""
    long, row = np.array([5000, 5000, 3000, 3000]), 2 * 16 * 2
    params = AttendParameters(budget=0.2)
    about = uneven.code, uneven.nlist, 2
    even, own = reading(params, long, *about), reading(params, long, *about, SHARES)
    fixed = uneven.nlist * (2 * 16 + 8) + 2 * (16 + 4) * uneven.code.coded[[0, 1, 0, 1]]
    left = 0.2 * long * row - fixed
    np.testing.assert_array_equal(own.left, (left * [0.5, 1.5, 0.5, 1.5]).astype(np.int64))
    assert abs(own.left.sum() - even.left.sum()) <= 4
    codes = own.scan * uneven.code.nbytes_per_key / own.left
    np.testing.assert_allclose(codes, [0.4, 0.75, 0.4, 0.75], rtol=0.01)
    more = reading(params.replace(scan_share=0.9), long, *about, SHARES)
    np.testing.assert_allclose(more.scan * uneven.code.nbytes_per_key / more.left, 0.9, rtol=0.01)
    evenly = reading(AttendParameters(budget=0.2, by_head=False), long, *about, SHARES)
    np.testing.assert_array_equal(evenly.left, even.left)
    np.testing.assert_array_equal(evenly.scan, even.scan)


def test_where_bytes_are_scarce_those_that_look_things_up_see_all_codes(uneven):
    """The mean stays the budget, and nobody takes more than is needed or can be had."""
    shares = SHARES._replace(scarce=np.float32([0.2, 1.8]), asks=np.float32([1.5, 1.8, 0.75]))
    long, code = np.array([5000, 5000]), uneven.code
    ends = []
    for budget in (0.03, 0.12, 0.125, 0.2, 0.5):
        params = AttendParameters(budget=budget)
        even = reading(params, long, code, uneven.nlist, 2)
        plain = reading(params, long, code, uneven.nlist, 2, SHARES)
        own = reading(params, long, code, uneven.nlist, 2, shares)
        if (code.coded == code.coded[0]).all():
            assert abs(int(own.left.sum()) - int(even.left.sum())) <= 4
        weight = own.left[1] / even.left[1]
        ends.append(weight)
        enough = own.scan[1] >= 5000 - 1
        assert own.left[1] >= plain.left[1]
        assert enough or weight > 1.799
        if plain.scan[1] >= 5000:
            np.testing.assert_array_equal(own.left, plain.left)
    assert max(ends) > 1.799
    assert min(ends) < 1.501


def test_in_long_contexts_so_many_codes_are_enough(uneven):
    """The floor rises with the keys up to a number of them."""
    shares = SHARES._replace(scarce=np.float32([0.01, 1.99]), asks=np.float32([1.5, 1.99, 0.75]))
    size, row = uneven.code.nbytes_per_key, 2 * 16 * 2
    for long in (MOST_SEEN, 2 * MOST_SEEN, 4 * MOST_SEEN):
        budget = MOST_SEEN * size / 0.75 / 1.75 / (long * row)  # about 1.75 even parts are enough
        found = reading(
            AttendParameters(budget=budget), np.full(2, long), uneven.code, uneven.nlist, 2, shares
        )
        assert abs(found.scan[1] - MOST_SEEN) <= 1


def test_no_head_reads_more_than_all(uneven):
    long = np.array([5000, 5000])
    found = reading(AttendParameters(budget=0.9), long, uneven.code, uneven.nlist, 2, SHARES)
    assert found.left[1] == 5000 * 2 * 16 * 2


@pytest.mark.parametrize("params", [{}, {"refine": False}, {"policy": "union"}, {"remainder": False}])
def test_each_head_is_what_it_would_be_alone(make_codebook, uneven, data, params):
    """A head of weight `w` reads what every head would read at a budget that leaves `w` times as much."""
    budget = 0.3
    index, (out, lse) = steps(uneven, data, AttendParameters(budget=budget, **params))
    long = index._batch.long[:2]
    element, row = 4, 2 * 16 * 4
    for head in range(2):
        even = reading(AttendParameters(budget=budget, **params), long, uneven.code, uneven.nlist, element)
        fixed = budget * long[head] * row - even.left[head]
        wanted = (float(SHARES.weights[head]) * (budget * long[0] * row - fixed) + fixed) / (long[0] * row)
        alone = AttendParameters(
            budget=wanted + 1e-9, scan_share=max(0.4, float(SHARES.codes[head])), **params
        )
        _, (known, known_lse) = steps(make_codebook(), data, alone)
        own = slice(3 * head, 3 * head + 3)
        np.testing.assert_allclose(out[:, own], known[:, own], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:, own], known_lse[:, own], rtol=1e-5)


@pytest.mark.parametrize("budget", [0.1, 0.4, 1.0])
def test_numba_is_the_reference(uneven, data, budget):
    params = AttendParameters(budget=budget)
    _, (out, lse) = steps(uneven, data, params)
    _, (other, other_lse) = steps(uneven, data, params, backend="cpu")
    np.testing.assert_allclose(out, other, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(lse, other_lse, rtol=1e-3, atol=1e-4)


def test_a_budget_of_one_is_dense(make_codebook, uneven, data):
    _, (out, lse) = steps(uneven, data, AttendParameters(budget=1.0))
    _, (dense, dense_lse) = steps(make_codebook(), data, AttendParameters(budget=1.0))
    np.testing.assert_array_equal(out, dense)
    np.testing.assert_array_equal(lse, dense_lse)


def test_what_is_refused(make_codebook, uneven, data):
    with pytest.raises(InvalidInputError, match="by_head is True, but the codebook says nothing of heads"):
        steps(make_codebook(), data, AttendParameters(budget=0.2, by_head=True))
    with pytest.raises(InvalidInputError, match=r"by_head is 1\.5, expected True, False or None"):
        AttendParameters(by_head=1.5)
    for shares, message in (
        (
            HeadShares(np.float32([1.0]), np.float32([0.0])),
            r"weights of the shares are float32 of shape \(1,\)",
        ),
        (HeadShares(np.float32([1.0, 0.0]), np.float32([0.0, 0.0])), "expected numbers above 0"),
        (HeadShares(np.float32([1.0, 1.0]), np.float32([0.0, 1.0])), r"expected some in \[0, 1\)"),
        (SHARES._replace(scarce=np.float32([1.0, 1.0])), "given alone, expected both or neither"),
        (SHARES._replace(scarce=np.float32([0.0, 1.0]), asks=ASKS), "scarce are .* expected numbers above 0"),
        (SHARES._replace(scarce=SHARES.weights, asks=ASKS[:2]), "asks of the shares are"),
        (SHARES._replace(scarce=SHARES.weights, asks=ASKS[::-1].copy()), "expected two rising weights"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            dataclasses.replace(make_codebook(), shares=shares)


def test_shares_are_used_unless_they_are_refused(make_codebook, uneven, data):
    assert uneven.fingerprint() != make_codebook().fingerprint()
    found = {
        way: steps(uneven, data, AttendParameters(budget=0.2, by_head=way))[1] for way in (None, True, False)
    }
    np.testing.assert_array_equal(found[None][0], found[True][0])
    assert not np.allclose(found[None][0], found[False][0], atol=1e-5)
    _, (even, _) = steps(make_codebook(), data, AttendParameters(budget=0.2))
    np.testing.assert_array_equal(found[False][0], even)


@pytest.mark.parametrize(("codes", "reads"), [([0.0, 0.75], True), ([0.0, 0.0], False)])
def test_by_default_codes_are_read_on_a_device_where_heads_look_things_up(codes, reads, uneven, monkeypatch):
    """Elsewhere whole lists are fetched, on devices that are so fast at it."""
    from types import SimpleNamespace

    from saapindex.attention import device_attend

    monkeypatch.setattr(device_attend, "shape_of", lambda *_: object())
    book = dataclasses.replace(uneven, shares=SHARES._replace(codes=np.float32(codes)))
    keeping = SimpleNamespace(book=SimpleNamespace(codebook=book))
    batch = SimpleNamespace(keeping=keeping, streams=None)

    def refine(**how):
        return device_attend.limits_of(AttendParameters(**how), batch, 3, 0).refine

    assert refine() is reads
    assert not refine(by_head=False)
    assert (refine(refine=True), refine(refine=False)) == (True, False)


def test_buffers_of_one_token_are_kept_and_those_of_several_not(monkeypatch):
    """Unless room was reserved, for graphs go on with them."""
    from types import SimpleNamespace

    from saapindex.attention import device_attend

    for name in ("launch_shape", "multiprocessors"):
        monkeypatch.setattr(device_attend, name, lambda *_: (1, 32))
    monkeypatch.setattr(device_attend, "Workspace", SimpleNamespace(empty=lambda *_: object()))
    streams = SimpleNamespace(**dict.fromkeys(("pages", "keys", "anchors"), np.zeros((2, 3, 4))))
    code = SimpleNamespace(quads=np.zeros((2, 8)))
    keeping = SimpleNamespace(xp=np, book=SimpleNamespace(code=code))
    batch = SimpleNamespace(spaces={}, streams=streams, keeping=keeping, reserved=0)
    kept = {t: device_attend.workspace(batch, 3, t, 0) for t in (1, 20)}
    assert list(batch.spaces.values()) == [kept[1]]
    assert device_attend.workspace(batch, 3, 1, 0) is kept[1]
    batch.reserved = 8
    again = device_attend.workspace(batch, 3, 20, 0)
    assert again is not kept[20]
    assert device_attend.workspace(batch, 3, 20, 0) is again
