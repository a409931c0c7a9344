"""Texts: read, cut into sequences, and sampled."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from saapindex.errors import InvalidInputError
from saapindex.learn.texts import cut_sequences, query_positions, read_text, with_copies


@pytest.mark.parametrize(
    ("context", "count"), [(10_000, 4096), (10_000, 100), (3000, 2900), (100, 30), (100, 100), (9, None)]
)
def test_sampled_positions(context, count):
    at = query_positions(context, count, seed=3)
    assert len(at) == (count or context)
    assert (np.diff(at) > 0).all()
    assert 0 <= at[0] <= at[-1] < context
    late = (at >= context - 2048).sum()
    assert late == (max(min(count, 512), count - max(context - 2048, 0)) if count else context)
    assert (query_positions(context, count, seed=3) == at).all()


def test_sequences_are_distinct_stretches(letters):
    text = "".join(chr(97 + number % 26) for number in range(500))
    bos, ids = [1], letters(text, add_special_tokens=False).input_ids
    cut = cut_sequences(letters, text, 51, 20)
    assert cut == [bos + ids[50 * number : 50 * (number + 1)] for number in range(10)]
    for count in (1, 3, 10):
        assert cut_sequences(letters, text, 51, count) == cut[:count]
    assert cut_sequences(letters, "abc", 51, 2) == []
    assert cut_sequences(letters, text, 1, 2) == []


def test_texts_packed_and_in_folders(tmp_path):
    (tmp_path / "b.rst.gz").write_bytes(gzip.compress("zweites λ".encode()))
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.txt").write_text("not this")
    assert read_text(tmp_path) == "first\n\nzweites λ"
    assert read_text(tmp_path / "b.rst.gz") == "zweites λ"
    (tmp_path / "c.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidInputError, match=r"c\.txt\.gz cannot be unpacked"):
        read_text(tmp_path)
    with pytest.raises(InvalidInputError, match="there is no text"):
        read_text(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="no text in the folder"):
        read_text(tmp_path / "empty")


@pytest.mark.parametrize("length", [0, 1, 2, 50, 1000, 20_000])
def test_copies_are_passages_of_what_came_before(length):
    tokens = list(range(length))
    copied = with_copies(tokens, seed=5)
    half = length // 2
    assert len(copied) == length
    assert set(copied) <= set(tokens)
    assert copied[:1] == tokens[:1]
    assert copied.count(0) == min(length, 1)
    odd = sum(copied[i] != i for i in range(half))
    assert odd <= 32 * (half // 512)
    assert with_copies(tokens, seed=5) == copied
    later = [token for token in copied[half:] if token < half]
    assert set(later) <= set(copied[:half])
    if length == 20_000:
        assert odd >= 8 * (half // 512)
        assert with_copies(tokens, seed=6) != copied
        assert 0.7 < len(set(copied)) / length < 0.8
