"""What a layer's codebook must be, and what fitting makes of keys and queries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saapindex.attention import AttendParameters, LayerCodebook, fit_layer
from saapindex.attention.tensors import element_type, stored, to_bfloat16
from saapindex.backends import get_ops
from saapindex.errors import InvalidInputError
from saapindex.partition import View
from saapindex.rope import Rope

OPS = get_ops("reference")


def test_keys_go_to_the_nearest_centroid_in_the_metric(codebook, data):
    keys, _ = data(np.random.default_rng(0), 1, 100)
    labels = codebook.assign(codebook.view(keys[0], np.arange(100), OPS), None, OPS)
    for h in range(2):
        away = keys[0, h, :, None] - codebook.centroids[h]
        distances = np.einsum("njd,de,nje->nj", away, codebook.metric[h], away)
        np.testing.assert_array_equal(labels[h], distances.argmin(axis=1))


def test_heads_may_have_views_of_their_own(codebook, data):
    keys, _ = data(np.random.default_rng(0), 1, 50)
    rope = Rope(dim=16)
    mixed = dataclasses.replace(codebook, views=(View("unrotated", rope=rope), View("rotated", rope=rope)))
    seen = mixed.view(keys[0], np.arange(50), OPS)
    np.testing.assert_array_equal(seen[1], keys[0, 1])
    np.testing.assert_allclose(seen[0], rope.unrotate(keys[0, 0], np.arange(50), ops=OPS))
    assert mixed.fingerprint() != codebook.fingerprint()


def test_a_spherical_codebook_assigns_by_inner_product(codebook, data):
    keys, _ = data(np.random.default_rng(0), 1, 50)
    unit = codebook.centroids / np.linalg.norm(codebook.centroids, axis=2, keepdims=True)
    spherical = dataclasses.replace(codebook, centroids=unit, metric=None, spherical=True)
    labels = spherical.assign(keys[0], None, OPS)
    np.testing.assert_array_equal(labels, (keys[0] @ unit.swapaxes(1, 2)).argmax(2))
    moved = spherical.adapt(keys[0], 2, OPS)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=2), 1, rtol=1e-5)


def test_adapting_moves_centroids_to_the_keys(codebook, data):
    keys, _ = data(np.random.default_rng(0), 1, 500)
    seen = keys[0] + 1

    def error(centroids):
        labels = codebook.assign(seen, centroids, OPS)
        away = seen - centroids[np.arange(2)[:, None], labels]
        return np.einsum("hnd,hde,hne->", away, codebook.metric, away)

    assert error(codebook.adapt(seen, 3, OPS)) < error(codebook.centroids)
    np.testing.assert_array_equal(codebook.adapt(seen, 3, OPS), codebook.adapt(seen, 3, OPS))


@pytest.mark.parametrize("view", ["rotated", "unrotated", "windowed"])
def test_fitting_takes_the_view_of_keys_and_queries(data, view):
    rng = np.random.default_rng(0)
    keys, _ = data(rng, 1, 300)
    rope, positions = Rope(dim=16), rng.integers(0, 5000, 300)
    rotated = np.stack([rope.rotate(k, positions) for k in keys[0]])
    queries = rng.standard_normal((6, 50, 16))
    how = {"niter": 3, "backend": "reference", "positions": positions, "query_positions": np.arange(50)}
    codebook = fit_layer(rotated, queries, 6, words=1, rope=rope, view=view, cutoff=100.0, **how)
    assert codebook.views == (View(view, 100.0, rope),) * 2
    assert codebook.scale == 0.25
    if view == "unrotated":
        asked = np.stack([rope.unrotate(q, np.arange(50)) for q in queries.astype(np.float32)])
        plain = fit_layer(keys[0], asked, 6, words=1, **how)
        np.testing.assert_allclose(codebook.centroids, plain.centroids, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.ones((5, 8))}, r"keys are float64 of shape \(5, 8\), expected finite floats"),
        ({"keys": np.full((1, 5, 8), np.nan)}, "expected finite floats"),
        (
            {"queries": np.ones((2, 3, 7))},
            r"queries have shape \(2, 3, 7\), expected \(a multiple of 2, m, 8\)",
        ),
        ({"queries": np.ones((3, 3, 8))}, "a multiple of 2"),
        ({"nlist": 6}, "5 keys for 6 lists"),
        ({"nlist": 0}, "nlist is 0"),
        ({"words": 9}, "words is 9"),
        ({"positions": [1]}, r"positions has shape \(1,\), expected \(5,\)"),
    ],
)
def test_bad_training_is_refused(change, message):
    arguments = {"keys": np.ones((2, 5, 8)), "queries": np.ones((4, 3, 8)), "nlist": 2, **change}
    with pytest.raises(InvalidInputError, match=message):
        fit_layer(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": np.ones((2, 6, 16))}, "centroids are float64"),
        ({"centroids": np.ones((3, 6, 16), np.float32)}, "but the codes are for 2 heads of 16 dimensions"),
        ({"centroids": np.full((2, 6, 16), np.nan, np.float32)}, "centroids hold NaN or infinity"),
        ({"metric": np.ones((2, 3, 3))}, r"metric has shape \(2, 3, 3\), expected \(2, 16, 16\)"),
        ({"spherical": True}, "or None if spherical"),
        ({"views": (View(),)}, "1 views for 2 KV heads"),
        ({"scale": -1.0}, "scale is -1.0, expected a number above 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_refused(codebook, change, message):
    with pytest.raises(InvalidInputError, match=message):
        dataclasses.replace(codebook, **change)


def test_bfloat16_is_rounded_as_torch_rounds(torch):
    x = np.concatenate(
        [np.random.default_rng(0).normal(0, 1e3, 1000), [0, -0.0, 1e-45, 3e38, np.inf, -np.inf]]
    )
    x = x.astype(np.float32)
    theirs = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(x), theirs)
    tensor = torch.from_numpy(x[:1000]).bfloat16()
    assert np.shares_memory(stored(tensor, "x", (1000,), "bfloat16"), tensor.view(torch.int16).numpy())
    assert element_type(tensor, "x") == "bfloat16"
    for bad in (np.nan, np.inf, 3.4e38):
        with pytest.raises(InvalidInputError, match="what bfloat16 cannot hold"):
            stored(np.array([1, bad]), "x", (2,), "bfloat16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0, expected a share in"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"nprobe": 1.5}, "nprobe is 1.5, expected an integer"),
        ({"budget": 0.1, "nprobe": 1}, "budget and nprobe are given together"),
        ({"policy": "mean"}, "policy is 'mean', expected one of 'sum', 'max', 'union'"),
        ({"rank": "size"}, "rank is 'size'"),
        ({"refine": 1}, "refine is 1, expected True, False or None"),
        ({"scan_share": 1.0}, "scan_share is 1.0"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        AttendParameters(**settings)


def test_parameters_have_one_limit_at_a_time():
    assert AttendParameters().budget == 0.05
    params = AttendParameters(nprobe=3, policy="max", remainder=False)
    assert params.replace(top_p=0.5) == AttendParameters(top_p=0.5, policy="max", remainder=False)
    assert params.replace(policy="sum").nprobe == 3


def test_a_codebook_is_a_value(codebook):
    assert isinstance(codebook, LayerCodebook)
    with pytest.raises(dataclasses.FrozenInstanceError):
        codebook.scale = 2.0
