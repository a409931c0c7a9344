// One step of sparse attention, whole, in one launch: route, select, scan codes, cut, attend, remainder, merge.
//
// A unit is one query token of one stream. `blocks` blocks work on it and meet at barriers of their own, so all
// of them must be resident at once (the launcher sees to it). Every block keeps its part of the keys from the
// scan to the end; only inner products, histograms, candidates and partial results cross blocks.
//
// Estimates are bounded by the largest exact logit, which is known last. Those below the largest near logit are
// below the bound in any case and count at once, during the scan; the few others are deferred.
//
// Compiled with what attend_step.cuh says and -DWORDS (of a code). The definition is saapindex/backends/reference.

#ifndef RESIDENT
#define RESIDENT 1  // blocks of a multiprocessor
#endif
#ifndef THREADS
#define THREADS 384  // as many as leave registers enough for all
#endif
#define ROUND 1024              // pages that a block looks at before it works on those it found
#define QUEUE 4096              // keys that a block gathers before it attends to them
#define CHUNK (4 * THREADS)     // places that a block looks at before it makes room in the queue
#define CANDIDATES 4096         // keys in the bin in which the cut falls, of a unit
#define AHEAD 4                 // lists that a thread asks for at once
#define FIELDS (8 * WORDS)      // the most groups of four fields of a code

#include "attend_step.cuh"

// Counters of a unit: barrier, blocks that are done, blocks that deferred something, rows to fetch, candidates of each ranker,
// largest near logit of each head, largest exact one.
enum { BARRIER, DONE, DEFERRED, ROWS, CANDIDATE, NEAREST = CANDIDATE + G, LARGEST = NEAREST + G, COUNTERS = LARGEST + G };

#define STAGES 12
#ifdef STAMPS
#define STAMP(i) \
    if (threadIdx.x == 0) p.stamps[(i64)blockIdx.x * STAGES + i] = clock64()
#else
#define STAMP(i)
#endif

// Which part of the work a block does.
struct Part {
    int unit, block, stream, head, blocks, pages;  // `pages` are those of this block
    int first_list, last_list;                     // this block's share of the lists, the last one exclusive
    int places;                                    // lanes of the most pages of a block
    i64 first_place;

    // A page of this block: pairs of pages go round the blocks, so that all have their share of every list.
    __device__ __forceinline__ int page(int i) const { return ((i >> 1) * blocks + block) * 2 + (i & 1); }
};

// What the threads of a block share. Arrays of a length known at run time lie behind it.
struct Shared {
    union {
        int2 queue[ROUND];    // page in the pool, label
        int rows[QUEUE];      // keys to attend to
    };
    union {
        struct {
            int labels[ROUND], places[ROUND];  // of pages that this block looks at
        };
        struct {
            int own[OWN];     // candidates
            float own_weights[OWN];
        };
    };
    Part part;                // out of registers, which are scarce
    int factors[WORDS][4][G][2];  // four int8 of a rounded query each: of chunk, lane of four, head and half
    int4 places_of[WORDS][4];     // where the fields for them lie: words of both halves, shifts, mask
    float query[G][D];
    u32 pairs[QUERY_PARTS][8][(D + 15) / 16 * 8 + 4];  // the same as matrices of a 16-bit type
    float scaled[G][WARP * WORDS];
    int histogram[BINS];
    float reduced[WARPS][2 * G];
    u32 peaks[G], largest[G];
    float unit[G], second[G], variance[G], norm[G], reference[G], basis[G], bound[G], lift[G], query_scale[G];
    int offsets[G];           // sum of (2^b - 1) a8
    u32 slot;
    int chunks, queued, gathered, owned, own_count, visited, boundary, reached;
    int deferred, unit_deferred, last;
    int scan, limit;          // keys that may be visited and fetched, by each ranker
    double left;              // bytes
    u64 cut;                  // rank and number of the first list that is not visited whole, of which `cut_keys` keys are
    int cut_keys;
};

#include "attend_common.cuh"
#include "attend_rows.cuh"
#include "attend_lists.cuh"
#include "attend_select.cuh"
#include "attend_gather.cuh"
#include "attend_scan.cuh"
#include "attend_cut.cuh"
#include "attend_merge.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attend(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    int* taken = (int*)(memory + (sizeof(Shared) + 15) / 16 * 16);
    float* stashed = (float*)(taken + (p.lists + 3) / 4 * 4);
    // Behind it: what is known of the lists, then codes, then rows, then what is to be merged.
    int* behind = (int*)(stashed + WARPS * STASH);
    u8* tiles = (u8*)behind;
    Table table = {(float*)behind, taken, behind + p.lists, (float*)(behind + 2 * p.lists)};

    const int unit = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks, thread = threadIdx.x;
    const int stream = unit / p.tokens, sequence = stream / p.heads, head = stream % p.heads;
    STAMP(0);
    prefetch_own(p, stream, head, block);
    load_queries(p, s, unit);
    const int length = p.lengths[sequence], first = p.first[sequence];
    const int token = unit % p.tokens;
    const int position = p.positions ? p.positions[sequence * p.tokens + token] : length - p.tokens + token;
    const int in_lists = max(0, first - p.sinks);
    const bool everything = p.everything || (in_lists > 0 && position < first - 1);
    const bool sparse = in_lists > 0 && !everything, deciding = p.bits != nullptr, nearby = p.near && !deciding;
    if (!p.cached) table.logits = nullptr, table.sizes = p.sizes + (i64)stream * p.lists;
    const int places = ((p.most_pages + 1) / 2 + p.blocks - 1) / p.blocks * 2 * LANES;
    const Part& part = s.part;
    if (thread == 0)
        s.part = {
            unit, block, stream, head, p.blocks, pages_of_block(p.counts[stream], block, p.blocks),
            share_of(p.lists, block, p.blocks), share_of(p.lists, block + 1, p.blocks), places, (i64)blockIdx.x * places
        };
    u32* counters = p.counters + (i64)unit * COUNTERS;
    u32 met = 0;
    // Near keys that the query sees, and this block's share of them.
    const int seen = min(position + 1, length);
    const int near = min(p.sinks, max(seen, 0)) + max(0, seen - max(first, p.sinks));
    int start = share_of(near, block, p.blocks), end = share_of(near, block + 1, p.blocks);

    if (thread < G) s.peaks[thread] = s.largest[thread] = 0;
    if (thread == 0) s.visited = s.deferred = s.gathered = 0;
    if (thread == THREADS - 1) {  // what may be read
        s.left = bytes_to_read(p, in_lists, head);
        const double share = p.by_head ? fmax(p.share, (double)p.least_codes[head]) : p.share;
        const double visited = p.refine ? share * s.left / p.code_bytes : s.left / p.row_bytes;
        s.scan = (int)fmin((double)((i64)visited / RANKERS), 2147483647.);
    }
    __syncthreads();
    const bool early = sparse && nearby;  // the first near keys are on their way before anything else
    if (sparse && p.refine) fetch_labels(p, s, part, 0);
    if (early) {
        start = gather_near(p, s, start, end, first, position);
        const int own = thread / WARP * TILE;
        if (own < s.gathered) fetch_tile(p, s, part, tiles + thread / WARP * TILE_BYTES, own);
    }
    commit_copies();

    Partial mine;
    if (sparse) {
        __syncthreads();
        route(p, s, part);
        arrive(counters + BARRIER);
        met += p.blocks;
    }
    clear(mine);
    STAMP(1);
    bool at_lists = false;
#pragma unroll 1
    for (bool fetched = early;; fetched = false) {
        if (at_lists) {
            start = everything || !p.refine ? gather_whole(p, s, part, taken, everything, position, start)
                                            : gather_rows(p, s, part, start, end);
        } else if (nearby && !fetched) {
            start = gather_near(p, s, start, end, first, position);
        }
        if (!deciding) attend_gathered(p, s, part, mine, tiles, fetched);
        if (start < end && (at_lists || nearby)) continue;
        if (at_lists || !in_lists) break;
        // The near keys are done: on to the lists.
        at_lists = true;
        start = 0, end = part.pages;
        STAMP(2);
        if (!sparse) continue;
        if (nearby) publish_peaks(mine, s.peaks, counters + NEAREST);
        stash(mine, stashed);
        wait(counters + BARRIER, met);
        arrive(counters + BARRIER);  // near logits are known when all have come here
        met += p.blocks;
        prepare(p, s, part);
        STAMP(3);
        select_lists(p, s, part, table);
        STAMP(4);
        wait(counters + BARRIER, met);
        find_reference(p, s, counters);
        find_deferred_lists(p, s, part, table);
        __syncthreads();
        if (p.refine) scan(p, s, part, taken, (u8*)behind);
        STAMP(5);
        if (p.refine) {
            arrive(counters + BARRIER);
            met += p.blocks;
            wait(counters + BARRIER, met);
            STAMP(6);
            met = cut(p, s, part, counters + BARRIER, met);
            if (deciding) {
                arrive(counters + BARRIER);
                wait(counters + BARRIER, met + p.blocks);
                leave_histogram(p, part);
                break;
            }
        }
        if (p.remainder && !deciding || p.refine) {
            if (thread == 0 && s.deferred) atomicAdd(counters + DEFERRED, 1u);
            arrive(counters + BARRIER);  // rows and weights are known when all have come here
            met += p.blocks;
            wait(counters + BARRIER, met);
        }
        if (p.refine) {
            leave_histogram(p, part);
            const int rows = (int)__ldcg(counters + ROWS);
            start = share_of(rows, block, p.blocks), end = share_of(rows, block + 1, p.blocks);
        }
        STAMP(7);
        take_up(mine, stashed);
    }
    STAMP(8);
    float *reduction = (float*)behind, *sums = reduction + WARPS * G * (D + 1), *totals = sums + SHARES * G * D;
    const bool estimating = sparse && p.remainder && !deciding;
    if (estimating) {
        if (thread == 0) s.unit_deferred = __ldcg(counters + DEFERRED);
        __syncthreads();
        if (s.unit_deferred) {
            publish_peaks(mine, s.largest, counters + LARGEST);
            arrive(counters + BARRIER);
            met += p.blocks;
            wait(counters + BARRIER, met);
            find_bounds(s, counters);
            if (s.deferred && p.refine) attend_deferred_keys(p, s, part);
            arrive(counters + BARRIER);
            met += p.blocks;
            wait(counters + BARRIER, met);
        }
        add_means(p, s, part, taken, sums, totals);
    }
    STAMP(9);
    if (!deciding) reduce_block(p, s, part, mine, reduction, sums, totals, estimating ? SHARES : 0);
    else if (sparse && block == 0)  // the last words of a row of bits are for lists
        note_lists(p.bits + ((i64)unit + 1) * p.width - (p.lists + 31) / 32, taken, p.lists);
    STAMP(10);
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        s.last = atomicAdd(counters + DONE, 1u) == (u32)p.blocks - 1;
    }
    __syncthreads();
    if (s.last) {
        __threadfence();
        if (!deciding) merge_blocks(p, s, part, reduction);
        // The next step finds everything as this one did.
#pragma unroll 1
        for (int i = thread; i < COUNTERS; i += THREADS) counters[i] = 0;
    }
    STAMP(11);
}
