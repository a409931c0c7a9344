"""Texts for capture: reading them, cutting them into sequences of tokens, and sampling query positions."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.errors import InvalidInputError

__all__ = ["cut_sequences", "query_positions", "read_text", "text_name", "tokens_hash", "with_copies"]

_SUFFIXES = {".txt", ".rst", ".md", ".py"}
TAIL, TAIL_QUERIES = 2048, 512
"""At the end of a sequence, where evaluation asks: so many positions, and so many queries from them."""
_PASSAGE, _ODD, _ODD_EVERY = (32, 256), (8, 32), 512
"""Least and most tokens of what is repeated: of text, and of tokens in random order, one string in so many
tokens.
"""
_LONGEST_TOKEN = 10
"""Characters to tokenize for each token wanted: twice what text usually needs."""


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file, gzipped or not, or the text files that lie in a folder.

    Parameters
    ----------
    path
        A file of any name; ``.gz`` is unpacked. Or a folder: its ``.txt``, ``.rst``, ``.md`` and ``.py``
        files (gzipped too, those of its subfolders not), in order of name, an empty line in between.

    Raises
    ------
    InvalidInputError
        If there is no such file, or no text file in the folder.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "b.md").write_text("second")
    ...     _ = (Path(folder) / "a.txt").write_text("first")
    ...     read_text(folder)
    'first\\n\\nsecond'
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _SUFFIXES & set(file.suffixes))
        if not files:
            raise InvalidInputError(f"no text in the folder {path}, expected {', '.join(sorted(_SUFFIXES))}")
        return "\n\n".join(read_text(file) for file in files)
    if not path.is_file():
        raise InvalidInputError(f"there is no text {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="ignore") as file:
            return str(file.read())
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidInputError(f"{path} cannot be unpacked: {error}") from error


def text_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a text: that of its folder, or of its file without suffixes.

    Examples
    --------
    >>> text_name("manual/index.rst.gz")
    'index'
    """
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    stem = path.name.removesuffix(".gz")
    return Path(stem).stem


def cut_sequences(tokenizer: Any, text: str, context: int, count: int) -> list[list[int]]:
    """Cut the start of a text into stretches of tokens, one after another.

    Parameters
    ----------
    tokenizer
        Of transformers.
    text
        What is read.
    context
        Tokens of a stretch. Each starts with what the tokenizer puts before a text, such as a BOS token.
    count
        Stretches wanted; as many as the text holds, if it holds fewer.

    Returns
    -------
    list of list of int
        Token ids. Stretch `i` is the same whatever `count` is.
    """

    def ids(part: str, **options: Any) -> list[int]:
        return list(tokenizer(part, verbose=False, **options).input_ids)

    bare = ids("a", add_special_tokens=False)
    full = ids("a")
    start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    prefix, length = full[:start], context - start
    if length < 1:
        return []
    # Tokens near the end of a part may depend on what follows, hence the few more than are needed.
    needed, size = length * count + 16, _LONGEST_TOKEN * context * count
    tokens = ids(text[:size], add_special_tokens=False)
    while len(tokens) < needed and size < len(text):
        size *= 2
        tokens = ids(text[:size], add_special_tokens=False)
    whole = min(count, len(tokens) // length)
    return [prefix + tokens[number * length : (number + 1) * length] for number in range(whole)]


def with_copies(tokens: Sequence[int], *, seed: int = 0) -> list[int]:
    """Return as many tokens, in whose second half passages of what came before are repeated.

    Running text seldom makes a model look something up far back. Where a passage is repeated it does so at
    every token: so a codebook can be trained, and judged, on lookups too. Half of the copies are of text, 32
    to 256 tokens that begin anywhere. The others are of something odd: 8 to 32 tokens in random order, one in
    every 512 of the first half, of which nothing but a lookup can tell how they go on. As many tokens of text
    that is not repeated lie before each copy.

    Parameters
    ----------
    tokens
        Of a text.
    seed
        Of what is repeated, and where.

    Examples
    --------
    >>> copied = with_copies(range(4000))
    >>> len(copied), copied[0], len(set(copied)) < 3600
    (4000, 0, True)
    """
    rng, given = np.random.default_rng(seed), list(tokens)
    at = len(given) // 2
    out, odd = given[:at], []
    for start in range(1, at - _ODD_EVERY + 1, _ODD_EVERY):
        size = int(rng.integers(*_ODD, endpoint=True))
        place = start + int(rng.integers(_ODD_EVERY - size))
        odd.append([given[i] for i in rng.integers(1, len(given), size)])
        out[place : place + size] = odd[-1]
    while len(out) < len(given):
        size = int(rng.integers(*_PASSAGE, endpoint=True))
        start = int(rng.integers(1, max(len(out) - size, 1), endpoint=True))  # not the BOS token
        copy = out[start : start + size]
        if odd and rng.integers(2):
            copy = odd[int(rng.integers(len(odd)))]
        fresh = max(len(copy), 1)
        out += given[at : at + fresh]
        at += fresh
        out += copy
    return out[: len(given)]


def tokens_hash(tokens: Sequence[int]) -> str:
    """Return the SHA-256 of token ids, as little-endian int64."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()


def query_positions(context: int, count: int | None, *, seed: int = 0) -> NDArray[np.int64]:
    """Sample the positions whose queries a trace keeps.

    Parameters
    ----------
    context
        Tokens of the sequence.
    count
        Positions to sample, None for all. The last 2048 positions, where evaluation asks, get 512 of them
        (all of them, if there are no more); the rest is drawn evenly from the positions before.
    seed
        Of the sampling.

    Returns
    -------
    ndarray of int64
        Rising, without repeats: `count` of them, or all.

    Examples
    --------
    >>> positions = query_positions(10_000, 1000)
    >>> len(positions), int((positions >= 10_000 - 2048).sum())
    (1000, 512)
    """
    if count is None or count >= context:
        return np.arange(context)
    rng = np.random.default_rng(seed)
    early = max(context - TAIL, 0)
    late = max(min(TAIL_QUERIES, count), count - early)
    drawn = [
        rng.choice(early, count - late, replace=False),
        early + rng.choice(context - early, late, replace=False),
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
