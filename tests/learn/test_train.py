"""Training of codebooks: what is learnt, measured, kept, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from saapindex.codebook import Codebook
from saapindex.commands.train import parse_settings
from saapindex.commands.train import train as command
from saapindex.errors import InvalidInputError, MissingDependencyError
from saapindex.learn.report import TrainingReport
from saapindex.learn.sequences import split_sequences
from saapindex.learn.settings import TrainingSettings
from saapindex.learn.traces import read_trace, write_trace
from saapindex.learn.train import default_stages, train
from saapindex.rope import Rope

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SMALL = TrainingSettings(
    nlist=(6, 12), cutoffs=(30.0,), niter=3, hidden=8, epochs=2, batch=32, snapshots=3, window=20,
    routers=("centroid", "mean", "linear", "mlp", "mean+linear", "mean+mlp"), words=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def codebook(folder):
    return train(folder, SMALL)


def same(ours, theirs):
    """Whether two codebooks hold the same, to the bit."""
    assert ours.layers == theirs.layers
    for number in ours.layers:
        one, other = ours.layer(number), theirs.layer(number)
        assert one.describe() == other.describe()
        assert one.tensors().keys() == other.tensors().keys()
        for name, tensor in one.tensors().items():
            np.testing.assert_array_equal(tensor, other.tensors()[name], err_msg=name)


def test_a_codebook_is_of_its_model_and_layers(codebook, rope):
    assert (codebook.model_id, codebook.weights_hash, codebook.layers) == ("a/model", "f00d", (1, 4))
    codebook.check(model_id="a/model", layer=4, rope=rope, kv_heads=2, q_heads=6, d=16, scale=0.25)
    layer = codebook.layer(1)
    assert layer.nlists == (6, 12)
    assert layer.centroids[12].shape == (2, 12, 16)
    assert layer.centroids[12].dtype == np.float16
    assert layer.metric.shape == (2, 16, 16)
    assert layer.max_position == 400
    assert codebook.settings["held_out"] == ["text-3"]
    assert codebook.settings["nlist"] == [6, 12]


def test_lists_find_the_attention(codebook):
    """Twelve clusters of keys, and queries that look for one of them: a list holds what a query needs."""
    report = TrainingReport.from_dict(codebook.report)
    assert [(head.layer, head.head) for head in report.heads] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    for head in report.heads:
        assert {*head.views} == {"rotated", "unrotated", "windowed 30"}
        for lists in head.lists.values():
            assert set(lists.recall) == set(SMALL.routers)
            assert max(lists.recall.values()) <= lists.bound + 1e-3
            assert lists.imbalance >= 1
            below = lists.recall["mean"]
            assert lists.recall[lists.router] >= below
            assert lists.router == "mean" or lists.recall[lists.router] > below + SMALL.min_gain
        assert head.views[head.view] >= max(head.views.values()) - SMALL.min_gain
    assert report.mean_recall(12)["kept"] > 3 * SMALL.share


def test_the_report_is_data_and_a_table(codebook):
    report = TrainingReport.from_dict(json.loads(json.dumps(codebook.report)))
    assert report.table().row_count == 4 * 2 + 2
    assert report.held_out == ["text-3"]
    assert {"fit_partitions", "fit_routers"} <= report.seconds.keys()


def test_a_seed_fixes_the_result(folder, codebook):
    same(train(folder, SMALL), codebook)


def test_layers_together_give_what_each_gives_alone(folder, codebook):
    together = train(folder, SMALL, layers_together=2)
    for number in codebook.layers:
        one, other = codebook.layer(number), together.layer(number)
        assert one.views == other.views
        np.testing.assert_allclose(one.centroids[12], other.centroids[12], atol=2e-3)
        np.testing.assert_allclose(one.metric, other.metric, rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_result(folder, codebook, tmp_path):
    done = []

    def counted(job):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(job.layers)

    def stage(job):
        done.append(job.layers)

    stages = default_stages()
    with pytest.raises(KeyboardInterrupt):
        train(folder, SMALL, checkpoints=tmp_path, stages=(*stages, counted))
    assert [path.name for path in tmp_path.iterdir()] == ["layer-01.safetensors"]
    # Other stages make other layers; the same ones go on.
    train(folder, SMALL, checkpoints=tmp_path, stages=(*stages, stage))
    assert done == [[1], [1], [4]]
    again = train(folder, SMALL, checkpoints=tmp_path, stages=(*stages, stage))
    assert done == [[1], [1], [4]]
    same(again, codebook)


def test_checkpoints_of_anything_else_are_not_used(folder, tmp_path, make_trace):
    ran = []

    def stage(job):
        ran.append(job.layers)

    traces = tmp_path / "traces"
    shutil.copytree(folder, traces)
    run = (*default_stages(), stage)
    quick = TrainingSettings(nlist=4, routers=("mean",), view="rotated", niter=1, window=20)

    def once(settings=quick, **options):
        ran.clear()
        train(traces, settings, layers=[1], checkpoints=tmp_path / "parts", stages=run, **options)
        return bool(ran)

    assert once()
    assert not once()
    assert once(TrainingSettings(**{**quick.to_dict(), "seed": 5}))
    assert once(held_out=2)
    assert not once(held_out=2)
    write_trace(traces / "text-0" / "layer-01.safetensors", make_trace(9, 1))
    assert once(held_out=2)
    path = tmp_path / "parts" / "layer-01.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert once(held_out=2)


def test_stages_add_tensors_and_notes(folder):
    def stage(job):
        keys = job.listed(job.train[0], 6)
        assert keys.x.shape == (4, 399, 16)
        assert keys.labels.max() < 6
        job.extra["marks"] = np.arange(job.heads)
        job.notes["told"] = 1

    quick = TrainingSettings(nlist=6, routers=("mean",), view="rotated", niter=1, window=20)
    codebook = train(folder, quick, stages=(*default_stages(), stage), layers_together=2)
    assert codebook.layer(1).extra["marks"].tolist() == [0, 1]
    assert codebook.layer(4).extra["marks"].tolist() == [2, 3]
    assert codebook.report["extra"] == {"1": {"told": 1}, "4": {"told": 1}}
    assert "stage" in codebook.report["seconds"]


def test_what_is_stored_routes_as_it_was_measured(folder, codebook):
    """Recall from the codebook alone, in NumPy, is the recall in the report."""
    trace = read_trace(folder / "text-3" / "layer-01.safetensors")
    layer, report = codebook.layer(1), TrainingReport.from_dict(codebook.report)
    from saapindex.learn.contexts import Context, snapshots
    from saapindex.learn.masses import list_masses

    context = Context.of(trace, "a")
    moments = snapshots(context, window=SMALL.window, count=SMALL.snapshots)
    at, at_q = context.key_positions.numpy(), context.query_positions.numpy()
    forms, bias = layer.assignment(12)
    keys, queries, labels = [], [], []
    for head, view in enumerate(layer.views):
        ops = pytest.importorskip("saapindex.backends").get_ops("reference")
        keys.append(view.apply(context.keys[head].float().numpy(), at, ops))
        queries.append(np.stack([view.apply(q.float().numpy(), at_q, ops) for q in context.queries[head]]))
        labels.append((keys[-1] @ forms[head].T + bias[head]).argmax(axis=1))
        np.testing.assert_array_equal(layer.partition(head, 12).assign(keys[-1], ops), labels[-1])
    partition = torch.from_numpy(np.stack(labels)), 12
    mass = list_masses(context, moments, [partition], scale=layer.scale)[0].numpy()
    found = np.zeros(2)
    for moment in moments:
        rows = slice(moment.first - moments[0].first, moment.last - moments[0].first)
        counts = np.stack([np.bincount(own[: moment.n_keys], minlength=12) for own in labels])
        means = (
            np.stack(
                [
                    np.stack([x[: moment.n_keys][own[: moment.n_keys] == j].sum(axis=0) for j in range(12)])
                    for x, own in zip(keys, labels, strict=True)
                ]
            )
            / np.maximum(counts, 1)[..., None]
        )
        asked = np.stack(queries)[:, :, moment.first : moment.last]
        scores = layer.routers[12].scores(
            asked, means, layer.centroids[12].astype(np.float32), scale=layer.scale
        )
        predicted = np.exp(scores) * counts[:, None, None]
        predicted = (predicted / predicted.sum(axis=3, keepdims=True)).sum(axis=1)
        for head in range(2):
            for row in range(predicted.shape[1]):
                left = SMALL.share * counts[head].sum()
                for number in np.argsort(-predicted[head, row] / np.maximum(counts[head], 1)):
                    if not counts[head, number]:
                        continue
                    read = min(1.0, left / counts[head, number])
                    found[head] += read * mass[head, :, rows][:, row, number].mean()
                    left -= read * counts[head, number]
                    if left <= 0:
                        break
    found /= mass.shape[2]
    for head in range(2):
        lists = report.heads[head].lists[12]
        assert found[head] == pytest.approx(lists.recall[lists.router], abs=2e-3)


def test_rotated_keys_are_moved_to_all_positions(tmp_path, make_trace):
    """Trained below 400, served at 30,000: centroids are near to keys only if training moved its keys."""
    from saapindex.backends import get_ops

    slow = Rope(theta=50_000.0, dim=16)

    def trace_of(seed):
        """Keys whose slow pairs all point one way, as those of models do."""
        plain = make_trace(seed, 1, rope=None)
        keys = np.stack([slow.rotate(head + 8.0, plain.key_positions) for head in plain.keys])
        queries = np.stack([slow.rotate(head, plain.query_positions) for head in plain.queries])
        return dataclasses.replace(plain, keys=keys, queries=queries, rope=slow)

    for seed in range(2):
        write_trace(tmp_path / f"text{seed}-layer1.safetensors", trace_of(seed))
    trace = trace_of(3)
    far = trace.key_positions + 30_000
    errors = []
    for augment in (0, 1):
        settings = TrainingSettings(
            nlist=16, view="rotated", augment=augment, max_position=50_000, routers=("mean",), window=20,
            metric="euclidean",
        )  # fmt: skip
        layer = train(tmp_path, settings).layer(1)
        assert layer.max_position == 50_000
        ops, part = get_ops("reference"), layer.partition(0, 16)
        moved = trace.rope.rerotate(trace.keys[0], trace.key_positions, far)
        apart = moved - part.centroids[part.assign(moved, ops)]
        errors.append((apart**2).sum(axis=1).mean())
    assert errors[1] < 0.5 * errors[0]


def test_layers_without_a_rope(tmp_path, make_trace):
    for seed in range(2):
        write_trace(tmp_path / f"text{seed}-layer0.safetensors", make_trace(seed, rope=None))
    layer = train(tmp_path, SMALL).layer(0)
    assert layer.rope is None
    assert layer.max_position is None
    assert [view.kind for view in layer.views] == ["rotated", "rotated"]


def test_one_query_head_odd_sizes_and_the_paper(tmp_path, make_trace):
    for seed in range(2):
        trace = make_trace(seed, group=1, kv_heads=3, n=163, m=63, info={"scale": 0.3, "softcap": 20.0})
        write_trace(tmp_path / f"text{seed}-layer7.safetensors", trace)
    settings = TrainingSettings.paper(nlist=5, hidden=8, epochs=2, window=20, words=1)
    layer = train(tmp_path, settings).layer(7)
    assert (layer.q_heads, layer.kv_heads, layer.scale, layer.softcap) == (3, 3, 0.3, 20.0)
    assert layer.metric is None
    assert layer.spherical
    assert layer.routers[5].kinds == ("mlp",) * 3
    np.testing.assert_allclose(np.linalg.norm(layer.centroids[5].astype(np.float32), axis=2), 1, atol=2e-3)


def test_routers_of_every_query_head(folder):
    settings = TrainingSettings(
        **{**SMALL.to_dict(), "per_query_head": True, "routers": ["mean+linear"], "min_gain": 0.0}
    )
    layer = train(folder, settings, layers=[1]).layer(1)
    weights = [router.weight for router in layer.routers.values() if router.weight is not None]
    assert all(weight.shape[1] == 3 for weight in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ["nobody"]}, "held_out names"),
        ({"held_out": 4}, "0 sequences to train on and 4 held out"),
        ({"sequences": ["text-0"]}, "0 sequences to train on"),
        ({"sequences": ["nobody"]}, "sequences .*nobody.* have no traces"),
        ({"layers": [1, 2]}, r"layers \[2\] are not in every sequence"),
        ({"settings": TrainingSettings(nlist=4, window=400)}, "no query sees keys more than 400"),
        ({"settings": TrainingSettings(nlist=2000, window=20)}, "1197 training keys for 2000 lists"),
    ],
)
def test_bad_input_is_named(folder, options, message):
    with pytest.raises(InvalidInputError, match=message):
        train(folder, options.pop("settings", SMALL), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": {"model": "b/model"}}, "several models: model is 'a/model', 'b/model'"),
        ({"info": {"scale": 0.5}}, "layer 0: scale is None in text0 and 0.5 in text1"),
        ({"rope": None}, "layer 0: rope is"),
        ({"group": 2}, "layer 0: query heads is 6 in text0 and 4 in text1"),
    ],
)
def test_traces_of_different_models_are_refused(tmp_path, make_trace, change, message):
    write_trace(tmp_path / "text0-layer0.safetensors", make_trace(0))
    write_trace(tmp_path / "text1-layer0.safetensors", make_trace(1, **change))
    with pytest.raises(InvalidInputError, match=message):
        train(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nlist": []}, "nlist is empty"),
        ({"nlist": [0]}, "nlist is 0"),
        ({"view": "sideways"}, "view is 'sideways'"),
        ({"metric": "taxi"}, "metric is 'taxi'"),
        ({"routers": ["oracle"]}, "router is 'oracle'"),
        ({"cutoffs": []}, "cutoffs is"),
        ({"cutoffs": [-1.0]}, "cutoffs is"),
        ({"share": 0}, "share is 0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"shrinkage": 2}, "shrinkage is 2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_position": 0}, "max_position is 0"),
        ({"spherical": True}, "a metric of their own"),
        ({"stored": "int8"}, "stored is 'int8'"),
        ({"words": 9}, "words is 9"),
        ({"words": []}, "words is empty"),
        ({"words": [2, 3]}, "expected one size, or judge='error'"),
        ({"scan_share": 1.0}, "scan_share is 1.0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InvalidInputError, match=message):
        TrainingSettings(**change)


def test_settings_survive_json():
    settings = TrainingSettings(nlist=7, max_position=9)
    assert TrainingSettings(**json.loads(json.dumps(settings.to_dict()))) == settings


def test_sequences_are_split_by_name_or_number():
    names = [f"t{number:02d}" for number in range(12)]
    assert split_sequences(names)[1] == ["t10", "t11"]
    assert split_sequences(names, 3)[1] == names[-3:]
    assert split_sequences(names, ["t03"]) == ([name for name in names if name != "t03"], ["t03"])


def test_torch_is_named_where_it_is_missing(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="training a codebook"):
        train(folder)


def test_the_command_trains_and_writes(folder, tmp_path):
    app = Typer()
    app.command()(command)
    out = tmp_path / "codebook.safetensors"
    run = f"{folder} --out {out} --nlist 6 --layers 4 --report {tmp_path / 'report.json'}".split()
    for setting in ("window=20", "niter=2", "routers=mean", "words=1"):
        run += ["--set", setting]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    assert "attention mass found" in result.output
    assert Codebook.load(out).layers == (4,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook.safetensors", "report.json"]
    result = CliRunner().invoke(app, [*run, "--json"])
    assert TrainingReport.from_dict(json.loads(result.output)).heads[0].layer == 4
    for wrong in (["--set", "nonsense=1"], ["--nlist", "x"], ["--out", str(tmp_path / "no" / "x")]):
        assert isinstance(CliRunner().invoke(app, [*run, *wrong]).exception, InvalidInputError)


def test_settings_as_they_are_typed():
    assert parse_settings(["cutoffs=300,1e3", "view=auto", "share=0.1"]) == {
        "cutoffs": [300, 1000.0], "view": "auto", "share": 0.1,
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match="'hidden' is no setting"):
        parse_settings(["hidden"])
