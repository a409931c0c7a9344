// Choose lists, and deal out their pages: what the first warps of the blocks of a cluster do together.

// Some pages of the stream, as many as a thread asks for at once: their labels, orders and places in the pool.
#define PAGES_AHEAD 6
struct Pages {
    int labels[PAGES_AHEAD], orders[PAGES_AHEAD], places[PAGES_AHEAD];
};
__device__ __forceinline__ void load_pages(const Step& p, int stream, int start, Pages& pages) {
    const i64 row = (i64)stream * p.most_pages + start;
    const int *labels = p.labels + row, *orders = p.orders + row, *places = p.pages + row;
#pragma unroll
    for (int k = 0; k < PAGES_AHEAD; ++k) {
        const int i = k * CLUSTER * CHOOSERS;
        if (start + i < p.most_pages) pages.labels[k] = labels[i], pages.orders[k] = orders[i], pages.places[k] = places[i];
    }
}

// Ask for what this block reads later, whatever is chosen: those who attend do, while lists are chosen.
__device__ __forceinline__ void prefetch_rest(const Step& p, int stream, int rank, i64 row, int own) {
    const i64 pages = (i64)stream * p.most_pages;
    const int thread = threadIdx.x - CHOOSERS, threads = ATTENDING * WARP;
#pragma unroll 1
    for (int i = CLUSTER * CHOOSERS * PAGES_AHEAD + 32 * (rank * threads + thread); i < p.most_pages; i += 32 * CLUSTER * threads)
        prefetch(p.labels + pages + i), prefetch(p.orders + pages + i), prefetch(p.pages + pages + i);
#pragma unroll 1
    for (int i = 128 * thread; i < own * D; i += 128 * threads) prefetch(p.means + row * D + i);
#pragma unroll 1
    for (int list = 32 * thread; list < own; list += 32 * threads) prefetch(p.mean_scales + row + list);
}

// A thread for each rank and head, which sends to that rank what warps of this block left.
#define FOR_RANKS_AND_HEADS                           \
    if (threadIdx.x < CLUSTER * G)                    \
        for (int to = threadIdx.x / G, g = threadIdx.x % G; to >= 0; to = -1)

// Tell all blocks this block's part of the second orders of the queries: of its share of the rotated dimensions. Those
// who choose do it, from thread 0, or those who attend, from thread CHOOSERS; the others wait in the cluster themselves.
__device__ __forceinline__ void send_seconds(const Step& p, Shared& s, int head, int rank, int first, int threads) {
    const int lane = threadIdx.x % WARP, warp = (threadIdx.x - first) / WARP, warps = threads / WARP;
    const int last = share_of(p.coded_most, rank + 1, CLUSTER);
    float second[G] = {};
    // The last warps begin, since the first have more lists.
#pragma unroll 1
    for (int r = share_of(p.coded_most, rank, CLUSTER) + warps - 1 - warp; r < last; r += warps) {
        const i64 row = (i64)head * p.coded_most + r;
        const float* at = p.inverse + row * D + lane;
        const float spread = p.spread[row];
        float dots[G] = {};
#pragma unroll
        for (int d = 0; d < D; d += WARP) {
            if (D % WARP && d + lane >= D) continue;
            const float x = at[d];
#pragma unroll
            for (int g = 0; g < G; ++g) dots[g] = fmaf(s.query[g][d + lane], x, dots[g]);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            const float dot = warp_sum(dots[g]);
            second[g] = fmaf(dot * dot, spread, second[g]);
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g)
        if (lane == 0) s.reduced[threadIdx.x / WARP][g] = second[g];
    meet_some(first ? ATTENDING_MEET : CHOOSING_MEET, threads);
    wait_in_cluster();
#pragma unroll 1
    for (int i = threadIdx.x - first; i < CLUSTER * G; i += threads) {
        const int to = i / G, g = i % G;
        float sum = 0.f;
#pragma unroll 4
        for (int w = 0; w < warps; ++w) sum += s.reduced[first / WARP + w][g];
        send_4(&s.seconds[rank][g], to, __float_as_uint(p.scale * p.scale / 2.f * sum), &s.exchanges[SECOND]);
    }
}

// Logits of this block's lists, and the norms of all lists.
__device__ __forceinline__ void find_norms(
    const Step& p, Shared& s, int own, int rank, const int2* sizes_and_squares, float* logits, int* sizes
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float peak[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = -INFINITE, sum[g] = 0.f;
#pragma unroll 1
    for (int i = threadIdx.x; i < own; i += CHOOSERS) {
        const int2 of_list = sizes_and_squares[i];
        const int size = sizes[i] = of_list.x;
        if (!size) continue;
        Group group;
#pragma unroll
        for (int g = 0; g < G; ++g) group.x[g] = logits[i * G + g];
        group = corrected(p, s, group, __int_as_float(of_list.y), size);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            logits[i * G + g] = group.x[g];
            const float top = fmaxf(peak[g], group.x[g]);
            sum[g] = sum[g] * exponential(peak[g] - top) + (float)size * exponential(group.x[g] - top);
            peak[g] = top;
        }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float top = warp_max(peak[g]);
        sum[g] = warp_sum(peak[g] > -INFINITE ? sum[g] * exponential(peak[g] - top) : 0.f);
        if (lane == 0) s.reduced[warp][g] = top, s.reduced[warp][G + g] = sum[g];
    }
    meet_choosers();
    FOR_RANKS_AND_HEADS {
        float top = -INFINITE, all = 0.f;
#pragma unroll 4
        for (int w = 0; w < CHOOSING; ++w) top = fmaxf(top, s.reduced[w][g]);
        if (top > -INFINITE)
#pragma unroll 4
            for (int w = 0; w < CHOOSING; ++w) all = fmaf(s.reduced[w][G + g], exponential(s.reduced[w][g] - top), all);
        send_8(&s.norms[rank][g], to, __float_as_uint(top), __float_as_uint(all), &s.exchanges[NORM]);
    }
#pragma unroll 1
    for (int g = warp; g < G; g += CHOOSING) {
        await(&s.exchanges[NORM]);
        float2 one = make_float2(-INFINITE, 0.f);
        if (lane < CLUSTER) one = s.norms[lane][g];
        const float top = warp_max(one.x), all = warp_sum(one.x > -INFINITE ? one.y * exponential(one.x - top) : 0.f);
        if (lane == 0) s.norm[g] = top > -INFINITE ? top + __logf(all) : -INFINITE;
    }
    meet_choosers();
}

// How many keys of lists may be fetched.
__device__ __noinline__ int keys_to_visit(const Step& p, int in_lists, int head) {
    const i64 left = (i64)bytes_to_read(p, in_lists, head);
    return (int)fmin((double)(left / p.row_bytes), 2147483647.);
}

// What stands in the place of a rank when it is known how much of a list is visited: not a number above -infinity, but
// how many pages its thread's lists before it have.
#define DECIDED 0xff800000u
__device__ __forceinline__ int decided(int pages) { return (int)(DECIDED | (u32)pages); }

__device__ __forceinline__ int pages_of(int keys) { return (keys + LANES - 1) / LANES; }

// Of lists that count from `before` on: how many keys are visited.
__device__ __forceinline__ int keys_visited(const Step& p, int limit, int before, int weight, int size) {
    if (p.nprobe || p.top_p > 0.f) return before < limit ? size : 0;
    return min(size, max(0, limit - before));
}

// A thread's lists: two and two.
#define FOR_OWN_LISTS \
    for (int list = 2 * threadIdx.x; list < p.lists; list += list % 2 ? 2 * CHOOSERS - 1 : 1)

// Decide about the lists in the bin of the cut where there is no room to note them: nearly all ranks are the same. Of
// the lists that stay ranked each thread decides about its own, and adds their pages to what it has.
__device__ __noinline__ int decide_of_many(const Step& p, Shared& s, int limit, int2* table, int pages) {
    u64 first = 0;  // rank and number of the first list that is not visited whole
    int left = 0;
#pragma unroll 1
    FOR_OWN_LISTS {
        const float rank = __int_as_float(table[list].x);
        if (!(rank > -INFINITE)) continue;
        int before = s.reached;
#pragma unroll 1
        for (int j = 0; j < p.lists; ++j) {
            const float other = __int_as_float(table[j].x);
            if (other > rank || (other == rank && j < list)) before += rank_weight(p, other, table[j].y);
        }
        const int visit = keys_visited(p, limit, before, rank_weight(p, rank, table[list].y), table[list].y);
        const u64 place = (u64)__float_as_uint(rank) << 32 | (u32)~list;
        if (visit < table[list].y && place > first) first = place, left = visit;
    }
    if (threadIdx.x == 0) s.cut = 0;
    meet_choosers();
    if (first) atomicMax(&s.cut, first);
    meet_choosers();
    const u64 cut = s.cut;
#pragma unroll 1
    FOR_OWN_LISTS {
        const float rank = __int_as_float(table[list].x);
        if (!(rank > -INFINITE)) continue;
        const u64 place = (u64)__float_as_uint(rank) << 32 | (u32)~list;
        if (place <= cut) table[list].y = place == cut ? left : 0;
        table[list].x = decided(pages);
        pages += pages_of(table[list].y);
    }
    meet_choosers();
    return pages;
}

// Of the lists of each thread: how many pages the threads before it have.
__device__ __forceinline__ int* pages_before(Shared& s) { return s.histogram; }

// Tell all blocks the ranks of this block's lists; when all have come, cut their order. Returns how many pages all
// blocks fetch; `table`, first ranks and sizes, then says how many of them come before each list, after those of the
// threads before, and how many keys of the list are visited.
__device__ __forceinline__ int select(
    const Step& p, Shared& s, int rank, int first, int own, const float* logits, const int* sizes, int2* table,
    int2* sent  // stays as it is sent, while `table` changes
) {
#pragma unroll 1
    for (int i = threadIdx.x; i < (own + 1) / 2 * 2; i += CHOOSERS) {
        const int size = i < own ? sizes[i] : 0;
        float weight = -INFINITE;
        if (size) {
            weight = pooled_weight(logits + i * G, s.norm, POLICY, 0);
            // No head's mass is more than one, unless the query is not finite: then let the blocks agree at least.
            if (!(weight * (float)size <= 2.f * G)) weight = 0.f;
            if (p.by_mass) weight *= (float)size;
        }
        table[first + i] = sent[i] = make_int2(__float_as_int(weight), size);
    }
    end_writing();
    meet_choosers();
    if (threadIdx.x < CLUSTER && threadIdx.x != rank && own)
        send_many(table + first, sent, (own + 1) / 2 * 16, threadIdx.x, &s.exchanges[RANK]);
    await(&s.exchanges[RANK]);
    int4* two = (int4*)table;  // lists at a time
    const int pairs = (p.lists + 1) / 2;
#pragma unroll 4
    for (int i = threadIdx.x; i < pairs; i += CHOOSERS) {
        const int4 x = two[i];
        if (x.y) atomicAdd(s.histogram + bin_of_weight(__int_as_float(x.x)), rank_weight(p, __int_as_float(x.x), x.y));
        if (x.w) atomicAdd(s.histogram + bin_of_weight(__int_as_float(x.z)), rank_weight(p, __int_as_float(x.z), x.w));
    }
    const int limit = limit_of(p, s);
    find_bin(s, limit);
    const int boundary = s.boundary;
    int pages = 0;
    const auto decide = [&](int& rank, int& size) {
        const int bin = size ? bin_of_weight(__int_as_float(rank)) : -2;
        if (bin == boundary) return 1u;
        rank = decided(pages);
        size = bin > boundary ? size : 0;
        pages += pages_of(size);
        return 0u;
    };
    // Lists in the bin of the cut are noted afterwards: few of a warp's, which would hold up all others one by one.
#pragma unroll 1
    for (int first = threadIdx.x; first < pairs; first += 16 * CHOOSERS) {
        u32 open = 0;
#pragma unroll 4
        for (int k = 0; k < 16; ++k) {
            const int i = first + k * CHOOSERS;
            if (i >= pairs) break;
            int4 x = two[i];
            open |= (decide(x.x, x.y) | decide(x.z, x.w) << 1) << 2 * k;
            two[i] = x;
        }
#pragma unroll 1
        for (; open; open &= open - 1) {
            const int bit = __ffs(open) - 1, list = 2 * (first + bit / 2 * CHOOSERS) + bit % 2;
            const int own = atomicAdd(&s.owned, 1), rank = table[list].x, size = table[list].y;
            if (own >= OWN) continue;
            s.rows[own] = list, s.rows[OWN + own] = rank, s.rows[3 * OWN + own] = size;
            s.rows[2 * OWN + own] = rank_weight(p, __int_as_float(rank), size);
        }
    }
    meet_choosers();
    const int owned = s.owned;
    if (owned > OWN) pages = decide_of_many(p, s, limit, table, pages);
    // Thread by thread, the pages of lists make up a row that is dealt out to the blocks.
    const int before = sum_before(s, pages);
    const int lane = threadIdx.x % WARP, certain = warp_sum_int(lane < CHOOSING ? ((int*)s.reduced)[lane] : 0);
    if (threadIdx.x == 0) s.total = certain;
    pages_before(s)[threadIdx.x] = before;
    meet_choosers();
    if (owned > OWN) return certain;
    // In the bin of the cut, lists come one after another, those of equal rank in their own order: eight lanes look at
    // those that may come before one.
#pragma unroll 1
    for (int start = 0; start < owned; start += CHOOSERS / 8) {
        const int at = start + threadIdx.x / 8, i = min(at, owned - 1), list = s.rows[i];
        const float own_rank = __int_as_float(s.rows[OWN + i]);
        int weights = 0, come = 0;
#pragma unroll 2
        for (int j = threadIdx.x % 8; j < owned; j += 8) {
            const float other = __int_as_float(s.rows[OWN + j]);
            if (other > own_rank || (other == own_rank && s.rows[j] < list))
                weights += s.rows[2 * OWN + j], come += pages_of(s.rows[3 * OWN + j]);
        }
#pragma unroll
        for (int step = 1; step < 8; step <<= 1) {
            weights += __shfl_xor_sync(FULL, weights, step);
            come += __shfl_xor_sync(FULL, come, step);
        }
        const int size = s.rows[3 * OWN + i], visit = keys_visited(p, limit, s.reached + weights, s.rows[2 * OWN + i], size);
        if (at < owned && threadIdx.x % 8 == 0) {
            table[list] = make_int2(decided(certain + come - pages_before(s)[list / 2 % CHOOSERS]), visit);
            if (visit) atomicMax(&s.total, certain + come + pages_of(visit));
        }
    }
    meet_choosers();
    return s.total;
}

// The block that the page of an index goes to, where it stands there, and how many of `total` pages a block gets. Four of the
// eight blocks of a cluster are on multiprocessors that share their way to memory with each other (a CPC of an H100 has
// six, and clusters are spread over three), the other four do with one: these get a page more for every ROUNDS.
#if CLUSTER == 8
#define PERIOD (8 * ROUNDS + 4)
__device__ __forceinline__ bool gets_more(int rank) { return (rank + 2) / 4 == 1; }
__device__ __forceinline__ int2 place_of(int index) {
    const int turn = index / PERIOD, i = index % PERIOD, rank = i < 8 * ROUNDS ? i % 8 : i - 8 * ROUNDS + 2;
    return make_int2(rank, turn * (ROUNDS + gets_more(rank)) + i / 8);
}
__device__ __forceinline__ int dealt_to(int rank, int total) {
    const int turn = total / PERIOD, i = total % PERIOD;
    return turn * (ROUNDS + gets_more(rank)) + (min(i, 8 * ROUNDS) - rank + 7) / 8 + (gets_more(rank) && i - 8 * ROUNDS > rank - 2);
}
#else
__device__ __forceinline__ int2 place_of(int index) { return make_int2(index % CLUSTER, index / CLUSTER); }
__device__ __forceinline__ int dealt_to(int rank, int total) { return (total - rank + CLUSTER - 1) / CLUSTER; }
#endif

// Deal out the pages of visited lists: a block looks through its share of all pages of the stream, of which the first
// are at hand. A page is told as its place in the pool and, in the lowest five bits, how many of its keys are fetched.
__device__ __forceinline__ void deal_pages(
    const Step& p, Shared& s, int stream, int rank, int count, Pages& some, const int2* table, int* pages
) {
    const int step = CLUSTER * CHOOSERS;
    Pages next;
#pragma unroll 1
    for (int start = rank * CHOOSERS + threadIdx.x; start < count; start += PAGES_AHEAD * step) {
        load_pages(p, stream, start + PAGES_AHEAD * step, next);
#pragma unroll
        for (int k = 0; k < PAGES_AHEAD; ++k) {
            if (start + k * step >= count) break;
            const int2 list = table[some.labels[k] >> 5];
            const int keys = min(some.labels[k] & 31, list.y - some.orders[k] * LANES);
            if (keys <= 0) continue;
            const int index = list.x - (int)DECIDED + pages_before(s)[some.labels[k] / 64 % CHOOSERS] + some.orders[k];
            const int2 place = place_of(index);
            send_4(pages + place.y, place.x, (u32)(some.places[k] << 5 | keys), &s.exchanges[PAGE]);
        }
        some = next;
    }
}
