// Attend exactly to rows, on tensor cores: sixteen keys at a time in each warp, all heads of the group at once.
//
// Rows 0 to 7 of a product are the heads, and rows 8 to 15 the same heads again: there the second part of each
// weight stands, so that weights are rounded to two parts of a 16-bit type together. float32 keys and values, and
// queries of another type than the keys, come in three parts.

#define TILE 16                                            // keys
#define STEPS ((D + 15) / 16)                              // of sixteen dimensions
#define PARTS (2 * STEPS)                                  // eight dimensions of the output each
#define OUTS ((PARTS + 3) / 4 * 4)
#define PITCH (STEPS * 16 * (int)sizeof(element) + 16)     // bytes from row to row: no two of eight on the same banks
#define TILE_BYTES (2 * TILE * PITCH)                      // keys, then values
#if ELEMENT == 2
#define KEY_PARTS 3
#else
#define KEY_PARTS 1
#endif

// What a warp has attended to, relative to exp(reference), which moves only when a logit passes it by SLACK. A lane
// holds dimensions 8 i + 2 (lane % 4) and the next of head lane / 4: twice, in two parts that are to be added up.
struct Partial {
    float out[OUTS][4], reference, sum, peak;
};

__device__ __forceinline__ void clear(Partial& mine) {
    mine.reference = mine.peak = -INFINITE;
    mine.sum = 0.f;
#pragma unroll
    for (int i = 0; i < OUTS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.out[i][j] = 0.f;
}

// Express what was found relative to another reference.
__device__ __forceinline__ void refer(Partial& mine, float reference) {
    const float shrink = mine.reference > -INFINITE ? exponential(mine.reference - reference) : 0.f;
    mine.reference = reference;
    mine.sum *= shrink;
#pragma unroll
    for (int i = 0; i < OUTS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.out[i][j] *= shrink;
}

// Two numbers as a pair of a 16-bit type, the first in the lower half; and what the pair leaves of them.
__device__ __forceinline__ u32 pair_of(float x, float y) {
    u32 pair;
#if ELEMENT == 0
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
#endif
    return pair;
}
__device__ __forceinline__ void take_off(u32 pair, float& x, float& y) {
#if ELEMENT == 0
    x -= float16_to_float((u16)pair), y -= float16_to_float((u16)(pair >> 16));
#else
    x -= __uint_as_float(pair << 16), y -= __uint_as_float(pair & 0xffff0000u);
#endif
}

// Products of small matrices: (16, 16) with (16, 8).
__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
#if ELEMENT == 0
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four matrices of eight by eight: the first eight lanes give the rows of the first one, and so on.
__device__ __forceinline__ void load_matrices(u32* x, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((u32)__cvta_generic_to_shared(row)));
}
__device__ __forceinline__ void load_transposed(u32* x, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((u32)__cvta_generic_to_shared(row)));
}

// What the parts of a head's query are to be multiplied with.
__device__ __forceinline__ float query_scale(const Shared& s, int head) {
#if QUERY_PARTS > 1
    return head < G ? s.query_scale[head] : 0.f;
#else
    return 1.f;
#endif
}

// Read the queries, as they are and in parts of a 16-bit type as rows of products.
__device__ __forceinline__ void load_queries(const Step& p, Shared& s, i64 unit) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * STEPS * 8; i += THREADS) {
        const int g = i / (STEPS * 8), d = i % (STEPS * 8) * 2;
        float x = 0.f, y = 0.f;
        if (g < G && d < D) {
            load_two_queries(p.queries, (unit * G + g) * D + d, x, y);
            s.query[g][d] = x, s.query[g][d + 1] = y;
        }
        if (QUERY_PARTS == 1) s.pairs[0][g][d / 2] = pair_of(x, y);
    }
    __syncthreads();
#if QUERY_PARTS > 1
    if (threadIdx.x < G) {  // float16 has few exponents: the largest of a head becomes about one
        float most = 0.f;
#pragma unroll 1
        for (int d = 0; d < D; ++d) most = fmaxf(most, fabsf(s.query[threadIdx.x][d]));
        const int exponent = ELEMENT == 0 ? max(1, __float_as_int(most) >> 23) : 127;
        s.query_scale[threadIdx.x] = __int_as_float(min(exponent, 252) << 23);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * STEPS * 8; i += THREADS) {
        const int g = i / (STEPS * 8), d = i % (STEPS * 8) * 2;
        float x = 0.f, y = 0.f;
        if (g < G && d < D) x = s.query[g][d] / s.query_scale[g], y = s.query[g][d + 1] / s.query_scale[g];
#pragma unroll
        for (int part = 0; part < QUERY_PARTS; ++part) {
            const u32 pair = pair_of(x, y);
            take_off(pair, x, y);
            s.pairs[part][g][d / 2] = pair;
        }
    }
    __syncthreads();
#endif
}

// Parts of the keys of a tile as the second matrix of products: dimensions 16 `step` and on, of keys 0 to 7 and 8 to
// 15. And of its values, transposed: dimensions 16 `step` to + 7 and + 8 to + 15, of all keys.
__device__ __forceinline__ void key_matrices(const u8* tile, int step, u32 (*b)[4]) {
    const int lane = threadIdx.x % WARP;
#if KEY_PARTS == 1
    load_matrices(b[0], tile + (lane / 16 * 8 + lane % 8) * PITCH + step * 32 + lane / 8 % 2 * 16);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* row = (const float*)(tile + (i / 2 * 8 + lane / 4) * PITCH);
        float x = row[16 * step + i % 2 * 8 + lane % 4 * 2], y = row[16 * step + i % 2 * 8 + lane % 4 * 2 + 1];
#pragma unroll
        for (int part = 0; part < KEY_PARTS; ++part) {
            b[part][i] = pair_of(x, y);
            take_off(b[part][i], x, y);
        }
    }
#endif
}
__device__ __forceinline__ void value_matrices(const u8* tile, int step, u32 (*b)[4]) {
    const int lane = threadIdx.x % WARP;
#if KEY_PARTS == 1
    load_transposed(b[0], tile + (TILE + lane % 16) * PITCH + step * 32 + lane / 16 * 16);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u8* row = tile + (TILE + i % 2 * 8 + lane % 4 * 2) * PITCH;
        const int d = 16 * step + i / 2 * 8 + lane / 4;
        float x = ((const float*)row)[d], y = ((const float*)(row + PITCH))[d];
#pragma unroll
        for (int part = 0; part < KEY_PARTS; ++part) {
            b[part][i] = pair_of(x, y);
            take_off(b[part][i], x, y);
        }
    }
#endif
}

// Attend to the first `count` keys of a tile.
__device__ __forceinline__ void attend_tile(const Step& p, const Shared& s, Partial& mine, const u8* tile, int count) {
    const int lane = threadIdx.x % WARP, head = lane / 4;
    float x[4], products[2][4] = {};
#pragma unroll 2
    for (int step = 0; step < STEPS; ++step) {
        u32 b[KEY_PARTS][4];
        key_matrices(tile, step, b);
#pragma unroll
        for (int part = 0; part < QUERY_PARTS; ++part) {
            const u32* at = s.pairs[part][head] + 8 * step + lane % 4;
            const u32 a[4] = {at[0], at[0], at[4], at[4]};
#pragma unroll
            for (int other = 0; other < KEY_PARTS && part + other < 3; ++other) {
                multiply(products[0], a, b[other][0], b[other][1]);
                multiply(products[1], a, b[other][2], b[other][3]);
            }
        }
    }
    float top = -INFINITE;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
        float logit = p.scale * products[i / 2][i % 2];
        logit *= query_scale(s, head);
        x[i] = key < count && head < G ? capped(logit, p.cap) : -INFINITE;
        top = fmaxf(top, x[i]);
    }
    mine.peak = fmaxf(mine.peak, top);
    if (__any_sync(FULL, top > mine.reference + SLACK)) {
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        if (top > mine.reference + SLACK) refer(mine, top);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = x[i] > -INFINITE ? exponential(x[i] - mine.reference) : 0.f;
        mine.sum += x[i];
    }
    // Weights in two parts (and what float32 leaves, in a product of its own).
    u32 a[4];
    a[0] = pair_of(x[0], x[1]), a[2] = pair_of(x[2], x[3]);
    take_off(a[0], x[0], x[1]), take_off(a[2], x[2], x[3]);
    a[1] = pair_of(x[0], x[1]), a[3] = pair_of(x[2], x[3]);
#if KEY_PARTS > 1
    take_off(a[1], x[0], x[1]), take_off(a[3], x[2], x[3]);
    const u32 rest[4] = {pair_of(x[0], x[1]), 0, pair_of(x[2], x[3]), 0};
#endif
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 b[KEY_PARTS][4];
        value_matrices(tile, step, b);
#pragma unroll
        for (int part = 0; part < KEY_PARTS; ++part) {
            multiply(mine.out[2 * step], a, b[part][0], b[part][1]);
            multiply(mine.out[2 * step + 1], a, b[part][2], b[part][3]);
        }
#if KEY_PARTS > 1
        multiply(mine.out[2 * step], rest, b[0][0], b[0][1]);
        multiply(mine.out[2 * step + 1], rest, b[0][2], b[0][3]);
#endif
    }
}
