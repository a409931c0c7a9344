"""Indexes from strings, and back.

::

    string   = lists "," storage [ "," refine ]
    lists    = "SAAP" nlist      query-aware partition and asymmetric router (the preset "best")
             | "IVF" nlist       the partition and the routing of Faiss (the preset "faiss-ivf")
    storage  = "Flat"            float32 keys are scanned
             | "SQfp16"          float16 keys are scanned
             | "Bits1" | "Bits2" | "Bits4"
                                 codes of so many bits per dimension are scanned
    refine   = "RFlat"           the best candidates are scored exactly, from float32 keys
             | "Refine(SQfp16)"  the same, from float16 keys

`nlist` is a number, with "k" for 1024 and "M" for 1024^2 as in Faiss. Letters count as written. Without a
refine part, codes alone are stored.
"""

from __future__ import annotations

import re

from saapindex.errors import InvalidInputError
from saapindex.index.saap import IndexSAAP
from saapindex.index.store import METRIC_INNER_PRODUCT
from saapindex.params import IndexParameters, get_preset
from saapindex.rope import Rope

__all__ = ["index_factory"]

_GRAMMAR = re.compile(
    r"(?P<lists>SAAP|IVF)(?P<nlist>[0-9]+)(?P<unit>[kM]?),"
    r"(?P<storage>Flat|SQfp16|Bits[124])(?:,(?P<refine>RFlat|Refine\(SQfp16\)))?"
)
_PRESETS = {"SAAP": "best", "IVF": "faiss-ivf"}
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20}


def index_factory(
    d: int,
    description: str,
    metric: int = METRIC_INNER_PRODUCT,
    *,
    params: IndexParameters | str | None = None,
    rope: Rope | None = None,
    backend: str = "cpu",
) -> IndexSAAP:
    """Return the untrained index that a string describes; ``index.factory_string`` gives the string back.

    Parameters
    ----------
    d
        Dimension of keys and queries.
    description
        ``lists,storage`` or ``lists,storage,refine``: "SAAP1024,Flat", "SAAP512,Bits2",
        "SAAP4096,Bits1,RFlat", "IVF1024,Flat", and so on. Lists are ``SAAP<n>`` (query-aware and asymmetric)
        or ``IVF<n>`` (as in Faiss), with "k" for 1024; storage is ``Flat`` (float32), ``SQfp16`` (float16) or
        ``Bits1``, ``Bits2``, ``Bits4`` (codes of so many bits per dimension); after codes, ``RFlat`` or
        ``Refine(SQfp16)`` keeps the keys too, and scores the best candidates exactly.
    metric
        `METRIC_INNER_PRODUCT` (the default, unlike in Faiss) or `METRIC_L2`.
    params
        What else there is to choose, in the place of the preset that the string names; bits and refining
        come from the string.
    rope, backend
        As for `IndexSAAP`.

    Raises
    ------
    InvalidInputError
        If the string is not of this grammar.

    Examples
    --------
    >>> index = index_factory(128, "SAAP512,Bits2", rope=Rope(theta=500_000.0, dim=128))
    >>> index.nlist, index.params.bits, index.factory_string
    (512, 2, 'SAAP512,Bits2')
    """
    found = _GRAMMAR.fullmatch(description) if isinstance(description, str) else None
    if found is None:
        raise InvalidInputError(
            f"description is {description!r}, expected lists, storage and perhaps refining, such as "
            "'SAAP1024,Flat', 'SAAP512,Bits2', 'SAAP4096,Bits1,RFlat' or 'IVF1024,SQfp16'"
        )
    storage, refine = found["storage"], found["refine"]
    bits = int(storage[4:]) if storage.startswith("Bits") else 0
    if refine and not bits:
        raise InvalidInputError(f"description is {description!r}: {refine} follows codes, not {storage}")
    params = _PRESETS[found["lists"]] if params is None else params
    params = get_preset(params) if isinstance(params, str) else params
    return IndexSAAP(
        d,
        int(found["nlist"]) * _UNITS[found["unit"]],
        metric,
        params=params.replace(bits=bits, refine=refine is not None),
        rope=rope,
        dtype="float16" if "SQfp16" in (refine or storage) else "float32",
        backend=backend,
    )
