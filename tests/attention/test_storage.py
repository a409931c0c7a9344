"""Saved and loaded, an index answers bit for bit; other files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from saapindex.attention import AttentionIndex
from saapindex.errors import CodebookMismatchError, FileFormatError, InvalidInputError
from saapindex.files import read_file, write_file


def answers(index, seed=0):
    q = np.random.default_rng(seed).standard_normal((index.batch, 6, 16)).astype(np.float32)
    return [*index.attend(q, budget=1.0), *index.attend(q, budget=0.4), index.select(q, budget=0.4).ids]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index.safetensors"


@pytest.fixture
def filled(make, data):
    index = make(3, dtype="float16", adapt=1, sink_logits=np.arange(6.0), softcap=20.0, scale=0.3)
    keys, values = data(np.random.default_rng(0), 3, 400)
    index.add(keys, values, lengths=[400, 5, 220])
    return index


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loaded_it_answers_the_same_and_goes_on_the_same(make, data, codebook, path, dtype):
    index, (keys, values) = make(2, dtype=dtype), data(np.random.default_rng(0), 2, 500)
    index.add(keys[:, :, :333], values[:, :, :333], lengths=[333, 7])
    index.save(path)
    loaded = AttentionIndex.load(path, codebook, backend="reference")
    for step in range(333, 400):
        for one, other in zip(answers(loaded, step), answers(index, step), strict=True):
            np.testing.assert_array_equal(one, other)
        for each in (index, loaded):
            each.add(keys[:, :, step : step + 1], values[:, :, step : step + 1])
    assert loaded.dtype == dtype
    assert loaded.lengths.tolist() == [400, 74]


def test_settings_come_back(filled, codebook, path):
    filled.save(path)
    loaded = AttentionIndex.load(path, codebook, backend="cpu")
    for name in ("batch", "window", "sinks", "flush", "adapt", "dense_below", "scale", "softcap", "dtype"):
        assert getattr(loaded, name) == getattr(filled, name)
    np.testing.assert_array_equal(loaded.sink_logits, filled.sink_logits)
    assert loaded.ops.name == "cpu"
    np.testing.assert_array_equal(loaded.list_sizes, filled.list_sizes)


def test_what_sequences_share_is_saved_once(filled, codebook, path, tmp_path):
    filled.reorder([0])
    filled.save(path)
    filled.reorder([0] * 5)
    other = tmp_path / "five.safetensors"
    filled.save(other)
    assert other.stat().st_size < 1.01 * path.stat().st_size + 500
    loaded = AttentionIndex.load(other, codebook)
    assert loaded._batch.keeping.pool.used == filled._batch.keeping.pool.used
    for one, two in zip(answers(loaded), answers(filled), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_the_same_content_makes_the_same_file(make, data, path, tmp_path):
    """Nothing that lay in memory by chance is written."""
    keys, values = data(np.random.default_rng(0), 1, 300)
    written = []
    for i in range(2):
        index = make()
        garbage = [np.full(10_000 * (i + 1), np.nan) for _ in range(50)]
        del garbage
        index.add(keys, values)
        index.save(tmp_path / f"{i}")
        written.append((tmp_path / f"{i}").read_bytes())
    assert written[0] == written[1]


def test_an_index_without_keys(make, codebook, path):
    make(4, window=9).save(path)
    loaded = AttentionIndex.load(path, codebook)
    assert (loaded.batch, loaded.window, loaded.lengths.tolist(), loaded.dtype) == (4, 9, [0] * 4, None)


def test_another_codebook_is_refused(filled, make_codebook, codebook, path):
    filled.save(path)
    for other in (make_codebook(nlist=7), make_codebook(words=2), make_codebook("unrotated")):
        with pytest.raises(CodebookMismatchError, match="was saved with another codebook"):
            AttentionIndex.load(path, other)
    with pytest.raises(InvalidInputError, match="codebook is a int"):
        AttentionIndex.load(path, 3)
    assert codebook.fingerprint() == AttentionIndex.load(path, codebook).codebook.fingerprint()


def test_a_damaged_file_is_refused(filled, codebook, path):
    filled.save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-100] + b"x" + whole[-99:], b""):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            AttentionIndex.load(path, codebook)
    with pytest.raises(FileNotFoundError):
        AttentionIndex.load(path.with_name("nowhere"), codebook)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("runs.pages", lambda x: x + 10_000),
        ("lists.pages", lambda x: x[:-1]),
        ("lists.sizes", lambda x: x + 16),
        ("keys", lambda x: x.astype(np.float32)),
        ("filled", lambda x: x[:3]),
        ("codes", None),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(filled, codebook, path, name, change):
    filled.save(path)
    tensors, header = read_file(path, format="saapindex.attention", version=1)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(tensor))
    header = {key: value for key, value in header.items() if key not in ("format", "version", "checksum")}
    write_file(path, tensors, json.loads(json.dumps(header)), format="saapindex.attention", version=1)
    with pytest.raises(FileFormatError):
        AttentionIndex.load(path, codebook)


def test_a_failed_save_leaves_the_old_file(filled, make, codebook, path):
    make(2).save(path)
    with pytest.raises(InvalidInputError, match="does not exist"):
        filled.save(path.parent / "nowhere" / "index")
    assert AttentionIndex.load(path, codebook).batch == 2
