// Append keys and values to the ring of each stream and, where a flush is due, move the oldest into lists.
//
// One launch for any number of new keys. Without a flush a block copies its rows and leaves (or just leaves, where a step
// of attention adds the token itself). With one, all blocks of the grid go through the phases below, with a barrier of the
// grid between them; so there may be no more blocks than fit on the device at once. Whether a flush is due is decided
// here, from counters on the device.
//
// A flush must be the same as in saapindex/attention/table.py: `Table.entered`. Sums are formed in double precision
// in an order that does not depend on the schedule, so a flush gives the same bits each time it is run.
//
// Compiled with -DELEMENT, -DD, the dimensions of a key (a multiple of 8), and -DBLOCKS, how many blocks of the grid a
// multiprocessor has: 1, or 2 where the lists of entering keys are known. With -DSTATES for so many states at once.

#define THREADS 256
#define WARPS (THREADS / WARP)
#define ROW_WORDS (ELEMENT == 2 ? D : D / 2)       // 32-bit words of a key
#define TOGETHER (ROW_WORDS % 128 == 0 ? 4 : ROW_WORDS % 64 == 0 ? 2 : 1)  // words that a lane reads at once
#define WORDS ((ROW_WORDS + WARP - 1) / WARP)       // of them, those of a lane of a warp
#define PART (ELEMENT == 2 ? 1 : 2)              // elements of a word
#define MINE (WORDS * PART)                         // elements of a lane
#define PAIRED (PART * TOGETHER == 1 ? 1 : 2)       // of them, those that surely lie together
#define AHEAD (WORDS > 4 ? 2 : WORDS > 2 ? 4 : 8)   // rows that a warp has in flight
#define KEYS 64                                     // of a tile of the assignment
#define LISTS (WARPS * 32)
#define DEEP_KEY ((D + 15) / 16 * 16)               // dimensions of a key, with those that fill a product
#define PITCH (2 * DEEP_KEY + 16)                   // of two rows; keeps them on different banks
#define FORMS_AHEAD 4                               // products of the assignment whose lists are asked for before
#define SLABS ((D + 31) / 32)                       // of 32 dimensions of the forward matrix
#define FORWARD_BYTES ((D <= 128 ? 64 : 56) << 10)  // of it, that are held in shared memory at once
#define LISTS_EACH 4                                // of a thread that places keys
#define WINDOW 2048                                 // pages of a list that are looked up at a time
#define MOVING ((D + 63) / 64 * 16 * THREADS + 8 * WINDOW + 16)  // bytes that a block moves a list with
#define HEAVY 64                                    // more new keys than this are moved by a whole block
#define FEW 6                                       // pages of a list that as many blocks code as soon as it has its anchor
#define PAGES_IN_FLIGHT (WORDS > 4 ? 1 : 3)         // of these, that a block adds up
#define WALK 3                                      // pages of a list that are found one after another
#define TINY 1e-30f

#include "halves.cuh"
#include "append_state.cuh"
#include "append_assign.cuh"
#include "append_sort.cuh"
#include "append_move.cuh"
#include "append_codes.cuh"
#include "append_enter.cuh"
#include "append_pages.cuh"

// Copy the new keys that stay near into the ring, as warp `w` of `n`.
__device__ void store_near(const State& a, const Plan* plans, int w, int n) {
    const int lane = threadIdx.x % WARP;
    for (i64 i = w; i < (i64)a.batch * a.heads * a.tokens; i += n) {
        const int s = (int)(i / a.tokens), t = (int)(i % a.tokens);
        const Plan& plan = plans[s / a.heads];
        const int p = plan.old + t - skipped(a, plan);
        if (p < plan.old || (p < plan.until && p >= a.sinks)) continue;
        u32 key[WORDS], value[WORDS];
        load_row(new_key(a, s, t), lane, key);
        load_row(new_value(a, s, t), lane, value);
        const i64 row = near_row(a, s, p);
        store_row(a.near_keys + row, lane, key);
        store_row(a.near_values + row, lane, value);
    }
}

__device__ __forceinline__ void append_to(const State& a, u8* memory) {
    int &needed = ((int*)memory)[0], &last = ((int*)memory)[1], &begun = ((int*)memory)[2];
    Plan* plans = (Plan*)(memory + 16);
    char* rest = (char*)(plans + a.batch);
    const int tid = threadIdx.x, blocks = gridDim.x, streams = a.batch * a.heads;
    const int warp = blockIdx.x * WARPS + tid / WARP, warps = blocks * WARPS;
    int due = 0;
    const int moved = *a.moved;  // asked for together with the lengths
    if (tid == 0) needed = 0;
    for (int b = tid; b < a.batch; b += THREADS) {
        plans[b] = plan_of(a, b);
        due |= plans[b].until > plans[b].first;
    }
    if (moved != a.version) {  // a graph that was captured before: what it knows of is gone
        if (blockIdx.x == 0 && tid == 0) atomicOr(a.counters + STATUS, MOVED);
        return;
    }
    due = __syncthreads_or(due);
    if (due) {
        // Room for the most that it may need, or no flush at all: a flush cannot stop halfway.
        int full = 0;
        for (int s = tid; s < streams; s += THREADS) {
            const Plan& plan = plans[s / a.heads];
            const int pages = most_pages(a, plan.until - plan.first);
            if (pages) atomicAdd(&needed, pages);
            full |= a.counts[s] + pages > a.room;
        }
        full = __syncthreads_or(full) || needed > *a.available;
        if (full) {
            for (int b = tid; b < a.batch; b += THREADS) plans[b].until = plans[b].first;
            if (blockIdx.x == 0 && tid == 0) atomicOr(a.counters + STATUS, NO_PAGES);
            due = 0;
        }
        __syncthreads();
    }
    for (int b = tid; b < a.batch; b += THREADS)
        if (plans[b].now - plans[b].until > a.ring) {
            plans[b].now = plans[b].old;  // what has no place is lost, and the host will hear of it
            if (blockIdx.x == 0) atomicOr(a.counters + STATUS, NO_PLACE);
        }
    if (a.later && !due) return;
    __syncthreads();
    STAMP(0);
    if (due) {
        u32 target = blocks;
        int again = 0;  // whether places in the ring that keys leave are taken by new ones
        for (int b = 0; b < a.batch; ++b) again |= plans[b].now - plans[b].first > a.ring;
        ask_for_later(a, plans, stream_of_block(streams, blocks));
        if (BLOCKS == 1 && !a.labels_in) {
            const int columns = (a.lists + LISTS - 1) / LISTS;
            int skip = blockIdx.x;  // tiles until the next one of this block
            for (int s = 0; s < streams; ++s) {
                const Plan& plan = plans[s / a.heads];
                const int tiles = (plan.until - plan.first + KEYS - 1) / KEYS * columns;
                for (; skip < tiles; skip += blocks)
                    assign_tile(a, plan, s, skip / columns * KEYS, skip % columns * LISTS, (float*)rest);
                skip -= tiles;
            }
        }
        grid_barrier(a, target);  // every block has seen the counters that the next phase changes
        target += blocks;
        STAMP(1);
        for (int s = blockIdx.x; s < streams; s += blocks)
            if (plans[s / a.heads].until > plans[s / a.heads].first) place(a, plans[s / a.heads], s, rest);
        come(a);
        // Perhaps of the head that this block encodes keys of.
        int held = stream_of_block(streams, blocks) % a.heads * SLABS;
        uint4* forward = (uint4*)(rest + MOVING);
        ask_forward(a, held / SLABS, 0, forward);
        wait_for(a, target);
        target += blocks;

        STAMP(2);
        Room& room = *(Room*)rest;
        const Task first = a.heavy[min((int)blockIdx.x, FEW * streams * min(a.most, a.lists) - 1)];  // if there are so many
        const int heavies = a.counters[HEAVIES], tasks = a.counters[TASKS];
        Amount amount = amount_of(a, plans, streams, false);
        for (int i = blockIdx.x; i < heavies;) {
            if (heavies > blocks && tid == 0) begun = atomicAdd(a.counters + NEXT, 1);
            enter_by_block(a, plans, i == blockIdx.x ? first : a.heavy[i], room, forward, held, heavies <= blocks);
            __syncthreads();
            i = heavies > blocks ? blocks + begun : heavies;
            __syncthreads();
        }
        const int spared = heavies < blocks / 2 ? heavies : 0;  // blocks that have had enough to do
        Task task;
        Squares known;
#pragma unroll 1
        for (int pages = 0; pages < 2; ++pages) {  // keys that enter, then those that are coded anew
            if (pages) {
                amount = amount_of(a, plans, streams, true);
                if (!amount.all) break;
            }
            const int block = (int)blockIdx.x - (pages ? 0 : spared), others = blocks - (pages ? 0 : spared);
            if (BLOCKS == 2 && pages)
                encode_pages(a, plans, streams, amount, forward, held);
            else
                encode_share(a, plans, streams, pages, amount, block, others, sixteen_of(room), forward, held);
            come(a);
            if (!pages) {
                STAMP(3);
                if (block >= 0) enter_values(a, plans, tasks, warp - spared * WARPS, others * WARPS);
                if (again) come(a, ENTERED);
                if (BLOCKS == 1 && warp < tasks) task = a.tasks[warp], known = squares_of(a, task);
            }
            wait_for(a, target);
            target += blocks;
        }
        STAMP(4);
        for (int i = warp; i < tasks; i += warps) {
            if (BLOCKS == 2 || i != warp) task = a.tasks[i], known = squares_of(a, task);
            if (task.heavy) task = a.tasks[i], known = squares_of(a, task);  // they have a segment now
            add_squares(a, task, known);
        }
        if (again) wait_for(a, blocks, ENTERED);
    }
    STAMP(5);

    // The last block to come here changes what all have read by now: the lengths, and the counters of a flush.
    __syncthreads();
    if (tid == 0) last = atomicAdd(a.counters + TICKET, 1) == blocks - 1;
    if (!a.later) store_near(a, plans, warp, warps);
    __syncthreads();
    if (!last) return;
    for (int b = tid; b < a.batch; b += THREADS) {
        if (!a.later) a.lengths[b] = plans[b].now;
        a.first[b] = plans[b].until;
    }
    if (due)
        for (int s = tid; s < streams; s += THREADS) a.amounts[s] = make_int4(0, 0, 0, 0);
    if (tid >= TICKET && tid <= NEXT) a.counters[tid] = 0;
}

#ifndef STATES
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) append(const __grid_constant__ State a) {
    extern __shared__ __align__(16) u8 memory[];
    append_to(a, memory);
}
#else
// The same of several states, the layers of a model, one after another: if a flush of any of them may be due. What tells
// that stands together, since each line of the argument has to come from memory.
struct Look {
    const int *lengths, *first;
    int batch, sinks, dense_below, most;  // with more keys than `most` out of the lists, a flush is due
};
struct States {
    int count;
    Look looks[STATES];
    State of[STATES];
};
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) append(const __grid_constant__ States all) {
    extern __shared__ __align__(16) u8 memory[];
    int due = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < all.count; i += THREADS) {
        const Look look = all.looks[i];
#pragma unroll 1
        for (int b = 0; b < look.batch; ++b) {
            const int end = max(look.lengths[b] + 1, look.sinks), first = look.first[b];
            due |= end - first > look.most && (end >= look.dense_below || first != look.sinks);
        }
    }
    if (!__syncthreads_or(due)) return;
#pragma unroll 1
    for (int i = 0; i < all.count; ++i) {
        append_to(all.of[i], memory);
        __syncthreads();
    }
}
#endif
