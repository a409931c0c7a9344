"""Capture to files: what they hold, how an interrupted one goes on, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from saapindex.errors import InvalidInputError, SaapIndexError
from saapindex.learn import capture as capture_module
from saapindex.learn.capture import capture, capture_tokens
from saapindex.learn.models import LoadedModel, weights_hash
from saapindex.learn.texts import query_positions, tokens_hash, with_copies
from saapindex.learn.traces import find_traces, read_trace, read_trace_header
from saapindex.rope import Rope

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.torch
CONTEXT = 100


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_a_capture(model, text, tmp_path, dtype, device, letters):
    model.model.to(device)
    out = tmp_path / "deep" / "out"
    report = capture(model, [text], context=CONTEXT, out=out, sequences=2, queries=40, dtype=dtype, seed=7)
    model.model.to("cpu")
    found = find_traces(out)
    assert {name: list(layers) for name, layers in found.items()} == {
        "manual-0": [0, 1, 2],
        "manual-1": [0, 1, 2],
    }
    assert found["manual-0"][1] == out / "manual-0" / "layer-01.safetensors"
    headers = [read_trace_header(path) for layers in found.values() for path in layers.values()]
    read = letters(text.read_text(), add_special_tokens=False).input_ids
    for sequence in range(2):
        ids = [1, *read[sequence * 99 : (sequence + 1) * 99]]
        at = query_positions(CONTEXT, 40, seed=7)
        exact = capture_tokens(model.model, ids, layers=[0, 1, 2], query_positions=at)
        for layer, path in found[f"manual-{sequence}"].items():
            trace = read_trace(path)
            assert trace.rope == Rope(theta=1e4, dim=16)
            assert (trace.heads, trace.scale, trace.softcap) == ([0, 1], 0.25, None)
            np.testing.assert_array_equal(trace.query_positions, at)
            for name in ("keys", "values", "queries"):
                ours, theirs = getattr(trace, name), getattr(exact[layer], name)
                assert ours.dtype == (np.float16 if dtype == "float16" else np.float32)
                np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=2e-2)
    info = headers[-1].info
    expected = {
        "model": "tiny",
        "weights": weights_hash(model.model),
        "layer": 2,
        "layers": 3,
        "heads": [0, 1],
        "kv_heads": 2,
        "q_heads": 4,
        "context": CONTEXT,
        "text": "manual",
        "sequence": 1,
        "queries": 40,
        "seed": 7,
        "scale": 0.25,
        "softcap": None,
        "dtype": dtype,
        "compute_dtype": "float32",
    }
    assert {name: info[name] for name in expected} == expected
    assert {*info} - {*expected} == {"text_hash", "tokens_hash"}
    assert len({header.info["tokens_hash"] for header in headers}) == 2
    assert len({header.info["text_hash"] for header in headers}) == 1
    assert report.nbytes == sum(path.stat().st_size for path in out.glob("*/*"))
    assert json.loads(json.dumps(report.to_dict()))["sequences"][1]["written"] == [0, 1, 2]


def test_passages_are_repeated(model, text, tmp_path, letters):
    capture(model, [text], context=CONTEXT, out=tmp_path, layers=[0])
    capture(model, [text], context=CONTEXT, out=tmp_path, layers=[0], copies=True, seed=3)
    plain, copied = (
        read_trace_header(tmp_path / name / "layer-00.safetensors").info
        for name in ("manual-0", "manual-0-copies")
    )
    ids = [1, *letters(text.read_text(), add_special_tokens=False).input_ids[:99]]
    assert (plain["tokens_hash"], copied["tokens_hash"]) == (
        tokens_hash(ids),
        tokens_hash(with_copies(ids, seed=3)),
    )
    assert (copied["copies"], copied["seed"]) == (True, 3)
    assert "copies" not in plain


def test_an_interrupted_capture_goes_on_where_it_stopped(model, text, tmp_path, monkeypatch):
    options = {"context": CONTEXT, "out": tmp_path / "out", "sequences": 2}
    write, seen = capture_module.write_trace, []

    def crash(path, trace, **kwargs):
        if len(seen) == 4:
            raise OSError("no more")
        seen.append(path)
        write(path, trace, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "write_trace", crash)
        with pytest.raises(OSError, match="no more"):
            capture(model, [text], **options)
    before = {path: path.stat().st_mtime_ns for path in seen}
    read, forwards = capture_module._read, []
    monkeypatch.setattr(
        capture_module, "_read", lambda *arguments: (forwards.append(arguments[2]), read(*arguments))
    )
    report = capture(model, [text], **options)
    assert [(part.written, part.present) for part in report.sequences] == [([], [0, 1, 2]), ([1, 2], [0])]
    assert forwards == [[1, 2]]
    assert {path: path.stat().st_mtime_ns for path in seen} == before
    assert capture(model, [text], **options).sequences[1].present == [0, 1, 2]
    assert len(forwards) == 1
    whole = capture(model, [text], **{**options, "out": tmp_path / "whole"})
    assert whole.nbytes == report.nbytes
    for path in (tmp_path / "whole").glob("*/*"):
        assert path.read_bytes() == (tmp_path / "out" / path.parent.name / path.name).read_bytes()


def test_the_forward_pass_ends_with_the_last_layer_that_is_wanted(model, text, tmp_path, tokens):
    ran = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(model.model.model.layers)
    ]
    capture_tokens(model.model, tokens, layers=[0, 1], query_positions=np.arange(1))
    for hook in hooks:
        hook.remove()
    assert ran[3:] == [0]  # after the probe, which runs through all


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 64}, r"context was 100 and is 64 now"),
        ({"dtype": "bfloat16"}, r"dtype was float16 and is bfloat16 now"),
        ({"queries": 50}, r"queries was all and is 50 now; seed was None and is 0 now"),
        ({"text": "other " * 99}, r"text_hash was \w+ and is \w+ now"),
        ({"weights": 1.5}, r"weights was \w+ and is \w+ now"),
        ({"theta": 5e5}, r"rope was Rope\(theta=10000.0.* and is Rope\(theta=500000.0"),
    ],
)
def test_files_captured_otherwise_are_refused(model, text, tmp_path, change, message, tiny):
    options = {"context": CONTEXT, "out": tmp_path / "out"}
    capture(model, [text], layers=[1], **options)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    if "text" in change:
        text.write_text(change.pop("text"))
    if "weights" in change:
        model = model._replace(model=tiny("Llama"))
        with torch.no_grad():
            model.model.model.layers[0].mlp.up_proj.weight.mul_(change.pop("weights"))
    if "theta" in change:
        parameters = {"rope_type": "default", "rope_theta": change.pop("theta")}
        model = model._replace(model=tiny("Llama", rope_parameters=parameters))
    with pytest.raises(InvalidInputError, match=f"captured with other settings: .*{message}.*another folder"):
        capture(model, [text], **{**options, **change})
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_a_foreign_file_in_the_way_is_refused(model, text, tmp_path):
    (tmp_path / "manual-0").mkdir()
    (tmp_path / "manual-0" / "layer-00.safetensors").write_bytes(b"mine")
    with pytest.raises(SaapIndexError, match="layer-00"):
        capture(model, [text], context=CONTEXT, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 5000}, r"the text 'manual' has fewer tokens .* at least 5000"),
        ({"layers": "some"}, "layers is 'some', expected numbers, or 'all'"),
        ({"layers": [3]}, r"layers are \[3\], expected some of 0 to 2"),
        ({"layers": []}, "expected some of 0 to 2"),
        ({"layers": [True]}, "layer is True"),
        ({"queries": "few"}, "queries is 'few'"),
        ({"queries": 0}, "queries is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"seed": -1}, "seed is -1"),
        ({"copies": "yes"}, "copies is 'yes'"),
        ({"texts": []}, "texts is empty"),
        ({"texts": "manual.txt"}, "expected a list"),
        ({"texts": ["none.txt"]}, "there is no text none.txt"),
        ({"texts": ["a/manual.rst", "b/manual.txt.gz"]}, "have the same name, 'manual'"),
        ({"rope_scaling": "ntk"}, "of no use with a loaded model"),
        ({"device": "cpu"}, "of no use with a loaded model"),
    ],
)
def test_bad_input_changes_nothing(model, text, tmp_path, change, message):
    options = {"texts": [text], "context": CONTEXT, "out": tmp_path / "out", **change}
    with pytest.raises(InvalidInputError, match=message):
        capture(model, options.pop("texts"), **options)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InvalidInputError, match=r"has 0\.0 GB free, expected at least .* for 3 traces"):
        capture(model, [text], context=CONTEXT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_local_layers_are_left_out(text, tmp_path, tiny, letters):
    model = LoadedModel(tiny("Gemma3 Text"), letters, "gemma")
    report = capture(model, [text], context=CONTEXT, out=tmp_path)
    reason = "sliding_attention, window 24"
    assert (report.layers, report.left_out) == ([1], {0: reason, 2: reason})
    with pytest.raises(
        InvalidInputError, match=rf"layers 0 \({reason}\) cannot be captured, .*attention: 1$"
    ):
        capture(model, [text], context=CONTEXT, out=tmp_path, layers=[0, 1])
    windowed = model._replace(model=tiny("Mistral", sliding_window=64))
    assert capture(windowed, [text], context=64, out=tmp_path / "short").layers == [0, 1, 2]
    with pytest.raises(InvalidInputError, match=r"no layer of full attention, only .*window 64"):
        capture(windowed, [text], context=65, out=tmp_path / "long")


def test_values_that_float16_cannot_hold(model, text, tmp_path, tiny):
    loud = model._replace(model=tiny("Llama"))
    with torch.no_grad():
        loud.model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    with pytest.raises(InvalidInputError, match=r"layer 1: the values reach beyond 65504.*'bfloat16'"):
        capture(loud, [text], context=CONTEXT, out=tmp_path)
    assert [path.name for path in tmp_path.glob("*/*")] == ["layer-00.safetensors"]
    with torch.no_grad():
        loud.model.model.layers[1].self_attn.v_proj.weight.mul_(float("nan"))
    with pytest.raises(InvalidInputError, match="layer 2: the keys hold NaN"):
        capture(loud, [text], context=CONTEXT, out=tmp_path / "nan", dtype="bfloat16")
