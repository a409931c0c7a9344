"""Sparse attention inside vLLM: a plugin that needs no code.

vLLM finds `register` by the entry point ``vllm.general_plugins``. Where ``SAAPINDEX_CODEBOOK`` names a
codebook, decoding then attends through `saapindex.attention.SlotIndex`, over vLLM's own paged cache::

    SAAPINDEX_CODEBOOK=codebook.safetensors SAAPINDEX_BUDGET=0.05 vllm serve MODEL

Without that variable vLLM is what it always was. Prompts are read with dense, exact attention.

======================== =============================================================== =========
variable                 meaning                                                         default
======================== =============================================================== =========
``SAAPINDEX_CODEBOOK``   path of what training saved for the model                       off
``SAAPINDEX_BUDGET``     share of the long-range bytes that a step may read; 1 is dense  0.05
``SAAPINDEX_WINDOW``     recent tokens that are always attended to                       2047
``SAAPINDEX_SINKS``      first tokens that are                                           1
``SAAPINDEX_DENSE_BELOW`` shorter contexts are attended to densely                       4096
``SAAPINDEX_FLUSH``      tokens leave the window so many at a time                       256
``SAAPINDEX_ADAPT``      Lloyd steps that fit the partition to the context               3
``SAAPINDEX_NLIST``      which partition of the codebook                                 by length
``SAAPINDEX_BACKEND``    ``cpu`` or ``reference``                                        ``cpu``
======================== =============================================================== =========
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from saapindex.codebook import Codebook
from saapindex.errors import InvalidInputError, MissingDependencyError

__all__ = ["TESTED", "Settings", "register"]

TESTED = "0.32.0"
"""The release of vLLM whose interface this follows; others are refused."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment asks for; see the table above."""

    codebook: str
    budget: float = 0.05
    window: int = 2047
    sinks: int = 1
    dense_below: int = 4096
    flush: int = 256
    adapt: int = 3
    nlist: int | None = None
    backend: str = "cpu"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """Read the variables; None if no codebook is named.

        Raises
        ------
        InvalidInputError
            On a variable that is not known, or a value that is no number.
        """
        given = {
            name.removeprefix("SAAPINDEX_"): value
            for name, value in environment.items()
            if name.startswith("SAAPINDEX_")
        }
        names = {field.name.upper(): field for field in fields(cls)}
        strange = sorted(set(given) - set(names))
        if strange:
            raise InvalidInputError(
                f"SAAPINDEX_{strange[0]} is not known, expected SAAPINDEX_ and one of {', '.join(names)}"
            )
        if not given.get("CODEBOOK"):
            return None
        values: dict[str, Any] = {}
        for name, text in given.items():
            read = float if name == "BUDGET" else str if name in ("CODEBOOK", "BACKEND") else int
            try:
                values[name.lower()] = read(text)
            except ValueError as error:
                raise InvalidInputError(f"SAAPINDEX_{name} is {text!r}, expected a number") from error
        return cls(**values)

    def index(self) -> dict[str, Any]:
        """Return the arguments of `SlotIndex`."""
        names = ("window", "sinks", "dense_below", "flush", "adapt", "backend")
        return {name: getattr(self, name) for name in names}


def register() -> None:
    """Put sparse attention in the place of vLLM's CPU attention, if the environment asks for it.

    Raises
    ------
    InvalidInputError
        On another release or platform of vLLM than this is tested with, or wrong settings.
    MissingDependencyError
        If vLLM is not installed.
    FileFormatError, OSError
        If the codebook is none, or cannot be read.
    """
    settings = Settings.of(os.environ)
    if settings is None:
        return
    try:
        import vllm
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise MissingDependencyError("vllm", "attending inside vLLM", "vllm") from error
    if vllm.__version__.partition("+")[0] != TESTED:
        raise InvalidInputError(
            f"vLLM is {vllm.__version__}, expected {TESTED}, which this release of saapindex is tested with; "
            "unset SAAPINDEX_CODEBOOK to go without sparse attention"
        )
    if not current_platform.is_cpu():
        raise InvalidInputError(
            f"vLLM runs on {current_platform.device_name}, expected its CPU platform: indices live "
            "in main memory"
        )
    Codebook.load(settings.codebook)  # so that a wrong path is told now, and not by a worker later
    register_backend(AttentionBackendEnum.CPU_ATTN, "saapindex.adapters._vllm_backend.SaapBackend")
