// Assignment of rows to centroids, scores never in memory; and the sums of rows by label.
//
// `assign_many` and `assign_few` work on tensor cores: rows as float16 (bfloat16 scaled by a power of two, which keeps
// its digits; float32 as the sum of two), each centroid as the sum of two float16, so that scores are those of float32.
// `assign_plain` takes any type and dimension. Compiled with -DELEMENT, and -DD for tensor cores.

#define THREADS 256
#define NOTHING 0x7fffffff

#include "halves.cuh"

// ---- Centroids in two parts

#ifdef D
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
#endif

// ---- Any type and dimension

#define SIDE 128  // rows, and lists, of a tile
#define DEPTH 8   // dimensions held at once
#define PITCH (SIDE + 4)

__device__ __forceinline__ void fetch(const float* base, i64 stride, int rows, int d, int k, float* out) {
    const int row = threadIdx.x / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = k + threadIdx.x % 2 * 4 + i;
        out[i] = row < rows && column < d ? base[row * stride + column] : 0.f;
    }
}

#if ELEMENT != 2
__device__ __forceinline__ void fetch(const element* base, i64 stride, int rows, int d, int k, float* out) {
    const int row = threadIdx.x / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = k + threadIdx.x % 2 * 4 + i;
        out[i] = row < rows && column < d ? widen(base[row * stride + column]) : 0.f;
    }
}
#endif

// Grid (ceil(n / SIDE), heads, splits), THREADS threads; splits are whole tiles of lists.
extern "C" __global__ void __launch_bounds__(THREADS)
assign_plain(const element* __restrict__ x, i64 row_stride, i64 head_stride, int n, const float* __restrict__ centroids,
             const float* __restrict__ bias, int nlist, int split_lists, int d, int* __restrict__ labels,
             float* __restrict__ scores) {
    __shared__ float4 left[2][DEPTH][PITCH / 4], right[2][DEPTH][PITCH / 4];
    const int column = threadIdx.x % 16, line = threadIdx.x / 16;
    const i64 head = blockIdx.y;
    const int first_row = blockIdx.x * SIDE, rows = min(SIDE, n - first_row);
    const int begin = blockIdx.z * split_lists, end = min(begin + split_lists, nlist);
    const element* source = x + head * head_stride + first_row * row_stride;
    centroids += head * nlist * d;
    bias += head * nlist;
    float best[8];
    int label[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = -INFINITE, label[i] = NOTHING;
    for (int first = begin; first < end; first += SIDE) {
        const int lists = min(SIDE, end - first);
        const float* target = centroids + (i64)first * d;
        float sums[8][8];
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i / 8][i % 8] = 0.f;
        float next_left[4], next_right[4];
        fetch(source, row_stride, rows, d, 0, next_left);
        fetch(target, d, lists, d, 0, next_right);
        int slot = 0;
        for (int k = 0; k < d; k += DEPTH, slot ^= 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                ((float*)left[slot][threadIdx.x % 2 * 4 + i])[threadIdx.x / 2] = next_left[i];
                ((float*)right[slot][threadIdx.x % 2 * 4 + i])[threadIdx.x / 2] = next_right[i];
            }
            __syncthreads();
            if (k + DEPTH < d) {
                fetch(source, row_stride, rows, d, k + DEPTH, next_left);
                fetch(target, d, lists, d, k + DEPTH, next_right);
            }
#pragma unroll
            for (int depth = 0; depth < DEPTH; ++depth) {
                const float4 a = left[slot][depth][line], b = left[slot][depth][16 + line];
                const float4 c = right[slot][depth][column], e = right[slot][depth][16 + column];
                const float u[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
                const float v[8] = {c.x, c.y, c.z, c.w, e.x, e.y, e.z, e.w};
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(u[i], v[j], sums[i][j]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int list = j / 4 * 64 + column * 4 + j % 4;
            if (list >= lists) continue;
            const float shift = bias[first + list];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (sums[i][j] + shift > best[i]) best[i] = sums[i][j] + shift, label[i] = first + list;
        }
    }
    const i64 out = ((i64)blockIdx.z * gridDim.y + head) * n + first_row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int step = 1; step < 16; step <<= 1) {
            const float score = __shfl_xor_sync(FULL, best[i], step);
            const int other = __shfl_xor_sync(FULL, label[i], step);
            if (score > best[i] || (score == best[i] && other < label[i])) best[i] = score, label[i] = other;
        }
        const int row = i / 4 * 64 + line * 4 + i % 4;
        if (column == 0 && row < rows) {
            labels[out + row] = label[i] == NOTHING ? 0 : label[i];
            scores[out + row] = best[i];
        }
    }
}

// The best of the splits, which stand in the order of their lists: (splits, total) to (total).
extern "C" __global__ void __launch_bounds__(THREADS)
assign_merge(const int* __restrict__ labels, const float* __restrict__ scores, int splits, i64 total,
             i64* __restrict__ best, float* __restrict__ best_scores) {
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= total) return;
    float score = scores[i];
    int label = labels[i];
    for (int split = 1; split < splits; ++split) {
        const float other = scores[split * total + i];
        if (other > score) score = other, label = labels[split * total + i];
    }
    best[i] = label;
    best_scores[i] = score;
}

// ---- Sums of rows by label, in an order that does not change from run to run

#define RUN 256  // rows of a piece

// Sum the rows of a piece of `order`, which lists the rows label by label: grid ceil(n / RUN). A label whose rows lie
// within the piece goes to sums; others go to the pieces' edges, (pieces, 2, d): 0 where the piece begins with them.
extern "C" __global__ void __launch_bounds__(THREADS)
accumulate_pieces(const element* __restrict__ x, i64 stride, const i64* __restrict__ order, const i64* __restrict__ labels,
                  i64 n, int d, double* __restrict__ sums, double* __restrict__ edges) {
    __shared__ i64 rows[RUN], names[RUN];
    const i64 first = (i64)blockIdx.x * RUN;
    const int count = (int)min((i64)RUN, n - first);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        rows[i] = order[first + i];
        names[i] = labels[rows[i]];
    }
    __syncthreads();
    const i64 before = first ? labels[order[first - 1]] : -1, after = first + count < n ? labels[order[first + count]] : -1;
    for (int k = threadIdx.x; k < d; k += THREADS) {
        for (int begin = 0, end; begin < count; begin = end) {
            const i64 label = names[begin];
            for (end = begin + 1; end < count && names[end] == label; ++end) {}
            double sum = 0;
#pragma unroll 8
            for (int i = begin; i < end; ++i) sum += (double)widen(x[rows[i] * stride + k]);
            if (begin == 0 && label == before)
                edges[((i64)blockIdx.x * 2 + 0) * d + k] = sum;
            else if (end == count && label == after)
                edges[((i64)blockIdx.x * 2 + 1) * d + k] = sum;
            else
                sums[label * d + k] = sum;
        }
    }
}

// Join the parts of labels that lie in several pieces: grid nlist. List j is places ends[j - 1] to ends[j].
extern "C" __global__ void __launch_bounds__(THREADS)
accumulate_edges(const i64* __restrict__ ends, int d, double* __restrict__ sums, const double* __restrict__ edges) {
    const i64 list = blockIdx.x, begin = list ? ends[list - 1] : 0, end = ends[list];
    const i64 low = begin / RUN, high = (end - 1) / RUN;
    if (begin < end && low == high) return;
    for (int k = threadIdx.x; k < d; k += THREADS) {
        double sum = 0;
        if (begin < end) {
            sum = edges[(low * 2 + 1) * d + k];
            for (i64 piece = low + 1; piece <= high; ++piece) sum += edges[(piece * 2) * d + k];
        }
        sums[list * d + k] = sum;
    }
}
