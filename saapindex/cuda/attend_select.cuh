// Route and select: logits of all lists, and the lists that are visited.

// Which part of the work a block does.
struct Part {
    int unit, block, stream, sequence, head, blocks, pages;

    // A page of this block: groups of eight pages go round the blocks, since neighbours are often of one list.
    __device__ __forceinline__ int page(int i) const { return ((i >> 3) * blocks + block) * 8 + (i & 7); }
    __device__ __forceinline__ int page_count() const {
        const int groups = (pages + 7) >> 3, mine = (groups - block + blocks - 1) / blocks;
        if (mine <= 0) return 0;
        const int end = ((mine - 1) * blocks + block) * 8 + 8;  // end of the last group
        return mine * 8 - max(0, end - pages);
    }
};

__device__ __forceinline__ float block_max(Shared& s, float x) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) s.reduced[threadIdx.x / WARP][0] = x;
    __syncthreads();
    float all = s.reduced[0][0];
    for (int w = 1; w < WARPS; ++w) all = fmaxf(all, s.reduced[w][0]);
    return all;
}

__device__ __forceinline__ float block_sum(Shared& s, float x) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) s.reduced[threadIdx.x / WARP][0] = x;
    __syncthreads();
    float all = 0.f;
    for (int w = 0; w < WARPS; ++w) all += s.reduced[w][0];
    return all;
}

// Widen VECTOR int8 of a row.
__device__ __forceinline__ void widen_bytes(const i8* at, float* out) {
#if ELEMENT == 2
    const u32 words[1] = {*(const u32*)at};
#else
    const uint2 pair = *(const uint2*)at;
    const u32 words[2] = {pair.x, pair.y};
#endif
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = (float)(i8)(words[i / 4] >> (8 * (i % 4)));
}

// This block's share of the inner products of queries with anchors, and of the rotated queries.
__device__ void route(const Step& p, Shared& s, const Part& part) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, member = lane % TEAM, team = lane / TEAM;
    const i64 row = (i64)part.stream * p.lists;
    const int begin = (int)((i64)p.lists * part.block / part.blocks);
    const int end = (int)((i64)p.lists * (part.block + 1) / part.blocks);
    for (int start = begin + warp * TEAMS; start < end; start += WARPS * TEAMS) {
        const int list = start + team;
        float dot[G];
#pragma unroll
        for (int g = 0; g < G; ++g) dot[g] = 0.f;
#pragma unroll
        for (int v = 0; v < PER_LANE; ++v) {
            const int d = (v * TEAM + member) * VECTOR;
            if (list < end && d < D) {
                float anchor[VECTOR];
                widen_bytes(p.anchors + (row + list) * D + d, anchor);
#pragma unroll
                for (int g = 0; g < G; ++g)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) dot[g] = fmaf(s.query[g][d + i], anchor[i], dot[g]);
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int step = TEAM / 2; step; step >>= 1) dot[g] += __shfl_xor_sync(FULL, dot[g], step);
        if (list < end && member == 0) {
            const float scale = p.scale * p.anchor_scales[row + list];
#pragma unroll
            for (int g = 0; g < G; ++g) p.dots[((i64)part.unit * p.lists + list) * G + g] = scale * dot[g];
        }
    }
    const int from = p.coded_most * part.block / part.blocks, to = p.coded_most * (part.block + 1) / part.blocks;
    for (int r = from + warp; r < to; r += WARPS) {
        float dot[G];
#pragma unroll
        for (int g = 0; g < G; ++g) dot[g] = 0.f;
        for (int d = lane; d < D; d += WARP) {
            const float x = p.inverse[((i64)part.head * p.coded_most + r) * D + d];
#pragma unroll
            for (int g = 0; g < G; ++g) dot[g] = fmaf(s.query[g][d], x, dot[g]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float sum = warp_sum(dot[g]);
            if (lane == 0) p.rotated[((i64)part.unit * G + g) * p.coded_most + r] = sum;
        }
    }
}

// What every block needs of a query: its rounded form, second orders, and the limits of the step.
__device__ void prepare(const Step& p, Shared& s, const Part& part, int in_lists) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, coded = p.coded[part.head];
    const i64 own = (i64)part.head * p.coded_most;
    for (int i = threadIdx.x; i < FIELDS * G; i += THREADS) (&s.factors[0][0])[i] = 0;
    if (threadIdx.x == 0) {
        const double fixed = (double)p.lists * (2 * D + 8) + (double)D * 2 * coded;
        const double left = fmax(p.budget * in_lists * p.row_bytes - fixed, 0.0);
        s.left = (i64)left;
        s.scan = (i64)(p.refine ? p.share * left / p.code_bytes : left / p.row_bytes);
    }
    __syncthreads();
    for (int g = warp; g < G; g += WARPS) {
        float largest = 0.f, variance = 0.f, second = 0.f;
        for (int r = lane; r < p.coded_most; r += WARP) {
            const float u = __ldcg(p.rotated + ((i64)part.unit * G + g) * p.coded_most + r);
            s.rotated[g][r] = u;
            variance = fmaf(u * u, p.spread[own + r], variance);
            if (r < coded) {
                second = fmaf(u * u, p.distortion[own + r], second);
                largest = fmaxf(largest, fabsf(u * p.steps[own + r] * p.scale));
            }
        }
        largest = fmaxf(warp_max(largest), 1e-30f);
        variance = warp_sum(variance);
        second = warp_sum(second);
        const float unit = largest / 127.f;
        __syncwarp();
        // Field 4 k + c of a word with fields of b bits lies in byte c, bits b k and up.
        int offset = 0, word_start = 0, group = 0;
        for (int w = 0; w < WORDS; ++w) {
            const int width = p.widths[part.head * WORDS + w], count = 32 / width;
            int sum = 0;
            if (lane < count && word_start + lane < coded) {
                const int r = word_start + lane;
                sum = (int)rintf(s.rotated[g][r] * p.steps[own + r] * p.scale / unit);
                atomicOr(&s.factors[group + lane / 4][g], (sum & 255) << (8 * (lane % 4)));
            }
            offset += ((1 << width) - 1) * warp_sum_int(sum);
            word_start += count;
            group += count / 4;
        }
        if (lane == 0) {
            s.offsets[g] = offset;
            s.unit[g] = unit;
            s.variance[g] = p.scale * p.scale / 2.f * variance;
            s.second[g] = p.scale * p.scale / 2.f * second;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ float list_logit(const Step& p, const Shared& s, const Part& part, int list, int size, int g) {
    const float spread = p.squares[(i64)part.stream * p.lists + list] / (float)size;
    const float dot = __ldcg(p.dots + ((i64)part.unit * p.lists + list) * G + g);
    return capped(dot + fminf(s.variance[g] * spread, CORRECTION), p.cap);
}

// The log weight of a group, from those of its heads, as a ranker sees it.
__device__ __forceinline__ float pooled(const float* weights, int policy, int ranker) {
    if (policy == UNION) return weights[ranker];
    float peak = weights[0];
#pragma unroll
    for (int g = 1; g < G; ++g) peak = fmaxf(peak, weights[g]);
    if (policy == MAX || peak == -INFINITE) return peak;
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < G; ++g) sum += exponential(weights[g] - peak);
    return peak + logf(sum);
}

// The predicted mass of a list, as a ranker sees it.
__device__ __forceinline__ float list_mass(
    const Step& p, const Shared& s, const Part& part, int list, int size, int ranker
) {
    if (!size) return 0.f;
    float weights[G];
#pragma unroll
    for (int g = 0; g < G; ++g)
        weights[g] = list_logit(p, s, part, list, size, g) - s.norm[g] + logf((float)size);
    return exponential(pooled(weights, p.policy, ranker));
}

// Find how far down a ranking goes: the largest `cut` such that all ranks above it weigh at most `limit`.
// Histograms of 12, 12 and 8 bits of the rank, the last three steps of a radix sort without the sorting.
template <typename Weight>
__device__ u32 find_cut(Shared& s, const u32* ranks, int count, float limit, Weight weight, float* left) {
    u32 prefix = 0, mask = 0;
    float* bins = (float*)s.histogram;
    for (int shift = 20; shift >= 0; shift -= shift == 20 ? 12 : 8) {
        const int size = shift == 0 ? 256 : 4096;
        for (int i = threadIdx.x; i < size; i += THREADS) bins[i] = 0.f;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS)
            if (ranks[i] && (ranks[i] & mask) == prefix) atomicAdd(bins + ((ranks[i] >> shift) & (size - 1)), weight(i));
        __syncthreads();
        // Each thread sums a run of bins; bins go down from the top.
        const int per = size / THREADS > 0 ? size / THREADS : 1, begin = threadIdx.x * per;
        float sum = 0.f;
        if (begin < size)
            for (int i = 0; i < per; ++i) sum += bins[size - 1 - begin - i];
        float before = sum;
#pragma unroll
        for (int step = 1; step < WARP; step <<= 1) {
            const float other = __shfl_up_sync(FULL, before, step);
            if (threadIdx.x % WARP >= step) before += other;
        }
        if (threadIdx.x % WARP == WARP - 1) s.reduced[threadIdx.x / WARP][0] = before;
        if (threadIdx.x == 0) s.boundary = -1;
        __syncthreads();
        float earlier = 0.f;
        for (int w = 0; w < threadIdx.x / WARP; ++w) earlier += s.reduced[w][0];
        before += earlier - sum;
        if (begin < size && before <= limit && before + sum > limit) {
            float reached = before;
            for (int i = 0; i < per; ++i) {
                const float more = bins[size - 1 - begin - i];
                if (reached + more > limit) {
                    s.boundary = size - 1 - begin - i;
                    s.reached = reached;
                    break;
                }
                reached += more;
            }
        }
        __syncthreads();
        const int boundary = s.boundary;
        const float reached = s.reached;
        __syncthreads();
        if (boundary < 0) {
            *left = limit;
            return 0;  // everything fits
        }
        limit -= reached;
        prefix |= (u32)boundary << shift;
        mask |= (u32)(size - 1) << shift;
    }
    *left = limit;
    return prefix;
}

// Fill `taken`: how many keys of each list are visited, from its beginning.
__device__ void select_lists(const Step& p, Shared& s, const Part& part, u32* ranks, int* taken) {
    const int* sizes = p.sizes + (i64)part.stream * p.lists;
    float peak[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = -INFINITE, sum[g] = 0.f;
    for (int list = threadIdx.x; list < p.lists; list += THREADS) {
        taken[list] = 0;
        const int size = sizes[list];
        if (!size) continue;
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float x = list_logit(p, s, part, list, size, g) + logf((float)size), top = fmaxf(peak[g], x);
            sum[g] = sum[g] * exponential(peak[g] - top) + exponential(x - top);
            peak[g] = top;
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float top = block_max(s, peak[g]);
        const float all = block_sum(s, peak[g] > -INFINITE ? sum[g] * exponential(peak[g] - top) : 0.f);
        if (threadIdx.x == 0) s.norm[g] = top + logf(all);
    }
    __syncthreads();
    const int rankers = p.policy == UNION ? G : 1;
    for (int ranker = 0; ranker < rankers; ++ranker) {
        float total = 0.f;
        for (int list = threadIdx.x; list < p.lists; list += THREADS) {
            const int size = sizes[list];
            ranks[list] = 0;
            if (!size) continue;
            float weights[G];
            const float log_size = logf((float)size);
#pragma unroll
            for (int g = 0; g < G; ++g)
                weights[g] = list_logit(p, s, part, list, size, g) - s.norm[g] + (p.by_mass ? log_size : 0.f);
            ranks[list] = ordered(pooled(weights, p.policy, ranker));
            if (p.top_p > 0.f) total += list_mass(p, s, part, list, size, ranker);
        }
        const float mass = p.top_p > 0.f ? block_sum(s, total) : 0.f;
        __syncthreads();
        const i64 limit = s.scan / rankers;
        float left;
        u32 cut;
        if (p.nprobe)
            cut = find_cut(s, ranks, p.lists, (float)p.nprobe, [&](int) { return 1.f; }, &left);
        else if (p.top_p > 0.f)
            cut = find_cut(
                s, ranks, p.lists, p.top_p * mass,
                [&](int list) { return list_mass(p, s, part, list, sizes[list], ranker); }, &left);
        else
            cut = find_cut(s, ranks, p.lists, (float)limit, [&](int list) { return (float)sizes[list]; }, &left);
        for (int list = threadIdx.x; list < p.lists; list += THREADS)
            if (ranks[list] > cut) taken[list] = max(taken[list], sizes[list]);
        __syncthreads();
        // Lists of equal rank at the cut, the lower first: mostly one.
        if (threadIdx.x == 0 && cut) {
            bool open = true;
            for (int list = 0; list < p.lists && open; ++list) {
                if (ranks[list] != cut) continue;
                const int size = sizes[list];
                if (p.nprobe) {
                    open = left >= 1.f;
                    if (open) taken[list] = max(taken[list], size);
                    left -= 1.f;
                } else if (p.top_p > 0.f) {
                    open = left > 0.f;
                    if (open) taken[list] = max(taken[list], size);
                    left -= list_mass(p, s, part, list, size, ranker);
                } else {
                    open = (float)size <= left;
                    if (open) taken[list] = max(taken[list], size);
                    else if (!p.refine) taken[list] = max(taken[list], (int)left);
                    left -= (float)size;
                }
            }
        }
        __syncthreads();
    }
}
