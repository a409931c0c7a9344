"""The innermost loops over codes as SIMD: estimates of a page of keys, and sums of fields over keys."""

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
    FLOATS,
    HEADS,
    I32,
    I64,
    INTS,
    Emitter,
    data_of,
    long,
    rows_of,
)
from saapindex.backends.cpu.machine import has


def _make_estimate_page(portable: bool) -> Any:
    def estimate_page(typingctx, words, widths, queries, scales, factors, centers, count, cap, out, first):  # type: ignore[no-untyped-def]
        """Write the estimates of the keys of the page whose words are at `words`, minus infinity beyond
        `count`.

        With ``f = scales[first + lane]``, that of head `h` is ``factor * f * (sum - offset) + min(kappa *
        f^2, cap) + centers[h]``, where `sum` is that of ``query * field`` over the fields of the key.

        `widths` is (W,) int64; `queries` is (1 to `HEADS`, groups) int32, four signed bytes each, for four
        fields that lie in the four bytes of a word at the same shift; `factors` is (3, heads) float32:
        factors, offsets and kappas; `centers` is (heads,), and `out` is (heads, ...) float32, columns ``first
        : first + LANES``.
        """
        signature = types.void(
            types.int64,
            widths,
            queries,
            scales,
            factors,
            centers,
            types.int64,
            types.float32,
            out,
            types.int64,
        )

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emitter(builder)
            vnni = not portable and has("avx512vnni")
            dot4 = emit.dot4_vnni if vnni else emit.dot4
            places = {
                name: data_of(context, builder, signature, args, i)
                for i, name in (
                    (1, "widths"),
                    (2, "q"),
                    (3, "scales"),
                    (4, "factors"),
                    (5, "centers"),
                    (8, "out"),
                )
            }
            count, length = (rows_of(context, builder, signature, args, i) for i in (2, 1))
            lanes, first = emit.below(args[6]), emit.times(args[9], 4)
            for heads in range(1, HEADS + 1):
                with builder.if_then(builder.icmp_signed("==", count, long(heads))):
                    sums = _emit_code_sums(
                        emit, dot4, heads, args[0], places["widths"][0], length, places["q"]
                    )
                    _emit_estimates(emit, sums, places, lanes, args[7], first)
            return context.get_dummy_value()

        return signature, codegen

    return intrinsic(estimate_page)


def _emit_code_sums(
    emit: Emitter, dot4: Callable[..., Any], heads: int, words: Any, widths: Any, count: Any, q: Any
) -> list[Any]:
    """Sum up fields times queries, for each head."""
    builder = emit.builder
    zero = ir.Constant(INTS, [ir.Constant(I32, 0)] * LANES)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(heads)]
    group = cgutils.alloca_once(builder, I64)
    for total in totals:
        builder.store(zero, total)
    builder.store(long(0), group)
    with cgutils.for_range_slice(builder, long(0), count, long(1), intp=I64) as (i, _):
        word = emit.load(emit.at(words, emit.times(i, 4 * LANES)), INTS, 4)
        found = emit.load(emit.at(widths, emit.times(i, 8)), I64, 8)
        for bits in (1, 2, 4):
            with builder.if_then(builder.icmp_signed("==", found, long(bits))):
                mask = emit.splat(ir.Constant(I32, 0x01010101 * ((1 << bits) - 1)))
                for shift in range(0, 8, bits):
                    moved = builder.lshr(word, emit.splat(ir.Constant(I32, shift))) if shift else word
                    fields = builder.and_(moved, mask)
                    at = builder.load(group)
                    for h, total in enumerate(totals):
                        place = emit.at(q[0], emit.times(q[1], h), emit.times(at, 4))
                        query = emit.load(place, I32, 4)
                        builder.store(dot4(builder.load(total), fields, query), total)
                    builder.store(emit.at(at, long(1)), group)
    return [builder.load(total) for total in totals]


def _emit_estimates(
    emit: Emitter, sums: list[Any], places: dict[str, tuple[Any, Any]], lanes: Any, cap: Any, first: Any
) -> None:
    builder = emit.builder
    lowest = ir.Constant(FLOATS, [-math.inf] * LANES)
    f, most = emit.load(emit.at(places["scales"][0], first), FLOATS, 4), emit.splat(cap)
    for h, total in enumerate(sums):
        start, row = places["factors"]
        places_of = [emit.at(start, emit.times(row, i), long(4 * h)) for i in range(3)]
        factor, offset, kappa = (emit.splat(emit.load(place, FLOAT, 4)) for place in places_of)
        center = emit.splat(
            emit.load(emit.at(places["centers"][0], emit.times(places["centers"][1], h)), FLOAT, 4)
        )
        second = builder.fmul(builder.fmul(kappa, f), f)
        second = builder.select(builder.fcmp_ordered("<", second, most), second, most)
        whole = builder.fsub(builder.sitofp(total, FLOATS), offset)
        found = emit.multiply_add(builder.fmul(factor, f), whole, builder.fadd(second, center))
        out, stride = places["out"]
        emit.store(builder.select(lanes, found, lowest), emit.at(out, emit.times(stride, h), first))


def _field_sums(typingctx, places, shift, mask, weights, out):  # type: ignore[no-untyped-def]
    """Write ``sum weights[h, k] * field`` to ``out[h, c]`` for the fields at one shift of the four bytes `c`.

    `places`, (n,) int64, are the addresses of `LANES` words each; `weights` is (1 to `HEADS`, n * `LANES`)
    float32; `out` is (heads, 4) float32.
    """
    signature = types.void(places, types.int64, types.int64, weights, out)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        n, count = (rows_of(context, builder, signature, args, i) for i in (0, 3))
        places, w, o = (data_of(context, builder, signature, args, i) for i in (0, 3, 4))
        for heads in range(1, HEADS + 1):
            with builder.if_then(builder.icmp_signed("==", count, long(heads))):
                _emit_field_sums(Emitter(builder), heads, places[0], n, args[1], args[2], w, o)
        return context.get_dummy_value()

    return signature, codegen


def _emit_field_sums(
    emit: Emitter, heads: int, places: Any, n: Any, shift: Any, mask: Any, w: Any, out: Any
) -> None:
    builder = emit.builder
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(4)] for _ in range(heads)]
    for total in (total for row in totals for total in row):
        builder.store(zero, total)
    shifts, masks = (emit.splat(builder.trunc(value, I32)) for value in (shift, mask))
    with cgutils.for_range_slice(builder, long(0), n, long(1), intp=I64) as (k, _):
        place = emit.load(emit.at(places, emit.times(k, 8)), I64, 8)
        moved = builder.lshr(emit.load(place, INTS, 4), shifts)
        weights = [
            emit.load(emit.at(w[0], emit.times(w[1], h), emit.times(k, 4 * LANES)), FLOATS, 4)
            for h in range(heads)
        ]
        for c in range(4):
            byte = builder.lshr(moved, emit.splat(ir.Constant(I32, 8 * c))) if c else moved
            field = builder.sitofp(builder.and_(byte, masks), FLOATS)
            for weight, row in zip(weights, totals, strict=True):
                builder.store(emit.multiply_add(weight, field, builder.load(row[c])), row[c])
    for h, row in enumerate(totals):
        found = emit.sums([builder.load(total) for total in row])
        emit.store(found, emit.at(out[0], emit.times(out[1], h)))


field_sums: Callable[..., Any] = intrinsic(_field_sums)
estimate_page: Callable[..., Any] = _make_estimate_page(portable=False)
estimate_page_portable: Callable[..., Any] = _make_estimate_page(portable=True)
