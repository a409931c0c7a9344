// Exact scores of the keys in the probed lists: the k best of each query, or all within a radius.
#include "topk.cuh"
#include "scan_part.cuh"

// Compiled with -DD=... (dimensions).

// What a query reads of its lists: grid q, THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_plan(const i64* __restrict__ probes, const i64* __restrict__ sizes, const i64* __restrict__ limits, int p,
          int* __restrict__ before, int* __restrict__ takes) {
    __shared__ Scratch scratch;
    const i64 query = blockIdx.x;
    plan_query<true>(probes + query * p, p, sizes, limits[query], before + query * (p + 1), takes + query * p, scratch);
}

extern __shared__ i64 memory[];

// Grid (q, splits), THREADS threads; dynamic shared memory for `room` + `capacity` entries and the query.
// Each split writes its best to scores and found, (q, splits, k).
template <bool L2>
__device__ void scan_split(const float* queries, const element* vectors, const i64* ids, const i64* offsets, const u16* allowed,
                           const i64* probes, const int* before, const int* takes, int p, int k, int room, int capacity,
                           float* scores, i64* found) {
    __shared__ Scratch scratch;
    __shared__ Blocks blocks;
    __shared__ int count;
    i64 *best_ids = memory, *some_ids = best_ids + room;
    u32 *best_keys = (u32*)(some_ids + capacity), *some_keys = best_keys + room;
    float* query = (float*)(some_keys + capacity);
    const i64 number = blockIdx.x;
    probes += number * p, before += number * (p + 1), takes += number * p;
    const i64 total = before[p];
    const int first = (int)(total * blockIdx.y / gridDim.y), end = (int)(total * (blockIdx.y + 1) / gridDim.y);
    for (int i = threadIdx.x; i < D; i += THREADS) query[i] = queries[number * D + i];
    scan_part<L2>(query, vectors, ids, offsets, allowed, probes, before, takes, p, first, end, k, room, best_keys, best_ids,
                  capacity, some_keys, some_ids, scratch, blocks, count);
    const i64 out = (number * gridDim.y + blockIdx.y) * k;
    write_best(k, L2, best_keys, best_ids, scores + out, found + out);
}

#define SCAN_ARGUMENTS                                                                                              \
    const float *__restrict__ queries, const element *__restrict__ vectors, const i64 *__restrict__ ids,           \
        const i64 *__restrict__ offsets, const u16 *__restrict__ allowed, const i64 *__restrict__ probes,           \
        const int *__restrict__ before, const int *__restrict__ takes, int p

extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_ip(SCAN_ARGUMENTS, int k, int room, int capacity, float* __restrict__ scores, i64* __restrict__ found) {
    scan_split<false>(queries, vectors, ids, offsets, allowed, probes, before, takes, p, k, room, capacity, scores, found);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_l2(SCAN_ARGUMENTS, int k, int room, int capacity, float* __restrict__ scores, i64* __restrict__ found) {
    scan_split<true>(queries, vectors, ids, offsets, allowed, probes, before, takes, p, k, room, capacity, scores, found);
}

// The k best of what the splits of a query found: grid q, THREADS threads; dynamic shared memory for `room`.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_merge(const float* __restrict__ scores, const i64* __restrict__ found, int n, int k, int room, int l2,
           float* __restrict__ best, i64* __restrict__ best_found) {
    __shared__ Scratch scratch;
    i64* ids = memory;
    u32* keys = (u32*)(ids + room);
    const i64 number = blockIdx.x;
    scores += number * n, found += number * n;
    best_of(n, k, room, keys, ids, scratch, [&](int i, u32& key, i64& id) {
        id = found[i];
        key = id == -1 ? 0 : ordered(l2 ? -scores[i] : scores[i]);
    });
    write_best(k, l2, keys, ids, best + number * k, best_found + number * k);
}

// Keys that score above `radius`: counts, (q, splits), or if `starts` is given the results from there on, in the
// order of the scan. Grid (q, splits), THREADS threads.
template <bool L2>
__device__ void range_split(const float* queries, const element* vectors, const i64* ids, const i64* offsets, const u16* allowed,
                            const i64* probes, const int* before, const int* takes, int p, float radius, i64* counts,
                            const i64* starts, float* scores, i64* found) {
    __shared__ Scratch scratch;
    __shared__ Blocks blocks;
    __shared__ float query[D], some[STEP * LANES];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 number = blockIdx.x, split = number * gridDim.y + blockIdx.y;
    probes += number * p, before += number * (p + 1), takes += number * p;
    const i64 blocks_total = before[p];
    const int end = (int)(blocks_total * (blockIdx.y + 1) / gridDim.y);
    for (int i = threadIdx.x; i < D; i += THREADS) query[i] = queries[number * D + i];
    i64 out = starts ? starts[split] : 0, total;
    for (int first = (int)(blocks_total * blockIdx.y / gridDim.y); first < end; first += STEP) {
        find_blocks(first, end, probes, offsets, allowed, before, takes, p, blocks);
        __syncthreads();
        for (int i = warp; i < STEP; i += THREADS / WARP) {
            const u32 lanes = blocks.lanes[i];
            int key = 0;
            float score = -INFINITE;
            if (lanes)
                score = block_score<L2>(vectors + blocks.start[i] * D, query, lane, key);
            else
                key = lane % LANES;
            if (lanes ? !(lane & PARTS) : lane < LANES) some[i * LANES + key] = lanes >> key & 1 ? score : -INFINITE;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEP * LANES; i += THREADS) {
            const float score = some[i + threadIdx.x];
            const bool hit = score > radius;
            const i64 place = out + block_scan(hit, total, scratch);
            if (hit && starts) {
                const int block = (i + threadIdx.x) / LANES;
                scores[place] = L2 ? -score : score;
                found[place] = ids[blocks.start[block] + threadIdx.x % LANES];
            }
            out += total;
        }
        __syncthreads();
    }
    if (!starts && threadIdx.x == 0) counts[split] = out;
}

#define RANGE_RESULTS                                                                                        \
    float radius, i64 *__restrict__ counts, const i64 *__restrict__ starts, float *__restrict__ scores,     \
        i64 *__restrict__ found

extern "C" __global__ void __launch_bounds__(THREADS, 3) range_ip(SCAN_ARGUMENTS, RANGE_RESULTS) {
    range_split<false>(queries, vectors, ids, offsets, allowed, probes, before, takes, p, radius, counts, starts, scores, found);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) range_l2(SCAN_ARGUMENTS, RANGE_RESULTS) {
    range_split<true>(queries, vectors, ids, offsets, allowed, probes, before, takes, p, radius, counts, starts, scores, found);
}
