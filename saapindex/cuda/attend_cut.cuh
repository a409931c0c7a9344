// Cut what was scanned to the budget of keys: choose the best, and hand their rows to all blocks of the unit.

// Find the bin of a histogram of the unit in which the cut falls: keys of higher bins are kept.
__device__ __forceinline__ void find_boundary(const Step& p, Shared& s, const Part& part, int ranker, int limit) {
    const int* all = p.histogram + ((i64)part.unit * G + ranker) * BINS;
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS / 4; i += THREADS) ((int4*)s.histogram)[i] = __ldcg((const int4*)all + i);
    __syncthreads();
    find_bin(s, limit);
}

// Let the key at a place of this block be fetched.
__device__ __forceinline__ void keep(const Step& p, Shared& s, const Part& part, int at, bool hot) {
    if (POLICY == UNION) {
        if (p.kept[part.first_place + at]) return;
        p.kept[part.first_place + at] = 1;
    }
    s.rows[atomicAdd(&s.gathered, 1)] = at | (hot ? OWN_HOT : 0);
}

// Add to the sums of lists what each lane has for its own, if any: together where it is the same list.
__device__ __forceinline__ void take_mass(const Step& p, const Part& part, int list, float* weights) {
    const int lane = threadIdx.x % WARP;
    float* masses = p.masses + (i64)part.unit * p.lists * G;
    u32 left = __ballot_sync(FULL, list >= 0);
#pragma unroll 1
    for (int turn = 0; turn < 4 && left; ++turn) {
        const int one = __shfl_sync(FULL, list, __ffs(left) - 1);
        float sums[G];
#pragma unroll
        for (int g = 0; g < G; ++g) sums[g] = warp_sum(list == one ? weights[g] : 0.f);
        if (lane == 0) add_group(masses + (i64)one * G, sums);
        if (list == one) list = -1;
        left = __ballot_sync(FULL, list >= 0);
    }
    if (list >= 0) add_group(masses + (i64)list * G, weights);
}

// Turn the places that were gathered into rows, for all blocks of the unit, or note their positions. Their estimates
// do not count any more.
__device__ __forceinline__ void resolve(const Step& p, Shared& s, const Part& part) {
    const int count = s.gathered;
    if (threadIdx.x == 0 && count && !p.bits) s.slot = atomicAdd(p.counters + (i64)part.unit * COUNTERS + ROWS, (u32)count);
    __syncthreads();
    int* rows = p.rows + part.first_place - part.block * part.places + s.slot;
#pragma unroll 1
    for (int start = 0; start < count; start += THREADS) {
        const int i = start + threadIdx.x;
        int list = -1;
        float weights[G] = {};
        if (i < count) {
            const bool hot = s.rows[i] & OWN_HOT;
            const int at = s.rows[i] & ~OWN_HOT;
            const i64 place = part.first_place + at;
            const int2 page = __ldcg(p.visited + place / LANES);
            const int row = page.x * LANES + at % LANES;
            if (p.bits) {
                const int id = p.ids[row];
                atomicOr(p.bits + (i64)part.unit * p.width + (id >> 5), 1u << (id & 31));
            } else {
                rows[i] = row;
                if (hot) {
                    p.bins[place * RANKERS] = NO_KEY;  // it is not deferred any more
                } else if (p.remainder) {
                    const Group estimates = load_group(p.estimates + place * G);
                    list = page.y >> 5;
#pragma unroll
                    for (int g = 0; g < G; ++g) weights[g] = -weight_of(estimates.x[g], s.norm[g] * LOG2E) * s.lift[g];
                }
            }
        }
        take_mass(p, part, list, weights);
    }
    __syncthreads();
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
}

__device__ __forceinline__ float key_weight(const Step& p, const Shared& s, i64 place, int ranker) {
    Group weights = load_group(p.estimates + place * G);
#pragma unroll
    for (int g = 0; g < G; ++g) weights.x[g] -= s.norm[g];
    return pooled(weights.x, POLICY, ranker);
}

// Gather the keys of this block above the cut, from place `start` on, and note those in its bin. Returns where it
// stopped for want of room, or the end.
__device__ int gather_sure(const Step& p, Shared& s, const Part& part, int ranker, int start, int total) {
    const i64 places = part.first_place;
    const int boundary = s.boundary;
    const bool open = s.limit > s.reached;
#pragma unroll 1
    for (; start < total && s.gathered <= QUEUE - CHUNK - OWN; start += CHUNK) {
        u16 bins[4];
        const int begin = start + 4 * threadIdx.x;
        if (begin < total) {
            if (RANKERS == 1) {
                const uint2 four = *(const uint2*)(p.bins + places + begin);
                bins[0] = (u16)four.x, bins[1] = (u16)(four.x >> 16);
                bins[2] = (u16)four.y, bins[3] = (u16)(four.y >> 16);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bins[i] = p.bins[(places + begin + i) * RANKERS + ranker];
                    // Whether a key is deferred still, the first ranker knows.
                    if (bins[i] != NO_KEY && p.bins[(places + begin + i) * RANKERS] == NO_KEY) bins[i] &= ~HOT;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int bin = bins[i] & (BINS - 1);
                if (bins[i] == NO_KEY) continue;
                if (bin > boundary) {
                    keep(p, s, part, begin + i, bins[i] & HOT);
                } else if (bin == boundary && open) {
                    const int own = atomicAdd(&s.owned, 1);
                    if (own < OWN) s.own[own] = (begin + i) | (bins[i] & HOT ? OWN_HOT : 0);
                    else if (bins[i] & HOT) s.deferred = 1;
                } else if (bins[i] & HOT) {
                    s.deferred = 1;
                }
            }
        }
        __syncthreads();
    }
    return start;
}

// The position of the key at a place.
__device__ __forceinline__ int id_of(const Step& p, i64 place) {
    return p.ids[__ldcg(&p.visited[place / LANES].x) * LANES + place % LANES];
}

// Hand the keys in the bin of the cut to all blocks.
__device__ __forceinline__ void publish_candidates(const Step& p, Shared& s, const Part& part, int ranker) {
    float2* candidates = p.candidates + ((i64)part.unit * G + ranker) * CANDIDATES;
    const int owned = min(s.owned, OWN);
    if (threadIdx.x == 0) s.own_count = owned;
    if (!owned) return;  // the same in all threads
    if (threadIdx.x == 0)
        s.slot = atomicAdd(p.counters + (i64)part.unit * COUNTERS + CANDIDATE + ranker, (u32)owned);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < owned; i += THREADS) {
        const u32 slot = s.slot + i;
        const int at = s.own[i] & ~OWN_HOT;
        const float weight = key_weight(p, s, part.first_place + at, ranker);
        s.own_weights[i] = weight;
        // Where a key is looked up only if its weight is that of another.
        if (slot < CANDIDATES) candidates[slot] = make_float2(weight, __int_as_float(at + part.block * part.places));
        else s.own[i] = -1;
    }
}

// Gather the best candidates of this block, judged against those of all blocks: one by one, where there are many
// only against those in the part of the bin in which the cut falls.
__device__ __forceinline__ void gather_candidates(const Step& p, Shared& s, const Part& part, int ranker) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, boundary = s.boundary, owned = s.own_count;
    const u32 written = __ldcg(p.counters + (i64)part.unit * COUNTERS + CANDIDATE + ranker);
    const int count = (int)min(written, (u32)CANDIDATES);
    if (!count) return;  // the same in all threads
    const float2* candidates = p.candidates + ((i64)part.unit * G + ranker) * CANDIDATES;
    float2* rivals = (float2*)s.histogram;
    int fine = -1, left = s.limit - s.reached, rival_count = count;
    if (count > BINS / 2) {
        clear_histogram(s);
        __syncthreads();
#pragma unroll 2
        for (int c = threadIdx.x; c < count; c += THREADS)
            atomicAdd(s.histogram + fine_bin_of(__ldcg(candidates + c).x, boundary), 1);
        __syncthreads();
        find_bin(s, left);
        fine = s.boundary, left -= s.reached;
    }
    // All rivals side by side, where they fit.
    if (threadIdx.x == 0) s.owned = 0;
    __syncthreads();
#pragma unroll 2
    for (int c = threadIdx.x; c < count; c += THREADS) {
        const float2 other = __ldcg(candidates + c);
        if (fine >= 0 && fine_bin_of(other.x, boundary) != fine) continue;
        const int own = atomicAdd(&s.owned, 1);
        if (own < BINS / 2) rivals[own] = other;
    }
    __syncthreads();
    const bool fits = s.owned <= BINS / 2;
    if (fits) rival_count = s.owned;
    const i64 places = part.first_place - part.block * part.places;
#pragma unroll 1
    for (int i = warp; i < owned; i += WARPS) {
        if (s.own[i] < 0) continue;
        const float weight = s.own_weights[i];
        const int bin = fine < 0 ? -1 : fine_bin_of(weight, boundary), at = s.own[i] & ~OWN_HOT;
        bool kept = bin > fine;
        if (bin == fine) {
            const int own = at + part.block * part.places;
            int better = 0;
            bool ties = !fits;
            if (fits) {
#pragma unroll 4
                for (int c = lane; c < rival_count; c += WARP) {
                    const float2 other = rivals[c];
                    better += other.x > weight;
                    ties |= other.x == weight && __float_as_int(other.y) != own;
                }
            }
            if (__any_sync(FULL, ties)) {  // of equal weight the lower position first
                better = 0;
#pragma unroll 1
                for (int c = lane; c < rival_count; c += WARP) {
                    const float2 other = fits ? rivals[c] : __ldcg(candidates + c);
                    if (fine >= 0 && fine_bin_of(other.x, boundary) != fine) continue;
                    const int place = __float_as_int(other.y);
                    if (other.x > weight) ++better;
                    else if (other.x == weight && place != own) better += id_of(p, places + place) < id_of(p, places + own);
                }
            }
            kept = warp_sum_int(better) < left;
        }
        if (lane == 0 && kept) keep(p, s, part, at, s.own[i] & OWN_HOT);
        if (lane == 0 && !kept && s.own[i] & OWN_HOT) s.deferred = 1;
    }
    __syncthreads();
}

// The keys of this block that were deferred and not kept.
__device__ void attend_deferred_keys(const Step& p, const Shared& s, const Part& part) {
#pragma unroll 1
    for (int i = threadIdx.x; i < s.visited * LANES; i += THREADS) {
        const i64 place = part.first_place + i;
        const u32 bin = p.bins[place * RANKERS];
        if (bin == NO_KEY || !(bin & HOT)) continue;
        const Group estimates = load_group(p.estimates + place * G);
        float* mass = p.masses + ((i64)part.unit * p.lists + (__ldcg(&p.visited[place / LANES].y) >> 5)) * G;
#pragma unroll
        for (int g = 0; g < G; ++g)
            atomicAdd(mass + g, exponential(fminf(estimates.x[g], s.bound[g]) - s.basis[g]));
    }
}

// Zeros for the next step, when all blocks have seen what was counted: this block's share.
__device__ __forceinline__ void leave_histogram(const Step& p, const Part& part) {
    const int end = share_of(RANKERS * BINS, part.block + 1, part.blocks);
#pragma unroll 1
    for (int i = share_of(RANKERS * BINS, part.block, part.blocks) + threadIdx.x; i < end; i += THREADS)
        p.histogram[(i64)part.unit * G * BINS + i] = 0;
}

// Choose the keys to fetch, and leave their rows to all blocks of the unit. Returns how often blocks met.
__device__ __forceinline__ u32 cut(const Step& p, Shared& s, const Part& part, u32* counter, u32 met) {
    const int total = s.visited * LANES;
#pragma unroll 1
    for (int ranker = 0; ranker < RANKERS; ++ranker) {
        find_boundary(p, s, part, ranker, s.limit);
#pragma unroll 1
        for (int start = 0, ended = 0; !ended;) {
            start = gather_sure(p, s, part, ranker, start, total);
            if (start >= total) {
                ended = 1;
                publish_candidates(p, s, part, ranker);
                arrive(counter);
                met += part.blocks;
                wait(counter, met);
                gather_candidates(p, s, part, ranker);
            }
            resolve(p, s, part);
        }
    }
    return met;
}
