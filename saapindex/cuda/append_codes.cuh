// Codes of keys that entered a list, or whose list has a new anchor: of sixteen at once, by a block.

#define DEEP (SLABS * 32)                           // dimensions of a residual, with those that fill a slab
#define PIECE (TOGETHER * PART)                     // elements of a lane that lie together
#define TILES ((D / 8 + WARPS - 1) / WARPS)         // of 8 fields of a code, that a warp multiplies
#if TOGETHER == 4 && ELEMENT != 2
typedef u64 piece;
#elif TOGETHER == 4 || (TOGETHER == 2 && ELEMENT != 2)
typedef u32 piece;
#elif TOGETHER == 2 || ELEMENT != 2
typedef u16 piece;
#else
typedef u8 piece;
#endif

// Sixteen keys in shared memory. Warp w has keys w and w + 8 until they are multiplied; then it has fields of all.
struct Sixteen {
    // Residuals, in the range of tensor cores: of keys k and k + 8, high and low parts; of every four dimensions two of
    // k, two of k + 8, and so again.
    u32 parts[LANES / 2][2 * DEEP + 16];
    float squares[LANES][WARPS], products[LANES][WARPS], lengths[LANES][WARPS];
    float factors[LANES];             // what brought them into that range
    int rows[LANES];                  // below zero: no key
    u32 codes[LANES * (D / 8)];
};
static_assert(sizeof(Sixteen) <= MOVING - 4 * WINDOW, "sixteen keys fit beside the pages that are looked up");

// Two of them as a warp holds them; row and list (of all streams) are known later than the key.
struct Two {
    u32 key[2][WORDS];
    int row[2];
    i64 list[2];  // below zero: no key
};

// Put the residuals of two keys where all warps find them.
__device__ __forceinline__ void set_residuals(const State& a, const Two& two, Sixteen& x) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    piece steps[2][WORDS / TOGETHER] = {};
    float scale[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (two.list[i] < 0) continue;
        scale[i] = a.anchor_scales[two.list[i]];
#pragma unroll
        for (int w = 0; w < WORDS; w += TOGETHER) {
            const int at = element_of(lane, w * PART);
            if (at < D) steps[i][w / TOGETHER] = *(const piece*)(a.anchors + two.list[i] * D + at);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float rest[MINE + 1] = {}, largest = 0.f;
#pragma unroll
        for (int e = 0; e < MINE; ++e) {
            const i8 step = (i8)(steps[i][e / PIECE] >> (e % PIECE * 8));
            if (two.list[i] >= 0 && element_of(lane, e) < D)
                rest[e] = __fsub_rn(part_of(two.key[i][e / PART], e % PART), __fmul_rn((float)step, scale[i]));
            largest = fmaxf(largest, fabsf(rest[e]));
        }
        const float factor = power(exponent_for(__uint_as_float(__reduce_max_sync(FULL, __float_as_uint(largest)))));
        u32* high = x.parts[warp] + i;
#pragma unroll
        for (int e = 0; e < MINE; e += PAIRED) {
            const int at = element_of(lane, e), word = at / 2 * 2;
            if (at >= D) continue;
            const float u = rest[e] * factor, v = rest[e + 1] * factor;
            const u32 pair = to_float16_pair(u, v), low = rest_of_pair(u, v, pair);
            if (PAIRED == 2) {
                high[word] = pair;
                high[DEEP + word] = low;
            } else {
                ((u16*)(high + word))[at % 2] = (u16)pair;
                ((u16*)(high + DEEP + word))[at % 2] = (u16)low;
            }
        }
        if (lane == 0) x.factors[warp + i * WARPS] = factor;
    }
    for (int i = threadIdx.x; i < LANES / 2 * (DEEP - D); i += THREADS) {
        u32* high = x.parts[i % (LANES / 2)] + D + i / (LANES / 2);
        high[0] = high[DEEP] = 0;
    }
}

// How much of the forward matrix of a head fits in shared memory, in slabs of 32 dimensions.
__device__ __forceinline__ int slabs_held(int tiles) { return min(SLABS, FORWARD_BYTES / (tiles * 2 * WARP * 16)); }

// Ask for slabs of the forward matrix of a head in shared memory.
__device__ __forceinline__ void ask_forward(const State& a, int h, int slab, uint4* forward) {
    const int tiles = (a.coded_dimensions + 7) / 8;
    const int count = min(slabs_held(tiles), SLABS - slab) * 2 * tiles * WARP;
    const uint4* from = a.forward + (i64)(h * SLABS + slab) * 2 * tiles * WARP;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) copy_async(forward + i, from + i);
    asm volatile("cp.async.commit_group;");
}

// The same unless they are there or were asked for, which `held` says.
__device__ __forceinline__ void want_forward(const State& a, int h, int slab, uint4* forward, int& held) {
    if (held == h * SLABS + slab) return;
    held = h * SLABS + slab;
    asm volatile("cp.async.wait_group 0;");  // what was asked for before may not come later
    __syncthreads();
    ask_forward(a, h, slab, forward);
}

// Have them there.
__device__ __forceinline__ void hold_forward(const State& a, int h, int slab, uint4* forward, int& held) {
    want_forward(a, h, slab, forward, held);
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

__device__ __forceinline__ float sum_of_warps(const float* x) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += x[w];
    return sum;
}

// Round the keys of all warps to codes. Lane 4 g + t has keys g and g + 8, and of every 8 fields t and t + 4: so of
// each word the byte t. A warp has fields 8 n to 8 n + 7 for every n that is its number modulo WARPS.
__device__ void encode(const State& a, int h, const Two& two, Sixteen& x, uint4* forward, int& held) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int R = a.coded_dimensions, tiles = (R + 7) / 8, held_slabs = slabs_held(tiles);
    if (!__syncthreads_or(two.list[0] >= 0 || two.list[1] >= 0)) return;
    const int width = lane < a.words ? __ldg(a.widths + h * a.words + lane) : 0;
    float4 steps[TILES][2];
    auto load_steps = [&]() {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int field = (warp + i * WARPS) * 8 + t + 4 * e;
                steps[i][e] = field < R ? __ldg(a.step + h * R + field) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
    };
    if (BLOCKS == 1) load_steps();  // where there are registers for them
    for (int i = threadIdx.x; i < LANES * (D / 8); i += THREADS) x.codes[i] = 0;
    set_residuals(a, two, x);
    float sums[TILES][4] = {}, rests[TILES][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < SLABS; ++slab) {
        if (slab % held_slabs == 0) hold_forward(a, h, slab, forward, held);
        u32 parts[2][2][4];  // high and low, halves
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 four = *(const uint4*)(x.parts[g] + i / 2 * DEEP + slab * 32 + 8 * t + i % 2 * 4);
            u32* to = parts[i / 2][i % 2];
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            if (warp + i * WARPS >= tiles) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 f = forward[((slab % held_slabs * 2 + half) * tiles + warp + i * WARPS) * WARP + lane];
                multiply(rests[i], parts[1][half], f.x, f.y);
                multiply(sums[i], parts[0][half], f.x, f.y);
                multiply(rests[i], parts[0][half], f.z, f.w);
            }
        }
    }
    if (BLOCKS == 2) load_steps();
    // Which word a tile belongs to; words have 1, 2 or 4 tiles.
    int ends = width ? 4 / width : 0;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const int left = __shfl_up_sync(FULL, ends, step);
        if (lane >= step) ends += left;
    }
    int word[TILES], bits[TILES], shift[TILES];
    float square[2] = {};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int n = warp + i * WARPS;
        word[i] = __popc(__ballot_sync(FULL, ends <= n));
        bits[i] = __shfl_sync(FULL, width, word[i] % WARP);
        shift[i] = 8 * t + 2 * bits[i] * (n - (word[i] ? __shfl_sync(FULL, ends, (word[i] + WARP - 1) % WARP) : 0));
        if (word[i] == WARP || bits[i] == 0) word[i] = -1;  // no word has these fields
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sums[i][j] = word[i] >= 0 ? (sums[i][j] + rests[i][j]) * steps[i][j % 2].z : 0.f;
            square[j / 2] = fmaf(sums[i][j], sums[i][j], square[j / 2]);
        }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        square[k] = quad_sum(square[k]);
        if (t == 0) x.squares[g + 8 * k][warp] = square[k];
        if (lane == 0) x.rows[warp + k * WARPS] = two.list[k] >= 0 ? two.row[k] : -1;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float inverse = __fdiv_rn(1.f, fmaxf(sqrtf(sum_of_warps(x.squares[g + 8 * k])), TINY));
        float product = 0.f, length = 0.f;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const float high = (float)((1 << bits[i]) - 1);
            u32 code = 0;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float y = sums[i][2 * k + e], step = steps[i][e].x;
                const float spot = step > 0.f ? fmaf(y * inverse, steps[i][e].y, high / 2) : 0.f;
                const float rounded = fminf(fmaxf(rintf(spot), 0.f), high);
                const float level = (rounded - high / 2) * step;
                product = fmaf(y, level, product);
                length = word[i] >= 0 ? fmaf(level, level, length) : length;
                code |= (u32)rounded << (shift[i] + e * bits[i]);
            }
            code |= __shfl_xor_sync(FULL, code, 1);
            code |= __shfl_xor_sync(FULL, code, 2);
            if (t == 0 && word[i] >= 0) atomicOr(x.codes + (g + 8 * k) * (D / 8) + word[i], code);
        }
        product = quad_sum(product), length = quad_sum(length);
        if (t == 0) x.products[g + 8 * k][warp] = product, x.lengths[g + 8 * k][warp] = length;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < LANES * a.words; i += THREADS) {
        const int row = x.rows[i % LANES], w = i / LANES;
        u32* to = a.codes + ((i64)(row / LANES) * a.words + w) * LANES + row % LANES;
        if (row >= 0) *to = w < D / 8 ? x.codes[i % LANES * (D / 8) + w] : 0;
    }
    if (threadIdx.x < LANES && x.rows[threadIdx.x] >= 0) {
        const int k = threadIdx.x;
        const float along = sum_of_warps(x.products[k]) / fmaxf(sum_of_warps(x.lengths[k]), TINY);
        const float scale = fmaxf(__fdiv_rn(along, x.factors[k]), TINY);
        const float exponent = rintf(16.f * log2f(__fdiv_rn(scale, a.base[h]))) + 128.f;
        a.exponents[x.rows[k]] = (u8)(int)fminf(fmaxf(exponent, 0.f), 255.f);
    }
}

// Two keys of a page with its label, that is coded anew.
__device__ __forceinline__ void of_page(const State& a, int s, int page, int label, Two& two) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = page * LANES + warp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool any = warp + i * WARPS < (label & 31);
        two.row[i] = row + i * WARPS;
        two.list[i] = any ? (i64)s * a.lists + (label >> 5) : -1;
        if (any) load_row(a.keys + (i64)two.row[i] * D, lane, two.key[i]);
    }
}

__device__ __forceinline__ double squared_scale(const State& a, int h, i64 row) {
    const float f = __fmul_rn(a.base[h], exp2f(((float)a.exponents[row] - 128.f) / 16.f));
    return (double)__fmul_rn(f, f);
}
