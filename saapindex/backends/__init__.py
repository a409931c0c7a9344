"""The operations of the index, once for each kind of machine.

`reference` is the definition: short NumPy that works in any precision. `cpu` is the same in
numba, on all cores. Both offer the interface of `base.Ops` and are tested against each other.
"""

from __future__ import annotations

import functools

from saapindex.backends.base import Ops
from saapindex.errors import InvalidInputError

__all__ = ["Ops", "get_ops"]


@functools.cache
def get_ops(name: str) -> Ops:
    """Return the backend called `name`: ``"reference"`` or ``"cpu"``.

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
    raise InvalidInputError(f"backend is {name!r}, expected 'reference' or 'cpu'")
