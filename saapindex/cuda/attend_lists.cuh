// Lists: their logits, and where the order of their ranks is cut.

#ifndef TOGETHER
#define TOGETHER 4  // lists that a thread looks at before it waits
#endif

// A byte as a number: as the last of the digits of 2^23, which is faster than to convert it.
__device__ __forceinline__ float byte_of(u32 x, int j) {
    return __uint_as_float(__byte_perm(x ^ 0x80808080u, 0x4b000000u, 0x7440 + j)) - 8388736.f;
}

// Logits of a list, from inner products: with the second order of the mean of exp.
__device__ __forceinline__ Group corrected(const Step& p, const Shared& s, Group dots, float squares, int size) {
    const float spread = __fdividef(squares, (float)size);
#pragma unroll
    for (int g = 0; g < G; ++g)
        dots.x[g] = capped(dots.x[g] + fminf(s.variance[g] * spread, CORRECTION), p.cap);
    return dots;
}

// The bytes of lists that a head may read: of a budget, after statistics, its weight in it.
__device__ __forceinline__ double bytes_to_read(const Step& p, int in_lists, int coded, float weight) {
    const double fixed = (double)p.lists * (2 * D + 8) + (double)D * 2 * coded, all = (double)in_lists * p.row_bytes;
    return floor(fmin(fmax(p.budget * in_lists * p.row_bytes - fixed, 0.) * (double)weight, all));
}

// How much a list counts towards the limit: keys, itself, or its predicted mass in parts of 2^30. The masses of "sum" add
// up to G, those of others to something between one and G.
__device__ __forceinline__ int list_weight(const Step& p, float weight, int size) {
    if (p.nprobe) return 1;
    return p.top_p > 0.f ? (int)(fminf(weight * (float)size, (float)G) * ((float)(1 << 30) / G)) : size;
}

// Cut the order of the lists: take lists as long as they fit into the limit, in the order of their ranks, and those of
// equal rank in their own. The block's histogram is of the ranks. `lists` gives rank (minus infinity for none) and
// size, and takes how many keys of a list are visited: each list by the thread that looks at it.
template <typename Lists>
__device__ __forceinline__ void cut_lists(const Step& p, Shared& s, Lists& lists) {
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
    const int boundary = s.boundary, reached = s.reached;
    const auto weight_of = [&](float rank, int size) {
        return list_weight(p, p.by_mass ? __fdividef(rank, (float)size) : rank, size);
    };
#pragma unroll TOGETHER
    for (int list = threadIdx.x; list < p.lists; list += CHOOSERS) {
        const float rank = lists.rank(list);
        if (rank > -INFINITE && bin_of_weight(rank) == boundary) {
            const int own = atomicAdd(&s.owned, 1);
            if (own < OWN) {
                s.rows[own] = list;
                s.rows[OWN + own] = __float_as_int(rank);
                s.rows[2 * OWN + own] = weight_of(rank, lists.size(list));
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
                    before += weight_of(other, lists.size(j));
            }
            look(list, rank, weight_of(rank, lists.size(list)), before);
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
