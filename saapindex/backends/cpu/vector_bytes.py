"""Sums over keys of a weight times a field of their codes, four keys in an instruction (VNNI).

A word of a code has fields in its four bytes. Of four pages, the words of the same lane are turned, so that
the same byte of four keys lies side by side, and so do bytes of their weights.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saapindex.backends.base import LANES
from saapindex.backends.cpu.emitter import FLOAT, FLOATS, I32, I64, INTS, Emitter, data_of, long, rows_of
from saapindex.backends.cpu.machine import has

HAS_BYTE_SUMS = has("avx512vnni")
"""Whether the machine has the instruction."""
TURNED = 4
"""Pages that are turned together."""
HEADS = 3
"""Query heads that `byte_sums` takes at once."""


@intrinsic
def turn_words(typingctx, places, first, out):  # type: ignore[no-untyped-def]
    """Turn the `LANES` words at each address ``places[first : first + 4]``.

    Byte `p` of word ``out[first + c, lane]`` becomes byte `c` of the word of page ``first + p``; `out` is
    (..., `LANES`) int32, contiguous.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        at, to = (data_of(context, builder, signature, args, i)[0] for i in (0, 2))
        words = [
            emit.load(emit.load(emit.at(at, emit.times(args[1], 8), long(8 * p)), I64, 8), INTS, 4)
            for p in range(TURNED)
        ]
        pairs = [
            _swapped(emit, one, other, 8, 0x00FF00FF)
            for one, other in zip(words[::2], words[1::2], strict=True)
        ]
        (even, odd), (even2, odd2) = pairs
        turned = [*_swapped(emit, even, even2, 16, 0x0000FFFF), *_swapped(emit, odd, odd2, 16, 0x0000FFFF)]
        for c, vector in zip((0, 2, 1, 3), turned, strict=True):
            emit.store(vector, emit.at(to, emit.times(args[1], 4 * LANES), long(4 * LANES * c)))
        return context.get_dummy_value()

    return types.void(places, types.int64, out), codegen


def _swapped(emit: Emitter, one: Any, other: Any, bits: int, low: int) -> tuple[Any, Any]:
    """Put the low parts of both side by side, and the high parts."""
    builder = emit.builder
    lows, highs = (emit.splat(ir.Constant(I32, mask)) for mask in (low, low << bits))
    shift = emit.splat(ir.Constant(I32, bits))
    return (
        builder.or_(builder.and_(one, lows), builder.shl(builder.and_(other, lows), shift)),
        builder.or_(builder.and_(builder.lshr(one, shift), lows), builder.and_(other, highs)),
    )


@intrinsic
def pack_weights(typingctx, weights, first, unit, inverse, high, low):  # type: ignore[no-untyped-def]
    """Round ``weights[first : first + 4 * LANES]``, float32 from zero up, to multiples of `unit`, in place.

    How many units they are, below 2^16, goes to ``high[first / 4 : first / 4 + LANES]`` and `low`, int32:
    byte `p` of a word belongs to page `p` of the four. `inverse` is ``1 / unit``.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        at, high, low = (data_of(context, builder, signature, args, i)[0] for i in (0, 4, 5))
        unit, inverse = emit.splat(args[2]), emit.splat(args[3])
        half = emit.splat(ir.Constant(FLOAT, 0.5))
        byte = emit.splat(ir.Constant(I32, 255))
        highs = lows = ir.Constant(INTS, [ir.Constant(I32, 0)] * LANES)
        for p in range(TURNED):
            place = emit.at(at, emit.times(args[1], 4), long(4 * LANES * p))
            scaled = emit.multiply_add(emit.load(place, FLOATS, 4), inverse, half)
            whole = builder.fptosi(scaled, INTS)
            emit.store(builder.fmul(builder.sitofp(whole, FLOATS), unit), place)
            shift = emit.splat(ir.Constant(I32, 8 * p))
            eight = emit.splat(ir.Constant(I32, 8))
            highs = builder.or_(highs, builder.shl(builder.lshr(whole, eight), shift))
            lows = builder.or_(lows, builder.shl(builder.and_(whole, byte), shift))
        emit.store(highs, emit.at(high, args[1]))
        emit.store(lows, emit.at(low, args[1]))
        return context.get_dummy_value()

    floats = types.float32, types.float32
    return types.void(weights, types.int64, *floats, high, low), codegen


@intrinsic
def byte_sums(typingctx, turned, n, shift, mask, weights, out):  # type: ignore[no-untyped-def]
    """Write ``sum weight * field`` to ``out[h, c]`` for the fields at one shift of the four bytes `c`.

    `turned` is (n, `LANES`) int32 for `n` pages, a multiple of `TURNED`; `weights`, (1 to `HEADS`, 2, n / 4 *
    `LANES`) int32, are whole numbers in two bytes, the higher ones first, four keys to a word; `out` is
    (heads, 4) float32.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = rows_of(context, builder, signature, args, 4)
        for heads in range(1, HEADS + 1):
            with builder.if_then(builder.icmp_signed("==", count, long(heads))):
                _emit_byte_sums(context, builder, signature, args, heads)
        return context.get_dummy_value()

    return types.void(turned, types.int64, types.int64, types.int64, weights, out), codegen


def _emit_byte_sums(context: Any, builder: Any, signature: Any, args: Any, heads: int) -> None:
    emit = Emitter(builder)
    (words, _), (out, out_row) = (data_of(context, builder, signature, args, i) for i in (0, 5))
    weights = context.make_array(signature.args[4])(context, builder, args[4])
    first, strides = builder.ptrtoint(weights.data, I64), cgutils.unpack_tuple(builder, weights.strides)
    zero = ir.Constant(INTS, [ir.Constant(I32, 0)] * LANES)
    totals = [
        [[cgutils.alloca_once_value(builder, zero) for _ in range(TURNED)] for _ in range(2)]
        for _ in range(heads)
    ]
    for total in (total for head in totals for part in head for total in part):
        builder.store(zero, total)
    shifts, masks = (emit.splat(builder.trunc(args[i], I32)) for i in (2, 3))
    with cgutils.for_range_slice(builder, long(0), args[1], long(TURNED), intp=I64) as (k, _):
        fields = []
        for c in range(TURNED):
            word = emit.load(emit.at(words, emit.times(k, 4 * LANES), long(4 * LANES * c)), INTS, 4)
            fields.append(builder.and_(builder.lshr(word, shifts), masks))
        for h, head in enumerate(totals):
            for p, part in enumerate(head):
                place = emit.at(first, emit.times(strides[0], h), emit.times(strides[1], p))
                weight = emit.load(emit.at(place, emit.times(k, LANES)), INTS, 4)
                for total, field in zip(part, fields, strict=True):
                    builder.store(emit.dot4_vectors(builder.load(total), weight, field), total)
    eight = emit.splat(ir.Constant(I32, 8))
    for h, (high, low) in enumerate(totals):
        joined = [
            builder.sitofp(builder.add(builder.shl(builder.load(a), eight), builder.load(b)), FLOATS)
            for a, b in zip(high, low, strict=True)
        ]
        emit.store(emit.sums(joined), emit.at(out, emit.times(out_row, h)))
