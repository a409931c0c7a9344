// Routing: scores of all lists, the best of them in order, and what a query reads of those.
#include "topk.cuh"
#include "route_rows.cuh"

#define QUERIES 8  // that share a load of the table
#define CHUNK 512  // features held at once

// scores[i, j] = features[i] . table[j] + bias[j]: grid (ceil(q / QUERIES), ceil(blocks / 8)), THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS)
route_scores(const float* __restrict__ features, const float* __restrict__ table, const float* __restrict__ bias,
             float* __restrict__ scores, int q, int h, int nlist) {
    __shared__ float4 tile[CHUNK * QUERIES / 4];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int block = blockIdx.y * (THREADS / WARP) + warp, blocks = (nlist + LANES - 1) / LANES;
    const int first = blockIdx.x * QUERIES;
    float sums[QUERIES][4];
#pragma unroll
    for (int i = 0; i < QUERIES; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = 0.f;
    for (int start = 0; start < h; start += CHUNK) {
        const int width = min(CHUNK, h - start);
        __syncthreads();
        for (int i = threadIdx.x; i < width * QUERIES; i += THREADS) {
            const int row = i / width, column = i % width;
            const float value = first + row < q ? features[(i64)(first + row) * h + start + column] : 0.f;
            ((float*)tile)[column * QUERIES + row] = value;
        }
        __syncthreads();
        if (block >= blocks) continue;
        const float4* rows = (const float4*)(table + ((i64)block * h + start) * LANES);
#pragma unroll 4
        for (int i = lane; i < width * 4; i += WARP) {
            const float4 x = rows[i], low = tile[i / 4 * 2], high = tile[i / 4 * 2 + 1];
            const float f[QUERIES] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < QUERIES; ++j) {
                sums[j][0] = multiply_add(f[j], x.x, sums[j][0]);
                sums[j][1] = multiply_add(f[j], x.y, sums[j][1]);
                sums[j][2] = multiply_add(f[j], x.z, sums[j][2]);
                sums[j][3] = multiply_add(f[j], x.w, sums[j][3]);
            }
        }
    }
    if (block >= blocks) return;
    const int list = block * LANES + list_of_lane();
#pragma unroll
    for (int j = 0; j < QUERIES; ++j) {
        const float sum = sum_of_list(sums[j]);
        if (!(lane & 4) && list < nlist && first + j < q)
            scores[(i64)(first + j) * nlist + list] = add(sum, bias[list]);
    }
}

// The `p` best lists of a query, and if `sizes` is given the plan of its scan: grid q, THREADS threads; dynamic
// shared memory for `room` entries, a power of two that is at least p.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
route_select(const float* __restrict__ scores, i64* __restrict__ lists, float* __restrict__ best, int nlist, int p,
             int room, const i64* __restrict__ sizes, int* __restrict__ before, int* __restrict__ takes) {
    extern __shared__ i64 ids[];
    __shared__ Scratch scratch;
    u32* keys = (u32*)(ids + room);
    const i64 query = blockIdx.x;
    choose_lists(scores + query * nlist, nlist, 0, p, room, keys, ids, scratch);
    write_best(p, false, keys, ids, best + query * p, lists + query * p);
    if (!sizes) return;
    __syncthreads();
    plan_query<false>(lists + query * p, p, sizes, 0, before + query * (p + 1), takes + query * p, scratch);
}
