"""Reading and writing of an attention index, in one safetensors file with a JSON header.

=========================== ======================= ==============================================
tensor                      shape                   meaning
=========================== ======================= ==============================================
``keys``, ``values``        (pages, 16, d)          of every page, once; bfloat16 as uint16
``codes``, ``exponents``    (pages, W, 16), ...     zero in pages that belong to no list
``ids``                     (pages, 16) int32       positions
``filled``                  (pages,) int64          lanes of a page that hold keys
``runs.pages``              int32                   tables of sinks and recent keys, one after the other
``lists.pages``             int32                   tables of lists, one after the other
``lists.*``                 (tables, ...)           statistics, as in `Table`
``sink_logits``             (q_heads,) float32      where there are any
=========================== ======================= ==============================================

The header says which runs and tables each sequence has, so that those which sequences share stay shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from saapindex.attention.batch import Batch
from saapindex.attention.layer import LayerCodebook
from saapindex.attention.near import Run
from saapindex.attention.sequence import Sequence
from saapindex.attention.table import Table
from saapindex.backends.base import LANES
from saapindex.errors import CodebookMismatchError, FileFormatError, InvalidInputError
from saapindex.files import read_file, write_file
from saapindex.lists.paged import PagePool, PageSet

if TYPE_CHECKING:
    from saapindex.attention.store import AttentionStore

__all__ = ["read_index", "write_index"]

Filling: TypeAlias = "Callable[[AttentionStore], Batch | None]"
FORMAT = "saapindex.attention"
VERSION = 1
_SETTINGS = ("batch", "window", "sinks", "dtype", "flush", "adapt", "dense_below", "scale", "softcap")
_FIELDS = ("keys", "values", "codes", "exponents", "ids")
_STATISTICS = (
    "sizes",
    "coded",
    "anchors",
    "anchor_scales",
    "sums",
    "means",
    "mean_scales",
    "squares",
    "slopes",
)


def write_index(index: AttentionStore, path: Path) -> None:
    """Write `index` to `path`."""
    header: dict[str, Any] = {
        "codebook": index.codebook.fingerprint(),
        "settings": {name: getattr(index, name) for name in _SETTINGS},
        "sequences": None,
    }
    tensors: dict[str, NDArray[Any]] = {}
    if index.sink_logits is not None:
        tensors["sink_logits"] = index.sink_logits
    if index._batch is not None:
        described, content = _described(index.host_batch)
        header["sequences"] = described
        tensors |= content
    write_file(path, tensors, header, format=FORMAT, version=VERSION)


def _described(batch: Batch) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What the sequences hold: the part that JSON can hold, and the tensors."""
    pool = batch.keeping.pool
    runs = {id(run): run for s in batch.sequences for run in (s.sinks, s.recent)}
    tables = {id(s.lists): s.lists for s in batch.sequences}
    number = {key: i for part in (runs, tables) for i, key in enumerate(part)}
    run_pages = [run.held.pages for run in runs.values()]
    list_pages = [table.held.pages for table in tables.values()]
    flat_runs = np.concatenate([pages.reshape(-1) for pages in run_pages])
    flat_lists = np.concatenate(list_pages)
    used = np.unique(np.concatenate([flat_runs, flat_lists])).astype(np.int64)
    rows = (used[:, None] * LANES + np.arange(LANES)).reshape(-1)
    filled = pool.filled[used]
    written = np.arange(LANES) < filled[:, None]
    coded = written & np.isin(used, flat_lists)[:, None]
    tensors: dict[str, NDArray[Any]] = {}
    for name in _FIELDS:
        content = pool.pages.take(name, rows)
        content = content.reshape(len(used), LANES, *content.shape[1:])
        content[~(coded if name in ("codes", "exponents") else written)] = 0  # memory that nobody wrote
        tensors[name] = content
    tensors |= {
        "filled": filled,
        "runs.pages": np.searchsorted(used, flat_runs).astype(np.int32),
        "lists.pages": np.searchsorted(used, flat_lists).astype(np.int32),
    }
    for name in _STATISTICS:
        tensors[f"lists.{name}"] = np.stack([getattr(table, name) for table in tables.values()])
    adapted = [table.centroids for table in tables.values() if table.centroids is not None]
    if adapted:
        tensors["lists.centroids"] = np.stack(adapted)
    described = {
        "sequences": [
            [s.length, number[id(s.sinks)], number[id(s.recent)], number[id(s.lists)]]
            for s in batch.sequences
        ],
        "runs": [[run.start, run.count, run.held.pages.shape[1]] for run in runs.values()],
        "tables": [
            [len(table.held.pages), table.centroids is not None, table.fitted] for table in tables.values()
        ],
    }
    return described, tensors


def read_index(
    path: Path, codebook: LayerCodebook
) -> tuple[dict[str, Any], Callable[[AttentionStore], Batch | None]]:
    """Return the settings of the index at `path`, and what fills an index made with them.

    Raises
    ------
    CodebookMismatchError, FileFormatError, OSError
        See `AttentionIndex.load`.
    """
    if not isinstance(codebook, LayerCodebook):
        raise InvalidInputError(f"codebook is a {type(codebook).__name__}, expected a LayerCodebook")
    tensors, header = read_file(path, format=FORMAT, version=VERSION)
    if header.get("codebook") != codebook.fingerprint():
        raise CodebookMismatchError(f"{path} was saved with another codebook than the one given")

    def build(index: AttentionStore) -> Batch | None:
        try:
            return _built(index, header["sequences"], tensors)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{path} is no whole index: {error}") from error

    settings = dict(header["settings"])
    if "sink_logits" in tensors:
        settings["sink_logits"] = tensors["sink_logits"]
    return settings, build


def _built(
    index: AttentionStore, described: Mapping[str, Any] | None, tensors: Mapping[str, NDArray[Any]]
) -> Batch | None:
    if described is None:
        return None
    batch = index._empty(str(index.dtype))
    keeping, pool = batch.keeping, batch.keeping.pool
    held = _pages(pool, tensors)
    heads, nlist = keeping.codebook.heads, keeping.codebook.nlist
    widths = [heads * width for _, _, width in described["runs"]]
    runs = [
        Run(PageSet(pool, pages.reshape(heads, width)), start, count)
        for pages, (start, count, width) in zip(
            _split(held, tensors["runs.pages"], widths), described["runs"], strict=True
        )
    ]
    if any(-(-run.count // LANES) != run.held.pages.shape[1] for run in runs):
        raise FileFormatError("a run of keys has more or fewer pages than it fills")
    widths = [width for width, _, _ in described["tables"]]
    centroids = iter(tensors.get("lists.centroids", ()))
    tables = []
    for i, pages in enumerate(_split(held, tensors["lists.pages"], widths)):
        statistics = {name: tensors[f"lists.{name}"][i] for name in _STATISTICS}
        _, adapted, fitted = described["tables"][i]
        own = next(centroids) if adapted else None
        tables.append(Table(held=PageSet(pool, pages), centroids=own, fitted=int(fitted), **statistics))
        if len(tables[i].sizes) != heads * nlist or tables[i].page_counts.sum() != len(pages):
            raise FileFormatError("lists have more or fewer pages than they fill")
    sequences = [
        Sequence(length, runs[sinks], runs[recent], tables[lists])
        for length, sinks, recent, lists in described["sequences"]
    ]
    return Batch(keeping, sequences)


def _pages(pool: PagePool, tensors: Mapping[str, NDArray[Any]]) -> PageSet:
    """Put the pages of a file into the pool."""
    filled = tensors["filled"]
    held = pool.allocate((len(filled),))
    page, lane = np.nonzero(np.arange(LANES) < filled[:, None])
    content = [tensors[name][page, lane] for name in _FIELDS]
    keys, values, words, exponents, ids = content
    if keys.dtype != pool.dtype or keys.shape[1:] != (pool.d,) or words.shape[1:] != (pool.words,):
        raise FileFormatError(
            f"keys are {keys.dtype} of {keys.shape[1:]}, expected {pool.dtype} of {(pool.d,)}"
        )
    pool.write(held.pages[page].astype(np.int64) * LANES + lane, keys, values, ids, words, exponents)
    return held


def _split(held: PageSet, pages: NDArray[np.int32], widths: list[int]) -> list[NDArray[np.int32]]:
    """Return tables of `widths` pages each, as pages of the pool."""
    count = len(held.pages)
    if len(pages) != sum(widths) or not ((pages >= 0) & (pages < count)).all():
        raise FileFormatError(f"tables of {sum(widths)} of {count} pages have other ones")
    return np.split(held.pages[pages], np.cumsum(widths)[:-1]) if widths else []
