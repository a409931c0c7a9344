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
#pragma unroll 1
    for (int r0 = warp * AHEAD; r0 < KEYS; r0 += WARPS * AHEAD) {
        u32 words[AHEAD][WORDS] = {};
        const int mine = plan.first + min(key0 + r0 + lane % AHEAD, m - 1);
        const element* from = entering_key(a, plan, s, mine);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const element* row = row_of_lane(from, u);
            if (key0 + r0 + u < m) load_row(row, lane, words[u]);
        }
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
// it reads from memory itself, some products ahead. Of 16 dimensions lane 4 g + t has 4 t to 4 t + 3: their order in a
// product is free.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* xs) {
    const int m = plan.until - plan.first, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int form = a.own_forms ? s : s % a.heads;
    const bool two_parts = sizeof(element) == 4 || a.turns;
    float* inverse = xs + KEYS * PITCH;
    list0 += warp * 32;
    const uint4* lists[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        lists[j] = a.parts + ((i64)form * a.lists + min(list0 + j * 8 + g, a.lists - 1)) * (D / 4) + t;
    uint4 next[FORMS_AHEAD][4];
    auto fetch = [&](int k0, uint4* out) {
        const bool inside = k0 < D && (D % 16 == 0 || k0 / 4 + t < D / 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = inside ? __ldg(lists[j] + k0 / 4) : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int u = 0; u < FORMS_AHEAD; ++u) fetch(16 * u, next[u]);
    load_tile(a, plan, s, key0, xs, inverse);
    const float* bias = a.bias + (i64)form * a.lists;
    float sums[KEYS / 16][4][4] = {}, biases[4][2];
#pragma unroll 1
    for (int k1 = 0; k1 < D; k1 += 16 * FORMS_AHEAD)
#pragma unroll
        for (int u = 0; u < FORMS_AHEAD; ++u) {
            const int k0 = k1 + 16 * u;
            if (k0 >= D) break;
            uint4 b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = next[u][j];
            fetch(k0 + 16 * FORMS_AHEAD, next[u]);
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
    for (int j = 0; j < 8; ++j) {
        const int list = list0 + j / 2 * 8 + 2 * t + j % 2;
        biases[j / 2][j % 2] = list < a.lists ? __ldg(bias + list) : -INFINITE;
    }
    float* scores = inverse + KEYS;              // [WARPS][KEYS]
    int* winners = (int*)(scores + WARPS * KEYS);  // [WARPS][KEYS]
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {  // rows 8 i + g
        const float factor = inverse[i * 8 + g] * unit;
        float best = -INFINITE;
        int winner = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {  // the first of those that are the same
            const float score = fmaf(sums[i / 2][j / 2][i % 2 * 2 + j % 2], factor, biases[j / 2][j % 2]);
            if (score > best) best = score, winner = j / 2 * 8 + j % 2;
        }
        winner += list0 + 2 * t;
#pragma unroll
        for (int step = 2; step; step >>= 1) {
            const float other = __shfl_xor_sync(FULL, best, step);
            const int rival = __shfl_xor_sync(FULL, winner, step);
            if (other > best || (other == best && rival < winner)) best = other, winner = rival;
        }
        if (t == 0) scores[warp * KEYS + i * 8 + g] = best, winners[warp * KEYS + i * 8 + g] = winner;
    }
    __syncthreads();
    if (threadIdx.x < KEYS && key0 + threadIdx.x < m) {
        float best = -INFINITE;
        int winner = 0;
        for (int w = 0; w < WARPS; ++w)
            if (scores[w * KEYS + threadIdx.x] > best)
                best = scores[w * KEYS + threadIdx.x], winner = winners[w * KEYS + threadIdx.x];
        const u32 bits = __float_as_uint(best), rank = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
        atomicMax(a.best + (i64)s * a.most + key0 + threadIdx.x, (u64)rank << 32 | (u32)~winner);
    }
}

__device__ __forceinline__ int label_of(const State& a, int s, int i) {
    const i64 at = (i64)s * a.most + i;
    return a.labels_in ? a.labels_in[at] : (int)~(u32)a.best[at];
}
