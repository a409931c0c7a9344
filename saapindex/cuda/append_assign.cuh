// Phase 1 of a flush: the best list of each key that enters, on tensor cores.

// Keys of a tile as they are assigned, in shared memory: float32, [KEYS][PITCH].
__device__ void load_tile(const State& a, const Plan& plan, int s, int key0, float* xs) {
    const int m = plan.until - plan.first, h = s % a.heads;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int r0 = warp * AHEAD; r0 < KEYS; r0 += WARPS * AHEAD) {
        u32 words[AHEAD][WORDS] = {};
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (key0 + r0 + u < m) load_row(entering_key(a, plan, s, plan.first + key0 + r0 + u), lane, words[u]);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
#pragma unroll
            for (int i = 0; i < MINE; i += PAIRED) {
                const int at = element_of(lane, i);
                float* to = xs + (r0 + u) * PITCH + at;
                if (at >= D) continue;
                if (PAIRED == 1)
                    *to = part_of(words[u][i / PART], i % PART);
                else
                    *(float2*)to = make_float2(part_of(words[u][i / PART], i % PART),
                                               part_of(words[u][(i + 1) / PART], (i + 1) % PART));
            }
    }
    if (D % 16)
        for (int i = threadIdx.x; i < KEYS * 8; i += THREADS) xs[i / 8 * PITCH + D + i % 8] = 0.f;
    __syncthreads();
    if (!a.turns) return;
    for (int i = threadIdx.x; i < KEYS * a.pairs; i += THREADS) {
        const int r = i / a.pairs, pair = i % a.pairs;
        const double turn = (double)(plan.first + key0 + r) * a.turns[h * a.pairs + pair];
        float sine, cosine;
        sincospif(2.f * (float)(turn - rint(turn)), &sine, &cosine);
        const float amplitude = a.amplitudes[h * a.pairs + pair];
        const int one = a.interleaved ? 2 * pair : pair, two = a.interleaved ? one + 1 : pair + a.pairs;
        float *x = xs + r * PITCH + one, *y = xs + r * PITCH + two;
        const float u = *x, v = *y;
        *x = u * (cosine * amplitude) - v * (sine * amplitude);
        *y = v * (cosine * amplitude) + u * (sine * amplitude);
    }
    __syncthreads();
}

// The best list of a tile of keys among LISTS lists. A warp meets all the keys with lists of its own, 32 of them, which
// it reads from memory itself. Of 16 dimensions lane 4 g + t has 4 t to 4 t + 3: their order in a product is free.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* xs) {
    load_tile(a, plan, s, key0, xs);
    const int m = plan.until - plan.first, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const i64 own = (i64)(a.own_forms ? s : s % a.heads) * a.lists;
    const bool two_parts = sizeof(element) == 4 || a.turns;
    list0 += threadIdx.x / WARP * 32;
    float4 next[4];
    auto fetch = [&](int k0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int list = list0 + j * 8 + g, k = k0 + 4 * t;
            next[j] = list < a.lists && k < D ? __ldg((const float4*)(a.forms + (own + list) * D + k))
                                              : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    };
    fetch(0);
    float sums[KEYS / 16][4][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < D; k0 += 16) {
        float high[4][4], low[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            split(next[j].x, high[j][0], low[j][0]);
            split(next[j].y, high[j][1], low[j][1]);
            split(next[j].z, high[j][2], low[j][2]);
            split(next[j].w, high[j][3], low[j][3]);
        }
        if (k0 + 16 < D) fetch(k0 + 16);
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
            const float4 x = *(const float4*)(xs + (i * 16 + g) * PITCH + k0 + 4 * t);
            const float4 y = *(const float4*)(xs + (i * 16 + 8 + g) * PITCH + k0 + 4 * t);
            float one[2][4] = {{x.x, y.x, x.y, y.y}, {x.z, y.z, x.w, y.w}};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                if (two_parts) {
                    float rest[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) split(one[step][e], one[step][e], rest[e]);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        multiply(sums[i][j], rest, high[j][2 * step], high[j][2 * step + 1]);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(sums[i][j], one[step], low[j][2 * step], low[j][2 * step + 1]);
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(sums[i][j], one[step], high[j][2 * step], high[j][2 * step + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {  // rows 8 i + g
        u64 best = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int list = list0 + j / 2 * 8 + 2 * t + j % 2;
            if (list < a.lists) {
                const u32 bits = __float_as_uint(sums[i / 2][j / 2][i % 2 * 2 + j % 2] + __ldg(a.bias + own + list));
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
        const int key = key0 + i * 8 + g;
        if (t == 0 && key < m && best) atomicMax(a.best + (i64)s * a.most + key, best);
    }
}

__device__ __forceinline__ int label_of(const State& a, int s, int i) {
    const i64 at = (i64)s * a.most + i;
    return a.labels_in ? a.labels_in[at] : (int)~(u32)a.best[at];
}
