"""Fast exponentials and logarithms, which loops over them make SIMD of."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_I32, _FLOAT = ir.IntType(32), ir.FloatType()


@intrinsic
def bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """Return the bits of a float32 as int32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the float32 of these bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), codegen


_ROUND = np.float32(1.5 * 2**23)
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_EXP = [np.float32(c) for c in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0)]
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = _EXP
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1.0), np.float32(2.0)


@njit(cache=True, nogil=True, fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """Exponential of a float32 to about an ulp, without a branch; zero below -87, and no more than e^88."""
    y = min(max(x, _LOWEST), _HIGHEST)
    n = (y * _LOG2E + _ROUND) - _ROUND
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = _E0
    p = p * r + _E1
    p = p * r + _E2
    p = p * r + _E3
    p = p * r + _E4
    p = p * r + _E5
    p = p * r + _E6
    p = p * r + _ONE
    power = float_of(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return p * power if x > _LOWEST else np.float32(0)


_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)


@njit(cache=True, nogil=True, fastmath={"contract"})
def log(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a normal float32 above zero to about an ulp, without a branch (Cephes)."""
    bits = bits_of(x)
    exponent = np.int32((bits - _SQRT_HALF_BITS) >> np.int32(23))
    m = float_of(np.int32(bits - np.int32(exponent << np.int32(23)))) - _ONE
    e = np.float32(exponent)
    p = _L0
    p = p * m + _L1
    p = p * m + _L2
    p = p * m + _L3
    p = p * m + _L4
    p = p * m + _L5
    p = p * m + _L6
    p = p * m + _L7
    p = p * m + _L8
    z = m * m
    y = p * m * z + e * _LN2_LOW - _HALF * z
    return (m + y) + e * _LN2_HIGH


@njit(cache=True, nogil=True, fastmath={"contract"})
def capped(x, softcap):  # type: ignore[no-untyped-def]
    """Return a logit under the cap of the model; zero for no cap."""
    if softcap == np.float32(0):
        return x
    return softcap * (_ONE - _TWO / (exp(_TWO * x / softcap) + _ONE))
