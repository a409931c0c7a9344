// Exact scores of the keys in the probed lists: the k best of each query, or all within a radius.
#include "topk.cuh"

#define STEP 32  // blocks of keys that a thread block reads before it looks at what it has
#define PARTS (LANES / VECTOR)

// Compiled with -DD=... (dimensions).

// What a query reads of its lists: grid q, THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_plan(const i64* __restrict__ probes, const i64* __restrict__ sizes, const i64* __restrict__ limits, int p,
          int* __restrict__ before, int* __restrict__ takes) {
    __shared__ Scratch scratch;
    const i64 query = blockIdx.x;
    plan_query(probes + query * p, p, sizes, limits[query], before + query * (p + 1), takes + query * p, scratch);
}

extern __shared__ i64 memory[];

struct Blocks {
    i64 start[STEP];
    u32 lanes[STEP];  // the keys that are read, as bits
};

// Find the next STEP blocks of keys from number `first` on: their first rows, and which keys are read.
__device__ __forceinline__ void find_blocks(int first, int end, const i64* probes, const i64* offsets, const u16* allowed,
                                            const int* before, const int* takes, int p, Blocks& blocks) {
    if (threadIdx.x >= STEP) return;
    const int number = first + threadIdx.x;
    if (number >= end) {
        blocks.lanes[threadIdx.x] = 0;
        return;
    }
    int low = 0, high = p - 1;  // the last probe that begins at or before `number`
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (before[middle] <= number)
            low = middle;
        else
            high = middle - 1;
    }
    const int place = (number - before[low]) * LANES;
    const i64 start = offsets[probes[low]] + place;
    const u32 lanes = (1u << min(LANES, takes[low] - place)) - 1;
    blocks.start[threadIdx.x] = start;
    blocks.lanes[threadIdx.x] = allowed ? lanes & allowed[start / LANES] : lanes;
}

// The score of one of the LANES keys of a block, `key`; larger is better. Every key has two lanes.
template <bool L2>
__device__ __forceinline__ float block_score(const element* __restrict__ vectors, const float* query, int lane, int& key) {
    float sums[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sums[i] = 0.f;
    const uint4* rows = (const uint4*)vectors;
#pragma unroll 8
    for (int i = lane; i < D * PARTS; i += WARP) {
        const float x = query[i / PARTS];
        float y[VECTOR];
        widen_vector(rows[i], y);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            if (L2) {
                const float difference = add(x, -y[j]);
                sums[j] = multiply_add(difference, difference, sums[j]);
            } else {
                sums[j] = multiply_add(x, y[j], sums[j]);
            }
        }
    }
    key = lane % PARTS * VECTOR;
    int step = WARP / 2;
#pragma unroll
    for (int half = VECTOR / 2; half; half >>= 1, step >>= 1) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float sent = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
            sums[i] = add(kept, __shfl_xor_sync(FULL, sent, step));
        }
        key += upper ? half : 0;
    }
    const float sum = add(sums[0], __shfl_xor_sync(FULL, sums[0], PARTS));
    return L2 ? -sum : sum;
}

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
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 number = blockIdx.x;
    probes += number * p, before += number * (p + 1), takes += number * p;
    const i64 total = before[p];
    const int end = (int)(total * (blockIdx.y + 1) / gridDim.y);
    for (int i = threadIdx.x; i < D; i += THREADS) query[i] = queries[number * D + i];
    if (threadIdx.x == 0) count = 0;
    u32 threshold = 1;  // the least key that may be among the best
    int kept;
    for (int first = (int)(total * blockIdx.y / gridDim.y);; first += STEP) {
        find_blocks(first, end, probes, offsets, allowed, before, takes, p, blocks);
        __syncthreads();
        for (int i = warp; i < STEP; i += THREADS / WARP) {
            const u32 lanes = blocks.lanes[i];
            if (!lanes) continue;
            const i64 start = blocks.start[i];
            int key;
            const u32 score = ordered(block_score<L2>(vectors + start * D, query, lane, key));
            const bool wanted = !(lane & PARTS) && lanes >> key & 1 && score >= threshold;
            const u32 all = __ballot_sync(FULL, wanted);
            int place = 0;
            if (lane == 0 && all) place = atomicAdd(&count, __popc(all));
            place = __shfl_sync(FULL, place, 0) + __popc(all & ((1u << lane) - 1));
            if (wanted) {
                some_keys[place] = score;
                some_ids[place] = ids[start + key];
            }
        }
        __syncthreads();
        const int have = count;
        const bool last = first + STEP >= end;
        if (!last && have + STEP * LANES <= capacity) continue;
        kept = collect(have, k, best_keys, best_ids, scratch, [&](int i, u32& key, i64& id) {
            key = some_keys[i];
            id = some_ids[i];
        });
        if (last) break;
        if (threadIdx.x == 0) count = kept, scratch.least = 0xffffffffu;
        __syncthreads();
        u32 least = 0xffffffffu;
        for (int i = threadIdx.x; i < kept; i += THREADS) {
            some_keys[i] = best_keys[i];
            some_ids[i] = best_ids[i];
            least = min(least, best_keys[i]);
        }
        if (least != 0xffffffffu) atomicMin(&scratch.least, least);
        __syncthreads();
        if (kept == k) threshold = max(1u, scratch.least);
    }
    sort_entries(kept, room, best_keys, best_ids);
    const i64 out = (number * gridDim.y + blockIdx.y) * k;
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const float score = i < kept ? unordered(best_keys[i]) : -INFINITE;
        scores[out + i] = L2 ? -score : score;
        found[out + i] = i < kept ? best_ids[i] : -1;
    }
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
    const int count = collect(n, k, keys, ids, scratch, [&](int i, u32& key, i64& id) {
        id = found[i];
        key = id == -1 ? 0 : ordered(l2 ? -scores[i] : scores[i]);
    });
    sort_entries(count, room, keys, ids);
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const float score = i < count ? unordered(keys[i]) : -INFINITE;
        best[number * k + i] = l2 ? -score : score;
        best_found[number * k + i] = i < count ? ids[i] : -1;
    }
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
