"""Every exception and warning that saapindex raises, in one small tree.

::

    SaapIndexError
    ├── DeviceMemoryError      (also MemoryError)  a device has too little memory; says what was needed
    ├── InvalidInputError      (also ValueError)   an argument is wrong; says what was given and expected
    ├── NotTrainedError        (also RuntimeError) the index or its router has not been trained
    ├── FileFormatError        (also ValueError)   a file is truncated, foreign, newer or tampered with
    ├── CodebookMismatchError  (also ValueError)   a codebook was trained for another model, layer or RoPE
    └── MissingDependencyError (also ImportError)  an optional package is needed; says what to install

    SaapIndexWarning           (also UserWarning)
    ├── TrainingWarning                            training data is thin, or queries are missing
    └── PositionWarning                            positions lie outside the range a codebook knows
"""

from __future__ import annotations

__all__ = [
    "CodebookMismatchError",
    "DeviceMemoryError",
    "FileFormatError",
    "InvalidInputError",
    "MissingDependencyError",
    "NotTrainedError",
    "PositionWarning",
    "SaapIndexError",
    "SaapIndexWarning",
    "TrainingWarning",
]


class SaapIndexError(Exception):
    """Base of every error that saapindex raises on purpose."""


class InvalidInputError(SaapIndexError, ValueError):
    """An argument has the wrong type, shape, dtype or value; nothing was changed."""


class NotTrainedError(SaapIndexError, RuntimeError):
    """The operation needs a trained index (or a trained router)."""


class FileFormatError(SaapIndexError, ValueError):
    """A file is not a whole, known and untouched saapindex file."""


class CodebookMismatchError(SaapIndexError, ValueError):
    """A codebook was trained for another model, layer or rotary embedding; says what differs."""


class DeviceMemoryError(SaapIndexError, MemoryError):
    """A CUDA device has too little memory, or steps of a graph went past what was reserved."""


class MissingDependencyError(SaapIndexError, ImportError):
    """An optional dependency is not installed.

    Parameters
    ----------
    package
        Name of the missing package.
    purpose
        What needs it, as the subject of a sentence ("training a router").
    extra
        The extra of saapindex that brings it.
    """

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'saapindex[{extra}]'"
        )


class SaapIndexWarning(UserWarning):
    """Base of every warning that saapindex gives."""


class TrainingWarning(SaapIndexWarning):
    """Training goes on, but with less than it needs to be good."""


class PositionWarning(SaapIndexWarning):
    """Positions lie outside the range that the codebook was trained for."""
