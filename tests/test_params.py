"""Parameters and presets: checked when they are made, and then fixed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saapindex.errors import InvalidInputError
from saapindex.params import PRESETS, IndexParameters, SearchParameters, check_integer, get_preset


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("view", "sideways"),
        ("view", None),
        ("router", "oracle"),
        ("rank", "size"),
        ("init", "zeros"),
        ("niter", -1),
        ("niter", 2.5),
        ("niter", True),
        ("max_points_per_centroid", 0),
        ("augment", -1),
        ("seed", -1),
        ("seed", None),
        ("max_position", 0),
        ("max_position", 1e6),
        ("cutoff", 0),
        ("cutoff", -1.0),
        ("cutoff", np.nan),
        ("cutoff", "long"),
    ],
)
def test_index_parameters_refused(field, value):
    with pytest.raises(InvalidInputError, match=rf"{field} is .*, expected"):
        IndexParameters(**{field: value})
    with pytest.raises(ValueError, match=field):
        IndexParameters().replace(**{field: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nprobe": 0}, "nprobe is 0, expected at least 1"),
        ({"nprobe": 1.0}, "nprobe is 1.0, expected an integer"),
        ({"nprobe": True}, "nprobe is True, expected an integer"),
        ({"nprobe": np.array([1, 2])}, "nprobe is array"),
        ({"budget": 0}, "budget is 0, expected at least 1"),
        ({"budget": 0.0}, r"budget is 0\.0, expected a share in \(0, 1\] or a count"),
        ({"budget": 1.5}, r"budget is 1\.5, expected a share"),
        ({"budget": np.nan}, "budget is nan, expected a share"),
        ({"budget": "all"}, "budget is 'all', expected a share"),
        ({"budget": True}, "budget is True, expected an integer"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a share"),
        ({"top_p": 1.1}, "top_p is 1.1, expected a share"),
        ({"top_p": "most"}, "top_p is 'most', expected a share"),
        ({"top_p": np.nan}, "top_p is nan, expected a share"),
        ({"rank": "size"}, "rank is 'size', expected one of 'key', 'mass'"),
        ({"nprobe": 1, "budget": 1}, "nprobe and budget are given together, expected one"),
        ({"budget": 0.1, "top_p": 0.9}, "budget and top_p are given together"),
        ({"nprobe": 1, "budget": 1, "top_p": 0.5}, "nprobe and budget and top_p are given together"),
    ],
)
def test_search_parameters_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        SearchParameters(**given)


@pytest.mark.parametrize(
    ("budget", "keys"),
    [
        (None, 1000),
        (0.05, 50),
        (np.float64(0.05), 50),
        (np.float32(0.05), 50),
        (1.0, 1000),
        (1e-9, 1),
        (1, 1),
        (np.int64(7), 7),
        (5000, 5000),
    ],
)
def test_a_budget_is_a_share_or_a_count(budget, keys):
    assert SearchParameters(budget=budget).keys(1000) == keys


@pytest.mark.parametrize("cls", [IndexParameters, SearchParameters])
def test_parameters_are_frozen_and_keyword_only(cls):
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), field, None)
    with pytest.raises(TypeError):
        cls("rotated")
    assert cls() == cls()
    assert hash(cls()) == hash(cls())


def test_replace_leaves_the_original():
    params = IndexParameters()
    assert params.replace(niter=3) == IndexParameters(niter=3)
    assert params == IndexParameters()


def test_presets_are_found_by_name_and_cannot_be_changed():
    assert get_preset("best") == IndexParameters()
    assert (get_preset("paper").view, get_preset("paper").router) == ("unrotated", "mlp")
    assert get_preset("faiss-ivf").router == "centroid"
    with pytest.raises(
        InvalidInputError, match="preset is 'fast', expected one of 'best', 'faiss-ivf', 'paper'"
    ):
        get_preset("fast")
    with pytest.raises(TypeError):
        PRESETS["best"] = IndexParameters()


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integers_of_any_kind(value):
    check_integer("k", value, 3)
    with pytest.raises(InvalidInputError, match="k is 3, expected at least 4"):
        check_integer("k", value, 4)


@pytest.mark.parametrize("value", [3.0, "3", None, True, np.True_, np.array([3, 4]), [3], 1j])
def test_what_is_no_integer(value):
    with pytest.raises(InvalidInputError, match="expected an integer of at least 0"):
        check_integer("k", value, 0)
