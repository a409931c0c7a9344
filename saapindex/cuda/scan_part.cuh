// The best keys of a part of what a query reads, by one block of threads: what `scan` and `search` share.

#define STEP 32  // blocks of keys that a thread block reads before it looks at what it has
#define PARTS (LANES / VECTOR)

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

// Find the `k` best of the blocks of keys from number `first` up to `end` of what a query reads, sorted, as `best_of`: to
// `best_keys` and `best_ids`, which have room for `room`. A block of threads does it, whose query stands in shared memory, as
// may be written just before. `some_keys` and `some_ids` hold `capacity` on the way.
template <bool L2>
__device__ void scan_part(const float* query, const element* vectors, const i64* ids, const i64* offsets, const u16* allowed,
                          const i64* probes, const int* before, const int* takes, int p, int first, int end, int k, int room,
                          u32* best_keys, i64* best_ids, int capacity, u32* some_keys, i64* some_ids, Scratch& scratch,
                          Blocks& blocks, int& count) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (threadIdx.x == 0) count = 0;
    u32 threshold = 1;  // the least key that may be among the best
    for (;; first += STEP) {
        find_blocks(first, end, probes, offsets, allowed, before, takes, p, blocks);
        __syncthreads();
        for (int i = warp; i < STEP; i += THREADS / WARP) {
            const u32 lanes = blocks.lanes[i];
            if (!lanes) continue;
            const i64 start = blocks.start[i];
            int key;
            const u32 score = ordered(block_score<L2>(vectors + start * D, query, lane, key));
            const bool wanted = !(lane & PARTS) && lanes >> key & 1 && score >= threshold;
            const int place = next_place(wanted, count);
            if (wanted) {
                some_keys[place] = score;
                some_ids[place] = ids[start + key];
            }
        }
        __syncthreads();
        const int have = count;
        const auto entry = [&](int i, u32& key, i64& id) {
            key = some_keys[i];
            id = some_ids[i];
        };
        if (first + STEP >= end) return best_of(have, k, room, best_keys, best_ids, scratch, entry);
        if (have + STEP * LANES <= capacity) continue;
        const int kept = collect(have, k, best_keys, best_ids, scratch, entry);
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
}
