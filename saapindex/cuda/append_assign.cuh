// Phase 1 of a flush: the best list of each key that enters, on tensor cores.

// x as the sum of two numbers that tensor cores take; the second is zero for keys of 16 bits.
__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void split(float x, u32& high, u32& low) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
}

// c += a b for a of 16 x 8 and b of 8 x 8.
__device__ __forceinline__ void multiply(float* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Phase 1: the best list of a tile of keys among a tile of lists. Products on tensor cores, of which each takes as
// many digits as float32 has: forms, and keys in float32, in two parts.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* shared) {
    const int m = plan.until - plan.first, h = s % a.heads;
    float* xs = shared;                         // [D][KEYS + PAD]
    float* fs = xs + D * (KEYS + PAD);          // [SLAB][LISTS + PAD]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 own = (i64)(a.own_forms ? s : h) * a.lists;
    float4 held[SLAB * LISTS / 4 / THREADS];
    auto fetch = [&](int k0) {
#pragma unroll
        for (int i = 0; i < SLAB * LISTS / 4 / THREADS; ++i) {
            const int at = threadIdx.x + i * THREADS, list = list0 + at / (SLAB / 4), k = k0 + at % (SLAB / 4) * 4;
            held[i] = list < a.lists && k < D ? __ldg((const float4*)(a.forms + (own + list) * D + k))
                                              : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    };
    fetch(0);
    __syncthreads();
    for (int r0 = warp * AHEAD; r0 < KEYS; r0 += WARPS * AHEAD) {
        u32 words[AHEAD][WORDS] = {};
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (key0 + r0 + u < m) load_row(entering_key(a, plan, s, plan.first + key0 + r0 + u), lane, words[u]);
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int at = element_of(lane, i);
#pragma unroll
            for (int u = 0; u < AHEAD; ++u)
                if (at < D) xs[at * (KEYS + PAD) + r0 + u] = part_of(words[u][i / PART], i % PART);
        }
    }
    if (a.turns) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * a.pairs; i += THREADS) {
            const int r = i % KEYS, pair = i / KEYS;
            const double turn = (double)(plan.first + key0 + r) * a.turns[h * a.pairs + pair];
            float sine, cosine;
            sincospif(2.f * (float)(turn - rint(turn)), &sine, &cosine);
            const float amplitude = a.amplitudes[h * a.pairs + pair];
            const int one = a.interleaved ? 2 * pair : pair, two = a.interleaved ? one + 1 : pair + a.pairs;
            float *x = xs + one * (KEYS + PAD) + r, *y = xs + two * (KEYS + PAD) + r;
            const float u = *x, v = *y;
            *x = u * (cosine * amplitude) - v * (sine * amplitude);
            *y = v * (cosine * amplitude) + u * (sine * amplitude);
        }
    }
    // A warp has 32 keys and 32 lists; lane 4 g + t has rows g and g + 8 and columns 2 t and 2 t + 1 of each product.
    const bool two_parts = sizeof(element) == 4 || a.turns;
    const int g = lane / 4, t = lane % 4, row0 = warp / 4 * 32, column0 = warp % 4 * 32;
    float acc[2][4][4] = {};
    for (int k0 = 0; k0 < D; k0 += SLAB) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SLAB * LISTS / 4 / THREADS; ++i) {
            const int at = threadIdx.x + i * THREADS;
            float* to = fs + at % (SLAB / 4) * 4 * (LISTS + PAD) + at / (SLAB / 4);
            to[0] = held[i].x;
            to[LISTS + PAD] = held[i].y;
            to[2 * (LISTS + PAD)] = held[i].z;
            to[3 * (LISTS + PAD)] = held[i].w;
        }
        __syncthreads();
        if (k0 + SLAB < D) fetch(k0 + SLAB);
#pragma unroll
        for (int k = 0; k < SLAB; k += 8) {
            if (k0 + k >= D) break;
            u32 high[2][4], low[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* x = xs + (k0 + k + t + j / 2 * 4) * (KEYS + PAD) + row0 + i * 16 + g + j % 2 * 8;
                    split(*x, high[i][j], low[i][j]);
                }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 form[2], rest[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    split(fs[(k + t + i * 4) * (LISTS + PAD) + column0 + j * 8 + g], form[i], rest[i]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (two_parts) multiply(acc[i][j], low[i], form);
                    multiply(acc[i][j], high[i], rest);
                    multiply(acc[i][j], high[i], form);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows row0 + 8 i + g
        u64 best = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int list = list0 + column0 + j / 2 * 8 + 2 * t + j % 2;
            if (list < a.lists) {
                const u32 bits = __float_as_uint(acc[i / 2][j / 2][i % 2 * 2 + j % 2] + __ldg(a.bias + own + list));
                const u32 rank = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
                const u64 found = (u64)rank << 32 | (u32)~list;
                best = found > best ? found : best;
            }
        }
#pragma unroll
        for (int step = 2; step; step >>= 1) {
            const u64 other = __shfl_xor_sync(FULL, best, step);
            best = other > best ? other : best;
        }
        const int key = key0 + row0 + i * 8 + g;
        if (t == 0 && key < m) atomicMax(a.best + (i64)s * a.most + key, best);
    }
}

__device__ __forceinline__ int label_of(const State& a, int s, int i) {
    const i64 at = (i64)s * a.most + i;
    return a.labels_in ? a.labels_in[at] : (int)~(u32)a.best[at];
}
