"""What the training of a codebook measured, head by head, as data and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HeadReport", "ListsReport", "TrainingReport"]


@dataclass(frozen=True)
class ListsReport:
    """One head with one number of lists, on the held-out sequences.

    Attributes
    ----------
    router
        Rung that was kept.
    recall
        Share of the long-range attention mass that each rung reads at the settings' share of the keys.
    bound
        What a router that knew every mass would read: no rung can do better with this partition.
    imbalance
        Mean list size that a key sees over the even size, in the fullest lists.
    """

    router: str
    recall: Mapping[str, float]
    bound: float
    imbalance: float


@dataclass(frozen=True)
class HeadReport:
    """One KV head.

    Attributes
    ----------
    layer, head
        Numbers in the model.
    view
        View that was kept.
    views
        Recall of the `mean` router in each view that was tried.
    lists
        For each number of lists.
    errors
        Where views were judged by it: the error of the output in each view, by held-out sequence; also of
        lookups, where a sequence has some (``NAME, lookups``).
    """

    layer: int
    head: int
    view: str
    views: Mapping[str, float]
    lists: Mapping[int, ListsReport]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingReport:
    """All heads of a codebook.

    Attributes
    ----------
    heads
        In order of layer and head.
    held_out
        Names of the sequences that were measured on, and trained on by none of the steps.
    share
        Of the keys that were read.
    seconds
        Time of each stage.
    extra
        What further stages measured, by layer.

    Examples
    --------
    >>> lists = ListsReport("mean", {"centroid": 0.8, "mean": 0.9}, 0.95, 1.2)
    >>> report = TrainingReport([HeadReport(3, 0, "rotated", {}, {128: lists})], ["test"], 0.05)
    >>> TrainingReport.from_dict(json.loads(report.to_json())) == report
    True
    >>> report.mean_recall(128)
    {'centroid': 0.8, 'mean': 0.9, 'kept': 0.9, 'bound': 0.95}
    """

    heads: Sequence[HeadReport]
    held_out: Sequence[str]
    share: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def mean_recall(self, nlist: int) -> dict[str, float]:
        """Return the recall of each rung, of what was kept, and its bound: means over heads."""
        lists = [head.lists[nlist] for head in self.heads]
        found = {
            rung: sum(part.recall[rung] for part in lists) / len(lists)
            for rung in (lists[0].recall if lists else {})
        }
        kept = sum(part.recall[part.router] for part in lists) / len(lists)
        return {**found, "kept": kept, "bound": sum(part.bound for part in lists) / len(lists)}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that JSON can hold."""
        data = asdict(self)
        for head in data["heads"]:
            head["lists"] = {str(nlist): lists for nlist, lists in head["lists"].items()}
        return {**data, "held_out": list(self.held_out)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingReport:
        """Rebuild the report that `to_dict` described."""
        heads = []
        for head in data["heads"]:
            lists = {int(nlist): ListsReport(**part) for nlist, part in head["lists"].items()}
            heads.append(HeadReport(**{**head, "lists": lists}))
        return cls(**{**data, "heads": heads})

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def join(cls, parts: Sequence[TrainingReport]) -> TrainingReport:
        """Return one report of several layers."""
        names = dict.fromkeys(name for part in parts for name in part.seconds)
        return cls(
            [head for part in parts for head in part.heads],
            parts[0].held_out,
            parts[0].share,
            {name: sum(part.seconds.get(name, 0.0) for part in parts) for name in names},
            {name: value for part in parts for name, value in part.extra.items()},
        )

    def table(self) -> Table:
        """Return a rich table: a row for each head and number of lists, and the means."""
        from rich.table import Table

        rungs = list(
            dict.fromkeys(rung for head in self.heads for part in head.lists.values() for rung in part.recall)
        )
        table = Table(title=f"attention mass found at {100 * self.share:g} % of the keys, held-out sequences")
        for name in ("layer", "head", "nlist", "view"):
            table.add_column(name)
        for name in (*rungs, "bound", "imbalance"):
            table.add_column(name, justify="right")
        for head in self.heads:
            for nlist, part in head.lists.items():
                cells = [
                    f"[bold]{part.recall[rung]:.3f}[/]" if rung == part.router else f"{part.recall[rung]:.3f}"
                    for rung in rungs
                ]
                table.add_row(
                    str(head.layer), str(head.head), str(nlist), head.view, *cells,
                    f"{part.bound:.3f}", f"{part.imbalance:.2f}",
                )  # fmt: skip
        table.add_section()
        for nlist in self.heads[0].lists if self.heads else ():
            means = self.mean_recall(nlist)
            cells = [f"{means[rung]:.3f}" for rung in rungs]
            kept = f"kept {means['kept']:.3f}"
            table.add_row("all", "", str(nlist), kept, *cells, f"{means['bound']:.3f}", "")
        return table
