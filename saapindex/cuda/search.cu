// A search for few queries in one launch, on clusters of blocks: route, choose lists, scan them, merge.
//
// A cluster of -DCLUSTER blocks works on a query. Each scores a part of the lists and sends the best of them to all, which
// merge them to the same lists; each then scans a part of their keys, and the first block merges what they find. Results are
// those of `route` and `scan`, bit for bit.
//
// Compiled with -DELEMENT, -DD and -DDISTANCES, whether these are scores. Grid q * CLUSTER, THREADS threads.
#include "topk.cuh"
#include "route_rows.cuh"
#include "scan_part.cuh"
#include "cluster.cuh"

#ifndef CLUSTER
#define CLUSTER 8
#endif
#define WARPS (THREADS / WARP)

// What it is given; all members have 8 bytes: see backends/cuda/quick.py.
struct Search {
    const float* queries;  // (q, D)
    float* best;           // (q, k)
    i64* found;
    const float *table, *bias;
    const element* vectors;
    const i64 *ids, *offsets, *sizes;
    i64 nlist, p, k;
    // Powers of two: at least p; at least what p and the lists of a block are; at least k. Keys that a block holds.
    i64 chosen_room, part_room, room, capacity;
};

enum { LISTS, RESULTS, EXCHANGES };

// What the threads of a block share. Behind it: arrays of a length known at run time.
struct Shared {
    u64 exchanges[EXCHANGES];
    Scratch scratch;
    Blocks blocks;
    float query[D];
    int count;
};

// Send an entry to a block, where it comes as far behind `start`.
__device__ __forceinline__ void send_entry(u32* to_keys, i64* to_ids, int start, const u32* keys, const i64* ids, int i, int to,
                                           u64* exchange) {
    send_8(to_ids + start + i, to, (u32)ids[i], (u32)(ids[i] >> 32), exchange);
    send_4(to_keys + start + i, to, keys[i], exchange);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
search(const __grid_constant__ Search a) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int nlist = (int)a.nlist, p = (int)a.p, k = (int)a.k;
    const int part_room = (int)a.part_room, room = (int)a.room, capacity = (int)a.capacity;
    const int rank = blockIdx.x % CLUSTER;
    const i64 number = blockIdx.x / CLUSTER;
    // Lists that are chosen, of the blocks, and results of the blocks; the best that this block found, and keys on the way.
    i64* chosen_ids = (i64*)(memory + (sizeof(Shared) + 15) / 16 * 16);
    i64 *list_ids = chosen_ids + a.chosen_room, *merged_ids = list_ids + CLUSTER * part_room;
    i64 *best_ids = merged_ids + CLUSTER * room, *some_ids = best_ids + max(room, part_room);
    u32* chosen_keys = (u32*)(some_ids + capacity);
    u32 *list_keys = chosen_keys + a.chosen_room, *merged_keys = list_keys + CLUSTER * part_room;
    u32 *best_keys = merged_keys + CLUSTER * room, *some_keys = best_keys + max(room, part_room);
    int *before = (int*)(some_keys + capacity), *takes = before + p + 1;
    float* scores = (float*)(takes + p);

    if (thread == 0)
        for (int i = 0; i < EXCHANGES; ++i) begin_exchange(&s.exchanges[i]);
    arrive_in_cluster();
    for (int i = thread; i < D; i += THREADS) s.query[i] = a.queries[number * D + i];
    __syncthreads();
    if (thread == 0) {
        expect(&s.exchanges[LISTS], 12 * CLUSTER * part_room);
        if (rank == 0) expect(&s.exchanges[RESULTS], 12 * CLUSTER * room);
    }

    const int blocks = (nlist + LANES - 1) / LANES, first_block = blocks * rank / CLUSTER;
    const int end_block = blocks * (rank + 1) / CLUSTER, first_list = first_block * LANES;
#pragma unroll 1
    for (int block = first_block + warp; block < end_block; block += WARPS) {
        const float4* rows = (const float4*)(a.table + (i64)block * D * LANES);
        float sums[4] = {};
#pragma unroll 8
        for (int i = lane; i < D * 4; i += WARP) {
            const float4 x = rows[i];
            const float f = s.query[i / 4];
            sums[0] = multiply_add(f, x.x, sums[0]);
            sums[1] = multiply_add(f, x.y, sums[1]);
            sums[2] = multiply_add(f, x.z, sums[2]);
            sums[3] = multiply_add(f, x.w, sums[3]);
        }
        const int list = block * LANES + list_of_lane();
        const float sum = sum_of_list(sums);
        if (!(lane & 4) && list < nlist) scores[list - first_list] = add(sum, a.bias[list]);
    }
    __syncthreads();
    const int own = min(end_block * LANES, nlist) - first_list;
    choose_lists(scores, own, first_list, min(p, part_room), part_room, best_keys, best_ids, s.scratch);
    wait_in_cluster();
#pragma unroll 1
    for (int i = thread; i < CLUSTER * part_room; i += THREADS)
        send_entry(list_keys, list_ids, rank * part_room, best_keys, best_ids, i % part_room, i / part_room, &s.exchanges[LISTS]);
    await(&s.exchanges[LISTS]);
    __syncthreads();

    clear_behind(0, (int)a.chosen_room, chosen_keys, chosen_ids);
    merge_sorted<CLUSTER>(CLUSTER, part_room, p, list_keys, list_ids, chosen_keys, chosen_ids);
    for (int i = thread; i < p; i += THREADS)
        if (!chosen_keys[i]) chosen_ids[i] = -1;
    __syncthreads();
    plan_query<false>(chosen_ids, p, a.sizes, 0, before, takes, s.scratch);
    __syncthreads();

    const int total = before[p], first = (int)((i64)total * rank / CLUSTER), end = (int)((i64)total * (rank + 1) / CLUSTER);
    scan_part<DISTANCES>(s.query, a.vectors, a.ids, a.offsets, nullptr, chosen_ids, before, takes, p, first, end, k, room,
                         best_keys, best_ids, capacity, some_keys, some_ids, s.scratch, s.blocks, s.count);
    for (int i = thread; i < room; i += THREADS)
        send_entry(merged_keys, merged_ids, rank * room, best_keys, best_ids, i, 0, &s.exchanges[RESULTS]);
    if (rank) return;
    await(&s.exchanges[RESULTS]);
    __syncthreads();
    clear_behind(0, room, best_keys, best_ids);
    merge_sorted<CLUSTER>(CLUSTER, room, k, merged_keys, merged_ids, best_keys, best_ids);
    write_best(k, DISTANCES, best_keys, best_ids, a.best + number * k, a.found + number * k);
}
