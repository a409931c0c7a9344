// Route and select: logits of all lists, and the lists that are visited.

// Ask for what this block is going to read, whatever is chosen: memory is slow to begin.
__device__ __forceinline__ void prefetch_own(const Step& p, int stream, int head, int block) {
    const int first = share_of(p.lists, block, p.blocks), last = share_of(p.lists, block + 1, p.blocks);
#pragma unroll 1
    for (int list = first + threadIdx.x; list < last; list += THREADS) {
        const i64 row = (i64)stream * p.lists + list;
        prefetch(p.anchor_scales + row), prefetch(p.mean_scales + row);
#pragma unroll
        for (int d = 0; d < D; d += 128) prefetch(p.anchors + row * D + d), prefetch(p.means + row * D + d);
    }
#pragma unroll 1
    for (int list = 32 * (THREADS - 1 - threadIdx.x); list < p.lists; list += 32 * THREADS)
        prefetch(p.sizes + (i64)stream * p.lists + list), prefetch(p.squares + (i64)stream * p.lists + list);
    const int begin = share_of(p.coded_most, block, p.blocks), end = share_of(p.coded_most, block + 1, p.blocks);
    const i64 own = (i64)head * p.coded_most;
#pragma unroll 1
    for (int i = THREADS - 1 - threadIdx.x; i < (end - begin) * ((D + 31) / 32); i += THREADS)
        prefetch(p.inverse + (own + begin) * D + 32 * i);
    const int r = 32 * ((int)threadIdx.x - THREADS / 2);
    if (r >= 0 && r < p.coded_most)
        prefetch(p.steps + own + r), prefetch(p.spread + own + r), prefetch(p.distortion + own + r), prefetch(p.slots + own + r);
}

// Inner products of the queries with eight anchors: a lane gets those of head lane / 4 with lists 2 (lane % 4) and the
// next, in the first two; they lack the scales of the query and of the anchors. `raw` holds, of the list lane / 4, four
// dimensions of each step of sixteen.
__device__ __forceinline__ void multiply_anchors(const Shared& s, const u32* raw, float* products) {
    const int head = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const u32 x = raw[step];
        const u32 b0 = pair_of(byte_of(x, 0), byte_of(x, 1)), b1 = pair_of(byte_of(x, 2), byte_of(x, 3));
#pragma unroll
        for (int i = 0; i < QUERY_PARTS; ++i) {
            const uint2 pairs = *(const uint2*)(s.pairs[i][head] + 8 * step + 2 * quarter);
            const u32 a[4] = {pairs.x, pairs.x, pairs.y, pairs.y};
            multiply(products, a, b0, b1);
        }
    }
}

// This block's share of the inner products of queries with anchors, and of the rotated queries.
__device__ __forceinline__ void route(const Step& p, Shared& s, const Part& part) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
    const i64 row = (i64)part.stream * p.lists;
    // Eight lists a warp; in a step, a lane takes four dimensions of one of them.
#pragma unroll 1
    for (int start = part.first_list + warp * 8; start < part.last_list; start += WARPS * 8) {
        const int list = min(start + lane / 4, part.last_list - 1);
        u32 raw[STEPS];
        const i8* anchor = p.anchors + (row + list) * D + 4 * quarter;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            raw[step] = 16 * step + 4 * quarter < D ? *(const u32*)(anchor + 16 * step) : 0;
        float products[4] = {};
        multiply_anchors(s, raw, products);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int one = start + 2 * quarter + i;
            if (head < G && one < part.last_list)
                p.dots[((i64)part.unit * p.lists + one) * G + head] =
                    products[i] * p.scale * p.anchor_scales[row + one] * query_scale(s, head);
        }
    }
    // The last warps begin here, since the first have more lists.
    const int last = share_of(p.coded_most, part.block + 1, part.blocks);
#pragma unroll 1
    for (int r = share_of(p.coded_most, part.block, part.blocks) + WARPS - 1 - warp; r < last; r += WARPS) {
        float dot[G] = {};
#pragma unroll
        for (int d = lane; d < D; d += WARP) {
            const float x = p.inverse[((i64)part.head * p.coded_most + r) * D + d];
#pragma unroll
            for (int g = 0; g < G; ++g) dot[g] = fmaf(s.query[g][d], x, dot[g]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            dot[g] = warp_sum(dot[g]);
            if (lane == 0) p.rotated[((i64)part.unit * G + g) * p.coded_most + r] = dot[g];
        }
    }
}

// What every block needs of a query: its rounded form, second orders, and the limits of the step.
__device__ __forceinline__ void prepare(const Step& p, Shared& s, const Part& part) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, coded = p.coded[part.head];
    const i64 own = (i64)part.head * p.coded_most;
#pragma unroll 1
    for (int i = threadIdx.x; i < FIELDS * G; i += THREADS) (&s.factors[0][0][0][0])[i] = 0;
    if (threadIdx.x < 4 * WORDS) {
        const int c = threadIdx.x / 4, quarter = threadIdx.x % 4;
        const u32* quads = p.quads + part.head * FIELDS + 8 * c + quarter;
        const u32 one = quads[0], other = quads[4];
        s.places_of[c][quarter] = make_int4(
            one & 0xffff, other & 0xffff, (one >> 16 & 0xff) | (other >> 16 & 0xff) << 8, (int)((one >> 24) * 0x01010101u)
        );
    }
    if (threadIdx.x < G) s.unit[threadIdx.x] = s.variance[threadIdx.x] = s.second[threadIdx.x] = 0.f;
    if (threadIdx.x < G) s.offsets[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.chunks = p.chunks[part.head];
    __syncthreads();
#pragma unroll 1
    for (int task = warp; task < WORDS * G; task += WARPS) {
        const int g = task % G, r = task / G * WARP + lane;
        float u = 0.f, a = 0.f, variance = 0.f, second = 0.f;
        if (r < p.coded_most) {
            u = __ldcg(p.rotated + ((i64)part.unit * G + g) * p.coded_most + r);
            variance = u * u * p.spread[own + r];
            if (r < coded) {
                second = u * u * p.distortion[own + r];
                a = u * p.steps[own + r] * p.scale;
            }
        }
        s.scaled[g][r] = a;
        a = warp_max(fabsf(a));
        variance = warp_sum(variance);
        second = warp_sum(second);
        if (lane == 0) {
            atomicMax((int*)&s.unit[g], __float_as_int(a));  // not negative
            atomicAdd(&s.variance[g], p.scale * p.scale / 2.f * variance);
            atomicAdd(&s.second[g], p.scale * p.scale / 2.f * second);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int task = warp; task < WORDS * G; task += WARPS) {
        const int g = task % G, r = task / G * WARP + lane;
        const int slot = r < coded ? p.slots[own + r] : 0;  // four times the quad plus the byte, and the mask
        const float unit = fmaxf(s.unit[g], 1e-30f) / 127.f;
        const int a = r < coded ? (int)rintf(s.scaled[g][r] / unit) : 0;
        const int quad = (slot & 0xffff) / 4;
        if (r < coded) atomicOr(&s.factors[quad / 8][quad % 4][g][quad / 4 % 2], (a & 255) << (8 * (slot % 4)));
        const int offset = warp_sum_int((slot >> 16) * a);
        if (lane == 0) atomicAdd(&s.offsets[g], offset);
    }
    __syncthreads();
    if (threadIdx.x < G) s.unit[threadIdx.x] = fmaxf(s.unit[threadIdx.x], 1e-30f) / 127.f;
    __syncthreads();
}

// What is known of the lists of a unit. Arrays of the block where they fit, otherwise (`logits` null) in memory.
struct Table {
    float* ranks;
    int* taken;
    const int* sizes;
    float* logits;
};

__device__ __forceinline__ Group list_logits(
    const Step& p, const Shared& s, const Part& part, const Table& table, int list, int size
) {
    if (!table.logits) {
        const Group dots = load_group(p.dots + ((i64)part.unit * p.lists + list) * G);
        return corrected(p, s, dots, p.squares[(i64)part.stream * p.lists + list], size);
    }
    Group logits;
#pragma unroll
    for (int g = 0; g < G; ++g) logits.x[g] = table.logits[list * G + g];
    return logits;
}

// Log of the sum of exponentials over all keys in lists, for each head; fills the table.
__device__ __forceinline__ void find_norms(const Step& p, Shared& s, const Part& part, const Table& table) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 row = (i64)part.stream * p.lists;
    // All that is needed of several lists is loaded at once.
#pragma unroll 1
    for (int start = threadIdx.x; start < p.lists; start += AHEAD * THREADS) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int list = start + a * THREADS;
            if (list >= p.lists) break;
            copy_4((void*)(table.ranks + list), p.squares + row + list);
            if (!table.logits) continue;
            copy_4((void*)(table.sizes + list), p.sizes + row + list);
            copy_group(table.logits + list * G, p.dots + ((i64)part.unit * p.lists + list) * G);
        }
        commit_copies();
    }
    if (threadIdx.x < G) s.largest[threadIdx.x] = 0;
    wait_copies<0>();
    __syncthreads();
    float peak[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = -INFINITE;
#pragma unroll 1
    for (int list = threadIdx.x; list < p.lists; list += THREADS) {
        const int size = table.sizes[list];
        table.taken[list] = 0;
        if (!size) continue;
        Group logits = table.logits ? *(const Group*)(table.logits + list * G)
                                    : load_group(p.dots + ((i64)part.unit * p.lists + list) * G);
        logits = corrected(p, s, logits, table.ranks[list], size);
        if (table.logits) store_group(table.logits + list * G, logits.x);
#pragma unroll
        for (int g = 0; g < G; ++g) peak[g] = fmaxf(peak[g], logits.x[g]);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const u32 top = __reduce_max_sync(FULL, peak[g] > -INFINITE ? ordered(peak[g]) : 0);
        if (lane == 0) atomicMax(s.largest + g, top);
    }
    __syncthreads();
    float sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = unordered(s.largest[g]), sum[g] = 0.f;
#pragma unroll 1
    for (int list = threadIdx.x; list < p.lists; list += THREADS) {
        const int size = table.sizes[list];
        if (!size) continue;
        const Group logits = list_logits(p, s, part, table, list, size);
#pragma unroll
        for (int g = 0; g < G; ++g) sum[g] = fmaf((float)size, exponential(logits.x[g] - peak[g]), sum[g]);
    }
    // Lanes, then warps, in an order that is the same in all blocks.
#pragma unroll
    for (int g = 0; g < G; ++g) {
        sum[g] = warp_sum(sum[g]);
        if (lane == 0) s.reduced[warp][g] = sum[g];
    }
    __syncthreads();
    if (threadIdx.x < G) {
        float all = 0.f;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) all += s.reduced[w][threadIdx.x];
        s.norm[threadIdx.x] = unordered(s.largest[threadIdx.x]) + __logf(all);
        s.largest[threadIdx.x] = 0;
    }
    __syncthreads();
}

// Cut the order of the lists: take lists as long as they fit into the limit, in the order of their ranks, and those of
// equal rank in their own. The block's histogram is of the ranks. `lists` gives rank (minus infinity for none) and
// size, and takes how many keys of a list are visited: each list by the thread that looks at it.
template <typename Lists>
__device__ __forceinline__ void cut_lists(const Step& p, Shared& s, Lists& lists) {
    const int limit = limit_of(p, s);
    find_bin(s, limit);
    const int boundary = s.boundary, reached = s.reached;
#pragma unroll TOGETHER
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const float rank = lists.rank(list);
        if (rank > -INFINITE && bin_of_weight(rank) == boundary) {
            const int own = atomicAdd(&s.owned, 1);
            if (own < OWN) {
                s.rows[own] = list;
                s.rows[OWN + own] = __float_as_int(rank);
                s.rows[2 * OWN + own] = rank_weight(p, rank, lists.size(list));
            }
        }
    }
    meet_choosers();
    // In the bin of the cut, find the first list that does not fit whole.
    const bool by_keys = !p.nprobe && p.top_p <= 0.f;
    const int owned = s.owned, part = threadIdx.x % 8;
    u64 first = 0;
    int left = 0;
    const auto look = [&](int list, float rank, int weight, int before) {
        if (by_keys ? before + weight <= limit : before < limit) return;
        const u64 place = (u64)__float_as_uint(rank) << 32 | (u32)~list;
        if (place > first) first = place, left = by_keys && !p.refine ? max(0, limit - before) : 0;
    };
    if (owned <= OWN) {
#pragma unroll 1
        for (int start = 0; start < owned; start += CHOOSERS / 8) {
            const int i = min(start + (int)threadIdx.x / 8, owned - 1), list = s.rows[i];
            const float rank = __int_as_float(s.rows[OWN + i]);
            int before = 0;
#pragma unroll 2
            for (int j = part; j < owned; j += 8) {
                const float other = __int_as_float(s.rows[OWN + j]);
                before += other > rank || (other == rank && s.rows[j] < list) ? s.rows[2 * OWN + j] : 0;
            }
#pragma unroll
            for (int step = 1; step < 8; step <<= 1) before += __shfl_xor_sync(FULL, before, step);
            look(list, rank, s.rows[2 * OWN + i], reached + before);
        }
    } else {  // nearly all ranks are the same
#pragma unroll 1
        for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
            const float rank = lists.rank(list);
            if (!(rank > -INFINITE) || bin_of_weight(rank) != boundary) continue;
            int before = reached;
#pragma unroll 1
            for (int j = 0; j < p.lists; ++j) {
                const float other = lists.rank(j);
                if (other > -INFINITE && bin_of_weight(other) == boundary && (other > rank || (other == rank && j < list)))
                    before += rank_weight(p, other, lists.size(j));
            }
            look(list, rank, rank_weight(p, rank, lists.size(list)), before);
        }
    }
    if (first) atomicMax(&s.cut, first);
    meet_choosers();
    const u64 cut = s.cut;
    if (first && first == cut) s.cut_keys = left;
    meet_choosers();
#pragma unroll TOGETHER
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const float rank = lists.rank(list);
        const int bin = rank > -INFINITE ? bin_of_weight(rank) : -2;
        const u64 place = (u64)__float_as_uint(rank) << 32 | (u32)~list;
        lists.take(list, bin > boundary || (bin == boundary && place > cut) ? lists.size(list) : bin == boundary && place == cut ? s.cut_keys : 0);
    }
    meet_choosers();
}

// Lists in arrays: what several rankers visit is joined.
struct Listed {
    const float* ranks;
    int* taken;
    const int* sizes;
    __device__ __forceinline__ float rank(int list) const { return ranks[list]; }
    __device__ __forceinline__ int size(int list) const { return sizes[list]; }
    __device__ __forceinline__ void take(int list, int visit) const { taken[list] = max(taken[list], visit); }
};

// Fill `taken`: how many keys of each list are visited, from its beginning.
__device__ __forceinline__ void select_lists(const Step& p, Shared& s, const Part& part, const Table& table) {
    float* ranks = table.ranks;
    int* taken = table.taken;
    const int* sizes = table.sizes;
    find_norms(p, s, part, table);
    for (int ranker = 0; ranker < RANKERS; ++ranker) {
        clear_histogram(s);
        __syncthreads();
#pragma unroll 1
        for (int list = threadIdx.x; list < p.lists; list += THREADS) {
            const int size = sizes[list];
            ranks[list] = -INFINITE;
            if (!size) continue;
            const Group logits = list_logits(p, s, part, table, list, size);
            const float weight = pooled_weight(logits.x, s.norm, POLICY, ranker);
            const float rank = p.by_mass ? weight * (float)size : weight;
            ranks[list] = rank;
            atomicAdd(s.histogram + bin_of_weight(rank), list_weight(p, weight, size));
        }
        Listed listed = {ranks, taken, sizes};
        cut_lists(p, s, listed);
    }
}

// Set the bits of the lists that are visited.
__device__ __noinline__ void note_lists(u32* words, const int* taken, int lists) {
    for (int list = threadIdx.x; list < lists; list += THREADS)
        if (taken[list] > 0) atomicOr(words + (list >> 5), 1u << (list & 31));
}

// The weight of the keys of a list that were not visited, for each head.
__device__ __forceinline__ Group rest_of_list(const Step& p, const Shared& s, const Part& part, int list, int taken) {
    const int size = p.sizes[(i64)part.stream * p.lists + list], rest = size - taken;
    Group weights = load_group(p.dots + ((i64)part.unit * p.lists + list) * G);
    weights = corrected(p, s, weights, p.squares[(i64)part.stream * p.lists + list], max(size, 1));
#pragma unroll
    for (int g = 0; g < G; ++g)
        weights.x[g] = rest > 0 ? (float)rest * exponential(fminf(weights.x[g], s.bound[g]) - s.basis[g]) : 0.f;
    return weights;
}

// Whether a list of this block's share may count for more than the bound: note that it is deferred.
__device__ __forceinline__ void find_deferred_lists(const Step& p, Shared& s, const Part& part, const Table& table) {
#pragma unroll 1
    for (int list = part.first_list + threadIdx.x; list < part.last_list; list += THREADS) {
        const int size = table.sizes[list];
        if (size <= table.taken[list]) continue;
        const Group logits = list_logits(p, s, part, table, list, size);
        bool passes = false;
#pragma unroll
        for (int g = 0; g < G; ++g) passes |= logits.x[g] > s.reference[g];
        if (passes) s.deferred = 1;
    }
}
