// Attend: exactly to rows, by estimates to the rest; and the merging of what warps and blocks found.

// What a team of lanes has attended to: each lane holds its part of the output.
struct Partial {
    float peak[G], sum[G], out[G][HELD];
};

__device__ __forceinline__ void clear(Partial& mine) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        mine.peak[g] = -INFINITE;
        mine.sum[g] = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) mine.out[g][i] = 0.f;
    }
}

// Attend to AHEAD rows of each team; a null key is passed over.
__device__ __forceinline__ void attend_ahead(
    const Step& p, const Shared& s, Partial& mine, const element* const* keys, const element* const* values
) {
    const int member = threadIdx.x % TEAM;
    uint4 raw_keys[AHEAD][PER_LANE], raw_values[AHEAD][PER_LANE];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            const int d = (v * TEAM + member) * VECTOR;
            const bool there = keys[a] && d < D;
            raw_keys[a][v] = there ? *(const uint4*)(keys[a] + d) : make_uint4(0, 0, 0, 0);
            raw_values[a][v] = there ? *(const uint4*)(values[a] + d) : make_uint4(0, 0, 0, 0);
        }
    float logits[AHEAD][G];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
#pragma unroll
        for (int g = 0; g < G; ++g) logits[a][g] = 0.f;
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            const int d = (v * TEAM + member) * VECTOR;
            float x[VECTOR];
            widen_vector(raw_keys[a][v], x);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    logits[a][g] = fmaf(d < D ? s.query[g][d + i] : 0.f, x[i], logits[a][g]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int step = TEAM / 2; step; step >>= 1)
                logits[a][g] += __shfl_xor_sync(FULL, logits[a][g], step);
            logits[a][g] = keys[a] ? capped(p.scale * logits[a][g], p.cap) : -INFINITE;
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        float top = mine.peak[g];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) top = fmaxf(top, logits[a][g]);
        const float safe = top > -INFINITE ? top : 0.f, shrink = exponential(mine.peak[g] - safe);
        mine.peak[g] = top;
        mine.sum[g] *= shrink;
#pragma unroll
        for (int i = 0; i < HELD; ++i) mine.out[g][i] *= shrink;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            logits[a][g] = exponential(logits[a][g] - safe);
            mine.sum[g] += logits[a][g];
        }
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            float x[VECTOR];
            widen_vector(raw_values[a][v], x);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    mine.out[g][v * VECTOR + i] = fmaf(logits[a][g], x[i], mine.out[g][v * VECTOR + i]);
        }
}

// This block's share of the sinks and the recent keys that the query sees.
__device__ void attend_near(
    const Step& p, const Shared& s, const Part& part, Partial& mine, int length, int first, int position
) {
    const int warp = threadIdx.x / WARP, team = threadIdx.x % WARP / TEAM;
    const int sinks = min(p.sinks, length), count = sinks + max(0, length - max(first, p.sinks));
    const i64 offset = (i64)part.stream * (p.sinks + p.ring) * D;
    const int begin = (int)((i64)count * part.block / part.blocks), end = (int)((i64)count * (part.block + 1) / part.blocks);
    for (int start = begin + warp * AHEAD * TEAMS; start < end; start += WARPS * AHEAD * TEAMS) {
        const element *keys[AHEAD], *values[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = start + a * TEAMS + team, at = i < sinks ? i : max(first, p.sinks) + i - sinks;
            const int place = at < p.sinks ? at : p.sinks + (at - p.sinks) % p.ring;
            const bool seen = i < end && at <= position;
            keys[a] = seen ? p.near_keys + offset + (i64)place * D : nullptr;
            values[a] = p.near_values + offset + (i64)place * D;
        }
        attend_ahead(p, s, mine, keys, values);
    }
}

// Attend to the rows that were gathered.
__device__ void attend_gathered(const Step& p, Shared& s, Partial& mine) {
    const int warp = threadIdx.x / WARP, team = threadIdx.x % WARP / TEAM, count = s.gathered;
    for (int start = warp * AHEAD * TEAMS; start < count; start += WARPS * AHEAD * TEAMS) {
        const element *keys[AHEAD], *values[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = start + a * TEAMS + team;
            const i64 row = i < count ? s.rows[i] : 0;
            keys[a] = i < count ? p.keys + row * D : nullptr;
            values[a] = p.values + row * D;
        }
        attend_ahead(p, s, mine, keys, values);
    }
    __syncthreads();
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
}

// Attend to whole pages: those of visited lists, or everything up to the position of the query.
__device__ void attend_pages(
    const Step& p, Shared& s, const Part& part, Partial& mine, const int* taken, bool everything, int position
) {
    const i64 row = (i64)part.stream * p.most_pages;
    const int count = part.page_count(), step = QUEUE / LANES;
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
    for (int start = 0; start < count; start += step) {
        for (int i = threadIdx.x; i < step * LANES; i += THREADS) {
            const int number = start + i / LANES, lane = i % LANES;
            if (number >= count) continue;
            const int page = part.page(number), label = p.labels[row + page], at = p.pages[row + page] * LANES + lane;
            if (lane >= (label & 31)) continue;
            if (everything) {
                if (p.ids[at] > position) continue;
            } else {
                const int some = taken[label >> 5];
                if (!some || p.orders[row + page] * LANES + lane >= some) continue;
            }
            if (p.bits) {
                const int id = p.ids[at];
                atomicOr(p.bits + (i64)part.unit * p.width + (id >> 5), 1u << (id & 31));
            } else {
                s.rows[atomicAdd(&s.gathered, 1)] = at;
            }
        }
        __syncthreads();
        attend_gathered(p, s, mine);
    }
}

// Gather the keys of this block above the cut, and hand those in its bin to all blocks.
__device__ void attend_sure(const Step& p, Shared& s, const Part& part, Partial& mine, int ranker) {
    const i64 places = first_place(p, part);
    u32* count = p.counters + (i64)part.unit * COUNTERS + 2 + ranker;
    float2* candidates = p.candidates + ((i64)part.unit * RANKERS_MOST + ranker) * CANDIDATES;
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
    const int total = s.visited * LANES;
    for (int start = 0; start < total; start += QUEUE) {
        if (start) attend_gathered(p, s, mine);  // makes room
        for (int i = start + threadIdx.x; i < min(start + QUEUE, total); i += THREADS) {
            const i64 place = places + i;
            const float weight = key_weight(p, s, place, ranker);
            if (weight == -INFINITE) continue;
            const int bin = bin_of(weight);
            if (bin > s.boundary) {
                keep(p, s, part, place);
            } else if (bin == s.boundary && s.open) {
                const int own = atomicAdd(&s.owned, 1);
                if (own >= OWN) continue;
                const u32 slot = atomicAdd(count, 1u);
                s.own[own] = slot < CANDIDATES ? i : -1;
                if (slot >= CANDIDATES) continue;
                const int row = p.visited[place / LANES].x * LANES + (int)(place % LANES);
                candidates[slot] = make_float2(weight, __int_as_float(p.ids[row]));
            }
        }
        __syncthreads();
    }
}

// Keep the best candidates of this block, judged against those of all blocks, and attend to them.
__device__ void attend_candidates(const Step& p, Shared& s, const Part& part, Partial& mine, int ranker) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 places = first_place(p, part);
    const u32 written = __ldcg(p.counters + (i64)part.unit * COUNTERS + 2 + ranker);
    const int count = (int)min(written, (u32)CANDIDATES), owned = min(s.owned, OWN);
    const float2* candidates = p.candidates + ((i64)part.unit * RANKERS_MOST + ranker) * CANDIDATES;
    for (int i = warp; i < owned; i += WARPS) {
        const int at = s.own[i];
        if (at < 0) continue;
        const i64 place = places + at;
        const float weight = key_weight(p, s, place, ranker);
        const int id = p.ids[p.visited[place / LANES].x * LANES + (int)(place % LANES)];
        int better = 0;
        for (int c = lane; c < count; c += WARP) {
            const float2 other = __ldcg(candidates + c);
            better += other.x > weight || (other.x == weight && __float_as_int(other.y) < id);
        }
        if (warp_sum_int(better) < s.open && lane == 0) keep(p, s, part, place);
    }
    __syncthreads();
    if (p.bits) return;
    attend_gathered(p, s, mine);
}

// Tell all blocks the largest exact logit, and the largest estimate where there is none.
__device__ void publish_peaks(const Step& p, Shared& s, const Part& part, const Partial& mine, u32* counters) {
    const i64 places = first_place(p, part);
    float peak[G], estimate[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        peak[g] = warp_max(mine.peak[g]);
        estimate[g] = s.norm[g];
    }
    if (p.refine)
        for (int i = threadIdx.x; i < s.visited * LANES; i += THREADS)
#pragma unroll
            for (int g = 0; g < G; ++g) estimate[g] = fmaxf(estimate[g], p.estimates[(places + i) * G + g]);
#pragma unroll
    for (int g = 0; g < G; ++g) estimate[g] = warp_max(estimate[g]);
    if (threadIdx.x % WARP) return;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (peak[g] > -INFINITE) atomicMax(counters + 2 + RANKERS_MOST + g, ordered(peak[g]));
        if (estimate[g] > -INFINITE) atomicMax(counters + 2 + RANKERS_MOST + G + g, ordered(estimate[g]));
    }
}

// Estimates count for no more than the largest exact logit; where there is none they are only kept finite.
__device__ void find_bounds(Shared& s, const u32* counters) {
    if (threadIdx.x < G) {
        const u32 exact = __ldcg(counters + 2 + RANKERS_MOST + threadIdx.x);
        const u32 other = __ldcg(counters + 2 + RANKERS_MOST + G + threadIdx.x);
        s.bound[threadIdx.x] = exact ? unordered(exact) : other ? unordered(other) : 0.f;
    }
    __syncthreads();
}

// Express what was found relative to the bound.
__device__ __forceinline__ void rebase(const Shared& s, Partial& mine) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float shrink = exponential(mine.peak[g] - s.bound[g]);
        mine.peak[g] = s.bound[g];
        mine.sum[g] *= shrink;
#pragma unroll
        for (int i = 0; i < HELD; ++i) mine.out[g][i] *= shrink;
    }
}

// Add the mean value of a list, with a weight for each head.
__device__ __forceinline__ void add_mean(const Step& p, Partial& mine, i64 list, const float* weights) {
    const int member = threadIdx.x % TEAM;
    const float scale = p.mean_scales[list];
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int d = (v * TEAM + member) * VECTOR;
        if (d >= D) continue;
        float x[VECTOR];
        widen_bytes(p.means + list * D + d, x);
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i)
                mine.out[g][v * VECTOR + i] = fmaf(weights[g] * scale, x[i], mine.out[g][v * VECTOR + i]);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) mine.sum[g] += weights[g];
}

// This block's share of the keys that were not visited, list by list.
__device__ void attend_rest_lists(const Step& p, const Shared& s, const Part& part, Partial& mine, const int* taken) {
    const int warp = threadIdx.x / WARP, team = threadIdx.x % WARP / TEAM;
    const int* sizes = p.sizes + (i64)part.stream * p.lists;
    const int begin = (int)((i64)p.lists * part.block / part.blocks);
    const int end = (int)((i64)p.lists * (part.block + 1) / part.blocks);
    for (int list = begin + warp * TEAMS + team; list < end; list += WARPS * TEAMS) {
        const int size = sizes[list], rest = size - taken[list];
        if (rest <= 0) continue;
        float weights[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float logit = fminf(list_logit(p, s, part, list, size, g), s.bound[g]);
            weights[g] = (float)rest * exponential(logit - s.bound[g]);
        }
        add_mean(p, mine, (i64)part.stream * p.lists + list, weights);
    }
}

// This block's keys that were visited and not kept.
__device__ void attend_rest_keys(const Step& p, const Shared& s, const Part& part, Partial& mine) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, half = lane / LANES, team = lane / TEAM;
    const i64 places = first_place(p, part);
    for (int e = 2 * warp; e < s.visited; e += 2 * WARPS) {
        const i64 place = places + (i64)(e + half) * LANES + lane % LANES;
        const bool counts = e + half < s.visited && !p.kept[place];
        float weights[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            weights[g] = counts ? exponential(fminf(p.estimates[place * G + g], s.bound[g]) - s.bound[g]) : 0.f;
#pragma unroll
            for (int step = LANES / 2; step; step >>= 1) weights[g] += __shfl_xor_sync(FULL, weights[g], step);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float mass[G];
#pragma unroll
            for (int g = 0; g < G; ++g) mass[g] = __shfl_sync(FULL, weights[g], j * LANES);
            if (j % TEAMS != team || e + j >= s.visited) continue;
            const int label = p.visited[places / LANES + e + j].y >> 5;
            add_mean(p, mine, (i64)part.stream * p.lists + label, mass);
        }
    }
}

// Merge what the teams of a block found, and leave it where the last block of the unit finds it.
__device__ void reduce_block(
    const Step& p, Shared& s, const Part& part, Partial& mine, float* reduction, bool bounded
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, member = lane % TEAM;
    float peak[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = bounded ? mine.peak[g] : warp_max(mine.peak[g]);
    __syncthreads();
    if (!bounded) {
        if (lane == 0)
#pragma unroll
            for (int g = 0; g < G; ++g) s.reduced[warp][g] = peak[g];
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; ++g)
            for (int w = 0; w < WARPS; ++w) peak[g] = fmaxf(peak[g], s.reduced[w][g]);
    }
    float* own = reduction + warp * G * (D + 1);
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float shrink = peak[g] > -INFINITE ? exponential(mine.peak[g] - peak[g]) : 0.f;
        float sum = mine.sum[g] * shrink;
#pragma unroll
        for (int step = TEAM; step < WARP; step <<= 1) sum += __shfl_xor_sync(FULL, sum, step);
        if (lane == 0) own[g * (D + 1) + D] = sum;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            float x = mine.out[g][i] * shrink;
#pragma unroll
            for (int step = TEAM; step < WARP; step <<= 1) x += __shfl_xor_sync(FULL, x, step);
            const int d = (i / VECTOR * TEAM + member) * VECTOR + i % VECTOR;
            if (lane < TEAM && d < D) own[g * (D + 1) + d] = x;
        }
    }
    __syncthreads();
    float* left = p.partial + ((i64)part.unit * part.blocks + part.block) * G * (D + 2);
    for (int i = threadIdx.x; i < G * (D + 1); i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += reduction[w * G * (D + 1) + i];
        left[i / (D + 1) * (D + 2) + i % (D + 1)] = sum;
    }
    if (threadIdx.x == 0)
#pragma unroll
        for (int g = 0; g < G; ++g) left[g * (D + 2) + D + 1] = peak[g];
}

// Merge what the blocks of a unit found, and write the result.
__device__ void merge_blocks(const Step& p, const Part& part) {
    const float* parts = p.partial + (i64)part.unit * part.blocks * G * (D + 2);
    for (int i = threadIdx.x; i < G * D; i += THREADS) {
        const int g = i / D, d = i % D;
        float peak = -INFINITE, sum = 0.f, out = 0.f;
        for (int b = 0; b < part.blocks; ++b) peak = fmaxf(peak, __ldcg(parts + (b * G + g) * (D + 2) + D + 1));
        if (peak > -INFINITE)
            for (int b = 0; b < part.blocks; ++b) {
                const float* one = parts + (b * G + g) * (D + 2);
                const float weight = exponential(__ldcg(one + D + 1) - peak);
                sum = fmaf(weight, __ldcg(one + D), sum);
                out = fmaf(weight, __ldcg(one + d), out);
            }
        store_out(p.out, (i64)part.unit * G * D + i, sum > 0.f ? out / sum : 0.f);
        if (d == 0) p.lse[(i64)part.unit * G + g] = sum > 0.f ? peak + logf(sum) : -INFINITE;
    }
}
