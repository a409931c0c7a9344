"""The innermost loop of the scan: one query against the `LANES` keys of a block, as SIMD.

A block holds its keys side by side, dimension by dimension, so each step is one multiply-add over all of
them and no sum runs across a register. LLVM does not find this by itself, so the loop is written in its
own terms; it makes of it what the machine has (AVX-512, AVX2, NEON). Half-precision keys are widened in
the register, which halves the bytes read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saapindex.backends.base import LANES

# Independent sums, to hide the latency of a multiply-add.
_SUMS = 4


def _make(l2: bool) -> Any:
    def block_scores(typingctx, query, vectors, block, threshold, out):  # type: ignore[no-untyped-def]
        """Write the scores of block `block` to `out`, (LANES,) float32; tell which reach `threshold`.

        `query` is (d,) float32; `vectors` is (blocks, d, LANES) float32, or uint16 that holds float16.
        Larger is better: the score is the inner product, or minus the squared distance. The result has
        bit `i` set where lane `i` is at least `threshold`.
        """
        signature = types.int64(query, vectors, types.int64, types.float32, out)
        half = vectors.dtype == types.uint16

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            q, v, o = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 4))
            return _emit(builder, q, v, o, args[2], args[3], half, l2)

        return signature, codegen

    return intrinsic(block_scores)


def _emit(
    builder: Any, query: Any, vectors: Any, out: Any, block: Any, threshold: Any, half: bool, l2: bool
) -> Any:
    i32, i64, single = ir.IntType(32), ir.IntType(64), ir.FloatType()
    lanes = ir.VectorType(single, LANES)
    stored = ir.VectorType(ir.HalfType() if half else single, LANES)
    width = 2 if half else 4
    d = cgutils.unpack_tuple(builder, query.shape)[0]
    row = ir.Constant(i64, LANES * width)
    start = builder.add(builder.ptrtoint(vectors.data, i64), builder.mul(builder.mul(block, d), row))
    query_start = builder.ptrtoint(query.data, i64)
    sums = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * LANES)) for _ in range(_SUMS)]
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(lanes, [lanes] * 3), f"llvm.fmuladd.v{LANES}f32"
    )

    def spread(value: Any) -> Any:
        nothing = ir.Constant(lanes, ir.Undefined)
        first = builder.insert_element(nothing, value, ir.Constant(i32, 0))
        return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

    def load(address: Any, kind: Any, align: int) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)

    def step(i: Any, total: Any) -> None:
        q = spread(load(builder.add(query_start, builder.mul(i, ir.Constant(i64, 4))), single, 4))
        x = load(builder.add(start, builder.mul(i, row)), stored, width)
        x = builder.fpext(x, lanes) if half else x
        if l2:
            q = builder.fsub(q, x)
            x = builder.fneg(q)
        builder.store(builder.call(multiply_add, [q, x, builder.load(total)]), total)

    zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)
    whole = builder.and_(d, ir.Constant(i64, -_SUMS))
    with cgutils.for_range_slice(builder, zero, whole, ir.Constant(i64, _SUMS), intp=i64) as (i, _):
        for offset, total in enumerate(sums):
            step(builder.add(i, ir.Constant(i64, offset)), total)
    with cgutils.for_range_slice(builder, whole, d, one, intp=i64) as (i, _):
        step(i, sums[0])
    first, second, third, fourth = (builder.load(total) for total in sums)
    scores = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
    builder.store(scores, builder.bitcast(out.data, lanes.as_pointer()), align=4)
    reached = builder.fcmp_ordered(">=", scores, spread(threshold))
    return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), i64)


block_products: Callable[..., Any] = _make(l2=False)
block_distances: Callable[..., Any] = _make(l2=True)
