// What the stages of a step share: parts of the work, barriers, small reductions, loads of groups of heads.

// The threads that choose lists, the first ones of a block: all, unless a kernel says otherwise.
#ifndef CHOOSERS
#define CHOOSERS THREADS
__device__ __forceinline__ void meet_choosers() { __syncthreads(); }
#endif

// How many of all pages are of this block.
__device__ __forceinline__ int pages_of_block(int pages, int block, int blocks) {
    const int pairs = (pages + 1) >> 1, mine = (pairs - block + blocks - 1) / blocks;
    if (mine <= 0) return 0;
    const int end = ((mine - 1) * blocks + block) * 2 + 2;  // end of the last pair
    return mine * 2 - max(0, end - pages);
}
// Where the share of a block in `count` things begins.
__device__ __forceinline__ int share_of(int count, int block, int blocks) { return (u32)count * (u32)block / (u32)blocks; }

// The place of a near key of which so many come before it: sinks, then the recent ones, whose first is at `turned` in the
// ring.
__device__ __forceinline__ int near_place(const Step& p, int before, int sinks, int turned) {
    if (before < sinks) return before;
    const int place = before + turned - sinks;
    return place + (place < p.ring ? p.sinks : p.sinks - p.ring);
}

// Order-preserving integers, so that atomicMax works on floats; zero is below all.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 x) {
    return x == 0 ? -INFINITE : __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float exponential(float x) { return power_of_two(x * LOG2E); }

__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// Ask for a line of memory that is needed later.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copy 16 bytes to shared memory without waiting; `wait_copies<N>` waits for all but the last N groups.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
__device__ __forceinline__ void copy_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

__device__ __forceinline__ void copy_group(float* to, const float* from) {
#if G % 4 == 0
#pragma unroll
    for (int i = 0; i < G; i += 4) copy_16(to + i, from + i);
#else
#pragma unroll
    for (int i = 0; i < G; ++i) copy_4(to + i, from + i);
#endif
}

// Products of small matrices: (16, 32) of unsigned with (32, 8) of signed bytes.
__device__ __forceinline__ void multiply_bytes(int* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// All blocks of a unit meet: arrive, do something else, wait.
__device__ __forceinline__ void arrive(u32* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
    }
}
__device__ __forceinline__ void wait(const u32* counter, u32 wanted) {
    if (threadIdx.x == 0)
        while (load_acquire(counter) < wanted) {}
    __syncthreads();
}

__device__ __forceinline__ void load_two_queries(const void* queries, i64 at, float& x, float& y) {
#if QUERY == 2
    const float2 two = *(const float2*)((const float*)queries + at);
    x = two.x, y = two.y;
#else
    const u32 two = *(const u32*)((const u16*)queries + at);
#if QUERY == 0
    x = float16_to_float((u16)two), y = float16_to_float((u16)(two >> 16));
#else
    x = bfloat16_to_float((u16)two), y = bfloat16_to_float((u16)(two >> 16));
#endif
#endif
}
__device__ __forceinline__ void store_out(void* out, i64 at, float x) {
#if QUERY == 0
    ((u16*)out)[at] = float_to_float16(x);
#elif QUERY == 1
    ((u16*)out)[at] = float_to_bfloat16(x);
#else
    ((float*)out)[at] = x;
#endif
}

// A number for each head of the group, side by side in memory; past the first-level cache, which may be stale.
struct Group {
    float x[G];
};
__device__ __forceinline__ Group load_group(const float* at) {
    Group group;
#if G % 4 == 0
#pragma unroll
    for (int i = 0; i < G; i += 4) {
        const float4 four = __ldcg((const float4*)(at + i));
        group.x[i] = four.x, group.x[i + 1] = four.y, group.x[i + 2] = four.z, group.x[i + 3] = four.w;
    }
#else
#pragma unroll
    for (int i = 0; i < G; ++i) group.x[i] = __ldcg(at + i);
#endif
    return group;
}
__device__ __forceinline__ void store_group(float* at, const float* x) {
#if G % 4 == 0
#pragma unroll
    for (int i = 0; i < G; i += 4) *(float4*)(at + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
#else
#pragma unroll
    for (int i = 0; i < G; ++i) at[i] = x[i];
#endif
}

// The log weight of a group, from those of its heads, as a ranker sees it.
__device__ __forceinline__ float pooled(const float* weights, int policy, int ranker) {
    if (policy == UNION) {
        float own = weights[0];
#pragma unroll
        for (int g = 1; g < G; ++g) own = g == ranker ? weights[g] : own;
        return own;
    }
    float peak = weights[0];
#pragma unroll
    for (int g = 1; g < G; ++g) peak = fmaxf(peak, weights[g]);
    if (policy == MAX || G == 1 || peak == -INFINITE) return peak;
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < G; ++g) sum += exponential(weights[g] - peak);
    return peak + __logf(sum);
}

// The same, of weights themselves and as a weight; those too small for that stay in order.
#define SMALLEST 1e-30f
__device__ __forceinline__ float pooled_weight(const float* logits, const float* norms, int policy, int ranker) {
    float weights[G], weight = 0.f;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const float one = exponential(fminf(logits[g] - norms[g], 80.f));
        if (policy == SUM) weight += one;
        else if (policy == MAX || g == ranker) weight = fmaxf(weight, one);
    }
    if (weight < SMALLEST) {
#pragma unroll
        for (int g = 0; g < G; ++g) weights[g] = logits[g] - norms[g];
        weight = 50.f * SMALLEST / fmaxf(-pooled(weights, policy, ranker), 1.f);
    }
    return weight;
}

// Add a number for each head to those at an address.
__device__ __forceinline__ void add_group(float* at, const float* x) {
#if G % 4 == 0 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
    for (int i = 0; i < G; i += 4)
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at + i), "f"(x[i]), "f"(x[i + 1]),
                     "f"(x[i + 2]), "f"(x[i + 3]) : "memory");
#else
#pragma unroll
    for (int i = 0; i < G; ++i) atomicAdd(at + i, x[i]);
#endif
}

// Bins of weights: 32 of an octave, by their bits; and the parts of a bin.
__device__ __forceinline__ int bin_of_weight(float weight) {
    return min(BINS - 1, max(0, (__float_as_int(weight) - LOWEST_BITS) >> BIN_SHIFT));
}
__device__ __forceinline__ int fine_bin_of(float log_weight, int bin) {
    const int fine = (__float_as_int(exponential(fminf(log_weight, 80.f))) - LOWEST_BITS) - (bin << BIN_SHIFT);
    return min(BINS - 1, max(0, fine >> (BIN_SHIFT - 11)));
}

__device__ __forceinline__ void clear_histogram(Shared& s) {
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS / 4; i += CHOOSERS) ((int4*)s.histogram)[i] = make_int4(0, 0, 0, 0);
}

// The sum of what the choosers before this one have; sums of their warps are left in `reduced`.
__device__ __forceinline__ int sum_before(Shared& s, int own) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int before = own;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const int other = __shfl_up_sync(FULL, before, step);
        if (lane >= step) before += other;
    }
    int* warps = (int*)s.reduced;
    if (lane == WARP - 1) warps[warp] = before;
    meet_choosers();
    return before + warp_sum_int(lane < warp ? warps[lane] : 0) - own;
}

// Find the bin of the block's histogram in which the cut falls: all bins above weigh `reached`, with it they weigh
// more than `limit`; -1 where everything fits.
#define RUN ((BINS / 4 + CHOOSERS - 1) / CHOOSERS * 4)
__device__ __noinline__ void find_bin(Shared& s, int limit) {
    const int begin = threadIdx.x * RUN;
    int counts[RUN], sum = 0;
#pragma unroll
    for (int i = 0; i < RUN; i += 4) {
        const int4 four = begin + i < BINS ? *(const int4*)(s.histogram + BINS - 4 - begin - i) : make_int4(0, 0, 0, 0);
        counts[i] = four.w, counts[i + 1] = four.z, counts[i + 2] = four.y, counts[i + 3] = four.x;
        sum += four.x + four.y + four.z + four.w;
    }
    if (threadIdx.x == 0) s.boundary = -1, s.reached = limit, s.owned = 0, s.cut = 0;
    int before = sum_before(s, sum);
    if (before <= limit && before + sum > limit) {
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (before <= limit && before + counts[i] > limit) {
                s.boundary = BINS - 1 - begin - i;
                s.reached = before;
            }
            before += counts[i];
        }
    }
    meet_choosers();
}
