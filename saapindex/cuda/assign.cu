// Assignment of rows to centroids, scores never in memory; and the sums of rows by label.
//
// `assign_many` and `assign_few` work on tensor cores: rows as float16 (bfloat16 scaled by a power of two, which keeps
// its digits; float32 as the sum of two), each centroid as the sum of two float16, so that scores are those of float32.
// `assign_plain` takes any type and dimension. Compiled with -DELEMENT, and -DD for tensor cores.

#define THREADS 256
#define NOTHING 0x7fffffff

#include "halves.cuh"

#ifdef D
#include "assign_tiles.cuh"
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
