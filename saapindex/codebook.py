"""Codebooks: what training learns about a model once, in one file, for every layer and KV head.

A codebook is one safetensors file. A layer's tensors are read when the layer is asked for, and checked then
(see `saapindex.files`). For layer `i` and a partition into `nlist` lists:

==================================== ============================ ========================================
tensor                               shape                        meaning
==================================== ============================ ========================================
``layers.i.metric``                  (kv_heads, d, d) float32     query-aware; absent for the Euclidean
``layers.i.nlist.centroids``         (kv_heads, nlist, d)         in the view of each head
``layers.i.nlist.router.weight``     (linear heads, r, nlist, d)  of the heads with a linear router
``layers.i.nlist.router.hidden``     (mlp heads, r, h, d)         of those with an MLP
``....hidden_offset``, ``....top``   (.., r, h), (.., nlist, h)   its bias and its second layer
``layers.i.nlist.router.offset``     (learned heads, r, nlist)    of both
``layers.i.extra.NAME``              (kv_heads, ...)              what else training adds, such as codes
==================================== ============================ ========================================

`r` is 1, or the size of the query group where every query head has a router of its own. The header names the
model, its weights, each layer's RoPE, scale and heads, the settings of the training and its report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from saapindex.codebook_layer import CodebookLayer
from saapindex.codebook_routers import ListRouters, RouterKind
from saapindex.errors import CodebookMismatchError, FileFormatError, InvalidInputError, SaapIndexError
from saapindex.files import read_file, read_header, write_file
from saapindex.rope import Rope

__all__ = ["Codebook", "CodebookLayer", "ListRouters", "RouterKind"]

FORMAT = "saapindex.codebook"
VERSION = 1
_DESCRIBED = ("model_id", "weights_hash", "settings", "report")


class Codebook:
    """Partitions and routers of every layer of a model.

    Parameters
    ----------
    layers
        By number.
    model_id
        Hub id or name of the model.
    weights_hash
        Fingerprint of its weights.
    settings
        Of the training; what JSON can hold.
    report
        What the training measured; what JSON can hold.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from saapindex.partition import View
    >>> layer = CodebookLayer(3, views=[View()], centroids={4: np.eye(4)[None]}, q_heads=2, scale=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Codebook({3: layer}, model_id="a/model").save(os.path.join(folder, "codebook.safetensors"))
    ...     codebook = Codebook.load(os.path.join(folder, "codebook.safetensors"))
    ...     codebook.layer(3).centroids[4].shape
    (1, 4, 4)
    >>> codebook
    Codebook('a/model', layers 3, kv_heads=1, d=4, nlist 4)
    """

    def __init__(
        self,
        layers: Mapping[int, CodebookLayer],
        *,
        model_id: str | None = None,
        weights_hash: str | None = None,
        settings: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        if not layers:
            raise InvalidInputError("a codebook without layers, expected at least one")
        if not isinstance(layers, _Layers):  # which would read every layer
            strange = [number for number, layer in layers.items() if layer.layer != number]
            if strange:
                raise InvalidInputError(f"layers {strange} are under the number of another layer")
        self._layers = layers
        self.model_id = model_id
        self.weights_hash = weights_hash
        self.settings: Mapping[str, Any] = dict(settings or {})
        self.report: Mapping[str, Any] = dict(report or {})

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, rising."""
        return tuple(sorted(self._layers))

    def layer(self, number: int) -> CodebookLayer:
        """Return a layer; of a loaded codebook it is read now, and kept.

        Raises
        ------
        CodebookMismatchError
            If the codebook has no such layer.
        FileFormatError
            If the layer's part of the file was altered.
        """
        if number not in self._layers:
            raise CodebookMismatchError(f"the codebook has layers {_ranges(self.layers)}, not layer {number}")
        return self._layers[number]

    def check(
        self,
        *,
        model_id: str | None = None,
        weights_hash: str | None = None,
        layer: int | None = None,
        rope: Rope | None = None,
        scale: float | None = None,
        q_heads: int | None = None,
        kv_heads: int | None = None,
        d: int | None = None,
    ) -> None:
        """Refuse to serve what the codebook was not trained for.

        Parameters
        ----------
        model_id, weights_hash
            Of the model to be served. Each is compared where both sides know it; where the fingerprints
            agree, the name may differ (a copy, a local folder).
        layer
            Number of the layer that the rest is about; without it, that all layers fit is checked.
        rope, scale, q_heads, kv_heads, d
            Of the layer to be served; None leaves one out.

        Raises
        ------
        CodebookMismatchError
            Naming everything that differs, and both values.

        Examples
        --------
        >>> import numpy as np
        >>> from saapindex.partition import View
        >>> part = CodebookLayer(3, views=[View()], centroids={4: np.eye(4)[None]}, q_heads=2, scale=0.5)
        >>> Codebook({3: part}).check(d=8)
        Traceback (most recent call last):
        saapindex.errors.CodebookMismatchError: the codebook does not fit: layer 3: d is 8, trained for 4
        """
        differs = []
        known = weights_hash is not None and self.weights_hash is not None
        if known and weights_hash != self.weights_hash:
            differs.append(_differs("weights_hash", weights_hash, self.weights_hash))
        if not known and None not in (model_id, self.model_id) and model_id != self.model_id:
            differs.append(_differs("model_id", model_id, self.model_id))
        given = {"rope": rope, "scale": scale, "q_heads": q_heads, "kv_heads": kv_heads, "d": d}
        given = {name: value for name, value in given.items() if value is not None}
        if layer is not None or given:
            for number in self.layers if layer is None else (layer,):
                part = self.layer(number)
                for name, value in given.items():
                    trained = getattr(part, name)
                    close = isinstance(value, float) and math.isclose(value, trained, rel_tol=1e-6)
                    if not (close or value == trained):
                        differs.append(f"layer {number}: {_differs(name, value, trained)}")
        if differs:
            raise CodebookMismatchError(f"the codebook does not fit: {'; '.join(differs)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codebook to `path`, whole or not at all; a file that is there is replaced.

        Raises
        ------
        InvalidInputError
            If the folder does not exist.
        OSError
            If it cannot be written.
        """
        tensors: dict[str, NDArray[Any]] = {}
        described = {}
        for number in self.layers:
            layer = self.layer(number)
            described[str(number)] = layer.describe()
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
        header = {
            "model_id": self.model_id,
            "weights_hash": self.weights_hash,
            "settings": dict(self.settings),
            "report": dict(self.report),
            "layers": described,
        }
        # Checksums by row let one layer be read alone; what has no rows to speak of is read with the header.
        rows = [name for name, tensor in tensors.items() if tensor.ndim > 1]
        write_file(Path(path), tensors, header, format=FORMAT, version=VERSION, rows=rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Open the codebook at `path`; its header is read now, each layer when it is asked for.

        Raises
        ------
        FileFormatError
            If the file is truncated, foreign, newer than this release, or its header was altered.
        OSError
            If it cannot be read at all.
        """
        layers = _Layers(Path(path))
        header = layers.header
        return cls(layers, **{name: header[name] for name in _DESCRIBED})

    def __repr__(self) -> str:
        """Name the model and what is there."""
        first = self.layer(self.layers[0])
        nlists = ", ".join(map(str, first.nlists))
        return (
            f"{type(self).__name__}({self.model_id!r}, layers {_ranges(self.layers)}, "
            f"kv_heads={first.kv_heads}, d={first.d}, nlist {nlists})"
        )


def _differs(name: str, value: object, trained: object) -> str:
    return f"{name} is {value!r}, trained for {trained!r}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write rising numbers briefly: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class _Layers(Mapping[int, CodebookLayer]):
    """The layers of a file, each read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names, found = read_header(path)
        self.names = tuple(names) if found.get("format") == FORMAT else ()
        self.header = self._read(None)[1]
        try:
            self.described: dict[int, Any] = {
                int(number): described for number, described in self.header["layers"].items()
            }
        except (KeyError, AttributeError, ValueError) as error:
            raise FileFormatError(f"{path} is no whole codebook: {error}") from error
        missing = set(_DESCRIBED) - self.header.keys()
        if missing or not self.described:
            raise FileFormatError(f"{path} is no whole codebook: {sorted(missing) or 'it has no layers'}")
        self.read: dict[int, CodebookLayer] = {}

    def _read(self, number: int | None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Read the tensors of one layer, and of the others no row."""
        prefix = f"layers.{number}."
        none: dict[str, list[int]] = {name: [] for name in self.names if not name.startswith(prefix)}
        tensors, header = read_file(self.path, format=FORMAT, version=VERSION, rows=none)
        return {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }, header

    def __getitem__(self, number: int) -> CodebookLayer:
        if number not in self.read:
            described = self.described[number]
            tensors, header = self._read(number)
            if header != self.header:
                raise FileFormatError(f"{self.path} was replaced since it was opened: load it anew")
            try:
                self.read[number] = CodebookLayer.of(number, described, tensors)
            except (SaapIndexError, LookupError, TypeError, AttributeError, ValueError) as error:
                raise FileFormatError(f"{self.path}: layer {number} is not whole: {error}") from error
        return self.read[number]

    def __contains__(self, number: object) -> bool:
        return number in self.described

    def __iter__(self) -> Iterator[int]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)
