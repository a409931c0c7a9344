// Scan the codes of the visited lists, and cut to the budget of keys.
//
// A block writes what it scans one after another, page by page: place 16 e + lane is that of a lane of the e-th
// page it visited. What is kept for a place is only ever touched by this block.

#define NO_KEY 0xffffu
#define MEANS (TEAMS == 1 ? 2 : 1)  // of the two pages that a warp scans, a team counts so many
#define OWN_HOT (1 << 30)
#define HOT 0x4000u  // an estimate may pass the bound: it does not count yet

// Gather the visited ones of the pages `start : start + ROUND` of this block.
__device__ void gather_pages(const Step& p, Shared& s, const Part& part, const int* taken, int start, int count) {
    if (threadIdx.x == 0) s.queued = 0;
    __syncthreads();
    const i64 row = (i64)part.stream * p.most_pages;
    const int end = min(start + ROUND, count);
    for (int i = start + threadIdx.x; i < end; i += THREADS) {
        const int page = part.page(i), label = p.labels[row + page], place = p.pages[row + page];
        if (taken[label >> 5]) s.queue[atomicAdd(&s.queued, 1)] = make_int2(place, label);
    }
    __syncthreads();
}

// Multiply the fields of a word with a rounded query; a group of fields is a byte of each.
template <int BITS>
__device__ __forceinline__ void multiply(const Shared& s, const u32* words, int group, int (*sums)[G]) {
    const u32 mask = BITS == 4 ? 0x0f0f0f0fu : BITS == 2 ? 0x03030303u : 0x01010101u;
#pragma unroll
    for (int k = 0; k < 8 / BITS; ++k) {
        int factors[G];
#if G % 4 == 0
#pragma unroll
        for (int g = 0; g < G; g += 4) *(int4*)(factors + g) = *(const int4*)&s.factors[group + k][g];
#else
#pragma unroll
        for (int g = 0; g < G; ++g) factors[g] = s.factors[group + k][g];
#endif
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int g = 0; g < G; ++g)
                sums[u][g] = __dp4a((int)((words[u] >> (BITS * k)) & mask), factors[g], sums[u][g]);
    }
}

// Estimate the logits of the keys of every visited page of this block, count them by weight, and let them count.
__device__ __forceinline__ void scan(const Step& p, Shared& s, const Part& part, Partial& mine, const int* taken) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, key = lane % LANES, team = lane / TEAM;
    const i64 places = part.first_place, lists = (i64)part.stream * p.lists;
    const float base = p.base[part.head];
    const int rankers = p.policy == UNION ? G : 1, count = part.page_count();
    const bool counting = p.remainder && !p.bits;
    bool deferred = false;
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.histogram[i] = 0;
    for (int start = 0; start < count; start += ROUND) {
        gather_pages(p, s, part, taken, start, count);
        const int queued = s.queued, before = s.visited;
        // Two pairs of pages at a time.
        for (int pair = 4 * warp; pair < queued; pair += 4 * WARPS) {
            int2 entries[2];
            u32 words[WORDS][2];
            int exponents[2], sums[2][G];
            Group estimates[2];
            bool filled[2];
            Mean means[2][MEANS];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int e = pair + 2 * u + lane / LANES;
                entries[u] = e < queued ? s.queue[e] : make_int2(0, 0);
                filled[u] = e < queued && key < (entries[u].y & 31);
#pragma unroll
                for (int w = 0; w < WORDS; ++w)
                    words[w][u] = filled[u] ? p.codes[((i64)entries[u].x * WORDS + w) * LANES + key] : 0u;
                exponents[u] = filled[u] ? p.exponents[(i64)entries[u].x * LANES + key] : 128;
                estimates[u] = load_group(p.dots + ((i64)part.unit * p.lists + (entries[u].y >> 5)) * G);
#pragma unroll
                for (int g = 0; g < G; ++g) sums[u][g] = 0;
#pragma unroll
                for (int j = 0; j < MEANS; ++j) {
                    const int page = pair + 2 * u + (TEAMS == 1 ? j : team);
                    const bool there = counting && (TEAMS == 1 || team < 2) && page < queued;
                    if (there) means[u][j] = load_mean(p, lists + (s.queue[page].y >> 5));
                }
            }
            int group = 0;
#pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                const int bits = p.widths[part.head * WORDS + w];
                if (bits == 2) multiply<2>(s, words[w], group, sums);
                else if (bits == 4) multiply<4>(s, words[w], group, sums);
                else multiply<1>(s, words[w], group, sums);
                group += 8 / bits;
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int e = pair + 2 * u + lane / LANES;
                const float f = base * exp2f((exponents[u] - 128) / 16.f);
                float weights[G];
                bool hot = false;
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float residual = s.unit[g] * f * (0.5f * (2 * sums[u][g] - s.offsets[g]));
                    const float second = fminf(s.second[g] * f * f, CORRECTION);
                    estimates[u].x[g] = capped(estimates[u].x[g] + (residual + second), p.cap);
                    hot |= estimates[u].x[g] > s.reference[g];
                    weights[g] = estimates[u].x[g] - s.norm[g];
                }
                if (e < queued) {
                    const i64 place = places + (i64)(before + e) * LANES + key;
                    store_group(p.estimates + place * G, estimates[u].x);
                    for (int ranker = 0; ranker < rankers; ++ranker) {
                        const int bin = bin_of(pooled(weights, p.policy, ranker));
                        p.bins[place * rankers + ranker] = filled[u] ? bin | (hot ? HOT : 0) : NO_KEY;
                        if (filled[u] && rankers == 1) atomicAdd(s.histogram + bin, 1);
                    }
                    if (p.policy == UNION) p.kept[place] = 0;
                    if (key == 0) p.visited[place / LANES] = entries[u];
                }
                if (!counting) continue;
                deferred |= filled[u] && hot;
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    weights[g] = filled[u] && !hot ? exponential(estimates[u].x[g] - mine.reference[g]) : 0.f;
#pragma unroll
                    for (int step = LANES / 2; step; step >>= 1)
                        weights[g] += __shfl_xor_sync(FULL, weights[g], step);
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float mass[G];
#pragma unroll
                    for (int g = 0; g < G; ++g) mass[g] = __shfl_sync(FULL, weights[g], j * LANES);
                    if (j % TEAMS == team && pair + 2 * u + j < queued) add_mean(mine, means[u][TEAMS == 1 ? j : 0], mass);
                }
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) s.visited = before + queued;
        __syncthreads();
    }
    if (deferred) atomicOr(&s.deferred, (int)KEYS_DEFERRED);
    // All blocks of a unit take the same lists, so each knows how many keys are visited in all.
    int scanned = 0;
    for (int list = threadIdx.x; list < p.lists; list += THREADS) scanned += taken[list];
    scanned = warp_sum_int(scanned);
    if (threadIdx.x % WARP == 0) ((int*)s.reduced)[threadIdx.x / WARP] = scanned;
    __syncthreads();
    if (threadIdx.x == 0) {
        i64 left = s.left;
        for (int w = 0; w < WARPS; ++w) left -= (i64)((int*)s.reduced)[w] * p.code_bytes;
        s.limit = max((i64)0, left) / p.row_bytes;
    }
    for (int ranker = 0; ranker < rankers; ++ranker) {
        if (rankers > 1) {
            for (int i = threadIdx.x; i < BINS; i += THREADS) s.histogram[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < s.visited * LANES; i += THREADS) {
                const u32 bin = p.bins[(places + i) * rankers + ranker];
                if (bin != NO_KEY) atomicAdd(s.histogram + (bin & (BINS - 1)), 1);
            }
            __syncthreads();
        }
        int* all = p.histogram + ((i64)part.unit * 2 * G + 2 * ranker) * BINS;
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            if (s.histogram[i]) atomicAdd(all + i, s.histogram[i]);
        __syncthreads();
    }
}

// Find the bin of a histogram of the unit in which the cut falls: keys of higher bins are kept.
__device__ __forceinline__ void find_boundary(const Step& p, Shared& s, const Part& part, int number, int limit) {
    const int* all = p.histogram + ((i64)part.unit * 2 * G + number) * BINS;
    const int begin = threadIdx.x * RUN;
    int counts[RUN];
#pragma unroll
    for (int i = 0; i < RUN; ++i) counts[i] = begin + i < BINS ? __ldcg(all + BINS - 1 - begin - i) : 0;
    find_bin(s, counts, limit);
}

// Let a key be fetched: gather it, or note its position.
__device__ __forceinline__ void keep(const Step& p, Shared& s, i64 places, int at, bool hot) {
    const i64 place = places + at;
    if (p.policy == UNION) {
        if (p.kept[place]) return;
        p.kept[place] = 1;
    }
    const int2 entry = p.visited[place / LANES];
    const int row = entry.x * LANES + at % LANES;
    if (p.bits) {
        const int id = p.ids[row], unit = blockIdx.x / p.blocks;
        atomicOr(p.bits + (i64)unit * p.width + (id >> 5), 1u << (id & 31));
        return;
    }
    const int i = atomicAdd(&s.gathered, 1);
    s.rows[i] = row;
    s.places[i] = hot || !p.remainder ? -1 : at;
    s.labels[i] = (u16)(entry.y >> 5);
    if (hot) p.bins[place * (p.policy == UNION ? G : 1)] = NO_KEY;  // it is not deferred any more
}

__device__ __forceinline__ float key_weight(const Step& p, const Shared& s, i64 place, int ranker) {
    Group weights = load_group(p.estimates + place * G);
#pragma unroll
    for (int g = 0; g < G; ++g) weights.x[g] -= s.norm[g];
    return pooled(weights.x, p.policy, ranker);
}

// Gather the keys of this block above the cut, from place `start` on, and hand those in its bin to all blocks.
// Returns where it stopped for want of room, or the end.
__device__ int gather_sure(const Step& p, Shared& s, const Part& part, int ranker, int start, int total) {
    const i64 places = part.first_place;
    u32* count = p.counters + (i64)part.unit * COUNTERS + CANDIDATE + ranker;
    float2* candidates = p.candidates + ((i64)part.unit * G + ranker) * CANDIDATES;
    int* fine = p.histogram + ((i64)part.unit * 2 * G + 2 * ranker + 1) * BINS;
    const int rankers = p.policy == UNION ? G : 1;
    const int open = (int)min(s.limit / rankers, (i64)0x7fffffff) - s.reached, boundary = s.boundary;
    for (; start < total && s.gathered <= QUEUE - CHUNK - OWN; start += CHUNK) {
        u16 bins[4];
        const int begin = start + 4 * threadIdx.x;
        if (begin < total) {
            if (rankers == 1) {
                const uint2 four = *(const uint2*)(p.bins + places + begin);
                bins[0] = (u16)four.x, bins[1] = (u16)(four.x >> 16);
                bins[2] = (u16)four.y, bins[3] = (u16)(four.y >> 16);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bins[i] = p.bins[(places + begin + i) * rankers + ranker];
                    // Whether a key is deferred still, the first ranker knows.
                    if (bins[i] != NO_KEY && p.bins[(places + begin + i) * rankers] == NO_KEY) bins[i] &= ~HOT;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (bins[i] == NO_KEY) continue;
                const int bin = bins[i] & (BINS - 1);
                if (bin > boundary) {
                    keep(p, s, places, begin + i, bins[i] & HOT);
                } else if (bin == boundary && open > 0) {
                    const int own = atomicAdd(&s.owned, 1);
                    if (own >= OWN) continue;
                    const u32 slot = atomicAdd(count, 1u);
                    s.own[own] = slot < CANDIDATES ? (begin + i) | (bins[i] & HOT ? OWN_HOT : 0) : -1;
                    if (slot >= CANDIDATES) continue;
                    const i64 place = places + begin + i;
                    const int row = p.visited[place / LANES].x * LANES + (begin + i) % LANES;
                    const float weight = key_weight(p, s, place, ranker);
                    candidates[slot] = make_float2(weight, __int_as_float(p.ids[row]));
                    s.own_weights[own] = weight;
                    atomicAdd(fine + fine_bin_of(weight, boundary), 1);
                }
            }
        }
        __syncthreads();
    }
    return start;
}

// Gather the best candidates of this block, judged against those of all blocks: first by their counts in fine
// bins, and in the bin in which the cut falls one by one.
__device__ void gather_candidates(const Step& p, Shared& s, const Part& part, int ranker) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 places = part.first_place;
    const int boundary = s.boundary, owned = min(s.owned, OWN);
    const int open = (int)min(s.limit / (p.policy == UNION ? G : 1), (i64)0x7fffffff) - s.reached;
    const u32 written = __ldcg(p.counters + (i64)part.unit * COUNTERS + CANDIDATE + ranker);
    const int count = (int)min(written, (u32)CANDIDATES);
    if (!count) return;  // the same in all threads
    const float2* candidates = p.candidates + ((i64)part.unit * G + ranker) * CANDIDATES;
    find_boundary(p, s, part, 2 * ranker + 1, open);
    const int fine = s.boundary, left = open - s.reached;
    for (int i = warp; i < owned; i += WARPS) {
        if (s.own[i] < 0) continue;
        const float weight = s.own_weights[i];
        const int bin = fine_bin_of(weight, boundary);
        bool kept = bin > fine;
        if (bin == fine) {
            const int at = s.own[i] & ~OWN_HOT;
            const int id = p.ids[p.visited[(places + at) / LANES].x * LANES + at % LANES];
            int better = 0;
            for (int c = lane; c < count; c += WARP) {
                const float2 other = __ldcg(candidates + c);
                if (fine_bin_of(other.x, boundary) == fine)
                    better += other.x > weight || (other.x == weight && __float_as_int(other.y) < id);
            }
            kept = warp_sum_int(better) < left;
        }
        if (kept && lane == 0) keep(p, s, places, s.own[i] & ~OWN_HOT, s.own[i] & OWN_HOT);
    }
    __syncthreads();
}

// The keys of this block that were deferred and not kept.
__device__ __forceinline__ void attend_deferred_keys(const Step& p, const Shared& s, const Part& part, Partial& mine) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, half = lane / LANES, team = lane / TEAM;
    const i64 places = part.first_place;
    const int rankers = p.policy == UNION ? G : 1;
    for (int e = 2 * warp; e < s.visited; e += 2 * WARPS) {
        const i64 place = places + (i64)(e + half) * LANES + lane % LANES;
        const u32 bin = e + half < s.visited ? p.bins[place * rankers] : NO_KEY;
        const bool counts = bin != NO_KEY && (bin & HOT);
        Group weights = {};
        if (counts) weights = load_group(p.estimates + place * G);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            weights.x[g] = counts ? exponential(fminf(weights.x[g], s.bound[g]) - mine.reference[g]) : 0.f;
#pragma unroll
            for (int step = LANES / 2; step; step >>= 1) weights.x[g] += __shfl_xor_sync(FULL, weights.x[g], step);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float mass[G];
#pragma unroll
            for (int g = 0; g < G; ++g) mass[g] = __shfl_sync(FULL, weights.x[g], j * LANES);
            if (j % TEAMS != team || e + j >= s.visited) continue;
            const int label = p.visited[places / LANES + e + j].y >> 5;
            add_mean(mine, load_mean(p, (i64)part.stream * p.lists + label), mass);
        }
    }
}
