"""The innermost loops of attention as SIMD: products with keys, sums of values, extremes.

Keys and values are read where they lie, by address, and widened in the register. Buffers have rows of a
multiple of `LANES` dimensions, zero beyond those of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saapindex.backends.base import LANES
from saapindex.backends.cpu.emitter import (
    FLOAT,
    FLOAT32,
    FLOATS,
    I1,
    I64,
    INTS,
    KEYS,
    Emitter,
    cases,
    data_of,
    long,
    rows_of,
)

_COLUMNS = 4
_AHEAD = 4 * KEYS  # from the keys that are looked at to those that are asked for


def _dots(typingctx, kind, queries, keys, values, n, d, ahead, out):  # type: ignore[no-untyped-def]
    """Write ``queries[h] . key`` to ``out[h, k]`` for the key of `kind` at each address ``keys[k]``.

    `queries` is (1 to `HEADS`, padded d) float32; of `keys` and columns of `out`, the next multiple of `KEYS`
    from `n` up is read and written. With `ahead`, 1 and not 0, keys further on and what is at the addresses
    `values` are asked for before they are needed.
    """
    signature = types.void(types.int64, queries, keys, values, *[types.int64] * 3, out)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = rows_of(context, builder, signature, args, 1)
        for known, heads in cases(builder, args[0], count):
            q, k, v, o = (data_of(context, builder, signature, args, i) for i in (1, 2, 3, 7))
            _emit_dots(Emitter(builder), known, heads, q, k[0], v[0], args[4], args[5], args[6], o)
        return context.get_dummy_value()

    return signature, codegen


def _emit_dots(
    emit: Emitter,
    kind: int,
    heads: int,
    q: Any,
    keys: Any,
    values: Any,
    n: Any,
    d: Any,
    ahead: Any,
    out: Any,
) -> None:
    builder, width = emit.builder, 4 if kind == FLOAT32 else 2
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in range(KEYS)] for _ in range(heads)]
    tail = builder.and_(d, long(LANES - 1))
    whole = builder.sub(d, tail)
    with cgutils.for_range_slice(builder, long(0), n, long(KEYS), intp=I64) as (k, _):
        for total in (total for row in totals for total in row):
            builder.store(zero, total)
        places = [emit.load(emit.at(keys, emit.times(k, 8), long(8 * j)), I64, 8) for j in range(KEYS)]
        with builder.if_then(builder.icmp_signed("==", ahead, long(1))):
            later = builder.add(k, long(_AHEAD))
            later = builder.select(builder.icmp_signed("<", later, n), later, k)
            coming = [(start, i, 8 * j) for start, i in ((keys, later), (values, k)) for j in range(KEYS)]
            wanted = [emit.load(emit.at(x, emit.times(i, 8), long(j)), I64, 8) for x, i, j in coming]
            end = emit.times(d, width)
            with cgutils.for_range_slice(builder, long(0), end, long(64), intp=I64) as (i, _):
                for place in wanted:
                    emit.prefetch(emit.at(place, i))

        def step(i: Any, mask: Any | None, places: list[Any] = places) -> None:
            x = [emit.stored(emit.at(place, emit.times(i, width)), kind, mask) for place in places]
            for h, row in enumerate(totals):
                query = emit.load(emit.at(q[0], emit.times(q[1], h), emit.times(i, 4)), FLOATS, 4)
                for j, total in enumerate(row):
                    builder.store(emit.multiply_add(query, x[j], builder.load(total)), total)

        with cgutils.for_range_slice(builder, long(0), whole, long(LANES), intp=I64) as (i, _):
            step(i, None)
        with builder.if_then(builder.icmp_signed(">", tail, long(0))):
            step(whole, emit.below(tail))
        for h, row in enumerate(totals):
            found = emit.sums([builder.load(total) for total in row])
            emit.store(found, emit.at(out[0], emit.times(out[1], h), emit.times(k, 4)))


def _mix(typingctx, kind, weights, values, n, d, out):  # type: ignore[no-untyped-def]
    """Write the sum of ``weights[h, k] * value`` over the values of `kind` at addresses ``values[k]``.

    `weights` is (1 to `HEADS`, at least n) float32; `out` is (heads, padded d) float32.
    """
    signature = types.void(types.int64, weights, values, types.int64, types.int64, out)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = rows_of(context, builder, signature, args, 1)
        for known, heads in cases(builder, args[0], count):
            w, v, o = (data_of(context, builder, signature, args, i) for i in (1, 2, 5))
            _emit_mix(Emitter(builder), known, heads, w, v[0], args[3], args[4], o)
        return context.get_dummy_value()

    return signature, codegen


def _emit_mix(emit: Emitter, kind: int, heads: int, w: Any, values: Any, n: Any, d: Any, out: Any) -> None:
    builder, width = emit.builder, 4 if kind == FLOAT32 else 2
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in range(_COLUMNS)] for _ in range(heads)]

    def columns(i: Any, count: int, mask: Any | None) -> None:
        """Dimensions from `i` up, `count` vectors of them."""
        for row in totals:
            for total in row[:count]:
                builder.store(zero, total)
        with cgutils.for_range_slice(builder, long(0), n, long(1), intp=I64) as (k, _):
            place = emit.at(emit.load(emit.at(values, emit.times(k, 8)), I64, 8), emit.times(i, width))
            x = [emit.stored(emit.at(place, long(LANES * width * c)), kind, mask) for c in range(count)]
            for h, row in enumerate(totals):
                weight = emit.load(emit.at(w[0], emit.times(w[1], h), emit.times(k, 4)), FLOAT, 4)
                weight = emit.splat(weight)
                for c, total in enumerate(row[:count]):
                    builder.store(emit.multiply_add(weight, x[c], builder.load(total)), total)
        for h, row in enumerate(totals):
            for c, total in enumerate(row[:count]):
                target = emit.at(out[0], emit.times(out[1], h), emit.times(i, 4), long(4 * LANES * c))
                emit.store(builder.load(total), target)

    block = LANES * _COLUMNS
    tail = builder.and_(d, long(LANES - 1))
    whole = builder.sub(d, tail)
    blocks = builder.sub(d, builder.and_(d, long(block - 1)))
    with cgutils.for_range_slice(builder, long(0), blocks, long(block), intp=I64) as (i, _):
        columns(i, _COLUMNS, None)
    with cgutils.for_range_slice(builder, blocks, whole, long(LANES), intp=I64) as (i, _):
        columns(i, 1, None)
    with builder.if_then(builder.icmp_signed(">", tail, long(0))):
        columns(whole, 1, emit.below(tail))


def _extremes(typingctx, row):  # type: ignore[no-untyped-def]
    """Return the largest of contiguous float32, and the lowest of those that are above minus infinity; minus
    infinity and infinity of nothing.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit, array = Emitter(builder), context.make_array(signature.args[0])(context, builder, args[0])
        low, high = (ir.Constant(FLOAT, sign * math.inf) for sign in (-1, 1))
        found = _emit_extremes(emit, builder.ptrtoint(array.data, I64), array.nitems, low, high)
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 2)(row), codegen


def _emit_extremes(emit: Emitter, at: Any, n: Any, low: Any, high: Any) -> list[Any]:
    builder, lows, highs = emit.builder, emit.splat(low), emit.splat(high)
    most = [cgutils.alloca_once_value(builder, lows) for _ in range(_COLUMNS)]
    least = [cgutils.alloca_once_value(builder, highs) for _ in range(_COLUMNS)]
    for top, bottom in zip(most, least, strict=True):
        builder.store(lows, top)
        builder.store(highs, bottom)

    def look(i: Any, c: int, mask: Any | None) -> None:
        x = emit.stored(emit.at(at, emit.times(i, 4), long(4 * LANES * c)), FLOAT32, mask)
        x = x if mask is None else builder.select(mask, x, lows)
        top, bottom = builder.load(most[c]), builder.load(least[c])
        builder.store(builder.select(builder.fcmp_ordered(">", x, top), x, top), most[c])
        x = builder.select(builder.fcmp_ordered(">", x, lows), x, highs)
        builder.store(builder.select(builder.fcmp_ordered("<", x, bottom), x, bottom), least[c])

    tail = builder.and_(n, long(LANES - 1))
    whole = builder.sub(n, tail)
    blocks = builder.sub(n, builder.and_(n, long(_COLUMNS * LANES - 1)))
    with cgutils.for_range_slice(builder, long(0), blocks, long(_COLUMNS * LANES), intp=I64) as (i, _):
        for c in range(_COLUMNS):
            look(i, c, None)
    with cgutils.for_range_slice(builder, blocks, whole, long(LANES), intp=I64) as (i, _):
        look(i, 0, None)
    with builder.if_then(builder.icmp_signed(">", tail, long(0))):
        look(whole, 0, emit.below(tail))
    return [emit.folded([builder.load(x) for x in part], sign) for part, sign in ((most, ">"), (least, "<"))]


extremes: Callable[..., Any] = intrinsic(_extremes)


@intrinsic
def lanes_equal(typingctx, numbers, first, value):  # type: ignore[no-untyped-def]
    """Return as bits which of ``numbers[first : first + LANES]``, int32, are `value`, and which are lower."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        at = builder.ptrtoint(context.make_array(signature.args[0])(context, builder, args[0]).data, I64)
        found, known = emit.load(emit.at(at, emit.times(args[1], 4)), INTS, 4), emit.splat(args[2])
        masks = [builder.icmp_signed(test, found, known) for test in ("==", "<")]
        bits = [builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I64) for mask in masks]
        return context.make_tuple(builder, signature.return_type, bits)

    return types.UniTuple(types.int64, 2)(numbers, types.int64, types.int32), codegen


@intrinsic
def lowest_bit(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the number of the lowest bit that is set, of an int64 that is not zero."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.Constant(I1, 1))

    return types.int64(types.int64), codegen


@intrinsic
def prefetch(typingctx, address, size):  # type: ignore[no-untyped-def]
    """Ask for `size` bytes at an address that will soon be read."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        with cgutils.for_range_slice(builder, long(0), args[1], long(64), intp=I64) as (i, _):
            emit.prefetch(emit.at(args[0], i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


dots: Callable[..., Any] = intrinsic(_dots)
mix: Callable[..., Any] = intrinsic(_mix)
