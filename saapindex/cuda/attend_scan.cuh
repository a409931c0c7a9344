// Scan the codes of the visited lists, and cut to the budget of keys.
//
// A block writes what it scans one after another, page by page: place 16 e + lane is that of a lane of the e-th
// page it visited. Estimates, pages and flags of a place are only ever touched by this block.

// Places of a block: as many as its pages have lanes.
__device__ __forceinline__ i64 first_place(const Step& p, const Part& part) {
    const int groups = (p.most_pages + 7) / 8, most = (groups + part.blocks - 1) / part.blocks * 8;
    return ((i64)part.unit * part.blocks + part.block) * most * LANES;
}

// Gather the visited ones of the pages `start : start + ROUND` of this block.
__device__ void gather_pages(const Step& p, Shared& s, const Part& part, const int* taken, int start, int count) {
    if (threadIdx.x == 0) s.queued = 0;
    __syncthreads();
    const i64 row = (i64)part.stream * p.most_pages;
    const int end = min(start + ROUND, count);
    for (int i = start + threadIdx.x; i < end; i += THREADS) {
        const int page = part.page(i), label = p.labels[row + page];
        if (taken[label >> 5]) s.queue[atomicAdd(&s.queued, 1)] = make_int2(p.pages[row + page], label);
    }
    __syncthreads();
}

// Estimate the logits of the keys of every visited page of this block.
__device__ void scan(const Step& p, Shared& s, const Part& part, const int* taken) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, key = lane % LANES;
    const i64 places = first_place(p, part);
    const float base = p.base[part.head];
    int widths[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) widths[w] = p.widths[part.head * WORDS + w];
    const int count = part.page_count();
    for (int start = 0; start < count; start += ROUND) {
        gather_pages(p, s, part, taken, start, count);
        const int queued = s.queued, before = s.visited;
        for (int e = 2 * warp + lane / LANES; e - lane / LANES < queued; e += 2 * WARPS) {
            const bool valid = e < queued;
            const int2 entry = s.queue[valid ? e : 0];
            const bool filled = valid && key < (entry.y & 31);
            u32 words[WORDS];
#pragma unroll
            for (int w = 0; w < WORDS; ++w)
                words[w] = filled ? p.codes[((i64)entry.x * WORDS + w) * LANES + key] : 0u;
            const int exponent = filled ? p.exponents[(i64)entry.x * LANES + key] : 128;
            float estimates[G];
            int sums[G];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                sums[g] = 0;
                estimates[g] = __ldcg(p.dots + ((i64)part.unit * p.lists + (entry.y >> 5)) * G + g);
            }
            int group = 0;
#pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                const int width = widths[w];
                const u32 mask = width == 4 ? 0x0f0f0f0fu : width == 2 ? 0x03030303u : 0x01010101u;
                for (int k = 0; k < 8 / width; ++k, ++group) {
                    const int field = (int)((words[w] >> (width * k)) & mask);
#pragma unroll
                    for (int g = 0; g < G; ++g) sums[g] = __dp4a(field, s.factors[group][g], sums[g]);
                }
            }
            const float f = base * exp2f((exponent - 128) / 16.f);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float residual = s.unit[g] * f * (0.5f * (2 * sums[g] - s.offsets[g]));
                estimates[g] = capped(estimates[g] + (residual + fminf(s.second[g] * f * f, CORRECTION)), p.cap);
            }
            if (valid) {
                const i64 place = places + (i64)(before + e) * LANES + key;
#pragma unroll
                for (int g = 0; g < G; ++g) p.estimates[place * G + g] = filled ? estimates[g] : -INFINITE;
                p.kept[place] = 0;
                if (key == 0) p.visited[place / LANES] = entry;
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) s.visited = before + queued;
        __syncthreads();
    }
    // All blocks of a unit take the same lists, so each knows how many keys are visited in all.
    float scanned = 0.f;
    for (int list = threadIdx.x; list < p.lists; list += THREADS) scanned += (float)taken[list];
    scanned = block_sum(s, scanned);
    if (threadIdx.x == 0) {
        const i64 left = s.left - (i64)scanned * p.code_bytes;
        s.limit = max((i64)0, left) / p.row_bytes;
    }
    __syncthreads();
}

// The log weight of the key at a place; minus infinity where there is none.
__device__ __forceinline__ float key_weight(const Step& p, const Shared& s, i64 place, int ranker) {
    float weights[G];
#pragma unroll
    for (int g = 0; g < G; ++g) weights[g] = p.estimates[place * G + g] - s.norm[g];
    return pooled(weights, p.policy, ranker);
}

__device__ __forceinline__ int bin_of(float weight) {
    return min(BINS - 1, max(0, (int)((weight - LOWEST) * PER_NAT)));
}

// Count this block's keys by weight.
__device__ void tally(const Step& p, Shared& s, const Part& part, int ranker) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.histogram[i] = 0;
    __syncthreads();
    const i64 places = first_place(p, part);
    for (int i = threadIdx.x; i < s.visited * LANES; i += THREADS) {
        const float weight = key_weight(p, s, places + i, ranker);
        if (weight > -INFINITE) atomicAdd(s.histogram + bin_of(weight), 1);
    }
    __syncthreads();
    int* all = p.histogram + ((i64)part.unit * RANKERS_MOST + ranker) * BINS;
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (s.histogram[i]) atomicAdd(all + i, s.histogram[i]);
}

// Find the bin in which the cut falls: keys of higher bins are kept, and `open` keys of the bin itself.
__device__ void find_boundary(const Step& p, Shared& s, const Part& part, int ranker) {
    const int* all = p.histogram + ((i64)part.unit * RANKERS_MOST + ranker) * BINS;
    const int per = BINS / THREADS, begin = threadIdx.x * per, lane = threadIdx.x % WARP;
    const int limit = (int)min(s.limit / (p.policy == UNION ? G : 1), (i64)0x7fffffff);
    int counts[BINS / THREADS], sum = 0;
#pragma unroll
    for (int i = 0; i < per; ++i) {
        counts[i] = __ldcg(all + BINS - 1 - begin - i);
        sum += counts[i];
    }
    int before = sum;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const int other = __shfl_up_sync(FULL, before, step);
        if (lane >= step) before += other;
    }
    int* warps = (int*)s.reduced;
    __syncthreads();
    if (lane == WARP - 1) warps[threadIdx.x / WARP] = before;
    if (threadIdx.x == 0) s.boundary = -1, s.open = 0, s.owned = 0;
    __syncthreads();
    for (int w = 0; w < threadIdx.x / WARP; ++w) before += warps[w];
    before -= sum;
    if (before <= limit && before + sum > limit) {
#pragma unroll
        for (int i = 0; i < per; ++i) {
            if (before <= limit && before + counts[i] > limit) {
                s.boundary = BINS - 1 - begin - i;
                s.open = limit - before;
            }
            before += counts[i];
        }
    }
    __syncthreads();
}

// Let a key be fetched: mark it, and gather its row or note its position.
__device__ __forceinline__ void keep(const Step& p, Shared& s, const Part& part, i64 place) {
    if (p.kept[place]) return;
    p.kept[place] = 1;
    const int row = p.visited[place / LANES].x * LANES + (int)(place % LANES);
    if (p.bits) {
        const int id = p.ids[row];
        atomicOr(p.bits + (i64)part.unit * p.width + (id >> 5), 1u << (id & 31));
    } else {
        s.rows[atomicAdd(&s.gathered, 1)] = row;
    }
}
