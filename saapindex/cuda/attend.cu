// One step of sparse attention, whole, in one launch: route, select, scan codes, cut, attend, remainder, merge.
//
// A unit is one query token of one stream; BLOCKS blocks work on it and meet at barriers of their own, so all of
// them must be resident at once (the launcher sees to it). Every block keeps its part of the keys from the scan
// to the end, and nothing but counters, histograms and partial results crosses blocks.
//
// Compiled with -DD (head size), -DG (query heads of a KV head), -DWORDS (of a code), -DELEMENT (stored type),
// -DQUERY (type of queries and output). The definition is saapindex/backends/reference.

#ifndef THREADS
#define THREADS 512
#endif
#define WARPS (THREADS / WARP)
#define BINS 4096
#define LOWEST (-40.f)             // log weights below share a bin
#define PER_NAT (BINS / 44.f)      // bins of one nat
#define ROUND 1024                 // pages that a block looks at before it works on those it found
#define QUEUE 2048                 // keys that a block gathers before it attends to them
#define CANDIDATES 4096            // keys in the bin in which the cut falls, of a unit
#define OWN 1024                   // ... of a block
#define CORRECTION 3.f             // the most that a second-order term adds to a logit
#define LOG2E 1.4426950408889634f
#define RANKERS_MOST G

#define VECTORS (D * (int)sizeof(element) / 16)        // 16-byte loads of a row
#define PER_LANE ((VECTORS + WARP - 1) / WARP)         // ... of a lane
#define POW2(x) ((x) <= 1 ? 1 : (x) <= 2 ? 2 : (x) <= 4 ? 4 : (x) <= 8 ? 8 : (x) <= 16 ? 16 : 32)
#define TEAM POW2((VECTORS + PER_LANE - 1) / PER_LANE) // lanes that share a row
#define TEAMS (WARP / TEAM)
#define HELD (PER_LANE * VECTOR)                       // elements of a row in a lane
#define AHEAD 4                                        // rows that a team loads at once
#define FIELDS (8 * WORDS)                             // the most groups of four fields of a code

struct Step {
    const int *lengths, *first;
    const element *near_keys, *near_values, *keys, *values;
    const u32* codes;
    const u8* exponents;
    const int *ids, *pages, *labels, *orders, *counts, *sizes;
    const i8* anchors;
    const float* anchor_scales;
    const i8* means;
    const float *mean_scales, *squares;
    const float *inverse, *steps, *base, *spread, *distortion;  // inverse: (H, R, D)
    const int *widths, *coded;
    const void* queries;
    const int* positions;  // (B, t), or none: the newest tokens
    void* out;
    float* lse;
    u32* bits;  // (S, width): the positions that are chosen, instead of attending
    float *dots, *rotated, *estimates;
    int2* visited;
    u8* kept;
    int* histogram;
    float2* candidates;
    u32* counters;
    float* partial;
    i64* stamps;  // (grid, STAGES): clocks of each block at the beginning of each stage, with -DSTAMPS
    double budget, share;
    float scale, cap, top_p;
    int heads, tokens, lists, ring, sinks, most_pages, coded_most, blocks, width;
    int code_bytes, row_bytes, nprobe, policy, by_mass, refine, remainder, near, everything;
};

enum { SUM, MAX, UNION };
// Counters of a unit: barrier, blocks that are done, candidates of each ranker, peaks of each head.
#define COUNTERS (2 + RANKERS_MOST + 2 * G)

// Order-preserving integers, so that atomicMax works on floats; zero is below all.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 x) {
    return x == 0 ? -INFINITE : __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}
__device__ __forceinline__ float exponential(float x) { return exp2f(x * LOG2E); }

__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
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

__device__ __forceinline__ float load_query(const void* queries, i64 at) {
#if QUERY == 0
    return float16_to_float(((const u16*)queries)[at]);
#elif QUERY == 1
    return bfloat16_to_float(((const u16*)queries)[at]);
#else
    return ((const float*)queries)[at];
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

#define STAGES 12
#ifdef STAMPS
#define STAMP(i) \
    if (threadIdx.x == 0) p.stamps[(i64)blockIdx.x * STAGES + i] = clock64()
#else
#define STAMP(i)
#endif

// What the threads of a block share. Arrays of a length known at run time lie behind it.
struct Shared {
    float query[G][D];
    float rotated[G][32 * WORDS];
    int factors[FIELDS][G];   // four int8 of a rounded query each
    int offsets[G];           // sum of (2^b - 1) a8
    float unit[G], second[G], variance[G], norm[G], bound[G];
    int histogram[BINS];
    int2 queue[ROUND];        // page in the pool, label
    int rows[QUEUE];
    int own[OWN];             // places of candidates
    float reduced[WARPS][G];
    float reached;
    int queued, gathered, owned, visited, boundary, open, last;
    i64 scan, left, limit;
};

#include "attend_select.cuh"
#include "attend_scan.cuh"
#include "attend_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    u32* ranks = (u32*)(memory + sizeof(Shared));
    int* taken = (int*)(ranks + p.lists);
    float* reduction = (float*)(memory + sizeof(Shared));  // takes the place of both at the end

    const int unit = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks, thread = threadIdx.x;
    const int stream = unit / p.tokens, sequence = stream / p.heads, head = stream % p.heads;
    const int length = p.lengths[sequence], first = p.first[sequence];
    const int position =
        p.positions ? p.positions[sequence * p.tokens + unit % p.tokens] : length - p.tokens + unit % p.tokens;
    const int in_lists = max(0, first - p.sinks);
    const bool everything = p.everything || (in_lists > 0 && position < first - 1);
    const bool sparse = in_lists > 0 && !everything, deciding = p.bits != nullptr;
    u32* counters = p.counters + (i64)unit * COUNTERS;
    u32 met = 0;
    const Part part = {unit, block, stream, sequence, head, p.blocks, p.counts[stream]};

    STAMP(0);
    for (int i = thread; i < G * D; i += THREADS)
        s.query[i / D][i % D] = load_query(p.queries, (i64)unit * G * D + i);
    if (thread == 0) s.visited = 0;
    __syncthreads();

    Partial mine;
    clear(mine);
    if (sparse) {
        route(p, s, part);
        arrive(counters);
        met += p.blocks;
    }
    STAMP(1);
    if (p.near && !deciding) attend_near(p, s, part, mine, length, first, position);
    STAMP(2);
    if (sparse) {
        wait(counters, met);
        STAMP(3);
        prepare(p, s, part, in_lists);
        select_lists(p, s, part, ranks, taken);
    }
    STAMP(4);
    if (everything || (sparse && !p.refine)) {
        attend_pages(p, s, part, mine, taken, everything, position);
    } else if (sparse) {
        scan(p, s, part, taken);
        STAMP(5);
        const int rankers = p.policy == UNION ? G : 1;
        for (int ranker = 0; ranker < rankers; ++ranker) {
            tally(p, s, part, ranker);
            arrive(counters);
            met += p.blocks;
            wait(counters, met);
            STAMP(6);
            find_boundary(p, s, part, ranker);
            attend_sure(p, s, part, mine, ranker);
            arrive(counters);
            met += p.blocks;
            if (!deciding) attend_gathered(p, s, mine);
            wait(counters, met);
            STAMP(7);
            attend_candidates(p, s, part, mine, ranker);
        }
    }
    STAMP(8);
    if (!deciding) {
        bool bounded = false;
        if (sparse && p.remainder) {
            publish_peaks(p, s, part, mine, counters);
            arrive(counters);
            met += p.blocks;
            wait(counters, met);
            bounded = true;
            STAMP(9);
            find_bounds(s, counters);
            rebase(s, mine);
            attend_rest_lists(p, s, part, mine, taken);
            if (p.refine) attend_rest_keys(p, s, part, mine);
        }
        STAMP(10);
        reduce_block(p, s, part, mine, reduction, bounded);
    }
    STAMP(11);
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        s.last = atomicAdd(counters + 1, 1u) == (u32)p.blocks - 1;
    }
    __syncthreads();
    if (!s.last) return;
    __threadfence();
    if (!deciding) merge_blocks(p, part);
    // The next step finds everything as this one did.
    __syncthreads();
    for (int i = thread; i < COUNTERS; i += THREADS) counters[i] = 0;
    const int rankers = p.policy == UNION ? G : 1;
    for (int i = thread; i < rankers * BINS; i += THREADS) p.histogram[(i64)unit * RANKERS_MOST * BINS + i] = 0;
}
