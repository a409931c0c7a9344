"""The operations of the index, once for each kind of machine.

`reference` is the definition: short NumPy that works in any precision. `cpu` is the same in
numba, on all cores, `cuda` in CUDA through CuPy. All offer the interface of `base.Ops` and are tested against
each other.
"""

from __future__ import annotations

import functools

from saapindex.backends.base import Ops
from saapindex.errors import InvalidInputError

__all__ = ["Ops", "get_ops"]


@functools.cache
def get_ops(name: str) -> Ops:
    """Return the backend called `name`: ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    InvalidInputError
        If there is no such backend, or no device for it.
    MissingDependencyError
        If CUDA is asked for without CuPy.

    Examples
    --------
    >>> get_ops("reference").name
    'reference'
    """
    if name == "reference":
        from saapindex.backends.reference import ReferenceOps

        return ReferenceOps()
    if name == "cpu":
        from saapindex.backends.cpu import CpuOps

        return CpuOps()
    if name == "cuda":
        from saapindex.backends.cuda import CudaOps
        from saapindex.devices import get_cupy

        get_cupy()
        return CudaOps()
    raise InvalidInputError(f"backend is {name!r}, expected 'reference', 'cpu' or 'cuda'")
