// What all kernels share. Needs no header of the CUDA toolkit, so that NVRTC alone can compile every file.
//
// Compiled with -DELEMENT=0 (float16), 1 (bfloat16) or 2 (float32): how keys, values and queries are stored.
// All offsets are 64-bit where an array may pass 2^31 elements.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define WARP 32
#define FULL 0xffffffffu
#define LANES 16  // keys of a page
#define INFINITE __int_as_float(0x7f800000)

#ifndef ELEMENT
#define ELEMENT 1
#endif

__device__ __forceinline__ float float16_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ u16 float_to_float16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float bfloat16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }

__device__ __forceinline__ u16 float_to_bfloat16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if ELEMENT == 0
typedef u16 element;
__device__ __forceinline__ float widen(element x) { return float16_to_float(x); }
__device__ __forceinline__ element narrow(float x) { return float_to_float16(x); }
#elif ELEMENT == 1
typedef u16 element;
__device__ __forceinline__ float widen(element x) { return bfloat16_to_float(x); }
__device__ __forceinline__ element narrow(float x) { return float_to_bfloat16(x); }
#else
typedef float element;
__device__ __forceinline__ float widen(element x) { return x; }
__device__ __forceinline__ element narrow(float x) { return x; }
#endif

// Elements in one 16-byte load.
#define VECTOR (16 / (int)sizeof(element))

// Widen 16 bytes.
__device__ __forceinline__ void widen_vector(uint4 raw, float* out) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if ELEMENT == 0
        out[2 * i] = float16_to_float((u16)words[i]);
        out[2 * i + 1] = float16_to_float((u16)(words[i] >> 16));
#elif ELEMENT == 1
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#else
        out[i] = __uint_as_float(words[i]);
#endif
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

__device__ __forceinline__ int warp_sum_int(int x) {
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

// The logit under the cap of the model, where it has one (-DCAPPED).
__device__ __forceinline__ float capped(float logit, float cap) {
#ifdef CAPPED
    return cap * tanhf(logit / cap);
#else
    return logit;
#endif
}
