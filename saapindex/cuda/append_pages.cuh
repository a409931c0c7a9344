// Codes of very many pages: a warp has sixteen keys to itself. It takes longer for them than a block does, see
// append_codes.cuh, but warps wait for memory independently of each other.

#define AT_ONCE 12  // of 8 fields of a code, that a warp multiplies at once

// Eight elements of a key less those of its anchor.
__device__ __forceinline__ void residual(const element* key, const i8* anchor, float scale, float* out) {
    const uint2 steps = *(const uint2*)anchor;
#if ELEMENT == 2
    widen_vector(*(const uint4*)key, out);
    widen_vector(*(const uint4*)(key + 4), out + 4);
#else
    widen_vector(*(const uint4*)key, out);
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const i8 step = (i8)((i < 4 ? steps.x : steps.y) >> (i % 4 * 8));
        out[i] = __fsub_rn(out[i], __fmul_rn((float)step, scale));
    }
}

// Sixteen keys of a stream that a warp encodes. Lane 4 g + t has rows g and g + 8, and of every 8 fields t and t + 4:
// so of each word the byte t. The other lanes of a quad have the rest of these rows.
struct Rows {
    int row[2];
    const element* key[2];
    const i8* anchor[2];
    float scale[2], factor[2];  // of the anchor; what brings the residual into the range of tensor cores
    bool any;
};

// What a lane has of 32 dimensions, less the anchor; zero where there is no key.
__device__ __forceinline__ void residuals(const Rows& x, int slab, float (*rest)[8]) {
    const bool inside = D % 32 == 0 || slab * 32 + threadIdx.x % 4 * 8 < D;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) rest[i][e] = 0.f;
        if (inside && x.row[i] >= 0) residual(x.key[i] + slab * 32, x.anchor[i] + slab * 32, x.scale[i], rest[i]);
    }
}

// As lanes 0 to 15 name them: the row of a key, below zero for none, and its list.
__device__ __forceinline__ Rows rows_of(const State& a, int s, int list, int row) {
    Rows x;
    const int lane = threadIdx.x % WARP;
    x.any = __any_sync(FULL, lane < LANES && row >= 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        x.row[i] = __shfl_sync(FULL, row, lane / 4 + 8 * i);
        const i64 at = (i64)s * a.lists + __shfl_sync(FULL, list, lane / 4 + 8 * i);
        x.key[i] = a.keys + (i64)max(x.row[i], 0) * D + lane % 4 * 8;
        x.anchor[i] = a.anchors + at * D + lane % 4 * 8;
        x.scale[i] = a.anchor_scales[at];
    }
    float largest[2] = {};
    if (x.any)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            float rest[2][8];
            residuals(x, slab, rest);
#pragma unroll
            for (int i = 0; i < 16; ++i) largest[i / 8] = fmaxf(largest[i / 8], fabsf(rest[i / 8][i % 8]));
        }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(FULL, largest[i], 1));
        x.factor[i] = power(exponent_for(fmaxf(largest[i], __shfl_xor_sync(FULL, largest[i], 2))));
    }
    return x;
}

// Products of the residuals with `count` tiles of 8 fields from `tile0` on. All warps of a block come here together.
__device__ void project(const State& a, const Rows& x, int h, int tile0, int count, float (*sums)[4],
                        uint4* forward, int& held) {
    const int tiles = (a.coded_dimensions + 7) / 8, lane = threadIdx.x % WARP, held_slabs = slabs_held(tiles);
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.f;
#pragma unroll 1
    for (int slab = 0; slab < SLABS; ++slab) {
        if (slab % held_slabs == 0 && held != h * SLABS + slab) hold_forward(a, h, slab, forward, held);
        if (!x.any) continue;
        float rest[2][8];
        residuals(x, slab, rest);
        u32 high[2][4], low[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {  // of a half the first pairs of both rows, then the second ones
            const float* two = rest[e % 2] + e / 2 * 2;
            const float u = two[0] * x.factor[e % 2], v = two[1] * x.factor[e % 2];
            high[e / 4][e % 4] = to_float16_pair(u, v);
            low[e / 4][e % 4] = rest_of_pair(u, v, high[e / 4][e % 4]);
        }
        const uint4* here = forward + (slab % held_slabs * 2 * tiles + tile0) * WARP + lane;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n)
                if (n < count) {
                    const uint4 f = here[(half * tiles + n) * WARP];
                    multiply(sums[n], low[half], f.x, f.y);
                    multiply(sums[n], high[half], f.z, f.w);
                    multiply(sums[n], high[half], f.x, f.y);
                }
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int field = (tile0 + n) * 8 + lane % 4 + 4 * e;
            const bool coded = n < count && field < a.coded_dimensions;
            const float factor = coded ? __ldg(a.step + h * a.coded_dimensions + field).z : 0.f;
            sums[n][e] *= factor;
            sums[n][2 + e] *= factor;
        }
}

// Round what `project` found for words `word` to `end` to codes, and add up products and lengths.
__device__ __forceinline__ void quantise_words(const State& a, const Rows& x, int h, int word, int end, int tile0,
                                               int count, const float (*sums)[4], const float* inverse_norm,
                                               float* product, float* length) {
    const int t = threadIdx.x % 4, R = a.coded_dimensions;
    int bits = a.widths[h * a.words + word], have = 0;  // bits of this lane's byte
    u32 bytes[2] = {0, 0};
    auto store = [&](int i, u32 code) {
        const i64 page = x.row[i] / LANES;
        if (t == i && x.row[i] >= 0) a.codes[(page * a.words + word) * LANES + x.row[i] % LANES] = code;
    };
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
        if (n >= count) continue;
        const float high = (float)((1 << bits) - 1);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int field = (tile0 + n) * 8 + t + 4 * e;
            const float4 steps = field < R ? __ldg(a.step + h * R + field) : make_float4(0.f, 0.f, 0.f, 0.f);
            const float step = steps.x, inverse = steps.y;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float y = sums[n][2 * i + e];
                const float spot = step > 0.f ? fmaf(y * inverse_norm[i], inverse, high / 2) : 0.f;
                const float rounded = fminf(fmaxf(rintf(spot), 0.f), high);
                const float level = (rounded - high / 2) * step;
                product[i] = fmaf(y, level, product[i]);
                length[i] = fmaf(level, level, length[i]);
                bytes[i] |= (u32)rounded << have;
            }
            have += bits;
        }
        if (have < 8 && n + 1 < count) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 code = bytes[i] << (8 * t);
            code |= __shfl_xor_sync(FULL, code, 1);
            code |= __shfl_xor_sync(FULL, code, 2);
            store(i, code);
            bytes[i] = 0;
        }
        have = 0;
        if (++word < end) bits = a.widths[h * a.words + word];
    }
    for (; word < end; ++word)  // words for which there are no dimensions
        for (int i = 0; i < 2; ++i) store(i, 0);
}

// Codes of sixteen keys for each warp of the block, all of one stream. Words whose products do not fit in registers
// together are multiplied twice: once for the norm of all.
__device__ void encode_rows(const State& a, int s, const Rows& x, uint4* forward, int& held) {
    const int h = s % a.heads, t = threadIdx.x % 4;
    float sums[AT_ONCE][4], square[2] = {}, inverse_norm[2] = {}, product[2] = {}, length[2] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        bool whole = false;
#pragma unroll 1
        for (int word = 0, tile0 = 0; word < a.words;) {
            int end = word, count = 0;
            while (end < a.words && count + 4 / a.widths[h * a.words + end] <= AT_ONCE)
                count += 4 / a.widths[h * a.words + end++];
            count = min(count, (a.coded_dimensions + 7) / 8 - tile0);
            whole = end - word == a.words;
            if (pass == 0 || !whole) project(a, x, h, tile0, count, sums, forward, held);
            if (pass == 0) {
#pragma unroll
                for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) square[i / 2] = fmaf(sums[n][i], sums[n][i], square[i / 2]);
            } else if (x.any) {
                quantise_words(a, x, h, word, end, tile0, count, sums, inverse_norm, product, length);
            }
            word = end;
            tile0 += count;
        }
        if (pass == 0)
#pragma unroll
            for (int i = 0; i < 2; ++i) inverse_norm[i] = __fdiv_rn(1.f, fmaxf(sqrtf(quad_sum(square[i])), TINY));
    }
    if (!x.any) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float along = quad_sum(product[i]) / fmaxf(quad_sum(length[i]), TINY);
        const float scale = fmaxf(__fdiv_rn(along, x.factor[i]), TINY);
        const float exponent = rintf(16.f * log2f(__fdiv_rn(scale, a.base[h]))) + 128.f;
        if (t == i && x.row[i] >= 0) a.exponents[x.row[i]] = (u8)(int)fminf(fmaxf(exponent, 0.f), 255.f);
    }
}

// The pages that are left to all blocks, by warps: blocks have pages of the same stream next to each other, as many for
// each warp as there must be. The forward matrix has been asked for.
__device__ void encode_pages(const State& a, const Plan* plans, int streams, Amount amount, uint4* forward, int& held) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, blocks = gridDim.x;
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    const int each = min(max((amount.all + blocks - 1) / blocks, 1), WARPS);  // warps that have a page at once
    int groups = 0;
    for (int s = lane; s < streams; s += WARP) groups += (times(a, plans, s, true) + each - 1) / each;
    groups = warp_sum_int(groups);
    int skip = (u32)blockIdx.x * groups / (u32)blocks, left = (u32)(blockIdx.x + 1) * groups / (u32)blocks - skip;
    for (int s = 0; s < streams && left; ++s) {
        const int pages = times(a, plans, s, true), here = (pages + each - 1) / each;
        for (; skip < here && left; ++skip, --left) {
            const int number = skip * each + warp;
            int list = 0, row = -1;
            if (warp < each && number < pages) {
                const int2 page = a.work[(i64)s * a.room + number];
                list = page.y >> 5;
                if (lane < (page.y & 31)) row = page.x * LANES + lane;
            }
            encode_rows(a, s, rows_of(a, s, list, row), forward, held);
        }
        skip -= here;
    }
}
