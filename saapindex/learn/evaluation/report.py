"""What an evaluation found, and the files that say so."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import saapindex
from saapindex.files import write_whole
from saapindex.learn.evaluation.measures import Mode, Record
from saapindex.learn.evaluation.snapshot import Protocol
from saapindex.learn.evaluation.summary import summarise

__all__ = ["Report", "device_name", "versions"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Records, and everything that tells how they came about.

    Attributes
    ----------
    records
        Of the chosen settings, on test sequences.
    held_out
        Of every setting tried, on the sequences that settings were chosen on.
    protocol, budgets, modes
        How it was measured.
    tests, trains
        Names of sequences.
    skipped
        Methods that could not run, and why.
    seconds
        For each method the seconds of ``"fit"``, ``"build"`` and ``"measure"``, over all heads and settings.
    device
        Where it ran.
    versions
        Of the packages that matter.
    """

    records: Sequence[Record]
    held_out: Sequence[Record]
    protocol: Protocol
    budgets: Sequence[float]
    modes: Sequence[Mode]
    tests: Sequence[str]
    trains: Sequence[str]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Names of the methods that ran."""
        return list(dict.fromkeys(record.method for record in self.records))

    @property
    def main_budget(self) -> float:
        """The budget that tables show in detail: the one nearest to 5 %."""
        return min(self.budgets, key=lambda budget: abs(budget - 0.05))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it, with the summary over all heads and sequences.

        ``"records"`` are a list of fields and rows of values; ``"held_out"`` are summaries, one for each
        setting.
        """
        fields = [each.name for each in dataclasses.fields(Record)]
        rows = [[_rounded(getattr(record, name)) for name in fields] for record in self.records]
        return {
            "format": "saapindex.evaluation",
            "versions": dict(self.versions),
            "device": self.device,
            "protocol": asdict(self.protocol),
            "budgets": list(self.budgets),
            "modes": list(self.modes),
            "tests": list(self.tests),
            "trains": list(self.trains),
            "skipped": dict(self.skipped),
            "seconds": {name: dict(parts) for name, parts in self.seconds.items()},
            "summary": _summaries(self.records, "method", "mode", "budget"),
            "held_out": _summaries(self.held_out, "method", "mode", "budget", "setting"),
            "records": {"fields": fields, "rows": rows},
        }

    def write_json(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all.

        Raises
        ------
        InvalidInputError
            If the folder does not exist.
        """
        write_whole(path, (json.dumps(self.to_dict()) + "\n").encode())


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _summaries(records: Sequence[Record], *by: str) -> list[dict[str, Any]]:
    rows = []
    for summary in summarise(records, *by):
        row = {name: _rounded(value) for name, value in asdict(summary).items()}
        rows.append({**row, **dict(zip(by, row.pop("key"), strict=True))})
    return rows


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on.

    Examples
    --------
    >>> sorted(versions())
    ['python', 'saapindex', 'torch']
    """
    return {
        "saapindex": saapindex.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def device_name(device: torch.device | str) -> str:
    """Return what `device` is called.

    Examples
    --------
    >>> device_name("cpu").startswith("CPU")
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
