"""The innermost loop of the scan of codes: one query against the `LANES` codes of a block, as SIMD.

A word of 32 bits holds fields of one width in four bytes, so a shift and a mask leave four fields in the
bytes of each lane, and one instruction multiplies them by four elements of the query and adds them up
(AVX-512 VNNI), or two (AVX2). Elsewhere each field is multiplied on its own. Sums are whole numbers, so all
three agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saapindex.backends.base import LANES
from saapindex.backends.cpu.emitter import FLOAT, FLOATS, I32, I64, INTS, Emitter, long
from saapindex.backends.cpu.machine import has

_I8 = ir.IntType(8)
_MASKS = {1: 0x01010101, 2: 0x03030303, 4: 0x0F0F0F0F}


def masks(widths: Any) -> list[int]:
    """Return the mask of each group of four fields, in the order of dimensions."""
    return [_MASKS[int(width)] for width in widths for _ in range(8 // int(width))]


def _in_pairs(emit: Emitter, total: Any, fields: Any, query: Any) -> Any:
    """Do what `Emitter.dot4` does in two steps, for half of the lanes at a time (AVX2)."""
    builder = emit.builder
    half, words = ir.VectorType(I32, 8), ir.VectorType(ir.IntType(16), 16)
    bytes_ = ir.VectorType(_I8, 32)
    pairs = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(words, [bytes_, bytes_]), "llvm.x86.avx2.pmadd.ub.sw"
    )
    fours = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(half, [words, words]), "llvm.x86.avx2.pmadd.wd"
    )
    nothing, ones = ir.Constant(INTS, ir.Undefined), ir.Constant(words, [1] * 16)
    four = emit.splat(query)
    sums = []
    for first in (0, 8):
        places = ir.Constant(half, list(range(first, first + 8)))
        left, right = (
            builder.bitcast(builder.shuffle_vector(x, nothing, places), bytes_) for x in (fields, four)
        )
        sums.append(builder.call(fours, [builder.call(pairs, [left, right]), ones]))
    both = builder.shuffle_vector(*sums, ir.Constant(INTS, list(range(LANES))))
    return builder.add(total, both)


_WAYS = {"avx512vnni": Emitter.dot4_vnni, "avx2": _in_pairs, "": Emitter.dot4}
"""By the feature that a machine must have, the best first."""


def make_block_estimates(way: str | None = None) -> Callable[..., Any]:
    """Return the intrinsic that uses one of the ways; None takes the best that the machine has."""

    @intrinsic
    def block_estimates(typingctx, query, groups, words, exponents, norms, table, block, terms, out):  # type: ignore[no-untyped-def]
        """Write the estimates of block `block` to `out`, (LANES,) float32; tell which reach the threshold.

        `query` is (G,) int32: four elements of 8 bits each; `groups` is (G, 3) int32: word, shift and mask
        of each group of four fields. `table` is (256,) float32, the scale of each exponent. `terms` is (4,)
        float32: center, factor, offset and threshold; the estimate is ``center + factor * scale * (sum -
        offset) - norm``, without the norm where `norms` has none. Larger is better.
        """
        signature = types.int64(query, groups, words, exponents, norms, table, types.int64, terms, out)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            known = (feature for feature in _WAYS if not feature or has(feature))
            arrays = [
                None if i == 6 else context.make_array(signature.args[i])(context, builder, args[i])
                for i in range(9)
            ]
            return _emit(builder, arrays, args[6], _WAYS[next(known) if way is None else way])

        return signature, codegen

    return block_estimates  # type: ignore[no-any-return]


def _emit(builder: Any, arrays: list[Any], block: Any, multiply: Callable[..., Any]) -> Any:
    query, groups, words, exponents, norms, table, _, terms, out = arrays
    emit = Emitter(builder)

    def start(array: Any) -> Any:
        return builder.ptrtoint(array.data, I64)

    def element(array: Any, place: Any, kind: Any) -> Any:
        return emit.load(builder.add(start(array), builder.mul(place, long(4))), kind, 4)

    count = cgutils.unpack_tuple(builder, query.shape)[0]
    width = cgutils.unpack_tuple(builder, words.shape)[1]
    row = builder.add(start(words), builder.mul(builder.mul(block, width), long(4 * LANES)))
    total = cgutils.alloca_once_value(builder, ir.Constant(INTS, [0] * LANES))
    with cgutils.for_range_slice(builder, long(0), count, long(1), intp=I64) as (g, _):
        first = builder.mul(g, long(3))
        word = builder.sext(element(groups, first, I32), I64)
        shift = element(groups, builder.add(first, long(1)), I32)
        mask = element(groups, builder.add(first, long(2)), I32)
        fields = emit.load(builder.add(row, builder.mul(word, long(4 * LANES))), INTS, 4)
        fields = builder.and_(builder.lshr(fields, emit.splat(shift)), emit.splat(mask))
        builder.store(multiply(emit, builder.load(total), fields, element(query, g, I32)), total)

    bytes_ = emit.load(
        builder.add(start(exponents), builder.mul(block, long(LANES))), ir.VectorType(_I8, LANES), 1
    )
    scale = ir.Constant(FLOATS, [0.0] * LANES)
    for lane in range(LANES):
        place = builder.zext(builder.extract_element(bytes_, ir.Constant(I32, lane)), I64)
        scale = builder.insert_element(scale, element(table, place, FLOAT), ir.Constant(I32, lane))
    center, factor, offset, threshold = (emit.splat(element(terms, long(i), FLOAT)) for i in range(4))
    inner = builder.fsub(builder.sitofp(builder.load(total), FLOATS), offset)
    scores = builder.fadd(center, builder.fmul(builder.fmul(factor, scale), inner))
    result = cgutils.alloca_once_value(builder, scores)
    has_norms = builder.icmp_signed(">", cgutils.unpack_tuple(builder, norms.shape)[1], long(0))
    with builder.if_then(has_norms):
        place = builder.add(start(norms), builder.mul(block, long(4 * LANES)))
        builder.store(builder.fsub(scores, emit.load(place, FLOATS, 4)), result)
    scores = builder.load(result)
    builder.store(scores, builder.bitcast(out.data, FLOATS.as_pointer()), align=4)
    reached = builder.fcmp_ordered(">=", scores, threshold)
    return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), I64)


block_estimates: Callable[..., Any] = make_block_estimates()
