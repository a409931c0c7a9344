"""The innermost loop of the scan: queries against the `LANES` keys of a block, as SIMD.

A block holds its keys side by side, dimension by dimension, so each step is one multiply-add over all of
them and no sum runs across a register. LLVM does not find this by itself, so the loop is written in its
own terms; it makes of it what the machine has (AVX-512, AVX2, NEON). Half-precision keys are widened in
the register, which halves the bytes read.

There are two forms: one query against a block, and a tile of `TILE` queries against it, which reads (and
widens) the keys once for all of them. A query's score is the same sum in the same order in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saapindex.backends.base import LANES
from saapindex.backends.cpu.machine import has

# Independent sums of a query, to hide the latency of a multiply-add.
_SUMS = 4
WIDE = has("avx512f")
"""Whether there is AVX-512."""
TILE = 4 if WIDE else 2
"""Queries of a tile: as many as have their sums in registers. Four times 16 lanes fill an int64 of bits."""


def _make(l2: bool) -> Any:
    def block_scores(typingctx, query, vectors, block, threshold, out):  # type: ignore[no-untyped-def]
        """Write the scores of block `block` to `out`, (LANES,) float32; tell which reach `threshold`.

        `query` is (d,) float32; `vectors` is (blocks, d, LANES) float32, or uint16 that holds float16.
        Larger is better: the score is the inner product, or minus the squared distance. The result has
        bit `i` set where lane `i` is at least `threshold`.
        """
        signature = types.int64(query, vectors, types.int64, types.float32, out)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            q, o = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 4))
            emit = _Emitter(context, builder, signature.args[1], args[1], args[2], l2)
            return emit.scores([emit.address(q.data)], [emit.address(o.data)], [args[3]])

        return signature, codegen

    return intrinsic(block_scores)


def _make_tile(l2: bool) -> Any:
    def tile_scores(typingctx, queries, rows, vectors, block, thresholds, out, column):  # type: ignore[no-untyped-def]
        """Score `TILE` queries against block `block` at once.

        Rows `rows`, (TILE,) int64, of `queries`, (q, d) float32, C-contiguous. Scores go to
        ``out[t, column : column + LANES]``, out C-contiguous; bit ``LANES * t + i`` of the result is set
        where lane `i` is at least ``thresholds[t]``.
        """
        signature = types.int64(queries, rows, vectors, types.int64, thresholds, out, types.int64)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            q, r, t, o = (
                context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 4, 5)
            )
            emit = _Emitter(context, builder, signature.args[2], args[2], args[3], l2)
            at = [emit.element(r.data, i, ir.IntType(64), 8) for i in range(TILE)]
            limits = [emit.element(t.data, i, ir.FloatType(), 4) for i in range(TILE)]
            steps = [cgutils.unpack_tuple(builder, array.strides)[0] for array in (q, o)]
            here = builder.add(emit.address(o.data), builder.mul(args[6], emit.number(4)))
            return emit.scores(
                [builder.add(emit.address(q.data), builder.mul(row, steps[0])) for row in at],
                [builder.add(here, builder.mul(emit.number(i), steps[1])) for i in range(TILE)],
                limits,
            )

        return signature, codegen

    return intrinsic(tile_scores)


class _Emitter:
    """Writes the loop over dimensions for some queries and one block, in LLVM's terms."""

    def __init__(self, context: Any, builder: Any, kind: Any, vectors: Any, block: Any, l2: bool) -> None:
        self.builder, self.l2 = builder, l2
        self.half = kind.dtype == types.uint16
        self.width = 2 if self.half else 4
        self.i64, self.single = ir.IntType(64), ir.FloatType()
        self.lanes = ir.VectorType(self.single, LANES)
        self.stored = ir.VectorType(ir.HalfType() if self.half else self.single, LANES)
        array = context.make_array(kind)(context, builder, vectors)
        self.d = cgutils.unpack_tuple(builder, array.shape)[1]
        self.row = self.number(LANES * self.width)
        offset = builder.mul(builder.mul(block, self.d), self.row)
        self.start = builder.add(self.address(array.data), offset)
        self.multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.lanes, [self.lanes] * 3), f"llvm.fmuladd.v{LANES}f32"
        )

    def number(self, value: int) -> Any:
        return ir.Constant(self.i64, value)

    def address(self, pointer: Any) -> Any:
        return self.builder.ptrtoint(pointer, self.i64)

    def load(self, address: Any, kind: Any, align: int) -> Any:
        builder = self.builder
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)

    def element(self, pointer: Any, i: int, kind: Any, width: int) -> Any:
        return self.load(self.builder.add(self.address(pointer), self.number(i * width)), kind, width)

    def spread(self, value: Any) -> Any:
        builder, i32 = self.builder, ir.IntType(32)
        nothing = ir.Constant(self.lanes, ir.Undefined)
        first = builder.insert_element(nothing, value, ir.Constant(i32, 0))
        return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

    def step(self, i: Any, queries: list[Any], totals: list[Any]) -> None:
        """Add dimension `i` of every query to its sum."""
        builder = self.builder
        x = self.load(builder.add(self.start, builder.mul(i, self.row)), self.stored, self.width)
        x = builder.fpext(x, self.lanes) if self.half else x
        place = builder.mul(i, self.number(4))
        for query, total in zip(queries, totals, strict=True):
            q, key = self.spread(self.load(builder.add(query, place), self.single, 4)), x
            if self.l2:
                q = builder.fsub(q, x)
                key = builder.fneg(q)
            builder.store(builder.call(self.multiply_add, [q, key, builder.load(total)]), total)

    def scores(self, queries: list[Any], outs: list[Any], thresholds: list[Any]) -> Any:
        """Write the scores of each query at these addresses; return the bits of those that reach."""
        builder, number = self.builder, self.number
        nothing = ir.Constant(self.lanes, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, nothing) for _ in queries] for _ in range(_SUMS)]
        whole = builder.and_(self.d, number(-_SUMS))
        loop = cgutils.for_range_slice
        with loop(builder, number(0), whole, number(_SUMS), intp=self.i64) as (i, _):
            for offset, totals in enumerate(sums):
                self.step(builder.add(i, number(offset)), queries, totals)
        with loop(builder, whole, self.d, number(1), intp=self.i64) as (i, _):
            self.step(i, queries, sums[0])
        bits = number(0)
        for t, (out, threshold) in enumerate(zip(outs, thresholds, strict=True)):
            first, second, third, fourth = (builder.load(totals[t]) for totals in sums)
            scores = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
            builder.store(scores, builder.inttoptr(out, self.lanes.as_pointer()), align=4)
            reached = builder.fcmp_ordered(">=", scores, self.spread(threshold))
            lanes = builder.zext(builder.bitcast(reached, ir.IntType(LANES)), self.i64)
            bits = builder.or_(bits, builder.shl(lanes, number(LANES * t)))
        return bits


@intrinsic
def first_bit(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the number of the lowest bit of an int64 that is set; there must be one."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


def _lanes_at(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> tuple[Any, Any]:
    """Return where ``array[start : start + LANES]`` of float32 lies, and what is there."""
    lanes = ir.VectorType(ir.FloatType(), LANES)
    address = builder.ptrtoint(context.make_array(kind)(context, builder, array).data, ir.IntType(64))
    address = builder.add(address, builder.mul(start, ir.Constant(ir.IntType(64), 4)))
    pointer = builder.inttoptr(address, lanes.as_pointer())
    return pointer, builder.load(pointer, align=4, typ=lanes)


@intrinsic
def reaching(typingctx, scores, start, threshold):  # type: ignore[no-untyped-def]
    """Tell as bits which of ``scores[start : start + LANES]``, float32, are at least `threshold`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, loaded = _lanes_at(context, builder, signature.args[0], args[0], args[1])
        limit = ir.Constant(loaded.type, ir.Undefined)
        for lane in range(LANES):
            limit = builder.insert_element(limit, args[2], ir.Constant(ir.IntType(32), lane))
        reached = builder.fcmp_ordered(">=", loaded, limit)
        return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(scores, types.int64, types.float32), codegen


@intrinsic
def pack_lanes(typingctx, lanes, scores, ids, row, kept, names, count):  # type: ignore[no-untyped-def]
    """Copy the lanes that are set from scores and ``ids[row:]`` to place `count`; return what comes after.

    Needs AVX-512, whose registers close the gaps without a branch. Up to `LANES` places from `count` on are
    written, whatever is in `lanes`.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i64 = ir.IntType(64)

        def at(array: int, place: Any, kind: Any, width: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            start = builder.add(builder.ptrtoint(data, i64), builder.mul(place, ir.Constant(i64, width)))
            return builder.inttoptr(start, kind.as_pointer())

        def pack(
            source: int, start: Any, target: int, place: Any, element: Any, width: int, first: int
        ) -> Any:
            n, code = (16, "f32") if element == ir.FloatType() else (8, "i64")
            kind = ir.VectorType(element, n)
            bits = builder.trunc(builder.lshr(args[0], ir.Constant(i64, first)), ir.IntType(n))
            from_, to = at(source, start, kind, width), at(target, place, kind, width)
            mask = ir.VectorType(ir.IntType(1), n)
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(kind, [kind, kind, mask]),
                f"llvm.x86.avx512.mask.compress.v{n}{code}",
            )
            loaded = builder.load(from_, align=width, typ=kind)
            packed = builder.call(function, [loaded, loaded, builder.bitcast(bits, mask)])
            builder.store(packed, to, align=width)
            return builder.add(place, builder.zext(builder.ctpop(bits), i64))

        pack(1, ir.Constant(i64, 0), 4, args[6], ir.FloatType(), 4, 0)
        half = pack(2, args[3], 5, args[6], i64, 8, 0)
        return pack(2, builder.add(args[3], ir.Constant(i64, 8)), 5, half, i64, 8, 8)

    return types.int64(types.int64, scores, ids, types.int64, kept, names, types.int64), codegen


@intrinsic
def raise_peaks(typingctx, scores, start, peaks, at):  # type: ignore[no-untyped-def]
    """Raise ``peaks[at : at + LANES]`` to ``scores[start : start + LANES]`` where these are larger."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, new = _lanes_at(context, builder, signature.args[0], args[0], args[1])
        pointer, old = _lanes_at(context, builder, signature.args[2], args[2], args[3])
        larger = builder.select(builder.fcmp_ordered(">", new, old), new, old)
        builder.store(larger, pointer, align=4)
        return context.get_dummy_value()

    return types.none(scores, types.int64, peaks, types.int64), codegen


block_products: Callable[..., Any] = _make(l2=False)
block_distances: Callable[..., Any] = _make(l2=True)
tile_products: Callable[..., Any] = _make_tile(l2=False)
tile_distances: Callable[..., Any] = _make_tile(l2=True)
