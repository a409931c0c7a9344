"""The innermost loops of attention as SIMD, in LLVM's own terms, and fast exponentials.

Vectors are of `LANES` floats; LLVM makes of them what the machine has (AVX-512, AVX2, NEON). Keys and values
are read where they lie, by address, and widened in the register. Buffers have rows of a multiple of `LANES`
dimensions, zero beyond those of the keys.
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

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
KINDS = {"float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16}
"""Number of each type of stored elements, by NumPy's name."""

HEADS = 4
"""Query heads that the loops take at once; more are taken one four after the other."""
KEYS = 4
"""Keys that `dots` takes at once: lists of addresses have room for a multiple of it."""
_COLUMNS = 4
_AHEAD = 2 * KEYS  # from the keys that are looked at to those that are asked for

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


def _long(value: int) -> Any:
    return ir.Constant(_I64, value)


class Emitter:
    """Instructions on vectors of `LANES`."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def at(self, base: Any, *offsets: Any) -> Any:
        """Return an address: the sum of all."""
        for offset in offsets:
            base = self.builder.add(base, offset)
        return base

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, _long(factor))

    def load(self, address: Any, kind: Any, align: int) -> Any:
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=align, typ=kind)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=4)

    def store_some(self, value: Any, address: Any, mask: Any) -> None:
        """Store the lanes of floats where a mask is set."""
        pointer = self.builder.inttoptr(address, _FLOATS.as_pointer())
        function = self._intrinsic(
            f"llvm.masked.store.v{LANES}f32.p0",
            ir.VoidType(),
            [_FLOATS, pointer.type, _I32, ir.VectorType(_I1, LANES)],
        )
        self.builder.call(function, [value, pointer, ir.Constant(_I32, 4), mask])

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at an address, which may be any."""
        pointer = self.builder.inttoptr(address, _I8.as_pointer())
        function = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        self.builder.call(function, [pointer, *(ir.Constant(_I32, i) for i in (0, 3, 1))])

    def splat(self, value: Any) -> Any:
        kind = ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(
            one, other, ir.Constant(ir.VectorType(_I32, len(lanes)), [ir.Constant(_I32, i) for i in lanes])
        )

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        function = self._intrinsic(f"llvm.fmuladd.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
        return self.builder.call(function, [a, b, c])

    def stored(self, address: Any, kind: int, mask: Any | None = None) -> Any:
        """Load stored elements as floats; with a mask, only where it is set, and zero elsewhere."""
        width, bits = (4, _I32) if kind == FLOAT32 else (2, _I16)
        raw = ir.VectorType(bits, LANES)
        x = self.load(address, raw, width) if mask is None else self._masked_load(address, raw, width, mask)
        if kind == FLOAT32:
            return self.builder.bitcast(x, _FLOATS)
        if kind == FLOAT16:
            return self.builder.fpext(self.builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
        high = self.builder.shl(self.builder.zext(x, _INTS), self.splat(ir.Constant(_I32, 16)))
        return self.builder.bitcast(high, _FLOATS)

    def _masked_load(self, address: Any, raw: Any, width: int, mask: Any) -> Any:
        pointer = self.builder.inttoptr(address, raw.as_pointer())
        function = self._intrinsic(
            f"llvm.masked.load.v{LANES}i{8 * width}.p0",
            raw,
            [pointer.type, _I32, ir.VectorType(_I1, LANES), raw],
        )
        zeros = ir.Constant(raw, [ir.Constant(raw.element, 0)] * LANES)
        return self.builder.call(function, [pointer, ir.Constant(_I32, width), mask, zeros])

    def below(self, count: Any) -> Any:
        """Return a mask of the first `count` lanes."""
        numbers = ir.Constant(_INTS, [ir.Constant(_I32, i) for i in range(LANES)])
        return self.builder.icmp_unsigned("<", numbers, self.splat(self.builder.trunc(count, _I32)))

    def sums(self, vectors: list[Any]) -> Any:
        """Return the sum of each of `KEYS` vectors, as a short vector."""
        add, shuffle = self.builder.fadd, self.shuffle
        half, quarter = LANES // 2, LANES // 4
        low = [*range(half), *range(LANES, LANES + half)]
        high = [*range(half, LANES), *range(LANES + half, 2 * LANES)]
        pairs = [
            add(shuffle(a, b, low), shuffle(a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        low = [*range(quarter), *range(half, half + quarter)]
        low += [LANES + i for i in low]
        high = [i + quarter for i in low]
        first, second = pairs
        total = add(shuffle(first, second, low), shuffle(first, second, high))
        step = quarter // 2
        while step:
            turned = [i // quarter * quarter + (i + step) % quarter for i in range(LANES)]
            total = add(total, shuffle(total, total, turned))
            step //= 2
        return shuffle(total, total, [i * quarter for i in range(KEYS)])

    def folded(self, vectors: list[Any], better: str) -> Any:
        """Return the element of all vectors that is `better`, ``">"`` or ``"<"``, than the others."""
        builder, found = self.builder, vectors[0]
        for other in vectors[1:]:
            found = builder.select(builder.fcmp_ordered(better, other, found), other, found)
        step = LANES // 2
        while step:
            other = self.shuffle(found, found, [(i + step) % LANES for i in range(LANES)])
            found = builder.select(builder.fcmp_ordered(better, other, found), other, found)
            step //= 2
        return builder.extract_element(found, ir.Constant(_I32, 0))

    def dot4(self, total: Any, fields: Any, query: Any) -> Any:
        """Add to each lane of `total` four products of a byte of `fields` and a signed one of `query`."""
        builder = self.builder
        for shift in (0, 8, 16, 24):
            field = builder.and_(
                builder.lshr(fields, self.splat(ir.Constant(_I32, shift))), self.splat(ir.Constant(_I32, 255))
            )
            byte = builder.ashr(builder.shl(query, ir.Constant(_I32, 24 - shift)), ir.Constant(_I32, 24))
            total = builder.add(total, builder.mul(field, self.splat(byte)))
        return total

    def dot4_vnni(self, total: Any, fields: Any, query: Any) -> Any:
        """The same in one instruction."""
        return self.dot4_vectors(total, fields, self.splat(query))

    def dot4_vectors(self, total: Any, one: Any, other: Any) -> Any:
        """Add four products of bytes of `one` and signed ones of `other` to each lane, in one instruction."""
        function = self._intrinsic("llvm.x86.avx512.vpdpbusd.512", _INTS, [_INTS] * 3)
        return self.builder.call(function, [total, one, other])


def _cases(builder: Any, kind: Any, count: Any) -> Any:
    """Emit what follows once for each kind and number of heads, where they are those of the call."""
    for known in KINDS.values():
        for heads in range(1, HEADS + 1):
            same_kind = builder.icmp_signed("==", kind, _long(known))
            same_heads = builder.icmp_signed("==", count, _long(heads))
            with builder.if_then(builder.and_(same_kind, same_heads)):
                yield known, heads


def _data(context: Any, builder: Any, signature: Any, args: Any, i: int) -> tuple[Any, Any]:
    """Address of an array, and the bytes from row to row."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.ptrtoint(array.data, _I64), cgutils.unpack_tuple(builder, array.strides)[0]


def _dots(typingctx, kind, queries, keys, values, n, d, ahead, out):  # type: ignore[no-untyped-def]
    """Write ``queries[h] . key`` to ``out[h, k]`` for the key of `kind` at each address ``keys[k]``.

    `queries` is (1 to `HEADS`, padded d) float32; of `keys` and columns of `out`, the next multiple of `KEYS`
    from `n` up is read and written. With `ahead`, 1 and not 0, keys further on and what is at the addresses
    `values` are asked for before they are needed, which the machine does by itself where they lie side by
    side.
    """
    signature = types.void(types.int64, queries, keys, values, *[types.int64] * 3, out)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = cgutils.unpack_tuple(
            builder, context.make_array(signature.args[1])(context, builder, args[1]).shape
        )[0]
        for known, heads in _cases(builder, args[0], count):
            q, k, v, o = (_data(context, builder, signature, args, i) for i in (1, 2, 3, 7))
            n, d, ahead = args[4:7]
            _emit_dots(Emitter(builder), known, heads, q, k[0], v[0], n, d, ahead, o)
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
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(KEYS)] for _ in range(heads)]
    tail = builder.and_(d, _long(LANES - 1))
    whole = builder.sub(d, tail)
    with cgutils.for_range_slice(builder, _long(0), n, _long(KEYS), intp=_I64) as (k, _):
        for total in (total for row in totals for total in row):
            builder.store(zero, total)
        places = [emit.load(emit.at(keys, emit.times(k, 8), _long(8 * j)), _I64, 8) for j in range(KEYS)]
        with builder.if_then(builder.icmp_signed("==", ahead, _long(1))):
            later = builder.add(k, _long(_AHEAD))
            later = builder.select(builder.icmp_signed("<", later, n), later, k)
            coming = [(start, i, 8 * j) for start, i in ((keys, later), (values, k)) for j in range(KEYS)]
            wanted = [emit.load(emit.at(x, emit.times(i, 8), _long(j)), _I64, 8) for x, i, j in coming]
            end = emit.times(d, width)
            with cgutils.for_range_slice(builder, _long(0), end, _long(64), intp=_I64) as (i, _):
                for place in wanted:
                    emit.prefetch(emit.at(place, i))

        def step(i: Any, mask: Any | None, places: list[Any] = places) -> None:
            x = [emit.stored(emit.at(place, emit.times(i, width)), kind, mask) for place in places]
            for h, row in enumerate(totals):
                query = emit.load(emit.at(q[0], emit.times(q[1], h), emit.times(i, 4)), _FLOATS, 4)
                for j, total in enumerate(row):
                    builder.store(emit.multiply_add(query, x[j], builder.load(total)), total)

        with cgutils.for_range_slice(builder, _long(0), whole, _long(LANES), intp=_I64) as (i, _):
            step(i, None)
        with builder.if_then(builder.icmp_signed(">", tail, _long(0))):
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
        count = cgutils.unpack_tuple(
            builder, context.make_array(signature.args[1])(context, builder, args[1]).shape
        )[0]
        for known, heads in _cases(builder, args[0], count):
            w, v, o = (_data(context, builder, signature, args, i) for i in (1, 2, 5))
            _emit_mix(Emitter(builder), known, heads, w, v[0], args[3], args[4], o)
        return context.get_dummy_value()

    return signature, codegen


def _emit_mix(emit: Emitter, kind: int, heads: int, w: Any, values: Any, n: Any, d: Any, out: Any) -> None:
    builder, width = emit.builder, 4 if kind == FLOAT32 else 2
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(_COLUMNS)] for _ in range(heads)]

    def columns(i: Any, count: int, mask: Any | None) -> None:
        """Dimensions from `i` up, `count` vectors of them."""
        for row in totals:
            for total in row[:count]:
                builder.store(zero, total)
        with cgutils.for_range_slice(builder, _long(0), n, _long(1), intp=_I64) as (k, _):
            place = emit.at(emit.load(emit.at(values, emit.times(k, 8)), _I64, 8), emit.times(i, width))
            x = [emit.stored(emit.at(place, _long(LANES * width * c)), kind, mask) for c in range(count)]
            for h, row in enumerate(totals):
                weight = emit.load(emit.at(w[0], emit.times(w[1], h), emit.times(k, 4)), _FLOAT, 4)
                weight = emit.splat(weight)
                for c, total in enumerate(row[:count]):
                    builder.store(emit.multiply_add(weight, x[c], builder.load(total)), total)
        for h, row in enumerate(totals):
            for c, total in enumerate(row[:count]):
                target = emit.at(out[0], emit.times(out[1], h), emit.times(i, 4), _long(4 * LANES * c))
                emit.store(builder.load(total), target)

    block = LANES * _COLUMNS
    tail = builder.and_(d, _long(LANES - 1))
    whole = builder.sub(d, tail)
    blocks = builder.sub(d, builder.and_(d, _long(block - 1)))
    with cgutils.for_range_slice(builder, _long(0), blocks, _long(block), intp=_I64) as (i, _):
        columns(i, _COLUMNS, None)
    with cgutils.for_range_slice(builder, blocks, whole, _long(LANES), intp=_I64) as (i, _):
        columns(i, 1, None)
    with builder.if_then(builder.icmp_signed(">", tail, _long(0))):
        columns(whole, 1, emit.below(tail))


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
            vnni = not portable and "+avx512vnni" in context.codegen()._get_host_cpu_features()
            dot4 = emit.dot4_vnni if vnni else emit.dot4
            places = {
                name: _data(context, builder, signature, args, i)
                for i, name in (
                    (1, "widths"),
                    (2, "q"),
                    (3, "scales"),
                    (4, "factors"),
                    (5, "centers"),
                    (8, "out"),
                )
            }
            count, length = (
                cgutils.unpack_tuple(
                    builder, context.make_array(signature.args[i])(context, builder, args[i]).shape
                )[0]
                for i in (2, 1)
            )
            lanes, first = emit.below(args[6]), emit.times(args[9], 4)
            for heads in range(1, HEADS + 1):
                with builder.if_then(builder.icmp_signed("==", count, _long(heads))):
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
    zero = ir.Constant(_INTS, [ir.Constant(_I32, 0)] * LANES)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(heads)]
    group = cgutils.alloca_once(builder, _I64)
    for total in totals:
        builder.store(zero, total)
    builder.store(_long(0), group)
    with cgutils.for_range_slice(builder, _long(0), count, _long(1), intp=_I64) as (i, _):
        word = emit.load(emit.at(words, emit.times(i, 4 * LANES)), _INTS, 4)
        found = emit.load(emit.at(widths, emit.times(i, 8)), _I64, 8)
        for bits in (1, 2, 4):
            with builder.if_then(builder.icmp_signed("==", found, _long(bits))):
                mask = emit.splat(ir.Constant(_I32, 0x01010101 * ((1 << bits) - 1)))
                for shift in range(0, 8, bits):
                    moved = builder.lshr(word, emit.splat(ir.Constant(_I32, shift))) if shift else word
                    fields = builder.and_(moved, mask)
                    at = builder.load(group)
                    for h, total in enumerate(totals):
                        place = emit.at(q[0], emit.times(q[1], h), emit.times(at, 4))
                        query = emit.load(place, _I32, 4)
                        builder.store(dot4(builder.load(total), fields, query), total)
                    builder.store(emit.at(at, _long(1)), group)
    return [builder.load(total) for total in totals]


def _emit_estimates(
    emit: Emitter, sums: list[Any], places: dict[str, tuple[Any, Any]], lanes: Any, cap: Any, first: Any
) -> None:
    builder = emit.builder
    lowest = ir.Constant(_FLOATS, [-math.inf] * LANES)
    f, most = emit.load(emit.at(places["scales"][0], first), _FLOATS, 4), emit.splat(cap)
    for h, total in enumerate(sums):
        start, row = places["factors"]
        places_of = [emit.at(start, emit.times(row, i), _long(4 * h)) for i in range(3)]
        factor, offset, kappa = (emit.splat(emit.load(place, _FLOAT, 4)) for place in places_of)
        center = emit.splat(
            emit.load(emit.at(places["centers"][0], emit.times(places["centers"][1], h)), _FLOAT, 4)
        )
        second = builder.fmul(builder.fmul(kappa, f), f)
        second = builder.select(builder.fcmp_ordered("<", second, most), second, most)
        whole = builder.fsub(builder.sitofp(total, _FLOATS), offset)
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
        n, count = (
            cgutils.unpack_tuple(
                builder, context.make_array(signature.args[i])(context, builder, args[i]).shape
            )[0]
            for i in (0, 3)
        )
        places, w, o = (_data(context, builder, signature, args, i) for i in (0, 3, 4))
        for heads in range(1, HEADS + 1):
            with builder.if_then(builder.icmp_signed("==", count, _long(heads))):
                _emit_field_sums(Emitter(builder), heads, places[0], n, args[1], args[2], w, o)
        return context.get_dummy_value()

    return signature, codegen


def _emit_field_sums(
    emit: Emitter, heads: int, places: Any, n: Any, shift: Any, mask: Any, w: Any, out: Any
) -> None:
    builder = emit.builder
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(4)] for _ in range(heads)]
    for total in (total for row in totals for total in row):
        builder.store(zero, total)
    shifts, masks = (emit.splat(builder.trunc(value, _I32)) for value in (shift, mask))
    with cgutils.for_range_slice(builder, _long(0), n, _long(1), intp=_I64) as (k, _):
        place = emit.load(emit.at(places, emit.times(k, 8)), _I64, 8)
        moved = builder.lshr(emit.load(place, _INTS, 4), shifts)
        weights = [
            emit.load(emit.at(w[0], emit.times(w[1], h), emit.times(k, 4 * LANES)), _FLOATS, 4)
            for h in range(heads)
        ]
        for c in range(4):
            byte = builder.lshr(moved, emit.splat(ir.Constant(_I32, 8 * c))) if c else moved
            field = builder.sitofp(builder.and_(byte, masks), _FLOATS)
            for weight, row in zip(weights, totals, strict=True):
                builder.store(emit.multiply_add(weight, field, builder.load(row[c])), row[c])
    for h, row in enumerate(totals):
        found = emit.sums([builder.load(total) for total in row])
        emit.store(found, emit.at(out[0], emit.times(out[1], h)))


def _extremes(typingctx, row):  # type: ignore[no-untyped-def]
    """Return the largest of contiguous float32, and the lowest of those that are above minus infinity; minus
    infinity and infinity of nothing.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit, array = Emitter(builder), context.make_array(signature.args[0])(context, builder, args[0])
        low, high = (ir.Constant(_FLOAT, sign * math.inf) for sign in (-1, 1))
        found = _emit_extremes(emit, builder.ptrtoint(array.data, _I64), array.nitems, low, high)
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
        x = emit.stored(emit.at(at, emit.times(i, 4), _long(4 * LANES * c)), FLOAT32, mask)
        x = x if mask is None else builder.select(mask, x, lows)
        top, bottom = builder.load(most[c]), builder.load(least[c])
        builder.store(builder.select(builder.fcmp_ordered(">", x, top), x, top), most[c])
        x = builder.select(builder.fcmp_ordered(">", x, lows), x, highs)
        builder.store(builder.select(builder.fcmp_ordered("<", x, bottom), x, bottom), least[c])

    tail = builder.and_(n, _long(LANES - 1))
    whole = builder.sub(n, tail)
    blocks = builder.sub(n, builder.and_(n, _long(_COLUMNS * LANES - 1)))
    with cgutils.for_range_slice(builder, _long(0), blocks, _long(_COLUMNS * LANES), intp=_I64) as (i, _):
        for c in range(_COLUMNS):
            look(i, c, None)
    with cgutils.for_range_slice(builder, blocks, whole, _long(LANES), intp=_I64) as (i, _):
        look(i, 0, None)
    with builder.if_then(builder.icmp_signed(">", tail, _long(0))):
        look(whole, 0, emit.below(tail))
    return [emit.folded([builder.load(x) for x in part], sign) for part, sign in ((most, ">"), (least, "<"))]


extremes: Callable[..., Any] = intrinsic(_extremes)


@intrinsic
def lanes_equal(typingctx, numbers, first, value):  # type: ignore[no-untyped-def]
    """Return as bits which of ``numbers[first : first + LANES]``, int32, are `value`, and which are lower."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        at = builder.ptrtoint(context.make_array(signature.args[0])(context, builder, args[0]).data, _I64)
        found, known = emit.load(emit.at(at, emit.times(args[1], 4)), _INTS, 4), emit.splat(args[2])
        masks = [builder.icmp_signed(test, found, known) for test in ("==", "<")]
        bits = [builder.zext(builder.bitcast(mask, ir.IntType(LANES)), _I64) for mask in masks]
        return context.make_tuple(builder, signature.return_type, bits)

    return types.UniTuple(types.int64, 2)(numbers, types.int64, types.int32), codegen


@intrinsic
def lowest_bit(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the number of the lowest bit that is set, of an int64 that is not zero."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.Constant(_I1, 1))

    return types.int64(types.int64), codegen


@intrinsic
def prefetch(typingctx, address, size):  # type: ignore[no-untyped-def]
    """Ask for `size` bytes at an address that will soon be read."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        with cgutils.for_range_slice(builder, _long(0), args[1], _long(64), intp=_I64) as (i, _):
            emit.prefetch(emit.at(args[0], i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


field_sums: Callable[..., Any] = intrinsic(_field_sums)
dots: Callable[..., Any] = intrinsic(_dots)
mix: Callable[..., Any] = intrinsic(_mix)
estimate_page: Callable[..., Any] = _make_estimate_page(portable=False)
estimate_page_portable: Callable[..., Any] = _make_estimate_page(portable=True)
