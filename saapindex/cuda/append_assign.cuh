// Phase 1 of a flush: the best list of each key that enters, on tensor cores.

// Put two elements of a row, or one, among its four of the same 16 bytes: high parts, then low parts.
__device__ __forceinline__ void store_halves(float* row, int at, float x, float y) {
    u32* four = (u32*)(row + at / 4 * 4);
    const u32 high = to_float16_pair(x, y), low = rest_of_pair(x, y, high);
    if (PAIRED == 2) {
        four[at % 4 / 2] = high;
        four[2 + at % 4 / 2] = low;
    } else {
        ((u16*)four)[at % 4] = (u16)high;
        ((u16*)four)[4 + at % 4] = (u16)low;
    }
}

// Keys of a tile as tensor cores take them, [KEYS][PITCH] words in shared memory, and what undoes their scale, [KEYS].
__device__ void load_tile(const State& a, const Plan& plan, int s, int key0, float* xs, float* inverse) {
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
        for (int u = 0; u < AHEAD; ++u) {
            float x[MINE + 1] = {}, largest = 0.f;
#pragma unroll
            for (int i = 0; i < MINE; ++i) {
                x[i] = part_of(words[u][i / PART], i % PART);
                largest = fmaxf(largest, fabsf(x[i]));
            }
            const int exponent = exponent_for(__uint_as_float(__reduce_max_sync(FULL, __float_as_uint(largest))));
            const float factor = power(exponent);
            float* row = xs + (r0 + u) * PITCH;
            if (lane == 0) inverse[r0 + u] = power(-exponent);
#pragma unroll
            for (int i = 0; i < MINE; i += PAIRED) {
                const int at = element_of(lane, i);
                if (at >= D) continue;
                if (a.turns) {
                    row[at] = x[i] * factor;
                    if (PAIRED == 2) row[at + 1] = x[i + 1] * factor;
                } else {
                    store_halves(row, at, x[i] * factor, x[i + 1] * factor);
                }
            }
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
    for (int i = threadIdx.x; i < KEYS * (D / 4); i += THREADS) {
        float4* at = (float4*)(xs + i / (D / 4) * PITCH) + i % (D / 4);
        const float4 x = *at;
        const u32 one = to_float16_pair(x.x, x.y), two = to_float16_pair(x.z, x.w);
        *(uint4*)at = make_uint4(one, two, rest_of_pair(x.x, x.y, one), rest_of_pair(x.z, x.w, two));
    }
    __syncthreads();
}

// The best list of a tile of keys among LISTS lists. A warp meets all the keys with lists of its own, 32 of them, which
// it reads from memory itself. Of 16 dimensions lane 4 g + t has 4 t to 4 t + 3: their order in a product is free.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* xs) {
    const int m = plan.until - plan.first, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int form = a.own_forms ? s : s % a.heads;
    const bool two_parts = sizeof(element) == 4 || a.turns;
    float* inverse = xs + KEYS * PITCH;
    const i64 own = (i64)form * a.lists;
    list0 += threadIdx.x / WARP * 32;
    uint4 next[2][4];
    auto fetch = [&](int k0, uint4* out) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int list = list0 + j * 8 + g, k = k0 / 4 + t;
            out[j] = list < a.lists && k < D / 4 ? __ldg(a.parts + (own + list) * (D / 4) + k) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch(0, next[0]);
    fetch(16, next[1]);
    load_tile(a, plan, s, key0, xs, inverse);
    float sums[KEYS / 16][4][4] = {};
#pragma unroll 2
    for (int k0 = 0; k0 < D; k0 += 16) {
        uint4 b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = next[0][j], next[0][j] = next[1][j];
        fetch(k0 + 32, next[1]);
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
            const uint4 x = *(const uint4*)(xs + (i * 16 + g) * PITCH + k0 + 4 * t);
            const uint4 y = *(const uint4*)(xs + (i * 16 + 8 + g) * PITCH + k0 + 4 * t);
            const u32 high[4] = {x.x, y.x, x.y, y.y}, low[4] = {x.z, y.z, x.w, y.w};
            if (two_parts)
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(sums[i][j], low, b[j].x, b[j].y);
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(sums[i][j], high, b[j].z, b[j].w);
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(sums[i][j], high, b[j].x, b[j].y);
        }
    }
    const float unit = a.unit[form];
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {  // rows 8 i + g
        const float factor = inverse[i * 8 + g] * unit;
        u64 best = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int list = list0 + j / 2 * 8 + 2 * t + j % 2;
            if (list < a.lists) {
                const float score = fmaf(sums[i / 2][j / 2][i % 2 * 2 + j % 2], factor, __ldg(a.bias + own + list));
                const u32 bits = __float_as_uint(score), rank = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
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
