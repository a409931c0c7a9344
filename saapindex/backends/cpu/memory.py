"""Memory by its address, counters that several threads share, and arrays as the loops want them."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from saapindex.backends.base import LANES

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def atomic_add(typingctx, counters, i, value):  # type: ignore[no-untyped-def]
    """Add to ``counters[i]``, int64, in one go that no thread sees half of; return what it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _element(context, builder, signature, args)
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def atomic_read(typingctx, counters, i):  # type: ignore[no-untyped-def]
    """Return ``counters[i]``, int64, as other threads have left it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_element(context, builder, signature, args), "seq_cst", 8, typ=_I64)

    return types.int64(counters, types.int64), codegen


@intrinsic
def atomic_write(typingctx, counters, i, value):  # type: ignore[no-untyped-def]
    """Set ``counters[i]``, int64, for other threads to see, and all that was written before with it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[2], _element(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), codegen


@intrinsic
def atomic_replace(typingctx, counters, i, known, value):  # type: ignore[no-untyped-def]
    """Set ``counters[i]``, int64, if it still is `known`; return whether it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _element(context, builder, signature, args)
        found = builder.cmpxchg(place, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(counters, types.int64, types.int64, types.int64), codegen


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Pointer to an element of an array of int64."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    address = builder.add(builder.ptrtoint(array.data, _I64), builder.mul(args[1], ir.Constant(_I64, 8)))
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """Return an address as what `numba.carray` takes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def call_at(typingctx, function, record, stage, task):  # type: ignore[no-untyped-def]
    """Call the C function at an address with three int64."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def wait_at(typingctx, function, lock):  # type: ignore[no-untyped-def]
    """Take a lock of Python, and wait for it, by the address of ``PyThread_acquire_lock``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_I32, [_I64, _I32])
        taken = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], ir.Constant(_I32, 1)])
        return builder.zext(taken, _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def integer_at(typingctx, address):  # type: ignore[no-untyped-def]
    """Return the int32 at an address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[0], _I32.as_pointer()), align=4, typ=_I32)

    return types.int32(types.int64), codegen


def padded(x: NDArray[Any]) -> NDArray[np.float32]:
    """Return `x` as float32 in rows of a multiple of `LANES`, contiguous.

    Examples
    --------
    >>> padded(np.ones((2, 3))).shape
    (2, 16)
    """
    d = x.shape[-1]
    width = -(-d // LANES) * LANES
    if width == d:
        return plain(x, np.float32)
    rows = np.zeros((*x.shape[:-1], width), np.float32)
    rows[..., :d] = x
    return rows


def plain(x: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return `x` as the kernels know it: contiguous and writable, which numba has types of its own for.

    Examples
    --------
    >>> plain(np.broadcast_to(1, 2), np.int64).flags.writeable
    True
    """
    array = np.ascontiguousarray(x, dtype)
    return array if array.flags.writeable else array.copy()
