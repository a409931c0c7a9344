// Lists: their logits, and how much of them may be visited.

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

// The same, from the rank of a list.
__device__ __forceinline__ int rank_weight(const Step& p, float rank, int size) {
    return list_weight(p, p.by_mass ? __fdividef(rank, (float)size) : rank, size);
}

// What the lists that are visited may count: after all have written to the histogram.
__device__ __forceinline__ int limit_of(const Step& p, Shared& s) {
    meet_choosers();
    if (p.nprobe) return p.nprobe;
    if (p.top_p <= 0.f) return s.scan;
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
    return p.top_p >= 1.f ? 0x7fffffff : (int)(p.top_p * (float)total);
}
