// Whether all of an array is finite: read once, 16 bytes at a time, and nothing written where it is.
//
// Compiled with -DELEMENT. Any grid, THREADS threads; `count` pieces of 16 bytes.

#define THREADS 256
#define AT_ONCE 8  // loads of a thread in flight

__device__ __forceinline__ bool is_bad(u32 word) {
#if ELEMENT == 0
    const u32 exponent = 0x7c00u;
#elif ELEMENT == 1
    const u32 exponent = 0x7f80u;
#else
    return (word & 0x7f800000u) == 0x7f800000u;
#endif
#if ELEMENT != 2
    return (word & exponent) == exponent || (word >> 16 & exponent) == exponent;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
finite(const uint4* __restrict__ x, i64 count, int* __restrict__ bad) {
    bool found = false;
    for (i64 i = (i64)blockIdx.x * THREADS * AT_ONCE + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS * AT_ONCE) {
        uint4 words[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            words[j] = i + j * THREADS < count ? __ldcs(x + i + j * THREADS) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            found |= is_bad(words[j].x) | is_bad(words[j].y) | is_bad(words[j].z) | is_bad(words[j].w);
    }
    if (found) *bad = 1;
}
