"""Codebooks: what they hold, how they are read, and what they refuse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import saapindex as sx
from saapindex.backends import get_ops
from saapindex.codebook import Codebook, CodebookLayer, ListRouters
from saapindex.errors import CodebookMismatchError, FileFormatError, InvalidInputError
from saapindex.files import read_header, write_file
from saapindex.partition import View

HEADS, GROUP, D = 3, 2, 8
ROPE = sx.Rope(theta=500.0, dim=D)
KINDS = ("mean+mlp", "centroid", "mean+linear")


def routers(nlist, kinds=KINDS, r=1, h=5, seed=0):
    rng = np.random.default_rng(seed)
    linear, mlp = (sum(kind.endswith(rung) for kind in kinds) for rung in ("linear", "mlp"))
    tensors = {
        "weight": (linear, r, nlist, D),
        "offset": (linear + mlp, r, nlist),
        "hidden": (mlp, r, h, D),
        "hidden_offset": (mlp, r, h),
        "top": (mlp, r, nlist, h),
    }
    return ListRouters(
        kinds,
        **{name: rng.standard_normal(shape).astype("f2") for name, shape in tensors.items() if shape[0]},
    )


def layer_of(number, **changes):
    rng = np.random.default_rng(number)
    turn = rng.standard_normal((HEADS, D, D))
    settings = {
        "views": [View("rotated", rope=ROPE), View("unrotated", rope=ROPE), View("windowed", 30.0, ROPE)],
        "centroids": {n: rng.standard_normal((HEADS, n, D)).astype(np.float16) for n in (7, 4)},
        "q_heads": HEADS * GROUP,
        "scale": 0.35,
        "metric": (turn @ turn.swapaxes(1, 2)).astype(np.float32),
        "routers": {7: routers(7, r=GROUP)},
        "max_position": 900,
        "extra": {"codes": np.arange(HEADS, dtype=np.int8)[:, None]},
    }
    return CodebookLayer(number, **{**settings, **changes})


@pytest.fixture
def path(tmp_path):
    """A codebook of layers 2 and 5."""
    codebook = Codebook(
        {number: layer_of(number) for number in (5, 2)}, model_id="a/model", weights_hash="f00d",
        settings={"seed": 1}, report={"recall": 0.5},
    )  # fmt: skip
    codebook.save(tmp_path / "codebook.safetensors")
    return tmp_path / "codebook.safetensors"


def test_what_was_saved_is_loaded(path):
    codebook = Codebook.load(path)
    assert (codebook.model_id, codebook.weights_hash, codebook.layers) == ("a/model", "f00d", (2, 5))
    assert (codebook.settings, codebook.report) == ({"seed": 1}, {"recall": 0.5})
    for number in (2, 5):
        found, expected = codebook.layer(number), layer_of(number)
        assert found.describe() == expected.describe()
        assert found.views == expected.views
        assert found.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            np.testing.assert_array_equal(found.tensors()[name], tensor)
            assert found.tensors()[name].dtype == tensor.dtype
    assert codebook.layer(2) is codebook.layer(2)
    assert repr(codebook) == "Codebook('a/model', layers 2, 5, kv_heads=3, d=8, nlist 4, 7)"


def test_a_layer_is_read_when_it_is_asked_for(path, monkeypatch):
    codebook = Codebook.load(path)
    read = []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **options: read.append(1) or fromfile(*args, **options))
    codebook.layer(5)
    one = len(read)
    Codebook.load(path)
    assert one > 0
    assert len(read) == one  # a header alone reads no tensor


def test_a_changed_layer_is_refused_and_the_others_are_not(path):
    data = bytearray(path.read_bytes())
    centroids = layer_of(5).centroids[7].tobytes()
    at = bytes(data).index(centroids)
    data[at + 3] ^= 1
    path.write_bytes(data)
    codebook = Codebook.load(path)
    codebook.layer(2)
    with pytest.raises(FileFormatError, match="altered"):
        codebook.layer(5)


def test_a_changed_header_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a/model", b"b/model"))
    with pytest.raises(FileFormatError, match="altered"):
        Codebook.load(path)


def test_a_file_that_is_replaced_is_noticed(path):
    codebook = Codebook.load(path)
    Codebook({2: layer_of(2)}).save(path)
    with pytest.raises(FileFormatError, match="replaced"):
        codebook.layer(5)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    sx.write_index(sx.IndexSAAP(8, 4), path)
    with pytest.raises(FileFormatError, match=r"saapindex\.index.*saapindex\.codebook"):
        Codebook.load(path)
    with pytest.raises(FileNotFoundError):
        Codebook.load(tmp_path / "none")
    for header in ({}, {"layers": {}}, {"layers": 3}):
        write_file(path, {}, header, format="saapindex.codebook", version=1)
        with pytest.raises(FileFormatError, match="no whole codebook"):
            Codebook.load(path)


def test_a_layer_without_its_tensors_is_refused(path, tmp_path):
    _, header = read_header(path)
    body = {name: value for name, value in header.items() if name not in ("checksum", "row_checksums")}
    write_file(
        tmp_path / "y", {"layers.2.metric": np.eye(2)[None]}, body, format=body.pop("format"), version=1
    )
    codebook = Codebook.load(tmp_path / "y")
    with pytest.raises(FileFormatError, match="layer 2 is not whole"):
        codebook.layer(2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_id": "b/model"}, "model_id is 'b/model', trained for 'a/model'"),
        ({"weights_hash": "beef"}, "weights_hash is 'beef', trained for 'f00d'"),
        ({"layer": 3}, "has layers 2, 5, not layer 3"),
        ({"layer": 2, "rope": sx.Rope(theta=1000.0, dim=D)}, r"layer 2: rope is Rope\(theta=1000.*theta=500"),
        (
            {"layer": 2, "scale": 0.5, "d": 9},
            "layer 2: scale is 0.5, trained for 0.35; layer 2: d is 9, trained",
        ),
        ({"kv_heads": 2}, "layer 2: kv_heads is 2, trained for 3; layer 5: kv_heads is 2, trained for 3"),
        ({"layer": 5, "q_heads": 3}, "layer 5: q_heads is 3, trained for 6"),
    ],
)
def test_what_does_not_fit_is_named(path, given, message):
    with pytest.raises(CodebookMismatchError, match=message) as caught:
        Codebook.load(path).check(**given)
    assert isinstance(caught.value, ValueError)


def test_what_fits_passes(path):
    codebook = Codebook.load(path)
    codebook.check()
    codebook.check(model_id="a/model", weights_hash="f00d", layer=2, rope=ROPE, scale=0.35 * (1 + 1e-9), d=D)
    codebook.check(model_id="/a/local/copy", weights_hash="f00d")  # the same weights by another name
    Codebook({2: layer_of(2)}).check(model_id="any", weights_hash="any")


def test_partitions_of_heads_assign_as_the_layer_does():
    layer, ops = layer_of(2), get_ops("reference")
    x = np.random.default_rng(0).standard_normal((50, D)).astype(np.float32)
    forms, bias = layer.assignment(7)
    for head in range(HEADS):
        part = layer.partition(head, 7)
        np.testing.assert_array_equal(part.assign(x, ops), (x @ forms[head].T + bias[head]).argmax(axis=1))
        distance = x[:, None] - part.centroids
        expected = np.einsum("njd,de,nje->nj", distance, layer.metric[head], distance).argmin(axis=1)
        np.testing.assert_array_equal(part.assign(x, ops), expected)
    assert [layer.partition(head, 7).max_position for head in range(HEADS)] == [900, None, 900]
    with pytest.raises(InvalidInputError, match="nlist is 5, expected one of 4, 7"):
        layer.partition(0, 5)
    with pytest.raises(InvalidInputError, match="head is 3"):
        layer.partition(3, 7)


def test_scores_are_those_of_each_rung():
    rng = np.random.default_rng(0)
    queries, means, centroids = (
        rng.standard_normal(shape) for shape in ((HEADS, GROUP, 5, D), (HEADS, 7, D), (HEADS, 7, D))
    )
    ours = routers(7, r=GROUP)
    scores = ours.scores(queries, means, centroids, scale=0.5)
    for member in range(GROUP):
        mlp, linear = ours.weights(0), ours.weights(2)
        q = queries[0, member]
        hidden = np.maximum(q @ mlp["hidden"][member].T + mlp["hidden_offset"][member], 0)
        expected = 0.5 * q @ means[0].T + hidden @ mlp["top"][member].T + mlp["offset"][member]
        np.testing.assert_allclose(scores[0, member], expected)
        np.testing.assert_allclose(scores[1, member], 0.5 * queries[1, member] @ centroids[1].T)
        q = queries[2, member]
        expected = 0.5 * q @ means[2].T + q @ linear["weight"][member].T + linear["offset"][member]
        np.testing.assert_allclose(scores[2, member], expected)
    assert ours.on_mean.tolist() == [True, False, True]


def test_routers_of_some_heads():
    ours = routers(7)
    last = ours.part(slice(1, 3))
    assert last.kinds == KINDS[1:]
    np.testing.assert_array_equal(last.weights(1)["weight"], ours.weights(2)["weight"])
    np.testing.assert_array_equal(last.weights(1)["offset"], ours.weights(2)["offset"])
    assert set(last.tensors()) == {"weight", "offset"}
    assert ours.part(slice(1, 2)).tensors() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": []}, "cannot share 0 KV heads"),
        ({"q_heads": 4}, "4 query heads cannot share 3"),
        ({"views": [View(rope=ROPE)] * 2 + [View()]}, "different RoPE"),
        ({"centroids": {}}, "no centroids"),
        ({"centroids": {7: np.zeros((HEADS, 6, D))}}, r"expected finite floats of shape \(3, 7, any\)"),
        ({"centroids": {7: np.full((HEADS, 7, D), np.inf)}}, "expected finite floats"),
        ({"metric": np.eye(D)}, "metric is float64 of shape"),
        ({"routers": {7: ListRouters(["mean"])}}, "1 routers for 3 KV heads"),
        ({"routers": {7: routers(6)}}, "router weight is"),
        ({"routers": {7: routers(7, r=3)}}, "for 3 query heads, expected 1 or 2"),
        ({"extra": {"x": np.zeros(2)}}, "extra tensor x has shape"),
        ({"heads": [1]}, r"heads is \(1,\)"),
    ],
)
def test_bad_layers_are_named(change, message):
    with pytest.raises(InvalidInputError, match=message):
        layer_of(2, **change)


def test_bad_routers_and_codebooks_are_named():
    with pytest.raises(InvalidInputError, match="router kinds"):
        ListRouters(["oracle"])
    with pytest.raises(InvalidInputError, match="without weight, expected it of 1 heads"):
        ListRouters(["linear"])
    with pytest.raises(InvalidInputError, match="without layers"):
        Codebook({})
    with pytest.raises(InvalidInputError, match="number of another layer"):
        Codebook({3: layer_of(2)})


def test_one_head_one_list(tmp_path):
    layer = layer_of(
        0, views=[View()], centroids={1: np.zeros((1, 1, D))}, q_heads=1, metric=None, routers={},
        extra={"flat": np.array([3])},
    )  # fmt: skip
    Codebook({0: layer}).save(tmp_path / "x")
    found = Codebook.load(tmp_path / "x").layer(0)
    assert dataclasses.asdict(found)["metric"] is None
    assert found.routers[1].kinds == ("mean",)
    assert found.rope is None
    assert found.extra["flat"].tolist() == [3]


def test_loading_needs_numpy_alone(path):
    code = (
        "import sys; from saapindex.codebook import Codebook; "
        f"Codebook.load({str(path)!r}).layer(2); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "numba", "huggingface_hub"} & {*loaded.stdout.split()}
