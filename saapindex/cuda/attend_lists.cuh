// Lists: their logits, and where the order of their ranks is cut.

#ifndef TOGETHER
#define TOGETHER 4  // lists that a thread looks at before it waits
#endif

// A byte as a number: as the last of the digits of 2^23, which is faster than to convert it.
__device__ __forceinline__ float byte_of(u32 x, int j) {
    return __uint_as_float(__byte_perm(x ^ 0x80808080u, 0x4b000000u, 0x7440 + j)) - 8388736.f;
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

// Logits of a list, from inner products: with the second order of the mean of exp.
__device__ __forceinline__ Group corrected(const Step& p, const Shared& s, Group dots, float squares, int size) {
    const float spread = __fdividef(squares, (float)size);
#pragma unroll
    for (int g = 0; g < G; ++g)
        dots.x[g] = capped(dots.x[g] + fminf(s.variance[g] * spread, CORRECTION), p.cap);
    return dots;
}

#define MOST_SEEN 16384  // keys whose codes are to be seen by heads that look things up

// The bytes of lists that a head may read: of a budget, after statistics, its weight in it. That is more of what it takes
// where bytes are scarce, the less of all codes those see that look things up.
__device__ __forceinline__ double bytes_to_read(const Step& p, int in_lists, int head) {
    const double fixed = (double)p.lists * (2 * D + 8) + (double)(D + 4) * p.coded[head];
    const double all = (double)in_lists * p.row_bytes, left = fmax(p.budget * in_lists * p.row_bytes - fixed, 0.);
    if (!p.by_head) return floor(fmin(left, all));
    const double least = p.asks[0], needed = (double)min(in_lists, MOST_SEEN) * p.code_bytes / fmax((double)p.asks[2] * left, 1.);
    const double lack = fmin(fmax((needed - least) / fmax((double)p.asks[1] - least, 1e-9), 0.), 1.);
    return floor(fmin(left * (p.weights[head] + lack * ((double)p.scarce[head] - p.weights[head])), all));
}

// How much a list counts towards the limit: keys, itself, or its predicted mass in parts of 2^30. The masses of "sum" add
// up to G, those of others to something between one and G.
__device__ __forceinline__ int list_weight(const Step& p, float weight, int size) {
    if (p.nprobe) return 1;
    return p.top_p > 0.f ? (int)(fminf(weight * (float)size, (float)G) * ((float)(1 << 30) / G)) : size;
}

// Cut the order of the lists: take lists as long as they fit into the limit, in the order of their ranks, and those of
// equal rank in their own. The block's histogram is of the ranks. `lists` gives rank (minus infinity for none) and
// size, and takes how many keys of a list are visited.
template <typename Lists>
__device__ __forceinline__ void cut_lists(const Step& p, Shared& s, const Lists& lists) {
    meet_choosers();
    int limit = s.scan;
    if (p.nprobe) limit = p.nprobe;
    if (p.top_p > 0.f) {
        int total = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS; i += CHOOSERS) total += s.histogram[i];
        total = warp_sum_int(total);
        if (threadIdx.x % WARP == 0) ((int*)s.reduced)[threadIdx.x / WARP] = total;
        meet_choosers();
        total = 0;
#pragma unroll 1
        for (int w = 0; w < CHOOSERS / WARP; ++w) total += ((int*)s.reduced)[w];
        meet_choosers();
        limit = p.top_p >= 1.f ? 0x7fffffff : (int)(p.top_p * (float)total);
    }
    find_bin(s, limit);
    const int boundary = s.boundary;
#pragma unroll TOGETHER
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const float rank = lists.rank(list);
        const int size = lists.size(list), bin = rank > -INFINITE ? bin_of_weight(rank) : -2;
        if (bin == boundary) {
            const int own = atomicAdd(&s.owned, 1);
            if (own < OWN) {
                s.rows[own] = list;
                s.rows[OWN + own] = __float_as_int(rank);
                s.rows[2 * OWN + own] = list_weight(p, p.by_mass ? __fdividef(rank, (float)size) : rank, size);
            }
        }
        lists.take(list, bin > boundary ? size : 0);
    }
    meet_choosers();
    // In the bin of the cut, lists come one after another; of equal rank the lower first.
    const int owned = min(s.owned, OWN);
#pragma unroll 1
    for (int i = threadIdx.x; i < owned; i += CHOOSERS) {
        const int list = s.rows[i], size = lists.size(list);
        const float rank = __int_as_float(s.rows[OWN + i]);
        int before = s.reached;
#pragma unroll 4
        for (int j = 0; j < owned; ++j) {
            const float other = __int_as_float(s.rows[OWN + j]);
            before += other > rank || (other == rank && s.rows[j] < list) ? s.rows[2 * OWN + j] : 0;
        }
        int visit = 0;
        if (p.nprobe || p.top_p > 0.f) visit = before < limit ? size : 0;
        else if (before + size <= limit) visit = size;
        else if (!p.refine) visit = max(0, limit - before);
        lists.take(list, visit);
    }
    meet_choosers();
}
