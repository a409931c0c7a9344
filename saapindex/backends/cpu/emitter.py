"""Instructions on vectors of floats, in LLVM's own terms.

Vectors are of `LANES` floats; LLVM makes of them what the machine has (AVX-512, AVX2, NEON).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from saapindex.backends.base import LANES

__all__ = [
    "BFLOAT16", "FLOAT", "FLOAT16", "FLOAT32", "FLOATS", "HEADS", "I1", "I32", "I64", "INTS", "KEYS", "KINDS",
    "Emitter", "cases", "data_of", "long", "rows_of",
]  # fmt: skip

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
KINDS = {"float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16}
"""Number of each type of stored elements, by NumPy's name."""

HEADS = 4
"""Query heads that the loops take at once; more are taken one four after the other."""
KEYS = 4
"""Keys that the loops take at once: lists of addresses have room for a multiple of it."""

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)


def long(value: int) -> Any:
    """Return a constant, an int64."""
    return ir.Constant(I64, value)


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
        """Return a multiple of an int64."""
        return self.builder.mul(value, long(factor))

    def load(self, address: Any, kind: Any, align: int) -> Any:
        """Read a value of type `kind` at an address that is a multiple of `align`."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=align, typ=kind)

    def store(self, value: Any, address: Any) -> None:
        """Write a value to an address, a multiple of four."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=4)

    def store_some(self, value: Any, address: Any, mask: Any) -> None:
        """Store the lanes of floats where a mask is set."""
        pointer = self.builder.inttoptr(address, FLOATS.as_pointer())
        function = self._intrinsic(
            f"llvm.masked.store.v{LANES}f32.p0",
            ir.VoidType(),
            [FLOATS, pointer.type, I32, ir.VectorType(I1, LANES)],
        )
        self.builder.call(function, [value, pointer, ir.Constant(I32, 4), mask])

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at an address, which may be any."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        function = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [pointer.type, I32, I32, I32])
        self.builder.call(function, [pointer, *(ir.Constant(I32, i) for i in (0, 3, 1))])

    def splat(self, value: Any) -> Any:
        """Return a vector of the same number in every lane."""
        kind = ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """Return these lanes of two vectors, those of the second one counted behind the first."""
        return self.builder.shuffle_vector(
            one, other, ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        )

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a * b + c``, rounded once where the machine can."""
        function = self._intrinsic(f"llvm.fmuladd.v{LANES}f32", FLOATS, [FLOATS] * 3)
        return self.builder.call(function, [a, b, c])

    def stored(self, address: Any, kind: int, mask: Any | None = None) -> Any:
        """Load stored elements as floats; with a mask, only where it is set, and zero elsewhere."""
        width, bits = (4, I32) if kind == FLOAT32 else (2, I16)
        raw = ir.VectorType(bits, LANES)
        x = self.load(address, raw, width) if mask is None else self._masked_load(address, raw, width, mask)
        if kind == FLOAT32:
            return self.builder.bitcast(x, FLOATS)
        if kind == FLOAT16:
            return self.builder.fpext(self.builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        high = self.builder.shl(self.builder.zext(x, INTS), self.splat(ir.Constant(I32, 16)))
        return self.builder.bitcast(high, FLOATS)

    def _masked_load(self, address: Any, raw: Any, width: int, mask: Any) -> Any:
        pointer = self.builder.inttoptr(address, raw.as_pointer())
        function = self._intrinsic(
            f"llvm.masked.load.v{LANES}i{8 * width}.p0",
            raw,
            [pointer.type, I32, ir.VectorType(I1, LANES), raw],
        )
        zeros = ir.Constant(raw, [ir.Constant(raw.element, 0)] * LANES)
        return self.builder.call(function, [pointer, ir.Constant(I32, width), mask, zeros])

    def below(self, count: Any) -> Any:
        """Return a mask of the first `count` lanes."""
        numbers = ir.Constant(INTS, [ir.Constant(I32, i) for i in range(LANES)])
        return self.builder.icmp_unsigned("<", numbers, self.splat(self.builder.trunc(count, I32)))

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
        return builder.extract_element(found, ir.Constant(I32, 0))

    def dot4(self, total: Any, fields: Any, query: Any) -> Any:
        """Add to each lane of `total` four products of a byte of `fields` and a signed one of `query`."""
        builder = self.builder
        for shift in (0, 8, 16, 24):
            field = builder.and_(
                builder.lshr(fields, self.splat(ir.Constant(I32, shift))), self.splat(ir.Constant(I32, 255))
            )
            byte = builder.ashr(builder.shl(query, ir.Constant(I32, 24 - shift)), ir.Constant(I32, 24))
            total = builder.add(total, builder.mul(field, self.splat(byte)))
        return total

    def dot4_vnni(self, total: Any, fields: Any, query: Any) -> Any:
        """The same in one instruction."""
        return self.dot4_vectors(total, fields, self.splat(query))

    def dot4_vectors(self, total: Any, one: Any, other: Any) -> Any:
        """Add four products of bytes of `one` and signed ones of `other` to each lane, in one instruction."""
        # LLVM widens this signature by itself where it knows the newer one, of bytes.
        function = self._intrinsic("llvm.x86.avx512.vpdpbusd.512", INTS, [INTS] * 3)
        return self.builder.call(function, [total, one, other])


def cases(builder: Any, kind: Any, count: Any) -> Iterator[tuple[int, int]]:
    """Emit what follows once for each kind and number of heads, where they are those of the call."""
    for known in KINDS.values():
        for heads in range(1, HEADS + 1):
            same_kind = builder.icmp_signed("==", kind, long(known))
            same_heads = builder.icmp_signed("==", count, long(heads))
            with builder.if_then(builder.and_(same_kind, same_heads)):
                yield known, heads


def data_of(context: Any, builder: Any, signature: Any, args: Any, i: int) -> tuple[Any, Any]:
    """Address of an array, and the bytes from row to row."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.ptrtoint(array.data, I64), cgutils.unpack_tuple(builder, array.strides)[0]


def rows_of(context: Any, builder: Any, signature: Any, args: Any, i: int) -> Any:
    """How many rows an array has."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return cgutils.unpack_tuple(builder, array.shape)[0]
