// One step of sparse attention that reads whole lists, in one launch on clusters of blocks: route, select, attend,
// remainder, merge. Codes are not read; steps that read them are of attend.cu.
//
// A unit is one query token of one stream, and a cluster of -DCLUSTER blocks works on it. In each block, the first warps
// choose lists, and exchange what that takes with the other blocks: second orders, sums and ranks of lists, pages to
// fetch. Meanwhile the others attend to near keys, then to the pages that come, and the first warps add what is
// estimated of the rest. What comes out is the same each time: nothing depends on who comes first.
//
// Compiled for heads of a multiple of 16 dimensions, with what attend_step.cuh says. The definition is saapindex/backends/reference.

#ifndef CLUSTER
#define CLUSTER 8
#endif
#ifndef THREADS
#define THREADS 512
#endif
#ifndef CHOOSERS
#define CHOOSERS 256  // threads that choose
#endif
#ifndef STAGES
#define STAGES 2  // tiles of a warp that are on their way at once; the last waits until the anchors have been read
#endif
#define CHOOSING (CHOOSERS / WARP)      // warps that do
#define ATTENDING (WARPS - CHOOSING)
#define SLICE (((G * D / 4 + CLUSTER - 1) / CLUSTER) * 4)  // numbers of the output that each block merges
#define ROOM (ATTENDING * TILE_BYTES * (STAGES - 1) / D / 8 * 8)  // lists whose anchors fit where the last stage is
#ifndef FIRST
#define FIRST 256  // lists of a block from which on these come before near keys, of which large clusters have few
#endif
#define FOUND (D + 4)                   // floats from head to head of what a warp found: output, then sum
#ifndef ROUNDS
#define ROUNDS 4  // pages that each block gets before some get another
#endif
#ifndef OWN
#define OWN 512
#endif

#include "attend_step.cuh"

enum { ANCHORS, SECOND, NORM, RANK, PAGE, NEAREST, PEAK, RESULT, EXCHANGES };

#define STAMPED 12
#ifdef STAMPS
#define STAMP_OF(thread, i) \
    if (threadIdx.x == thread) p.stamps[(i64)blockIdx.x * STAMPED + i] = clock64()
#else
#define STAMP_OF(thread, i)
#endif
#define STAMP(i) STAMP_OF(0, i)

// What the threads of a block share. Behind it: tiles, then arrays of a length known at run time.
struct Shared {
    u64 exchanges[8];
    float query[G][D];
    u32 digits[3][G][(D + 63) / 64 * 16];                  // of the queries as whole numbers
    u32 pairs[QUERY_PARTS][8][(D + 15) / 16 * 8 + 4];  // the same as matrices of a 16-bit type
    union {
        struct {
            int histogram[BINS];
            int rows[4 * OWN];  // lists in the bin of the cut, their ranks, what they count, and sizes
        };
        float merged[CLUSTER][SLICE];
    };
    float reduced[WARPS][2 * G];
    float2 norms[CLUSTER][G];  // largest logit of the lists of each block, and their sum relative to it
    float seconds[CLUSTER][G], peaks[CLUSTER][G], sums[CLUSTER][G];
    float nearest[CLUSTER][ATTENDING][G];  // largest logits of near keys, of the warps of all blocks
    float variance[G], norm[G], near_bound[G], basis[G], query_scale[G], unit[G];
    const element *key, *value;  // that this step adds
    u64 cut;  // rank and number of the first list that is not visited whole
    int boundary, reached, owned, total, scan, dealt;
};

// Some threads of a block meet. DIGITS of the queries (whole_route.cuh) are written by those who attend, and ANCHORS_READ, in
// whose place the last stage of tiles comes, by those who choose: these come by, and the others wait for all of them.
enum { CHOOSING_MEET = 1, DIGITS, ATTENDING_MEET, ANCHORS_READ };
__device__ __forceinline__ void meet_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void come_by(int barrier) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory"); }
__device__ __forceinline__ void await_all(int barrier) { meet_some(barrier, THREADS); }
__device__ __forceinline__ void meet_choosers() { meet_some(CHOOSING_MEET, CHOOSERS); }

#include "attend_common.cuh"
#include "attend_rows.cuh"
#include "attend_lists.cuh"
#include "cluster.cuh"
#include "whole_route.cuh"
#include "whole_choose.cuh"
#include "whole_rest.cuh"
#include "whole_near.cuh"

__device__ __forceinline__ void find_peak(Partial& mine) {
    mine.peak = fmaxf(mine.peak, __shfl_xor_sync(FULL, mine.peak, 1));
    mine.peak = fmaxf(mine.peak, __shfl_xor_sync(FULL, mine.peak, 2));
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
attend_whole(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int unit = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, thread = threadIdx.x;
    const int lane = thread % WARP, warp = thread / WARP;
    const int sequence = unit / p.heads, head = unit % p.heads;
    // Shares of lists are even, since sixteen bytes are sent at once.
    const int pairs = (p.lists + 1) / 2, first_list = 2 * share_of(pairs, rank, CLUSTER);
    const int own = max(0, min(2 * share_of(pairs, rank + 1, CLUSTER), p.lists) - first_list);
    const int most_own = (pairs + CLUSTER - 1) / CLUSTER * 2;
    const i64 row = (i64)unit * p.lists + first_list;
    u8* tiles = memory + (sizeof(Shared) + 15) / 16 * 16;
    u8* anchors = tiles + ATTENDING * (STAGES - 1) * TILE_BYTES;
    float* found = (float*)tiles;  // of each warp, when tiles are done with
    const int tiled = max(ATTENDING * STAGES * TILE_BYTES, WARPS * G * FOUND * 4);
    int2* table = (int2*)(tiles + tiled);
    float* logits = (float*)(table + 2 * pairs);
    int2* sent = (int2*)(logits + (most_own * G + 3) / 4 * 4);
    int* sizes = (int*)(sent + most_own);
    int* pages = sizes + most_own;
    const bool lists_first = own > FIRST && (CLUSTER > 2 || !FIRST);
    STAMP(0);
    if (thread == 0)
        for (int i = 0; i < EXCHANGES; ++i) begin_exchange(&s.exchanges[i]);
    arrive_in_cluster();
    Partial mine;
    u32 turns = 0;  // in which lists were left for later
    if (warp < CHOOSING) {
        float* scales = (float*)sizes;  // of anchors, until sizes are known
        if (thread == 0) {
            const u32 bytes = min(own, ROOM) * D;
            expect(&s.exchanges[ANCHORS], bytes);
            if (bytes) fetch_many(anchors, p.anchors + row * D, bytes, &s.exchanges[ANCHORS]);
        }
#pragma unroll 1
        for (int list = thread; list < own; list += CHOOSERS) {
            copy_4(scales + list, p.anchor_scales + row + list);
            copy_4(&sent[list].x, p.sizes + row + list);
            copy_4(&sent[list].y, p.squares + row + list);
        }
        commit_copies();
        load_queries(p, s, unit);
        if (thread == 0) {
            expect(&s.exchanges[SECOND], CLUSTER * G * 4);
            expect(&s.exchanges[NORM], CLUSTER * G * 8);
            expect(&s.exchanges[RANK], (pairs - (own + 1) / 2) * 16);
            expect(&s.exchanges[NEAREST], CLUSTER * ATTENDING * G * 4);
            expect(&s.exchanges[PEAK], CLUSTER * G * 4);
            expect(&s.exchanges[RESULT], CLUSTER * (max(0, min(SLICE, G * D - rank * SLICE)) + G) * 4);
        }
        STAMP(1);
        clear_histogram(s);
        if (!lists_first) send_seconds(p, s, head, rank, 0, CHOOSERS);
        wait_copies<0>();
        meet_choosers();
        await(&s.exchanges[ANCHORS]);
        await_all(DIGITS);
#pragma unroll 1
        for (int list = 0; list < own; list += ROOM) {
            const int count = min(own - list, ROOM);
            if (list) {
                meet_choosers();
                fetch_anchors(p, row + list, count, anchors);
                wait_copies<0>();
                meet_choosers();
            }
            route(p, s, count, anchors, scales + list, logits + list * G);
        }
        come_by(ANCHORS_READ);
        const int count = p.counts[unit];
        Pages some;
        load_pages(p, unit, rank * CHOOSERS + thread, some);
        if (lists_first) wait_in_cluster();
        if (thread < G) {
            await(&s.exchanges[SECOND]);
            float sum = 0.f;
#pragma unroll
            for (int other = 0; other < CLUSTER; ++other) sum += s.seconds[other][thread];
            s.variance[thread] = sum;
        }
        meet_choosers();
        STAMP(2);
        find_norms(p, s, own, rank, sent, logits, sizes);
        STAMP(3);
        const int total = select(p, s, rank, first_list, own, logits, sizes, table, sent);
        STAMP(4);
        if (thread == 0) {
            s.dealt = dealt_to(rank, total);
            expect(&s.exchanges[PAGE], s.dealt * 4);
        }
        deal_pages(p, s, unit, rank, count, some, table, pages);
        STAMP(5);
        clear(mine);
        // What is below the largest near logit is below the bound in any case: it is added while others attend.
        if (p.remainder) {
            float nearest = -INFINITE;
            await(&s.exchanges[NEAREST]);
#pragma unroll 4
            for (int i = lane % 4; i < CLUSTER * ATTENDING; i += 4)
                nearest = fmaxf(nearest, (&s.nearest[0][0][0])[i * G + min(lane / 4, G - 1)]);
            nearest = fmaxf(nearest, __shfl_xor_sync(FULL, nearest, 1));
            nearest = fmaxf(nearest, __shfl_xor_sync(FULL, nearest, 2));
            mine.reference = nearest;
            if (warp == 0 && lane % 4 == 0 && lane / 4 < G) s.near_bound[lane / 4] = nearest;
            turns = add_rest(p, row, own, table + first_list, logits, sizes, mine);
        }
    } else {
        const int old = p.lengths[sequence], from = p.first[sequence], recent = max(from, p.sinks);
        const bool adding = adds(p, old, from);
        const int length = old + adding, all_near = p.near ? min(p.sinks, length) + max(0, length - recent) : 0;
        if (thread == CHOOSERS) {
            s.key = p.new_keys + sequence * p.key_batch + head * p.key_head;
            s.value = p.new_values + sequence * p.value_batch + head * p.value_head;
        }
        const Near near = {
            (i64)unit * (p.sinks + p.ring), share_of(all_near, rank, CLUSTER), share_of(all_near, rank + 1, CLUSTER),
            min(p.sinks, length), (int)((u32)(recent - p.sinks) % (u32)p.ring),
            adding && (old < p.sinks || old >= recent) ? all_near - 1 : -1
        };
        load_queries(p, s, unit);
        if (thread == THREADS - 1) s.scan = keys_to_visit(p, max(0, from - p.sinks), head);
        split_queries(s);
        if (lists_first) {
            send_seconds(p, s, head, rank, CHOOSERS, THREADS - CHOOSERS);
            await(&s.exchanges[ANCHORS]);
        }
        u8* own_tiles = tiles + (warp - CHOOSING) * TILE_BYTES;
        clear(mine);
        // First near keys, some of them while the last stage holds anchors, then pages.
        enum { SOME, NEAR, PAGES };
        const int all = (near.end - near.start + TILE - 1) / TILE;
        int begin = 0, count = all > 4 * ATTENDING ? 3 * ATTENDING : all;
        const auto fetch = [&](int phase, int i, int stage) {
            u8* tile = own_tiles + stage * ATTENDING * TILE_BYTES;
            if (i < count) {
                if (phase == PAGES) fetch_page(p, pages[i], tile);
                else fetch_near(p, s, near, near.start + i * TILE, tile);
            }
            commit_copies();
        };
#pragma unroll 1
        for (int phase = SOME; phase <= PAGES; ++phase) {
            const int stages = phase == SOME ? STAGES - 1 : STAGES, first = begin + warp - CHOOSING;
#pragma unroll 1
            for (int stage = 0; stage < stages; ++stage) fetch(phase, first + stage * ATTENDING, stage);
            if (phase == SOME) {
                if (adding && rank == CLUSTER - 1 && warp == CHOOSING) store_near(p, s, near, old);
                if (!lists_first) wait_in_cluster();
                STAMP_OF(CHOOSERS, 6);
            }
#pragma unroll 1
            for (int i = first, stage = 0; i < count; i += ATTENDING) {
                if (phase == SOME) wait_copies<STAGES - 2>();
                else wait_copies<STAGES - 1>();
                __syncwarp();
                const int keys = phase == PAGES ? pages[i] & 31 : near.end - near.start - i * TILE;
                attend_tile(p, s, mine, own_tiles + stage * ATTENDING * TILE_BYTES, keys);
                __syncwarp();
                fetch(phase, i + stages * ATTENDING, stage);
                stage = stage + 1 < stages ? stage + 1 : 0;
            }
            wait_copies<0>();
            if (phase == SOME) {
                begin = count, count = all;
                await_all(ANCHORS_READ);
            } else if (phase == NEAR) {
                STAMP_OF(CHOOSERS, 7);
                find_peak(mine);
                if (lane / 4 < G && lane % 4 == 0)
#pragma unroll 1
                    for (int to = 0; to < CLUSTER; ++to)
                        send_4(&s.nearest[rank][warp - CHOOSING][lane / 4], to, __float_as_uint(mine.peak), &s.exchanges[NEAREST]);
                // All of this block have read the length: those who choose waited for the digits, this warp for them. The
                // last block of which that holds writes it, while pages are dealt out.
                u32 ticket = 0;
                if (p.new_keys && thread == THREADS - 1) ticket = atomicAdd(p.tickets + sequence, 1u);
                prefetch_rest(p, unit, rank, row, own);
                if (p.new_keys && thread == THREADS - 1 && ticket == p.heads * CLUSTER - 1) {
                    if (adding) p.lengths[sequence] = length;
                    p.tickets[sequence] = 0;
                }
                await(&s.exchanges[PAGE]);
                begin = 0, count = s.dealt;
            }
        }
        STAMP_OF(CHOOSERS, 8);
    }
    // The largest exact logit bounds the estimates, and all weights are relative to it.
    find_peak(mine);
    if (lane / 4 < G && lane % 4 == 0) s.reduced[warp][lane / 4] = mine.peak;
    __syncthreads();
    FOR_RANKS_AND_HEADS {
        float top = -INFINITE;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.reduced[w][g]);
        send_4(&s.peaks[rank][g], to, __float_as_uint(top), &s.exchanges[PEAK]);
    }
    __syncthreads();
    await(&s.exchanges[PEAK]);
    const float basis = basis_of(s, min(lane / 4, G - 1));
    if (warp == 0 && lane / 4 < G && lane % 4 == 0) s.basis[lane / 4] = basis;
    STAMP(9);
    refer(mine, basis);
    mine.sum += __shfl_xor_sync(FULL, mine.sum, 1);
    mine.sum += __shfl_xor_sync(FULL, mine.sum, 2);
    float* own_found = found + warp * G * FOUND;
    if (lane / 4 < G) {
        float* at = own_found + lane / 4 * FOUND;
        if (lane % 4 == 0) at[D] = mine.sum;
        if (warp < CHOOSING) store_rest(mine, at);
        else
#pragma unroll
            for (int i = 0; i < PARTS; ++i)
                *(float2*)(at + 8 * i + lane % 4 * 2) = make_float2(mine.out[i][0] + mine.out[i][2], mine.out[i][1] + mine.out[i][3]);
    }
    if (turns) {
        __syncwarp();
        add_deferred(p, s, row, own, table + first_list, logits, sizes, turns, own_found);
    }
    __syncthreads();
    __syncthreads();  // for racecheck, which does not see the first one in all blocks
    STAMP(10);
#pragma unroll 1
    for (int start = 0; start < G * D; start += THREADS) {
        const int at = start + thread, g = at / D;
        float sum[4] = {};
        if (at < G * D)
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum[0] += found[(w * G + g) * FOUND + at % D];
#pragma unroll
        for (int i = 1; i < 4; ++i) sum[i] = __shfl_down_sync(FULL, sum[0], i);
        if (at < G * D && lane % 4 == 0)
            send_16(&s.merged[rank][at % SLICE], at / SLICE, (const u32*)sum, &s.exchanges[RESULT]);
    }
    FOR_RANKS_AND_HEADS {
        float sum = 0.f;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) sum += found[(w * G + g) * FOUND + D];
        send_4(&s.sums[rank][g], to, __float_as_uint(sum), &s.exchanges[RESULT]);
    }
    await(&s.exchanges[RESULT]);
    __syncthreads();  // for racecheck, which does not know that what a block sends to itself is awaited like the rest
#pragma unroll 1
    for (int i = thread; i < SLICE && rank * SLICE + i < G * D; i += THREADS) {
        const int at = rank * SLICE + i, g = at / D;
        float out = 0.f, sum = 0.f;
#pragma unroll
        for (int other = 0; other < CLUSTER; ++other) out += s.merged[other][i], sum += s.sums[other][g];
        store_out(p.out, (i64)unit * G * D + at, sum > 0.f ? out / sum : 0.f);
        if (at % D == 0) p.lse[(i64)unit * G + g] = sum > 0.f ? s.basis[g] + logf(sum) : -INFINITE;
    }
    STAMP(11);
}
