// What is estimated of the keys that are not fetched: the mean value of each list, with the weight of what is left of it.

// The weight of what is left of each list of this block, in place of its logits; scales of mean values, of its size.
__device__ __forceinline__ void weigh_rest(
    const Step& p, const Shared& s, i64 row, int own, float first_scale, const int2* table, float* logits, int* sizes
) {
#pragma unroll 1
    for (int i = threadIdx.x; i < own; i += THREADS) {
        const int rest = sizes[i] - table[i].y;
#pragma unroll
        for (int g = 0; g < G; ++g)
            logits[i * G + g] = rest > 0 ? (float)rest * exponential(fminf(logits[i * G + g], s.bound[g]) - s.basis[g]) : 0.f;
        sizes[i] = __float_as_int(i < THREADS ? first_scale : p.mean_scales[row + i]);
    }
}

// Mean values of sixteen lists: of four of them, four dimensions of each group, in a lane.
struct Means {
    u32 x[MEANS][AT_ONCE][4];
};
__device__ __forceinline__ void load_means(const Step& p, i64 row, int own, int start, int group, Means& means) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < MEANS; ++m) {
        if (start + m * 16 * WARPS >= own) continue;
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int list = start + m * 16 * WARPS + lane % 4 * 2 + i % 2 + i / 2 * 8;
                const int d = 32 * (group + c) + lane / 4 * 4;
                means.x[m][c][i] = list < own && d < D ? *(const u32*)(p.means + (row + list) * D + d) : 0;
            }
    }
}

// Add mean values, of which the first are at hand, to what a warp found: on tensor cores, weights in two parts.
__device__ __forceinline__ void add_means(
    const Step& p, i64 row, int own, const float* weights, const int* scales, Means& means, float* found
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
    float sum = 0.f;
#pragma unroll 1
    for (int group = 0; group < GROUPS; group += AT_ONCE) {
        float out[AT_ONCE][4][4] = {};
#pragma unroll 1
        for (int start = 16 * warp; start < own; start += MEANS * 16 * WARPS) {
            if (group || start > 16 * warp) load_means(p, row, own, start, group, means);
#pragma unroll
            for (int m = 0; m < MEANS; ++m) {
                const int first = start + m * 16 * WARPS;
                if (first >= own) break;
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int list = first + quarter * 2 + i % 2 + i / 2 * 8;
                    const float weight = list < own && head < G ? weights[list * G + head] : 0.f;
                    if (group == 0) sum += weight;
                    x[i] = list < own ? weight * __int_as_float(scales[list]) : 0.f;
                }
                u32 a[4];
                a[0] = pair_of(x[0], x[1]), a[2] = pair_of(x[2], x[3]);
                take_off(a[0], x[0], x[1]), take_off(a[2], x[2], x[3]);
                a[1] = pair_of(x[0], x[1]), a[3] = pair_of(x[2], x[3]);
#pragma unroll
                for (int c = 0; c < AT_ONCE; ++c)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const u32* y = means.x[m][c];
                        multiply(out[c][j], a, pair_of(byte_of(y[0], j), byte_of(y[1], j)), pair_of(byte_of(y[2], j), byte_of(y[3], j)));
                    }
            }
        }
        if (head < G)
#pragma unroll
            for (int c = 0; c < AT_ONCE; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int d = 32 * (group + c) + 8 * quarter + 4 * i;
                    if (d >= D) continue;
                    float4& four = *(float4*)(found + head * FOUND + d);
                    const float4 old = four;
                    four = make_float4(
                        old.x + out[c][0][i] + out[c][0][i + 2], old.y + out[c][1][i] + out[c][1][i + 2],
                        old.z + out[c][2][i] + out[c][2][i + 2], old.w + out[c][3][i] + out[c][3][i + 2]
                    );
                }
    }
    sum += __shfl_xor_sync(FULL, sum, 1);
    sum += __shfl_xor_sync(FULL, sum, 2);
    if (head < G && quarter == 0) found[head * FOUND + D] += sum;
}
