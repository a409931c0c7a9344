// Choose lists, and deal out their pages: what the first warps of the blocks of a cluster do together.

// Rank and size of each list, then how many of the pages that are fetched come before it, and how many of its keys are.
struct Ranked {
    int2* at;
    __device__ __forceinline__ float rank(int list) const { return __int_as_float(at[list].x); }
    __device__ __forceinline__ int size(int list) const { return at[list].y; }
    __device__ __forceinline__ void take(int list, int visit) const { at[list].x = visit; }
};

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

// Ask for what this block reads later, whatever is chosen.
__device__ __forceinline__ void prefetch_rest(const Step& p, int stream, int rank, i64 row, int own) {
    const i64 pages = (i64)stream * p.most_pages;
#pragma unroll 1
    for (int i = CLUSTER * CHOOSERS * PAGES_AHEAD + 32 * (rank * CHOOSERS + (int)threadIdx.x); i < p.most_pages; i += 32 * CLUSTER * CHOOSERS)
        prefetch(p.labels + pages + i), prefetch(p.orders + pages + i), prefetch(p.pages + pages + i);
#pragma unroll 1
    for (int i = 128 * threadIdx.x; i < own * D; i += 128 * CHOOSERS) prefetch(p.means + row * D + i);
#pragma unroll 1
    for (int list = 32 * threadIdx.x; list < own; list += 32 * CHOOSERS) prefetch(p.mean_scales + row + list);
}

// Fetch the anchors of some of this block's lists.
__device__ __forceinline__ void fetch_anchors(const Step& p, i64 row, int count, u8* anchors) {
#if D == 64 || D % 128 == 0  // a thread always fetches the same part of a row, to the same place
    const int part = threadIdx.x % (D / 16), first = threadIdx.x / (D / 16);
    const i8* from = p.anchors + (row + first) * D + 16 * part;
    u8* to = anchors + first * D + 16 * SWIZZLED(first, part);
#pragma unroll 2
    for (int list = first; list < count; list += CHOOSERS * 16 / D, from += CHOOSERS * 16, to += CHOOSERS * 16) copy_16(to, from);
#else
#pragma unroll 1
    for (int i = threadIdx.x; i < count * (D / 16); i += CHOOSERS) {
        const int list = i / (D / 16), part = i % (D / 16);
        copy_16(anchors + list * D + 16 * SWIZZLED(list, part), p.anchors + (row + list) * D + 16 * part);
    }
#endif
    commit_copies();
}

// Rows of the code that a warp needs, asked for at once.
struct Rows {
    float x[AHEAD][(D + WARP - 1) / WARP], spread[AHEAD];
};
__device__ __forceinline__ void load_rows(const Step& p, int head, int start, int last, Rows& rows) {
    const i64 row = (i64)head * p.coded_most + start;
    const float *at = p.inverse + row * D + threadIdx.x % WARP, *spread = p.spread + row;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        const bool there = start + a * CHOOSING < last;
        rows.spread[a] = there ? spread[a * CHOOSING] : 0.f;
#pragma unroll
        for (int d = 0; d < D; d += WARP)
            rows.x[a][d / WARP] = there && (D % WARP == 0 || d + threadIdx.x % WARP < D) ? at[a * CHOOSING * D + d] : 0.f;
    }
}

// Inner products of the queries with the anchors of some lists.
__device__ __forceinline__ void route(
    const Step& p, const Shared& s, int count, const u8* anchors, const float* scales, float* logits
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
#pragma unroll 2
    for (int start = warp * 8; start < count; start += CHOOSING * 8) {
        const int list = min(start + head, count - 1);
        float products[4] = {};
        u32 raw[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            raw[step] = *(const u32*)(anchors + list * D + 16 * SWIZZLED(list, step) + 4 * quarter);
        multiply_anchors(s, raw, products);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int one = start + 2 * quarter + i;
            if (head < G && one < count) logits[one * G + head] = products[i] * p.scale * scales[one] * query_scale(s, head);
        }
    }
}

// Sums of 32 numbers each over the lanes: lane i gets that of the i-th.
__device__ __forceinline__ float sum_each(float* x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = WARP / 2; half; half >>= 1)
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const bool upper = lane & half;
            x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(FULL, upper ? x[i] : x[i + half], half);
        }
    return x[0];
}

// This block's part of the second orders of the queries: of its share of the rotated dimensions, of which the first are
// at hand. The last warps begin, since the first have more lists.
__device__ __forceinline__ void sum_seconds(const Step& p, Shared& s, int head, int start, int last, Rows& rows) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float second = 0.f;  // of head lane % G
#pragma unroll 1
    for (int r = start; r < last; r += AHEAD * CHOOSING) {
        if (r > start) load_rows(p, head, r, last, rows);
        float dots[WARP] = {}, spread = 0.f;
#pragma unroll
        for (int d = 0; d < D; d += WARP)
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float q = s.query[g][D % WARP == 0 ? d + lane : min(d + lane, D - 1)];
#pragma unroll
                for (int a = 0; a < AHEAD; ++a) dots[a * G + g] = fmaf(q, rows.x[a][d / WARP], dots[a * G + g]);
            }
        const float dot = sum_each(dots);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) spread = lane / G == a ? rows.spread[a] : spread;
        second = fmaf(dot * dot, spread, second);
    }
    // What the lanes of each head have.
#pragma unroll 1
    for (int g = 0; g < G; ++g) {
        const float sum = warp_sum(lane % G == g && lane < AHEAD * G ? second : 0.f);
        if (lane == 0) s.reduced[warp][g] = sum;
    }
}

// A thread for each rank and head, which sends to that rank what warps of this block left.
#define FOR_RANKS_AND_HEADS                           \
    if (threadIdx.x < CLUSTER * G)                    \
        for (int to = threadIdx.x / G, g = threadIdx.x % G; to >= 0; to = -1)

// Logits of this block's lists, and the norms of all lists.
__device__ __forceinline__ void find_norms(
    const Step& p, Shared& s, i64 row, int own, int rank, const int* first_sizes, const float* first_squares, float* logits, int* sizes
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float peak[G], sum[G];
#pragma unroll
    for (int g = 0; g < G; ++g) peak[g] = -INFINITE, sum[g] = 0.f;
    const auto add = [&](int i, int size, float squares) {
        sizes[i] = size;
        if (!size) return;
        Group group;
#pragma unroll
        for (int g = 0; g < G; ++g) group.x[g] = logits[i * G + g];
        group = corrected(p, s, group, squares, size);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            logits[i * G + g] = group.x[g];
            const float top = fmaxf(peak[g], group.x[g]);
            sum[g] = sum[g] * exponential(peak[g] - top) + (float)size * exponential(group.x[g] - top);
            peak[g] = top;
        }
    };
#pragma unroll
    for (int k = 0; k < PER; ++k)
        if (threadIdx.x + k * CHOOSERS < own) add(threadIdx.x + k * CHOOSERS, first_sizes[k], first_squares[k]);
#pragma unroll 1
    for (int i = threadIdx.x + PER * CHOOSERS; i < own; i += CHOOSERS) add(i, p.sizes[row + i], p.squares[row + i]);
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

// Tell all blocks the ranks of this block's lists; when all have come, cut their order. Returns how many pages all
// blocks fetch; `table` says which.
__device__ __forceinline__ int select(
    const Step& p, Shared& s, int rank, int first, int own, const float* logits, const int* sizes, int2* table
) {
#pragma unroll 1
    for (int i = threadIdx.x; i < own; i += CHOOSERS) {
        float weight = -INFINITE;
        if (sizes[i]) {
            weight = pooled_weight(logits + i * G, s.norm, POLICY, 0);
            if (p.by_mass) weight *= (float)sizes[i];
        }
        table[first + i] = make_int2(__float_as_int(weight), sizes[i]);
    }
    end_writing();
    meet_choosers();
    if (threadIdx.x < CLUSTER && threadIdx.x != rank && own)
        send_same(table + first, (own + 1) / 2 * 16, threadIdx.x, &s.exchanges[RANK]);
    await(&s.exchanges[RANK]);
    const Ranked lists = {table};
#pragma unroll TOGETHER
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const int size = lists.size(list);
        const float weight = lists.rank(list);
        if (!size) continue;
        atomicAdd(s.histogram + bin_of_weight(weight), list_weight(p, p.by_mass ? __fdividef(weight, (float)size) : weight, size));
    }
    cut_lists(p, s, lists);
    // Thread by thread, the pages of lists make up a row that is dealt out to the blocks.
    int sum = 0;
#pragma unroll 2
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) sum += (table[list].x + LANES - 1) / LANES;
    int before = sum_before(s, sum);
    const int lane = threadIdx.x % WARP, total = warp_sum_int(lane < CHOOSING ? ((int*)s.reduced)[lane] : 0);
#pragma unroll 2
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const int taken = table[list].x;
        table[list] = make_int2(before, taken);
        before += (taken + LANES - 1) / LANES;
    }
    meet_choosers();
    return total;
}

// Deal out the pages of visited lists: a block looks through its share of all pages of the stream, of which the first
// are at hand. A page is told as its place in the pool and, in the lowest five bits, how many of its keys are fetched.
__device__ __forceinline__ void deal_pages(
    const Step& p, Shared& s, int stream, int rank, Pages& some, const int2* table, int* pages
) {
    const int count = p.counts[stream], step = CLUSTER * CHOOSERS;
#pragma unroll 1
    for (int start = rank * CHOOSERS + threadIdx.x, turn = 0; start < count; start += PAGES_AHEAD * step, ++turn) {
        if (turn) load_pages(p, stream, start, some);
#pragma unroll
        for (int k = 0; k < PAGES_AHEAD; ++k) {
            if (start + k * step >= count) break;
            const int2 list = table[some.labels[k] >> 5];
            const int keys = min(some.labels[k] & 31, list.y - some.orders[k] * LANES), index = list.x + some.orders[k];
            if (keys > 0)
                send_4(pages + index / CLUSTER, index % CLUSTER, (u32)(some.places[k] << 5 | keys), &s.exchanges[PAGE]);
        }
    }
}
