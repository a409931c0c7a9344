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
# Sums may be reordered; infinities and NaN keep their meaning.
_FLAGS = ("reassoc", "contract", "nsz")


def _make(l2: bool) -> Any:
    def block_scores(typingctx, query, vectors, block, out):  # type: ignore[no-untyped-def]
        """Write the scores of block `block` to `out`, (LANES,) float32; return the best of them.

        `query` is (d,) float32; `vectors` is (blocks, d, LANES) float32, or uint16 that holds float16.
        Larger is better: the score is the inner product, or minus the squared distance.
        """
        signature = types.float32(query, vectors, types.int64, out)
        half = vectors.dtype == types.uint16

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args, args, strict=True)
                if isinstance(kind, types.Array)
            ]
            q, v, o = arrays
            return _emit(builder, q, v, o, args[2], half, l2)

        return signature, codegen

    return intrinsic(block_scores)


def _emit(builder: Any, query: Any, vectors: Any, out: Any, block: Any, half: bool, l2: bool) -> Any:
    i64, single = ir.IntType(64), ir.FloatType()
    lanes = ir.VectorType(single, LANES)
    stored = ir.VectorType(ir.HalfType() if half else single, LANES)
    width = 2 if half else 4
    d = cgutils.unpack_tuple(builder, query.shape)[0]
    row = ir.Constant(i64, LANES * width)
    start = builder.add(builder.ptrtoint(vectors.data, i64), builder.mul(builder.mul(block, d), row))
    query_start = builder.ptrtoint(query.data, i64)
    sums = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * LANES)) for _ in range(_SUMS)]

    def load(address: Any, kind: Any, align: int) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)

    def step(i: Any, total: Any) -> None:
        q = load(builder.add(query_start, builder.mul(i, ir.Constant(i64, 4))), single, 4)
        x = load(builder.add(start, builder.mul(i, row)), stored, width)
        x = builder.fpext(x, lanes) if half else x
        nothing = ir.Constant(lanes, ir.Undefined)
        q = builder.insert_element(nothing, q, ir.Constant(ir.IntType(32), 0))
        q = builder.shuffle_vector(q, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
        before = builder.load(total)
        if l2:
            difference = builder.fsub(q, x, _FLAGS)
            after = builder.fsub(before, builder.fmul(difference, difference, _FLAGS), _FLAGS)
        else:
            after = builder.fadd(before, builder.fmul(q, x, _FLAGS), _FLAGS)
        builder.store(after, total)

    zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)
    whole = builder.and_(d, ir.Constant(i64, -_SUMS))
    with cgutils.for_range_slice(builder, zero, whole, ir.Constant(i64, _SUMS), intp=i64) as (i, _):
        for offset, total in enumerate(sums):
            step(builder.add(i, ir.Constant(i64, offset)), total)
    with cgutils.for_range_slice(builder, whole, d, one, intp=i64) as (i, _):
        step(i, sums[0])
    scores = builder.load(sums[0])
    for total in sums[1:]:
        scores = builder.fadd(scores, builder.load(total), _FLAGS)
    builder.store(scores, builder.bitcast(out.data, lanes.as_pointer()), align=4)
    reduce = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(single, [lanes]), f"llvm.vector.reduce.fmax.v{LANES}f32"
    )
    return builder.call(reduce, [scores])


block_products: Callable[..., Any] = _make(l2=False)
block_distances: Callable[..., Any] = _make(l2=True)
