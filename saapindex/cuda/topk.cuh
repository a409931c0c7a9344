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
    union {
        u32 bins[BINS];
        struct {  // that may be among the best
            i64 ids[THREADS];
            u32 keys[THREADS];
        } some;
    };
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

// Sort the entries of a warp, best first, one of each lane.
__device__ __forceinline__ void sort_in_warp(u32& key, i64& id) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int size = 2; size <= WARP; size <<= 1)
#pragma unroll
        for (int step = size / 2; step; step >>= 1) {
            const u32 other = __shfl_xor_sync(FULL, key, step);
            const i64 other_id = __shfl_xor_sync(FULL, id, step);
            const bool behind = (other > key) | ((other == key) & (other_id < id)), wants_first = !(lane & size) != !!(lane & step);
            if (behind == wants_first) key = other, id = other_id;
        }
}

// The `k` best of `parts` sorted parts, at most PARTS, of `length` entries, a power of two, of which those without a key are
// nothing: sorted to `keys` and `ids`.
template <int PARTS>
__device__ void merge_sorted(int parts, int length, int k, const u32* part_keys, const i64* part_ids, u32* keys, i64* ids) {
    for (int i = threadIdx.x; i < parts * length; i += THREADS) {
        const u32 key = part_keys[i];
        if (!key) continue;
        const i64 id = part_ids[i];
        // How many of each part come before it: of equal entries those before it.
        int before[PARTS] = {}, rank = 0;
#pragma unroll 1
        for (int step = length; step; step >>= 1) {
            const int half = max(step / 2, 1);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (part >= parts) break;
                const int at = part * length + before[part] + half - 1;
                const u32 other = part_keys[at];
                const i64 other_id = part_ids[at];
                const bool less = (other_id < id) | ((other_id == id) & (at < i));
                before[part] += (other > key) | ((other == key) & less) ? half : 0;
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) rank += before[part];
        if (rank < k) {
            keys[rank] = key;
            ids[rank] = id;
        }
    }
    __syncthreads();
}

// The `k` best of `n` entries, at most one of each thread from the first on, sorted; others give nothing.
__device__ void sort_few(u32 key, i64 id, int n, int k, u32* keys, i64* ids, Scratch& scratch) {
    sort_in_warp(key, id);
    if (n <= WARP) {
        if ((int)threadIdx.x < min(n, k)) {
            keys[threadIdx.x] = key;
            ids[threadIdx.x] = id;
        }
        __syncthreads();
        return;
    }
    scratch.some.keys[threadIdx.x] = key;
    scratch.some.ids[threadIdx.x] = id;
    __syncthreads();
    merge_sorted<THREADS / WARP>((n + WARP - 1) / WARP, WARP, k, scratch.some.keys, scratch.some.ids, keys, ids);
}

// The next place of those that are counted, for each lane of a warp that has something to put there.
__device__ __forceinline__ int next_place(bool some, int& count) {
    const int lane = threadIdx.x % WARP;
    const u32 all = __ballot_sync(FULL, some);
    int place = 0;
    if (lane == 0 && all) place = atomicAdd(&count, __popc(all));
    return __shfl_sync(FULL, place, 0) + __popc(all & ((1u << lane) - 1));
}

// The digits of the value of rank `left` (from 1) among those of `n` entries that `value(i, v)` admits, largest first:
// all, or as many as it takes until no more than `enough` values begin like that. `mask` tells which bits these are. `left`
// becomes its rank among the `equal` values that begin like it.
template <int BITS, typename Value>
__device__ u64 of_rank(int n, int enough, u64& mask, int& left, int& equal, Scratch& scratch, Value value) {
    const int each = BINS / THREADS;
    u64 prefix = 0;
    mask = 0, equal = n;
    for (int low = (BITS - 1) / DIGIT * DIGIT; low >= 0 && equal > enough; low -= DIGIT) {
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
        if (before < left && left <= before + here) {
            int rest = left - (int)before, digit = top;
            while (rest > (int)scratch.bins[digit]) rest -= (int)scratch.bins[digit--];
            scratch.rank = rest;
            scratch.equal = (int)scratch.bins[digit];
            scratch.found = prefix | (u64)digit << low;
        }
        __syncthreads();
        prefix = scratch.found;
        mask |= (u64)(BINS - 1) << low;
        left = scratch.rank;
        equal = scratch.equal;
        __syncthreads();
    }
    return prefix;
}

// Write the `k` best of `n` entries to `keys` and `ids`, in order if there are no more than THREADS; return how many there
// are. Digits of the keys say which are taken, and which may be: these are sorted when they are few.
template <typename Entry>
__device__ int collect(int n, int k, u32* keys, i64* ids, Scratch& scratch, Entry entry) {
    const int thread = threadIdx.x;
    u32 key = 0;
    i64 id = LAST_ID;
    if (n <= THREADS) {
        if (thread < n) entry(thread, key, id);
        const int count = __syncthreads_count(key != 0);
        sort_few(key, id, n, k, keys, ids, scratch);
        return min(count, k);
    }
    const bool all = n <= k;
    u64 mask = 0, ids_mask;
    u32 cut = 0;
    int left = 0, equal = 0, same = 0;
    i64 last = LAST_ID;
    if (!all) {
        left = k;
        cut = (u32)of_rank<32>(n, THREADS, mask, left, equal, scratch, [&](int i, u64& v) {
            u32 key;
            i64 id;
            entry(i, key, id);
            v = key;
            return true;
        });
        same = left;
        if (cut && equal > left && equal > THREADS) {  // the key is the same: ids say
            int others;
            const u64 value = of_rank<64>(n, 0, ids_mask, same, others, scratch, [&](int i, u64& v) {
                u32 key;
                i64 id;
                entry(i, key, id);
                v = ~((u64)id ^ 0x8000000000000000ull);
                return key == cut;
            });
            last = (i64)(~value ^ 0x8000000000000000ull);
        }
    }
    const bool few = equal <= THREADS;
    if (thread == 0) scratch.taken = scratch.tickets = 0;
    __syncthreads();
    for (int start = 0; start < n; start += THREADS) {
        key = 0;
        if (start + thread < n) entry(start + thread, key, id);
        const u32 digits = key & (u32)mask;
        bool taken = key && (all || digits > cut);
        const bool perhaps = key && !taken && digits == cut;
        if (!few && perhaps) taken = id < last || (id == last && atomicAdd(&scratch.tickets, 1) < same);
        if (few) {
            const int place = next_place(perhaps, scratch.tickets);
            if (perhaps) scratch.some.keys[place] = key, scratch.some.ids[place] = id;
        }
        const int place = next_place(taken, scratch.taken);
        if (taken) keys[place] = key, ids[place] = id;
    }
    __syncthreads();
    const int sure = scratch.taken, candidates = few ? scratch.tickets : 0;
    key = 0;
    if (thread < candidates) key = scratch.some.keys[thread], id = scratch.some.ids[thread];
    __syncthreads();
    if (candidates) sort_few(key, id, candidates, left, keys + sure, ids + sure, scratch);
    return sure + min(left, candidates);
}

// Sort `count` entries, best first; what is left of `room`, a power of two, is nothing.
__device__ void sort_entries(int count, int room, u32* keys, i64* ids, Scratch& scratch) {
    if (count <= THREADS) {
        const int thread = threadIdx.x;
        sort_few(thread < count ? keys[thread] : 0, thread < count ? ids[thread] : LAST_ID, count, count, keys, ids, scratch);
        return;
    }
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

// What is behind `count` entries, up to `room`, becomes nothing.
__device__ __forceinline__ void clear_behind(int count, int room, u32* keys, i64* ids) {
    for (int i = count + threadIdx.x; i < room; i += THREADS) {
        keys[i] = 0;
        ids[i] = LAST_ID;
    }
    __syncthreads();
}

// The `k` best of `n` entries, sorted; there is room for `room`, a power of two, and what is left of it is nothing.
template <typename Entry>
__device__ __forceinline__ void best_of(int n, int k, int room, u32* keys, i64* ids, Scratch& scratch, Entry entry) {
    const int count = collect(n, k, keys, ids, scratch, entry);
    clear_behind(count, room, keys, ids);
    if (n > THREADS) sort_entries(count, room, keys, ids, scratch);
}

// Write `k` entries, sorted and then nothing, as scores and ids; of distances the scores are negative.
__device__ __forceinline__ void write_best(int k, bool l2, const u32* keys, const i64* ids, float* scores, i64* found) {
    for (int i = threadIdx.x; i < k; i += THREADS) {
        const float score = keys[i] ? unordered(keys[i]) : -INFINITE;
        scores[i] = l2 ? -score : score;
        found[i] = keys[i] ? ids[i] : -1;
    }
}

// The `p` best of `n` lists by their scores, of which `first` is the number of the first one; see `best_of`.
__device__ __forceinline__ void choose_lists(const float* scores, int n, int first, int p, int room, u32* keys, i64* ids, Scratch& scratch) {
    best_of(n, p, room, keys, ids, scratch, [&](int i, u32& key, i64& id) {
        const float score = scores[i];
        key = score > -INFINITE ? ordered(score) : 0;
        id = first + i;
    });
}

// What a query reads of the lists that it probes: blocks of keys before each, and keys of each, which are at most `limit` if
// there is one.
template <bool LIMITED>
__device__ void plan_query(const i64* probes, int p, const i64* sizes, i64 limit, int* before, int* takes, Scratch& scratch) {
    i64 keys = 0, blocks = 0, total;
    for (int start = 0; start < p; start += THREADS) {
        const int i = start + threadIdx.x;
        const i64 list = i < p ? probes[i] : -1;
        i64 take = list >= 0 ? sizes[list] : 0;
        if (LIMITED) {
            const i64 left = limit - keys - block_scan(take, total, scratch);
            take = max(0LL, min(left, take));
            keys += total;
        }
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
