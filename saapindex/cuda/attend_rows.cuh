// Attend: exactly to rows, by estimates to the rest; and the merging of what teams, warps and blocks found.

// What a team of lanes has attended to. Weights are relative to exp(reference), which moves only when a logit
// passes it by SLACK. Each lane holds its part of the output, and owns the sums of some of the team's logits:
// logit n = AHEAD row * G + head is that of lane n / OWNED.
struct Partial {
    float out[G][HELD], reference[G];
    float extra[G];                     // sums of estimated weights, the same in all lanes
    float sum[OWNED], peak[OWNED];
    float owned_reference[OWNED];       // of the heads of these logits
};

__device__ __forceinline__ void clear(Partial& mine) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
        mine.reference[g] = -INFINITE;
        mine.extra[g] = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) mine.out[g][i] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < OWNED; ++j) {
        mine.sum[j] = 0.f;
        mine.peak[j] = mine.owned_reference[j] = -INFINITE;
    }
}

// Express what was found relative to another reference.
__device__ __forceinline__ void refer(Partial& mine, int g, float reference) {
    const int member = threadIdx.x % TEAM;
    const float shrink = mine.reference[g] > -INFINITE ? exponential(mine.reference[g] - reference) : 0.f;
    mine.reference[g] = reference;
    mine.extra[g] *= shrink;
#pragma unroll
    for (int i = 0; i < HELD; ++i) mine.out[g][i] *= shrink;
#pragma unroll
    for (int j = 0; j < OWNED; ++j)
        if ((member * OWNED + j) % G == g) {
            mine.sum[j] *= shrink;
            mine.owned_reference[j] = reference;
        }
}

// The mean value of a list, as a lane holds it.
struct Mean {
    Bytes raw[PER_LANE];
    float scale;
};
__device__ __forceinline__ Mean load_mean(const Step& p, i64 list) {
    const int member = threadIdx.x % TEAM;
    Mean mean;
    mean.scale = p.mean_scales[list];
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int d = (v * TEAM + member) * VECTOR;
        mean.raw[v] = Bytes();
        if (d < D) mean.raw[v] = *(const Bytes*)(p.means + list * D + d);
    }
    return mean;
}

// Add the mean value of a list, with a weight for each head.
__device__ __forceinline__ void add_mean(Partial& mine, const Mean& mean, const float* weights) {
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        float x[VECTOR];
        widen_bytes(mean.raw[v], x);
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i)
                mine.out[g][v * VECTOR + i] = fmaf(weights[g] * mean.scale, x[i], mine.out[g][v * VECTOR + i]);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) mine.extra[g] += weights[g];
}

// Attend to AHEAD rows of each team; a null key is passed over.
__device__ __forceinline__ void attend_ahead(
    const Step& p, const Shared& s, Partial& mine, const element* const* keys, const element* const* values
) {
    const int member = threadIdx.x % TEAM;
    uint4 raw_keys[AHEAD][PER_LANE], raw_values[AHEAD][PER_LANE];
    u32 there = 0;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        there |= (u32)(keys[a] != nullptr) << a;
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            const int d = (v * TEAM + member) * VECTOR;
            const bool load = keys[a] && d < D;
            raw_keys[a][v] = load ? *(const uint4*)(keys[a] + d) : make_uint4(0, 0, 0, 0);
            raw_values[a][v] = load ? *(const uint4*)(values[a] + d) : make_uint4(0, 0, 0, 0);
        }
    }
    float logits[TEAM * OWNED];
#pragma unroll
    for (int n = 0; n < TEAM * OWNED; ++n) logits[n] = 0.f;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            const int d = (v * TEAM + member) * VECTOR;
            float x[VECTOR];
            widen_vector(raw_keys[a][v], x);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    logits[a * G + g] = fmaf(d < D ? s.query[g][d + i] : 0.f, x[i], logits[a * G + g]);
        }
    // Sum over the team and deal out: at every step a lane gives away half of its logits.
#pragma unroll
    for (int step = TEAM / 2; step; step >>= 1) {
        const bool upper = member & step;
#pragma unroll
        for (int i = 0; i < TEAM * OWNED / 2; ++i) {
            const int other = i + step * OWNED;
            if (i >= step * OWNED) continue;
            const float given = upper ? logits[i] : logits[other], kept = upper ? logits[other] : logits[i];
            logits[i] = kept + __shfl_xor_sync(FULL, given, step);
        }
    }
    bool passes = false;
#pragma unroll
    for (int j = 0; j < OWNED; ++j) {
        const int n = member * OWNED + j;
        const bool valid = n < LOGITS && (there >> (n / G) & 1);
        logits[j] = valid ? capped(p.scale * logits[j], p.cap) : -INFINITE;
        mine.peak[j] = fmaxf(mine.peak[j], logits[j]);
        passes |= valid && !(logits[j] <= mine.owned_reference[j] + SLACK);
    }
    if (__any_sync(FULL, passes)) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float top = -INFINITE;
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const int n = a * G + g;
                top = fmaxf(top, __shfl_sync(FULL, logits[n % OWNED], n / OWNED, TEAM));
            }
            if (top > mine.reference[g] + SLACK || (mine.reference[g] == -INFINITE && top > -INFINITE))
                refer(mine, g, top);
        }
    }
#pragma unroll
    for (int j = 0; j < OWNED; ++j) {
        logits[j] = logits[j] > -INFINITE ? exponential(logits[j] - mine.owned_reference[j]) : 0.f;
        mine.sum[j] += logits[j];
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        float weights[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const int n = a * G + g;
            weights[g] = __shfl_sync(FULL, logits[n % OWNED], n / OWNED, TEAM);
        }
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            float x[VECTOR];
            widen_vector(raw_values[a][v], x);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < VECTOR; ++i)
                    mine.out[g][v * VECTOR + i] = fmaf(weights[g], x[i], mine.out[g][v * VECTOR + i]);
        }
    }
}

// Gather this block's share of the sinks and the recent keys that the query sees, from the `start`-th on; returns
// where it stopped for want of room. Rows below zero stand for places of near keys.
__device__ __forceinline__ int gather_near(const Step& p, Shared& s, int start, int end, int first, int position) {
    const int sinks = min(p.sinks, position + 1), recent = max(first, p.sinks), count = min(end - start, QUEUE);
    const int turned = (u32)(recent - p.sinks) % (u32)p.ring;  // where the first recent key is in the ring
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int place = start + i;
        if (place >= sinks) {
            place += turned - sinks;
            place += place < p.ring ? p.sinks : p.sinks - p.ring;
        }
        s.rows[i] = -1 - place;
    }
    if (threadIdx.x == 0) s.gathered = max(count, 0);
    __syncthreads();
    return start + count;
}

// Attend to the rows that were gathered.
__device__ __forceinline__ void attend_gathered(const Step& p, Shared& s, const Part& part, Partial& mine) {
    const int warp = threadIdx.x / WARP, team = threadIdx.x % WARP / TEAM, count = s.gathered;
    const i64 near = (i64)part.stream * (p.sinks + p.ring);
#pragma unroll 1
    for (int start = warp * AHEAD * TEAMS; start < count; start += WARPS * AHEAD * TEAMS) {
        const element *keys[AHEAD], *values[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = start + a * TEAMS + team, row = i < count ? s.rows[i] : 0;
            const i64 offset = (row < 0 ? near - 1 - row : (i64)row) * D;
            keys[a] = i < count ? (row < 0 ? p.near_keys : p.keys) + offset : nullptr;
            values[a] = (row < 0 ? p.near_values : p.values) + offset;
        }
        attend_ahead(p, s, mine, keys, values);
    }
    __syncthreads();
    if (threadIdx.x == 0) s.gathered = s.resolved = 0;
    __syncthreads();
}

// Gather the keys of whole pages, from this block's `start`-th page on: of visited lists, or everything up to the
// position of the query. Returns where it stopped for want of room.
__device__ __forceinline__ int gather_whole(
    const Step& p, Shared& s, const Part& part, const int* taken, bool everything, int position, int start
) {
    const i64 row = (i64)part.stream * p.most_pages;
    const int end = min(part.page_count(), start + QUEUE / LANES);
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - start) * LANES; i += THREADS) {
        const int page = part.page(start + i / LANES), label = p.labels[row + page], lane = i % LANES;
        if (lane >= (label & 31)) continue;
        if (!everything && p.orders[row + page] * LANES + lane >= taken[label >> 5]) continue;
        const int at = p.pages[row + page] * LANES + lane;
        if (everything && p.ids[at] > position) continue;
        if (p.bits) {
            const int id = p.ids[at];
            atomicOr(p.bits + (i64)part.unit * p.width + (id >> 5), 1u << (id & 31));
        } else {
            s.rows[atomicAdd(&s.gathered, 1)] = at;
        }
    }
    __syncthreads();
    return end;
}

// Tell all blocks the largest logit of each head.
__device__ __forceinline__ void publish_peaks(const Partial& mine, u32* own, u32* all) {
    const int member = threadIdx.x % TEAM;
#pragma unroll
    for (int j = 0; j < OWNED; ++j)
        if (mine.peak[j] > -INFINITE) atomicMax(own + (member * OWNED + j) % G, ordered(mine.peak[j]));
    __syncthreads();
    if (threadIdx.x < G && own[threadIdx.x]) atomicMax(all + threadIdx.x, own[threadIdx.x]);
}

// Take the largest near logit as the reference: estimates up to it are below the bound. Without it none is known
// to be, and weights are taken relative to the norm.
__device__ __forceinline__ void find_reference(const Step& p, Shared& s, const u32* counters) {
    if (threadIdx.x < G) {
        const float known = unordered(__ldcg(counters + NEAREST + threadIdx.x));
        s.reference[threadIdx.x] = known;
        s.basis[threadIdx.x] = known > -INFINITE ? known : s.norm[threadIdx.x];
        s.bound[threadIdx.x] = INFINITE;
    }
    __syncthreads();
}

// Estimates count for no more than the largest exact logit.
__device__ void find_bounds(Shared& s, const u32* counters) {
    if (threadIdx.x < G) {
        const u32 largest = __ldcg(counters + LARGEST + threadIdx.x);
        s.bound[threadIdx.x] = largest ? unordered(largest) : INFINITE;
    }
    __syncthreads();
}

// Add the mean values of lists: with the weight of the keys that were visited and not kept, page by page, and of
// those that were not visited, of this block's share of the lists.
__device__ __forceinline__ void attend_means(
    const Step& p, const Shared& s, const Part& part, Partial& mine, const int* taken
) {
    const int warp = threadIdx.x / WARP, team = threadIdx.x % WARP / TEAM, visited = p.refine ? s.visited : 0;
    const int begin = part.begin(p.lists), count = visited + part.end(p.lists) - begin;
    const i64 lists = (i64)part.stream * p.lists;
    float lift[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        refer(mine, g, fmaxf(mine.reference[g], s.basis[g]));
        lift[g] = exponential(s.basis[g] - mine.reference[g]);
    }
#pragma unroll 2
    for (int i = warp * TEAMS + team; i < count; i += WARPS * TEAMS) {
        Group weights;
        int list;
        if (i < visited) {
            weights = load_group(p.masses + (part.first_place / LANES + i) * G);
            list = __ldcg(&p.visited[part.first_place / LANES + i].y) >> 5;
        } else {
            list = begin + i - visited;
            weights = rest_of_list(p, s, part, list, taken[list]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) weights.x[g] *= lift[g];
        add_mean(mine, load_mean(p, lists + list), weights.x);
    }
}

// Merge what the teams of a block found, and leave it where the last block of the unit finds it.
__device__ __forceinline__ void reduce_block(const Step& p, Shared& s, const Part& part, Partial& mine, float* reduction) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, member = lane % TEAM;
    __syncthreads();
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float top = warp_max(mine.reference[g]);
        if (lane == 0) s.reduced[warp][g] = top;
    }
    __syncthreads();
    float* own = reduction + warp * G * (D + 1);
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float top = warp_max(lane < WARPS ? s.reduced[lane][g] : -INFINITE);
        if (threadIdx.x == 0) s.reference[g] = top;
        refer(mine, g, top > -INFINITE ? top : 0.f);
        float sum = member == 0 ? mine.extra[g] : 0.f;
#pragma unroll
        for (int j = 0; j < OWNED; ++j) sum += (member * OWNED + j) % G == g ? mine.sum[j] : 0.f;
        sum = warp_sum(sum);
        if (lane == 0) own[g * (D + 1) + D] = sum;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            float x = mine.out[g][i];
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
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) sum += reduction[w * G * (D + 1) + i];
        left[i / (D + 1) * (D + 2) + i % (D + 1)] = sum;
    }
    if (threadIdx.x < G) left[threadIdx.x * (D + 2) + D + 1] = s.reference[threadIdx.x];
}

// Merge what the blocks of a unit found, and write the result.
__device__ void merge_blocks(const Step& p, Shared& s, const Part& part, float* weights) {
    const float* parts = p.partial + (i64)part.unit * part.blocks * G * (D + 2);
#pragma unroll 1
    for (int g = threadIdx.x / WARP; g < G; g += WARPS) {
        const int lane = threadIdx.x % WARP;
        float peak = -INFINITE, sum = 0.f;
#pragma unroll 1
        for (int b = lane; b < part.blocks; b += WARP) peak = fmaxf(peak, __ldcg(parts + (b * G + g) * (D + 2) + D + 1));
        peak = warp_max(peak);
#pragma unroll 1
        for (int b = lane; b < part.blocks; b += WARP) {
            const float* one = parts + (b * G + g) * (D + 2);
            const float weight = peak > -INFINITE ? exponential(__ldcg(one + D + 1) - peak) : 0.f;
            weights[b * G + g] = weight;
            sum = fmaf(weight, __ldcg(one + D), sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            s.bound[g] = sum > 0.f ? 1.f / sum : 0.f;
            p.lse[(i64)part.unit * G + g] = sum > 0.f ? peak + logf(sum) : -INFINITE;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * D; i += THREADS) {
        const int g = i / D;
        float out = 0.f;
#pragma unroll 4
        for (int b = 0; b < part.blocks; ++b)
            out = fmaf(weights[b * G + g], __ldcg(parts + (b * G + g) * (D + 2) + i % D), out);
        store_out(p.out, (i64)part.unit * G * D + i, out * s.bound[g]);
    }
}
