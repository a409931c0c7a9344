"""One layer of a codebook: views, metric, partitions and routers of all its KV heads. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saapindex.codebook_routers import Array, ListRouters, finite
from saapindex.errors import InvalidInputError
from saapindex.partition import Partition, View
from saapindex.partition.kmeans import assignment_form
from saapindex.rope import Rope

__all__ = ["CodebookLayer"]


@dataclass(frozen=True, eq=False)
class CodebookLayer:
    """What training learnt about one layer.

    Attributes
    ----------
    layer
        Number of the layer.
    views
        View of each KV head; all with the RoPE of the layer.
    centroids
        For each number of lists, float16 or float32, (kv_heads, nlist, d).
    q_heads
        Query heads of the layer, a multiple of its KV heads.
    scale
        Of the logits.
    metric
        float32, (kv_heads, d, d): the query-aware metric; None for the Euclidean.
    spherical
        Whether keys are assigned by inner product to unit centroids.
    routers
        For each number of lists; by default the `mean` router for every head.
    max_position
        Positions below this are known; None where positions do not matter.
    softcap
        Of the logits, or None.
    heads
        Numbers of the KV heads in the model; by default all from 0.
    extra
        Other tensors by name, each with the KV heads first.

    Raises
    ------
    InvalidInputError
        If shapes do not fit each other.
    """

    layer: int
    views: Sequence[View] = field(kw_only=True)
    centroids: Mapping[int, Array] = field(kw_only=True)
    q_heads: int = field(kw_only=True)
    scale: float = field(kw_only=True)
    metric: Array | None = field(default=None, kw_only=True)
    spherical: bool = field(default=False, kw_only=True)
    routers: Mapping[int, ListRouters] = field(default_factory=dict, kw_only=True)
    max_position: int | None = field(default=None, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)
    heads: Sequence[int] | None = field(default=None, kw_only=True)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        count = len(self.views)
        if not count or self.q_heads % count:
            raise InvalidInputError(f"{self.q_heads} query heads cannot share {count} KV heads evenly")
        if len({view.rope for view in self.views}) != 1:
            raise InvalidInputError("the views of a layer have different RoPE settings, expected one")
        if not self.centroids:
            raise InvalidInputError(f"layer {self.layer} has no centroids")
        checked = {
            nlist: finite("centroids", self.centroids[nlist], (count, nlist, None))
            for nlist in sorted(self.centroids)
        }
        d = next(iter(checked.values())).shape[2]
        checked = {nlist: finite("centroids", array, (count, nlist, d)) for nlist, array in checked.items()}
        metric = None if self.metric is None else finite("metric", self.metric, (count, d, d))
        mean = ListRouters(["mean"] * count)
        routers = {nlist: self.routers.get(nlist, mean) for nlist in checked}
        for nlist, router in routers.items():
            shapes = {"weight": (nlist, d), "offset": (nlist,), "hidden": (None, d), "top": (nlist, None)}
            if len(router.kinds) != count:
                raise InvalidInputError(f"{len(router.kinds)} routers for {count} KV heads")
            for name, tensor in router.tensors().items():
                finite(f"router {name}", tensor, (len(tensor), tensor.shape[1], *shapes.get(name, (None,))))
                if tensor.shape[1] not in (1, self.q_heads // count):
                    raise InvalidInputError(
                        f"router {name} is for {tensor.shape[1]} query heads, "
                        f"expected 1 or {self.q_heads // count}"
                    )
        for name, tensor in self.extra.items():
            if tensor.ndim < 1 or len(tensor) != count:
                raise InvalidInputError(
                    f"extra tensor {name} has shape {tensor.shape}, expected the {count} KV heads first"
                )
        numbers = tuple(range(count)) if self.heads is None else tuple(self.heads)
        if len(numbers) != count:
            raise InvalidInputError(f"heads is {numbers}, expected the numbers of {count} KV heads")
        for name, value in (
            ("views", tuple(self.views)),
            ("centroids", checked),
            ("metric", metric),
            ("routers", routers),
            ("heads", numbers),
        ):
            object.__setattr__(self, name, value)

    @property
    def rope(self) -> Rope | None:
        """Rotary embedding of the layer."""
        return self.views[0].rope

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return len(self.views)

    @property
    def d(self) -> int:
        """Size of a head."""
        return int(next(iter(self.centroids.values())).shape[2])

    @property
    def nlists(self) -> tuple[int, ...]:
        """Numbers of lists that there are partitions for, rising."""
        return tuple(self.centroids)

    def partition(self, head: int, nlist: int) -> Partition:
        """Return the partition of one KV head.

        Raises
        ------
        InvalidInputError
            If there is none with so many lists, or no such head.
        """
        self._check_nlist(nlist)
        if not 0 <= head < self.kv_heads:
            raise InvalidInputError(f"head is {head}, expected one of 0 to {self.kv_heads - 1}")
        return Partition(
            self.views[head],
            self.centroids[nlist][head].astype(np.float32),
            None if self.metric is None else self.metric[head].astype(np.float64),
            self.spherical,
            self.max_position if self.views[head].keeps_rotation else None,
        )

    def assignment(self, nlist: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return `A` and `b`, (kv_heads, nlist, d) and (kv_heads, nlist).

        The list of a key `x` in the view of its head is ``argmax_j x . A_j + b_j``.
        """
        self._check_nlist(nlist)
        metrics = [None] * self.kv_heads if self.metric is None else list(self.metric.astype(np.float64))
        forms = [
            assignment_form(centroids.astype(np.float32), metric, self.spherical)
            for centroids, metric in zip(self.centroids[nlist], metrics, strict=True)
        ]
        return np.stack([form for form, _ in forms]), np.stack([bias for _, bias in forms])

    def _check_nlist(self, nlist: int) -> None:
        if nlist not in self.centroids:
            raise InvalidInputError(f"nlist is {nlist}, expected one of {', '.join(map(str, self.nlists))}")

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return what is stored, by name."""
        stored: dict[str, NDArray[Any]] = {} if self.metric is None else {"metric": self.metric}
        for nlist, centroids in self.centroids.items():
            stored[f"{nlist}.centroids"] = centroids
            stored |= {f"{nlist}.router.{name}": part for name, part in self.routers[nlist].tensors().items()}
        return stored | {f"extra.{name}": tensor for name, tensor in self.extra.items()}

    def describe(self) -> dict[str, Any]:
        """Return the rest, which JSON can hold."""
        return {
            "rope": None if self.rope is None else self.rope.to_dict(),
            "views": [[view.kind, view.cutoff] for view in self.views],
            "q_heads": self.q_heads,
            "scale": self.scale,
            "softcap": self.softcap,
            "spherical": self.spherical,
            "max_position": self.max_position,
            "heads": list(self.heads or ()),
            "routers": {str(nlist): list(router.kinds) for nlist, router in self.routers.items()},
        }

    @classmethod
    def of(
        cls, layer: int, described: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> CodebookLayer:
        """Rebuild the layer from what `describe` and `tensors` gave."""
        rope = None if described["rope"] is None else Rope.from_dict(described["rope"])
        kinds = {int(nlist): tuple(names) for nlist, names in described["routers"].items()}
        routers = {}
        for nlist, names in kinds.items():
            prefix = f"{nlist}.router."
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            routers[nlist] = ListRouters(names, **found)
        return cls(
            layer,
            views=[View(kind, cutoff, rope) for kind, cutoff in described["views"]],
            centroids={nlist: tensors[f"{nlist}.centroids"] for nlist in kinds},
            q_heads=described["q_heads"],
            scale=described["scale"],
            metric=tensors.get("metric"),
            spherical=described["spherical"],
            routers=routers,
            max_position=described["max_position"],
            softcap=described["softcap"],
            heads=described["heads"],
            extra={
                name.removeprefix("extra."): tensor
                for name, tensor in tensors.items()
                if name.startswith("extra.")
            },
        )
