"""What all backends share: the types of arrays, and the width of a block of keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LANES", "Floats", "Ints"]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

LANES = 16
"""Keys of a block or a page, which kernels handle side by side."""
