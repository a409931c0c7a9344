// The best of many entries, by one block of THREADS threads: what routing and scanning share.
//
// An entry is a key, larger is better and zero is nothing, and an id, of equal keys the lower is better.

#define THREADS 256
#define DIGIT 11
#define BINS (1 << DIGIT)
#define LAST_ID 0x7fffffffffffffffLL

// Sums and products that keep the smallest numbers: CuPy compiles everything else to flush them to zero.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    float x;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(x) : "f"(a), "f"(b), "f"(c));
    return x;
}

__device__ __forceinline__ float add(float a, float b) {
    float x;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}

// A float as an integer of the same order: -0 and 0 are the same, NaN is nothing.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
    if (bits == 0x80000000u) return bits;
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

struct Scratch {
    u32 bins[BINS];
    i64 sums[THREADS / WARP];
    u64 found;
    u32 least;
    int rank, equal, taken, tickets;
};

// Sum of `x` over the threads before this one; `total` becomes that over all.
__device__ __forceinline__ i64 block_scan(i64 x, i64& total, Scratch& scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 sum = x;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const i64 other = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();  // whoever read the sums of the scan before is done
    if (lane == WARP - 1) scratch.sums[warp] = sum;
    __syncthreads();
    i64 before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; ++i) {
        if (i < warp) before += scratch.sums[i];
        total += scratch.sums[i];
    }
    return before + sum - x;
}

// The value of rank `k` (from 1) among those of `n` entries that `value(i, v)` admits, largest first.
// `k` becomes its rank among the values that equal it, `equal` how many those are.
template <int BITS, typename Value>
__device__ u64 of_rank(int n, int& k, int& equal, Scratch& scratch, Value value) {
    const int each = BINS / THREADS;
    u64 prefix = 0, mask = 0;
    for (int low = (BITS - 1) / DIGIT * DIGIT; low >= 0; low -= DIGIT) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) scratch.bins[i] = 0;
        __syncthreads();
        // The first digits of many values are the same: each is counted once a warp.
        const bool first = !mask;
        for (int start = 0; start < n; start += THREADS) {
            const int i = start + threadIdx.x;
            u64 v;
            const bool counts = i < n && value(i, v) && (v & mask) == prefix;
            const u32 digit = counts ? (u32)(v >> low) & (BINS - 1) : BINS;
            if (first) {
                const u32 peers = __match_any_sync(FULL, digit);
                if (counts && (int)threadIdx.x % WARP == __ffs(peers) - 1)
                    atomicAdd(&scratch.bins[digit], (u32)__popc(peers));
            } else if (counts) {
                atomicAdd(&scratch.bins[digit], 1u);
            }
        }
        __syncthreads();
        const int top = BINS - 1 - each * (int)threadIdx.x;
        i64 here = 0, total;
        for (int i = 0; i < each; ++i) here += scratch.bins[top - i];
        const i64 before = block_scan(here, total, scratch);
        if (before < k && k <= before + here) {
            int left = k - (int)before, digit = top;
            while (left > (int)scratch.bins[digit]) left -= (int)scratch.bins[digit--];
            scratch.rank = left;
            scratch.equal = (int)scratch.bins[digit];
            scratch.found = prefix | (u64)digit << low;
        }
        __syncthreads();
        prefix = scratch.found;
        mask |= (u64)(BINS - 1) << low;
        k = scratch.rank;
        equal = scratch.equal;
        __syncthreads();
    }
    return prefix;
}

// Write the `k` best of `n` entries to `keys` and `ids`, in no order; return how many there are.
template <typename Entry>
__device__ int collect(int n, int k, u32* keys, i64* ids, Scratch& scratch, Entry entry) {
    u32 cut = 0;
    int ties = 0, equal = 0, same = 0;
    i64 last = LAST_ID;
    if (n > k) {
        ties = k;
        cut = (u32)of_rank<32>(n, ties, equal, scratch, [&](int i, u64& v) {
            u32 key;
            i64 id;
            entry(i, key, id);
            v = key;
            return true;
        });
        if (cut && equal > ties) {
            same = ties;
            const u64 value = of_rank<64>(n, same, equal, scratch, [&](int i, u64& v) {
                u32 key;
                i64 id;
                entry(i, key, id);
                v = ~((u64)id ^ 0x8000000000000000ull);
                return key == cut;
            });
            last = (i64)(~value ^ 0x8000000000000000ull);
        } else {
            same = ties;  // no id is that large
        }
    }
    if (threadIdx.x == 0) scratch.taken = scratch.tickets = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        u32 key;
        i64 id;
        entry(i, key, id);
        bool taken = key > cut;
        if (key == cut && cut) taken = id < last || (id == last && atomicAdd(&scratch.tickets, 1) < same);
        if (taken) {
            const int place = atomicAdd(&scratch.taken, 1);
            keys[place] = key;
            ids[place] = id;
        }
    }
    __syncthreads();
    const int count = scratch.taken;
    __syncthreads();
    return count;
}

// Sort `count` entries, best first; `room` is a power of two that is at least `count`.
__device__ void sort_entries(int count, int room, u32* keys, i64* ids) {
    for (int i = count + threadIdx.x; i < room; i += THREADS) {
        keys[i] = 0;
        ids[i] = LAST_ID;
    }
    __syncthreads();
    for (int size = 2; size <= room; size <<= 1) {
        for (int step = size / 2; step; step >>= 1) {
            for (int pair = threadIdx.x; pair < room / 2; pair += THREADS) {
                const int a = 2 * pair - (pair & (step - 1)), b = a + step;
                const u32 key_a = keys[a], key_b = keys[b];
                const i64 id_a = ids[a], id_b = ids[b];
                const bool behind = key_a < key_b || (key_a == key_b && id_a > id_b);
                if (behind == !(a & size)) {
                    keys[a] = key_b, ids[a] = id_b;
                    keys[b] = key_a, ids[b] = id_a;
                }
            }
            __syncthreads();
        }
    }
}

// Write the `k` best entries of `count` that are sorted, as scores and ids; of distances the scores are negative.
__device__ __forceinline__ void write_best(int count, int k, bool l2, const u32* keys, const i64* ids, float* scores, i64* found) {
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const float score = i < count ? unordered(keys[i]) : -INFINITE;
        scores[i] = l2 ? -score : score;
        found[i] = i < count ? ids[i] : -1;
    }
}

// The `p` best of `nlist` lists by their scores, sorted; returns how many there are. There is room for `room`.
__device__ __forceinline__ int choose_lists(const float* scores, int nlist, int p, int room, u32* keys, i64* ids, Scratch& scratch) {
    const int count = collect(nlist, p, keys, ids, scratch, [&](int i, u32& key, i64& id) {
        const float score = scores[i];
        key = score > -INFINITE ? ordered(score) : 0;
        id = i;
    });
    sort_entries(count, room, keys, ids);
    return count;
}

// What a query reads of the lists that it probes: blocks of keys before each, and keys of each.
__device__ void plan_query(const i64* probes, int p, const i64* sizes, i64 limit, int* before, int* takes, Scratch& scratch) {
    i64 keys = 0, blocks = 0, total;
    for (int start = 0; start < p; start += THREADS) {
        const int i = start + threadIdx.x;
        const i64 list = i < p ? probes[i] : -1;
        const i64 size = list >= 0 ? sizes[list] : 0;
        const i64 left = limit - keys - block_scan(size, total, scratch);
        const i64 take = left < 0 ? 0 : left < size ? left : size;
        keys += total;
        const i64 count = (take + LANES - 1) / LANES;
        const i64 place = blocks + block_scan(count, total, scratch);
        blocks += total;
        if (i < p) {
            before[i] = (int)place;
            takes[i] = (int)take;
        }
    }
    if (threadIdx.x == 0) before[p] = (int)blocks;
}
