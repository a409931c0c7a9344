// Scan the codes of the visited lists.
//
// A block writes what it scans one after another, page by page: place 16 e + lane is that of a lane of the e-th
// page it visited. What is kept for a place is only ever touched by this block.

#define NO_KEY 0xffffu
#define OWN_HOT (1 << 30)
#define HOT 0x4000u  // an estimate may pass the bound: it does not count yet

// Begin to fetch labels and places of the pages `start : start + ROUND` of this block.
__device__ __forceinline__ void fetch_labels(const Step& p, Shared& s, const Part& part, int start) {
    const i64 row = (i64)part.stream * p.most_pages;
    const int end = min(start + ROUND, part.pages);
#pragma unroll 1
    for (int i = start + threadIdx.x; i < end; i += THREADS) {
        const int page = part.page(i);
        copy_4(s.labels + i - start, p.labels + row + page);
        copy_4(s.places + i - start, p.pages + row + page);
    }
}

// Gather the visited ones of these pages.
__device__ void gather_pages(const Step& p, Shared& s, const Part& part, const int* taken, int start, int count) {
    if (threadIdx.x == 0) s.queued = 0;
    if (start) fetch_labels(p, s, part, start), commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int end = min(start + ROUND, count);
#pragma unroll 1
    for (int i = start + threadIdx.x; i < end; i += THREADS) {
        const int label = s.labels[i - start];
        if (taken[label >> 5]) s.queue[atomicAdd(&s.queued, 1)] = make_int2(s.places[i - start], label);
    }
    __syncthreads();
}

// A group of heads takes part in the product of codes and queries as eight columns, those of up to four heads
// twice: then half of the lanes look at one page, and half at the next.
#define COLUMNS (G <= 4 ? 4 : 8)
#define TURNS (G <= 4 ? 1 : 2)
#define PAGE_BYTES (WORDS * LANES * 4 + LANES)
#define DEPTH 4  // pairs of pages that a warp fetches ahead
static_assert(G <= 8, "at most eight query heads share a KV head");

// What a lane copies of a page: 16 bytes of the codes, or the scales that stand behind them.
#define PIECES (4 * WORDS + 1)
#define COPIES ((PIECES + WARP - 1) / WARP)
#define SIDE_BY_SIDE (PIECES <= WARP / 2)  // half of the lanes take one page, and half the next

// Fetch the codes and scales of two pages.
__device__ __forceinline__ void fetch_pages(const Step& p, const Shared& s, u8* to, int entry, int queued) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < (SIDE_BY_SIDE ? 1 : 2); ++j) {
        const int half = SIDE_BY_SIDE ? lane / (WARP / 2) : j;
        if (entry + half >= queued) continue;
        const i64 page = s.queue[entry + half].x;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int piece = SIDE_BY_SIDE ? lane % (WARP / 2) : copy * WARP + lane;
            const u8* from = piece < 4 * WORDS ? (const u8*)p.codes + 16 * piece : p.exponents;
            const int stride = piece < 4 * WORDS ? WORDS * LANES * 4 : LANES;
            if (piece < PIECES) copy_16(to + half * PAGE_BYTES + 16 * piece, from + page * stride);
        }
    }
}

// The weight of a key by its estimate, relative to the norm; infinite `norm` for heads that are not there.
__device__ __forceinline__ float weight_of(float estimate, float norm) {
    return power_of_two(fminf(fmaf(estimate, LOG2E, -norm), 115.f));
}

// Add up products of codes and queries for two pages: in chunks of eight quads, a lane takes one of each half.
__device__ __forceinline__ void sum_fields(const Shared& s, const u8* pages, int quarter, int column, int (*sums)[4]) {
    const int chunks = s.chunks;
#pragma unroll 2
    for (int c = 0; c < chunks; ++c) {
        const int4 place = s.places_of[c][quarter];
        const int2 factors = *(const int2*)s.factors[c][quarter][column];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u8 *one = pages + j * PAGE_BYTES + place.x, *other = pages + j * PAGE_BYTES + place.y;
            const u32 mask = place.w, a[4] = {
                *(const u32*)one >> (place.z & 0xff) & mask, *(const u32*)(one + 32) >> (place.z & 0xff) & mask,
                *(const u32*)other >> (place.z >> 8) & mask, *(const u32*)(other + 32) >> (place.z >> 8) & mask
            };
            multiply_bytes(sums[j], a, factors.x, factors.y);
        }
    }
}

// The sums of weights of estimates of a list, which lanes hold in parts: of the rows of a page, for two heads.
__device__ __forceinline__ void give_mass(float* masses, int list, int first, float* mass) {
    // Rows of even number take the first head, the others the second.
    const int row = threadIdx.x % WARP / 4, own = row % 2;
    float sum = own ? mass[1] : mass[0];
    sum += __shfl_xor_sync(FULL, own ? mass[0] : mass[1], 4);
    sum += __shfl_xor_sync(FULL, sum, 8);
    sum += __shfl_xor_sync(FULL, sum, 16);
    if (row < 2 && list >= 0 && first + own < G) atomicAdd(masses + list * G + own, sum);
    mass[0] = mass[1] = 0.f;
}

// Estimate the logits of the keys of every visited page of this block, and count them by weight. `stage` is room
// for DEPTH pairs of pages of each warp.
__device__ __forceinline__ void scan(const Step& p, Shared& s, const Part& part, const int* taken, u8* stage) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane / 4, quarter = lane % 4;
    const float log_base = log2f(p.base[part.head]) - 8.f;
    const int count = part.pages;
    const int first = G <= 4 ? quarter % 2 * 2 : quarter * 2;  // the first of the two heads of this lane
    const int column = row % COLUMNS < G ? row % COLUMNS : 0;  // the head that it provides to products
    const bool weighing = p.remainder && !p.bits;
    constexpr bool summing = POLICY == SUM;
    float unit[2], offset[2], seconds[2], norm[2], lift[2], reference[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int g = min(first + i, G - 1);
        const bool there = first + i < G;
        unit[i] = s.unit[g], offset[i] = -0.5f * s.unit[g] * (float)s.offsets[g], seconds[i] = s.second[g];
        norm[i] = there ? s.norm[g] * LOG2E : INFINITE, lift[i] = s.lift[g];
        reference[i] = there ? s.reference[g] : INFINITE;
    }
    // Addresses in registers, since what threads share is read again after every write.
    const float* const dots_at = p.dots + (i64)part.unit * p.lists * G;
    float* const masses_at = p.masses + (i64)part.unit * p.lists * G + first;
    const i64 first_place = part.first_place;
    bool deferred = false;
    stage += warp * DEPTH * 2 * PAGE_BYTES;
    clear_histogram(s);
#pragma unroll 1
    for (int start = 0; start < count; start += ROUND) {
        gather_pages(p, s, part, taken, start, count);
        // A warp takes neighbours, which are often of the same list.
        const int queued = s.queued, before = s.visited, pairs = (queued + 1) / 2;
        const int begin = share_of(pairs, warp, WARPS), end = share_of(pairs, warp + 1, WARPS);
        float* const estimates_at = p.estimates + (first_place + before * LANES) * G + first;
        u16* const bins_at = p.bins + (first_place + before * LANES) * RANKERS;
        int2* const visited_at = p.visited + first_place / LANES + before;
        float mass[2] = {0.f, 0.f};
        int held = -1;
#pragma unroll 1
        for (int k = 0; k < DEPTH; ++k) {
            fetch_pages(p, s, stage + k * 2 * PAGE_BYTES, 2 * (begin + k), min(queued, 2 * end));
            commit_copies();
        }
#pragma unroll 1
        for (int pair = begin, k = 0; pair < end; ++pair, k = (k + 1) % DEPTH) {
            u8* pages = stage + k * 2 * PAGE_BYTES;
            int2 page[TURNS];
            float centers[TURNS][2];
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                page[turn] = s.queue[min(2 * pair + (G <= 4 ? quarter / 2 : turn), queued - 1)];
                const float* dots = dots_at + (page[turn].y >> 5) * G;
#pragma unroll
                for (int i = 0; i < 2; ++i) centers[turn][i] = __ldcg(dots + min(first + i, G - 1));
            }
            wait_copies<DEPTH - 1>();
            __syncwarp();
            int sums[2][4] = {};
            sum_fields(s, pages + 4 * row, quarter, column, sums);
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                const int j = G <= 4 ? quarter / 2 : turn, e = 2 * pair + j, list = page[turn].y >> 5;
                const bool queue_ends = e >= queued;
                const int lanes = queue_ends ? 0 : page[turn].y & 31;
                if (weighing && __any_sync(FULL, list != held)) {
                    give_mass(masses_at, held, first, mass);
                    held = list;
                }
                float* const estimates_to = estimates_at + (e * LANES + row) * G;
                u16* const bins_to = bins_at + (e * LANES + row) * RANKERS;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int key = row + 8 * r;
                    const bool there = key < lanes;
                    const float exponent = (float)pages[j * PAGE_BYTES + WORDS * LANES * 4 + key];
                    const float f = power_of_two(fmaf(exponent, 1.f / 16.f, log_base)), square = f * f;
                    float weights[2], estimates[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int sum = G <= 4 && quarter >= 2 ? sums[1][2 * r + i] : sums[TURNS == 1 ? 0 : turn][2 * r + i];
                        const float second = centers[turn][i] + fminf(seconds[i] * square, CORRECTION);
                        estimates[i] = capped(fmaf(f, fmaf(unit[i], (float)sum, offset[i]), second), p.cap);
                        weights[i] = weight_of(estimates[i], norm[i]);
                    }
                    // What the lanes of a key know together.
                    int hot = estimates[0] > reference[0] || estimates[1] > reference[1];
                    hot |= __shfl_xor_sync(FULL, hot, 1);
                    if (G > 4) hot |= __shfl_xor_sync(FULL, hot, 2);
                    float weight = summing ? weights[0] + weights[1] : fmaxf(weights[0], weights[1]);
                    const float other = __shfl_xor_sync(FULL, weight, 1);
                    weight = summing ? weight + other : fmaxf(weight, other);
                    if (G > 4) {
                        const float others = __shfl_xor_sync(FULL, weight, 2);
                        weight = summing ? weight + others : fmaxf(weight, others);
                    }
                    deferred |= there && hot;
                    const bool counts = there && !hot;
#pragma unroll
                    for (int i = 0; i < 2; ++i) mass[i] = fmaf(counts ? weights[i] : 0.f, lift[i], mass[i]);
                    if (!queue_ends && first < G) {
                        if (G % 2 == 0) {
                            *(float2*)(estimates_to + 8 * r * G) = make_float2(estimates[0], estimates[1]);
                        } else {
                            estimates_to[8 * r * G] = estimates[0];
                            if (first + 1 < G) estimates_to[8 * r * G + 1] = estimates[1];
                        }
                    }
                    if (RANKERS == 1) {
                        const int bin = bin_of_weight(weight);
                        if (!queue_ends && first == 0) bins_to[8 * r] = there ? bin | (hot ? HOT : 0) : NO_KEY;
                        if (there && first == 0) atomicAdd(s.histogram + bin, 1);
                    } else if (!queue_ends) {
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            if (first + i < G)
                                bins_to[8 * r * G + first + i] = there ? bin_of_weight(weights[i]) | (hot ? HOT : 0) : NO_KEY;
                        if (first == 0) p.kept[first_place + (before + e) * LANES + key] = 0;
                    }
                }
                if (row == 0 && first == 0 && !queue_ends) visited_at[e] = page[turn];
            }
            __syncwarp();
            fetch_pages(p, s, pages, 2 * (pair + DEPTH), min(queued, 2 * end));
            commit_copies();
        }
        if (weighing) give_mass(masses_at, held, first, mass);
        wait_copies<0>();
        __syncthreads();
        if (threadIdx.x == 0) s.visited = before + queued;
        __syncthreads();
    }
    if (deferred && POLICY == UNION) s.deferred = 1;
    // All blocks of a unit take the same lists, so each knows how many keys are visited in all.
    int scanned = 0;
#pragma unroll 1
    for (int list = threadIdx.x; list < p.lists; list += THREADS) scanned += taken[list];
    scanned = warp_sum_int(scanned);
    if (threadIdx.x % WARP == 0) ((int*)s.reduced)[threadIdx.x / WARP] = scanned;
    __syncthreads();
    if (threadIdx.x == 0) {
        double visited = 0.;
#pragma unroll 1
        for (int w = 0; w < WARPS; ++w) visited += ((int*)s.reduced)[w];
        const double left = fmax(s.left - visited * p.code_bytes, 0.);
        s.limit = (int)fmin((double)((i64)(left / p.row_bytes) / RANKERS), 2147483647.);
    }
#pragma unroll 1
    for (int ranker = 0; ranker < RANKERS; ++ranker) {
        if (RANKERS > 1) {
            clear_histogram(s);
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < s.visited * LANES; i += THREADS) {
                const u32 bin = p.bins[(part.first_place + i) * RANKERS + ranker];
                if (bin != NO_KEY) atomicAdd(s.histogram + (bin & (BINS - 1)), 1);
            }
            __syncthreads();
        }
        int* all = p.histogram + ((i64)part.unit * G + ranker) * BINS;
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            if (s.histogram[i]) atomicAdd(all + i, s.histogram[i]);
        __syncthreads();
    }
}
