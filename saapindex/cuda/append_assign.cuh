// Phase 1 of a flush: the best list of each key that enters, on tensor cores.

// A tile in shared memory: rows r and r + 8 of sixteen together, and of every four dimensions one time the high parts
// of both and one time the low ones, as a lane takes them: two of r, two of r + 8, and so again.
__device__ __forceinline__ float* four_of(float* xs, int r, int part, int at) {
    return xs + (r / 16 * 8 + r % 8) * PITCH + part * DEEP_KEY + at / 4 * 4;
}

// Put two elements of a row, or one, there.
__device__ __forceinline__ void store_halves(float* xs, int r, int at, float x, float y, bool two_parts) {
    const u32 high = to_float16_pair(x, y);
    const int word = at % 4 / 2 * 2 + r % 16 / 8;
    u32* four = (u32*)four_of(xs, r, 0, at) + word;
    if (PAIRED == 2)
        *four = high;
    else
        ((u16*)four)[at % 2] = (u16)high;
    if (!two_parts) return;
    const u32 low = rest_of_pair(x, y, high);
    four += DEEP_KEY;
    if (PAIRED == 2)
        *four = low;
    else
        ((u16*)four)[at % 2] = (u16)low;
}

// Keys of a tile as tensor cores take them, [KEYS / 2][PITCH] words in shared memory, and what undoes their scale,
// [KEYS].
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
            if (lane == 0) inverse[r0 + u] = power(-exponent);
#pragma unroll
            for (int i = 0; i < MINE; i += PAIRED) {
                const int at = element_of(lane, i);
                if (at >= D) continue;
                if (a.turns) {
                    float* row = four_of(xs, r0 + u, (r0 + u) % 16 / 8, at) + at % 4;
                    row[0] = x[i] * factor;
                    if (PAIRED == 2) row[1] = x[i + 1] * factor;
                } else {
                    store_halves(xs, r0 + u, at, x[i] * factor, x[i + 1] * factor, ELEMENT == 2);
                }
            }
        }
    }
    if (D % 16)
        for (int i = threadIdx.x; i < KEYS * 8; i += THREADS)
            four_of(xs, i / 16 % 8 + i / 128 * 16, i / 8 % 2, D)[i % 8] = 0.f;
    __syncthreads();
    if (!a.turns) return;
    for (int i = threadIdx.x; i < KEYS * a.pairs; i += THREADS) {
        const int r = i / a.pairs, pair = i % a.pairs;
        const double turn = (double)(plan.first + key0 + r) * a.turns[h * a.pairs + pair];
        float sine, cosine;
        sincospif(2.f * (float)(turn - rint(turn)), &sine, &cosine);
        const float amplitude = a.amplitudes[h * a.pairs + pair];
        const int one = a.interleaved ? 2 * pair : pair, two = a.interleaved ? one + 1 : pair + a.pairs;
        float *x = four_of(xs, r, r % 16 / 8, one) + one % 4, *y = four_of(xs, r, r % 16 / 8, two) + two % 4;
        const float u = *x, v = *y;
        *x = u * (cosine * amplitude) - v * (sine * amplitude);
        *y = v * (cosine * amplitude) + u * (sine * amplitude);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < KEYS / 2 * (D / 4); i += THREADS) {
        float4* at = (float4*)(xs + i / (D / 4) * PITCH) + i % (D / 4);
        const float4 x = at[0], y = at[DEEP_KEY / 4];
        const u32 a0 = to_float16_pair(x.x, x.y), a1 = to_float16_pair(x.z, x.w);
        const u32 b0 = to_float16_pair(y.x, y.y), b1 = to_float16_pair(y.z, y.w);
        *(uint4*)at = make_uint4(a0, b0, a1, b1);
        *(uint4*)(at + DEEP_KEY / 4) = make_uint4(rest_of_pair(x.x, x.y, a0), rest_of_pair(y.x, y.y, b0),
                                                  rest_of_pair(x.z, x.w, a1), rest_of_pair(y.z, y.w, b1));
    }
    __syncthreads();
}

// The best list of a tile of keys among LISTS lists. A warp meets all the keys with lists of its own, 32 of them, which
// it reads from memory itself, some products ahead. Of 16 dimensions lane 4 g + t has 4 t to 4 t + 3: their order in a
// product is free.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* xs) {
    const int m = plan.until - plan.first, warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int form = a.own_forms ? s : s % a.heads;
    const bool two_parts = sizeof(element) == 4 || a.turns;
    float* inverse = xs + KEYS / 2 * PITCH;
    list0 += warp * 32;
    const uint4* lists[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        lists[j] = a.parts + ((i64)form * a.lists + min(list0 + j * 8 + g, a.lists - 1)) * (D / 4) + t;
    uint4 next[FORMS_AHEAD][4];
    auto fetch = [&](int k0, uint4* out) {
        if (k0 >= D) return;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            out[j] = D % 16 == 0 || k0 / 4 + t < D / 4 ? __ldg(lists[j] + k0 / 4) : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int u = 0; u < FORMS_AHEAD; ++u) fetch(16 * u, next[u]);
    const float unit = a.unit[form], *bias = a.bias + (i64)form * a.lists;
    float sums[KEYS / 16][4][4] = {}, biases[4][2];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int list = list0 + j / 2 * 8 + 2 * t + j % 2;
        biases[j / 2][j % 2] = list < a.lists ? __ldg(bias + list) : -INFINITE;
    }
    load_tile(a, plan, s, key0, xs, inverse);
#pragma unroll 1
    for (int k1 = 0; k1 < D; k1 += 16 * FORMS_AHEAD)
#pragma unroll
        for (int u = 0; u < FORMS_AHEAD; ++u) {
            const int k0 = k1 + 16 * u;
            if (D % (16 * FORMS_AHEAD) && k0 >= D) break;
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i) {
                const float* at = xs + (i * 8 + g) * PITCH + k0 + 4 * t;
                const uint4 x = *(const uint4*)at;
                const u32 high[4] = {x.x, x.y, x.z, x.w};
                if (two_parts) {
                    const uint4 y = *(const uint4*)(at + DEEP_KEY);
                    const u32 low[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply(sums[i][j], low, next[u][j].x, next[u][j].y);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(sums[i][j], high, next[u][j].z, next[u][j].w);
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(sums[i][j], high, next[u][j].x, next[u][j].y);
            }
            fetch(k0 + 16 * FORMS_AHEAD, next[u]);
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
#pragma unroll
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
