// Assignment on tensor cores, for heads of D dimensions: centroids in two parts, then rows that meet all of them.

#define STEPS ((D + 31) / 32)  // of 32 dimensions
#define PADDED (STEPS * 32)
// parts[list] = high and low part, (2, PADDED) float16; terms[list] = 2^-exponent and bias. A warp for each of
// `lists` lists of a head, those beyond `nlist` never chosen. Grid (ceil(lists / 8), heads).
extern "C" __global__ void __launch_bounds__(THREADS)
assign_split(const float* __restrict__ centroids, const float* __restrict__ bias, u16* __restrict__ parts,
             float2* __restrict__ terms, int nlist, int lists) {
    const int lane = threadIdx.x % WARP, list = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (list >= lists) return;
    const bool real = list < nlist;
    const i64 head = blockIdx.y, place = head * lists + list;
    const float* row = centroids + (head * nlist + list) * D;
    float largest = 0.f;
    for (int i = lane; i < D; i += WARP) largest = fmaxf(largest, real ? fabsf(row[i]) : 0.f);
    const int exponent = exponent_for(warp_max(largest));
    const float factor = power(exponent);
    for (int i = lane; i < PADDED; i += WARP) {
        const float x = real && i < D ? row[i] * factor : 0.f;
        const u16 high = float_to_float16(x);
        parts[place * 2 * PADDED + i] = high;
        parts[place * 2 * PADDED + PADDED + i] = float_to_float16(x - float16_to_float(high));
    }
    if (lane == 0) terms[place] = make_float2(power(-exponent), real ? bias[head * nlist + list] : -INFINITE);
}

// ---- Tensor cores

#define STAGES 2
#define ROW_PARTS (ELEMENT == 2 ? 2 : 1)  // of a row: high, and low
#define TILE (D <= 128 ? 64 : 32)  // lists of a stage
// Rows of a stage lie half of all banks apart, so that 16-byte reads of two of them do not meet.
#define STRIDE ((PADDED * 2) % 128 == 64 ? PADDED * 2 : PADDED * 2 + 64)
#define STAGE_BYTES (TILE * 2 * STRIDE + TILE * 8)

__device__ __forceinline__ uint4 read_shared(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
    return x;
}

// Eight elements of a row that lie together: float16 as they are, others by `scale_row`.
struct Eight {
#if ELEMENT == 0
    u32 pairs[4];
#else
    float x[8];
#endif
};

__device__ __forceinline__ void load_eight(const element* x, bool inside, Eight& out) {
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    const uint4 raw = inside ? *(const uint4*)x : nothing;
#if ELEMENT == 0
    out.pairs[0] = raw.x, out.pairs[1] = raw.y, out.pairs[2] = raw.z, out.pairs[3] = raw.w;
#else
    widen_vector(raw, out.x);
#if ELEMENT == 2
    widen_vector(inside ? *(const uint4*)(x + 4) : nothing, out.x + 4);
#endif
#endif
}

// Copy a stage of lists from `first` on.
__device__ __forceinline__ void load_stage(char* stage, const u16* parts, const float2* terms, int first) {
    const int pieces = PADDED / 8;  // of 16 bytes in a part
    for (int i = threadIdx.x; i < TILE * 2 * pieces; i += THREADS)
        copy_async(stage + i / pieces * STRIDE + i % pieces * 16, parts + ((i64)first * 2 * pieces + i) * 8);
    if (threadIdx.x < TILE / 2) copy_async(stage + TILE * 2 * STRIDE + threadIdx.x * 16, terms + first + threadIdx.x * 2);
}

// Each warp holds M * 16 rows in registers and meets all lists of its split. Grid (ceil(n / (128 M)), heads, splits).
// A thread holds 8 dimensions that lie together of every 32: the order of dimensions within a product is free.
template <int M>
__device__ void assign_rows(const element* x, i64 row_stride, i64 head_stride, int n, const u16* parts,
                            const float2* terms, int lists, int split_lists, int* labels, float* scores) {
    extern __shared__ uint4 stages[];
    const u32 shared = (u32)__cvta_generic_to_shared(stages);
    char* const held = (char*)stages;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, quad = lane / 4, part = lane % 4;
    const i64 head = blockIdx.y;
    const int first_row = (blockIdx.x * (THREADS / WARP) + warp) * M * 16 + quad;
    const int begin = blockIdx.z * split_lists, end = min(begin + split_lists, lists);
    const int count = (end - begin) / TILE;
    parts += head * lists * 2 * PADDED;
    terms += head * lists;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < count) load_stage(held + i * STAGE_BYTES, parts, terms, begin + i * TILE);
        asm volatile("cp.async.commit_group;");
    }
    u32 a[ROW_PARTS][M][STEPS][2][4];
    float inverse[M][2], best[M][2];
    int label[M][2];
    x += head * head_stride;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + m * 16 + half * 8;
            Eight raw[STEPS];
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int k = s * 32 + part * 8;
                load_eight(x + row * row_stride + k, row < n && k < D, raw[s]);
            }
            inverse[m][half] = 1.f;
#if ELEMENT != 0
            float largest = 0.f;
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(raw[s].x[i]));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
            const int exponent = exponent_for(largest);
            const float factor = power(exponent);
            inverse[m][half] = power(-exponent);
#endif
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // pairs of dimensions
#if ELEMENT == 0
                    a[0][m][s][i / 2][i % 2 * 2 + half] = raw[s].pairs[i];
#else
                    const float low = raw[s].x[2 * i] * factor, high = raw[s].x[2 * i + 1] * factor;
                    const u32 pair = to_float16_pair(low, high);
                    a[0][m][s][i / 2][i % 2 * 2 + half] = pair;
#if ELEMENT == 2
                    a[1][m][s][i / 2][i % 2 * 2 + half] = rest_of_pair(low, high, pair);
#endif
#endif
                }
            best[m][half] = -INFINITE;
            label[m][half] = NOTHING;
        }
    }
    int slot = 0;
    for (int stage = 0; stage < count; ++stage) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        const int ahead = stage + STAGES - 1;
        const int free = slot == 0 ? STAGES - 1 : slot - 1;
        if (ahead < count) load_stage(held + free * STAGE_BYTES, parts, terms, begin + ahead * TILE);
        asm volatile("cp.async.commit_group;");
        const u32 here = shared + slot * STAGE_BYTES;
#pragma unroll 1
        for (int chunk = 0; chunk < TILE / 16; ++chunk) {
            float sums[M][2][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[m][i / 4][i % 4] = 0.f;
            // Low parts first: their sums are small, and so is what adding to them rounds away.
#pragma unroll
            for (int pass = ROW_PARTS; pass >= 0; --pass) {
                const int row_part = pass == 2, list_part = pass == 1;
                const u32 rows = here + (chunk * 16 + quad) * 2 * STRIDE + list_part * STRIDE + part * 16;
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    const uint4 b = read_shared(rows + s * 64), c = read_shared(rows + 16 * STRIDE + s * 64);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(sums[m][0], a[row_part][m][s][0], b.x, b.y);
                        multiply(sums[m][1], a[row_part][m][s][0], c.x, c.y);
                    }
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(sums[m][0], a[row_part][m][s][1], b.z, b.w);
                        multiply(sums[m][1], a[row_part][m][s][1], c.z, c.w);
                    }
                }
            }
            const int list = begin + stage * TILE + chunk * 16 + part * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 raw = read_shared(here + TILE * 2 * STRIDE + (chunk * 16 + i * 8 + part * 2) * 8);
                const float factor[2] = {__uint_as_float(raw.x), __uint_as_float(raw.z)};
                const float bias[2] = {__uint_as_float(raw.y), __uint_as_float(raw.w)};
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float sum = sums[m][i][j];
#if ELEMENT != 0
                        sum *= inverse[m][j / 2];
#endif
                        const float score = fmaf(sum, factor[j % 2], bias[j % 2]);
                        if (score > best[m][j / 2]) {
                            best[m][j / 2] = score;
                            label[m][j / 2] = list + i * 8 + j % 2;
                        }
                    }
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    const i64 out = ((i64)blockIdx.z * gridDim.y + head) * n;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int step = 1; step < 4; step <<= 1) {
                const float score = __shfl_xor_sync(FULL, best[m][half], step);
                const int other = __shfl_xor_sync(FULL, label[m][half], step);
                if (score > best[m][half] || (score == best[m][half] && other < label[m][half])) {
                    best[m][half] = score;
                    label[m][half] = other;
                }
            }
            const int row = first_row + m * 16 + half * 8;
            if (part == 0 && row < n) {
                labels[out + row] = label[m][half] == NOTHING ? 0 : label[m][half];
                scores[out + row] = best[m][half];
            }
        }
}

#define TILES_KERNEL(name, m)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
    name(const element* __restrict__ x, i64 row_stride, i64 head_stride, int n, const u16* __restrict__ parts,         \
         const float2* __restrict__ terms, int lists, int split_lists, int* __restrict__ labels,                       \
         float* __restrict__ scores) {                                                                                 \
        assign_rows<m>(x, row_stride, head_stride, n, parts, terms, lists, split_lists, labels, scores);               \
    }
TILES_KERNEL(assign_few, 1)
#define MANY (4 / ROW_PARTS / (D <= 128 ? 1 : 2))
TILES_KERNEL(assign_many, MANY)
