"""Stored elements as floats, and whether all of them are finite, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from saapindex.backends.base import LANES, Floats
from saapindex.backends.cpu.emitter import FLOAT32, I1, I64, KINDS, Emitter, data_of, long
from saapindex.backends.cpu.memory import plain

_KINDS = {np.dtype(name): kind for name, kind in KINDS.items()}


@intrinsic
def _widen(typingctx, kind, raw, out):  # type: ignore[no-untyped-def]
    """Write elements of `kind`, (n,), to `out`, (n,) float32; return whether they are finite."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit, array = Emitter(builder), context.make_array(signature.args[2])(context, builder, args[2])
        raw, to = (data_of(context, builder, signature, args, i)[0] for i in (1, 2))
        fine = cgutils.alloca_once_value(builder, ir.Constant(I1, 1))
        for name, known in KINDS.items():
            with builder.if_then(builder.icmp_signed("==", args[0], long(known))):
                _emit_widen(emit, known, np.dtype(name).itemsize, raw, array.nitems, to, fine)
        return builder.load(fine)

    return types.boolean(types.int64, raw, out), codegen


def _emit_widen(emit: Emitter, kind: int, width: int, raw: Any, n: Any, to: Any, fine: Any) -> None:
    builder, zero = emit.builder, long(0)
    tail = builder.and_(n, long(LANES - 1))
    whole = builder.sub(n, tail)

    def some(i: Any, mask: Any | None) -> None:
        x = emit.stored(emit.at(raw, emit.times(i, width)), kind, mask)
        place = emit.at(to, emit.times(i, 4))
        if mask is None:
            emit.store(x, place)
        else:
            emit.store_some(x, place, mask)
        good = builder.fcmp_ordered("==", builder.fsub(x, x), ir.Constant(x.type, [0.0] * LANES))
        bits = builder.bitcast(good, ir.IntType(LANES))
        all_good = builder.icmp_signed("==", bits, ir.Constant(bits.type, -1))
        builder.store(builder.and_(builder.load(fine), all_good), fine)

    with cgutils.for_range_slice(builder, zero, whole, long(LANES), intp=I64) as (i, _):
        some(i, None)
    with builder.if_then(builder.icmp_signed(">", tail, zero)):
        some(whole, emit.below(tail))


@njit(cache=True, nogil=True)
def _floats(kind, raw, out):  # type: ignore[no-untyped-def]
    return _widen(kind, raw, out)


def as_floats(x: NDArray[Any]) -> tuple[Floats, bool]:
    """See `Ops.as_floats`."""
    kind, raw = _KINDS[x.dtype], plain(x, x.dtype).reshape(-1)
    out = np.empty(raw.size, np.float32)
    finite = _floats(kind, raw if kind == FLOAT32 else raw.view(np.uint16), out)
    return out.reshape(x.shape), finite
