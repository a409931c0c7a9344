// Numbers for tensor cores: float32 as the sum of two float16, after a power of two that brings it into their range.

#define TERM 14  // the largest element of a row is brought between 2^(TERM - 1) and 2^TERM

__device__ __forceinline__ float power(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The exponent that brings `largest` there, so small that no power of two overflows.
__device__ __forceinline__ int exponent_for(float largest) {
    const int have = (int)(__float_as_uint(largest) >> 23) - 126;  // largest < 2^have
    return largest > 0.f ? min(max(TERM - have, -120), 120) : 0;
}

__device__ __forceinline__ u32 to_float16_pair(float x, float y) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}

// What rounding two numbers to such a pair leaves of them.
__device__ __forceinline__ u32 rest_of_pair(float x, float y, u32 pair) {
    return to_float16_pair(x - float16_to_float((u16)pair), y - float16_to_float((u16)(pair >> 16)));
}

// c += a b for a of 16 x 16 and b of 16 x 8. Lane 4 g + t has of a rows g, g + 8, g and g + 8, of b column g, and of
// each two pairs along the product, in whatever order is the same in both; of c rows g and g + 8, columns 2 t, 2 t + 1.
__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
