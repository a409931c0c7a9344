// What is estimated of the keys that are not fetched: the mean value of each list, with the weight of what is left of it.
//
// On tensor cores, sixteen lists at a time, weights in two parts. A lane takes four dimensions of each 32 of a list, so
// that in `out` of a partial result, product 4 c + j is of the dimensions 32 c + j, + 4, + 8 and so on.

#define GROUPS ((D + 31) / 32)

// Add the lists whose logit is at most the largest near one, which is the reference: these are below the bound in any
// case. Returns in which turns there were others: a bit for each, the last one for all that follow.
__device__ __forceinline__ u32 add_rest(
    const Step& p, i64 row, int own, const int2* table, const float* logits, const int* sizes, Partial& mine
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
    u32 turns = 0;
#pragma unroll 1
    for (int first = 16 * warp, turn = 0; first < own; first += 16 * CHOOSING, ++turn) {
        bool higher = false;
        u32 means[GROUPS][4];
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int list = min(first + quarter * 2 + i % 2 + i / 2 * 8, own - 1);
            const i8* at = p.means + (row + list) * D + lane / 4 * 4;
#pragma unroll
            for (int c = 0; c < GROUPS; ++c) means[c][i] = 32 * c + lane / 4 * 4 < D ? *(const u32*)(at + 32 * c) : 0;
            x[i] = p.mean_scales[row + list];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int list = first + quarter * 2 + i % 2 + i / 2 * 8;
            float weight = 0.f;
            if (list < own && head < G) {
                const int rest = sizes[list] - table[list].y;
                const float logit = logits[list * G + head];
                if (rest > 0 && logit <= mine.reference) weight = (float)rest * exponential(logit - mine.reference);
                else higher |= rest > 0;
            }
            mine.sum += weight;
            x[i] *= weight;
        }
        u32 a[4];
        a[0] = pair_of(x[0], x[1]), a[2] = pair_of(x[2], x[3]);
        take_off(a[0], x[0], x[1]), take_off(a[2], x[2], x[3]);
        a[1] = pair_of(x[0], x[1]), a[3] = pair_of(x[2], x[3]);
#pragma unroll
        for (int c = 0; c < GROUPS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32* y = means[c];
                multiply(mine.out[4 * c + j], a, pair_of(byte_of(y[0], j), byte_of(y[1], j)), pair_of(byte_of(y[2], j), byte_of(y[3], j)));
            }
        if (__any_sync(FULL, higher)) turns |= 1u << min(turn, 31);
    }
    return turns;
}

// The largest exact logit of a head, when the blocks have told theirs: it bounds the estimates. And what all weights are
// relative to.
__device__ __forceinline__ float peak_of(const Shared& s, int g) {
    float top = -INFINITE;
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other) top = fmaxf(top, s.peaks[other][g]);
    return top;
}
__device__ __forceinline__ float basis_of(const Shared& s, int g) {
    const float top = peak_of(s, g);
    return top > -INFINITE ? top : s.norm[g] > -INFINITE ? s.norm[g] : 0.f;
}

// Add the others, of which there are few or none, when the bound is known; `found` is what the warp found.
__device__ __forceinline__ void add_deferred(
    const Step& p, const Shared& s, i64 row, int own, const int2* table, const float* logits, const int* sizes, u32 turns, float* found
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll 1
    for (int first = 16 * warp, turn = 0; first < own; first += 16 * CHOOSING, ++turn) {
        if (!(turns >> min(turn, 31) & 1)) continue;
        const int mine = min(first + lane % 16, own - 1);
        bool higher = false;
#pragma unroll
        for (int g = 0; g < G; ++g) higher |= logits[mine * G + g] > s.near_bound[g];
        u32 lists = __ballot_sync(FULL, higher && first + lane % 16 < own && sizes[mine] > table[mine].y) & 0xffff;
#pragma unroll 1
        for (; lists; lists &= lists - 1) {
            const int list = first + __ffs(lists) - 1, rest = sizes[list] - table[list].y;
            const float scale = p.mean_scales[row + list];
            u32 means[(D + 127) / 128];
#pragma unroll
            for (int c = 0; c < (D + 127) / 128; ++c) {
                const int d = 4 * (c * WARP + lane);
                means[c] = d < D ? *(const u32*)(p.means + (row + list) * D + d) : 0;
            }
#pragma unroll 1
            for (int g = 0; g < G; ++g) {
                const float logit = logits[list * G + g], peak = peak_of(s, g), bound = peak > -INFINITE ? peak : INFINITE;
                const float weight =
                    logit > s.near_bound[g] ? (float)rest * exponential(fminf(logit, bound) - basis_of(s, g)) : 0.f;
                float* at = found + g * FOUND + 4 * lane;
#pragma unroll
                for (int c = 0; c < (D + 127) / 128; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (4 * (c * WARP + lane) < D) at[128 * c + i] += weight * scale * byte_of(means[c], i);
                if (lane == 0) found[g * FOUND + D] += weight;
            }
        }
    }
}

// Write the result where the output of this lane's head is.
__device__ __forceinline__ void store_rest(const Partial& mine, float* at) {
    const int quarter = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < GROUPS; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int d = 32 * c + 8 * quarter + 4 * i;
            if (d >= D) continue;
            *(float4*)(at + d) = make_float4(
                mine.out[4 * c][i] + mine.out[4 * c][i + 2], mine.out[4 * c + 1][i] + mine.out[4 * c + 1][i + 2],
                mine.out[4 * c + 2][i] + mine.out[4 * c + 2][i + 2], mine.out[4 * c + 3][i] + mine.out[4 * c + 3][i + 2]
            );
        }
}
