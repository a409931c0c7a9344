// A search for few queries in one launch, on clusters of blocks: route, choose lists, scan them, merge.
//
// A cluster of -DCLUSTER blocks works on a query. Each scores a part of the lists and sends the scores to all; each then
// chooses the same lists, and scans a part of their keys; the first block merges what they find. Results are those of
// `route` and `scan`, bit for bit.
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
    i64 chosen_room, room, capacity;  // powers of two that are at least p, and at least k; keys that a block holds
};

enum { SCORES, RESULTS, EXCHANGES };

// What the threads of a block share. Behind it: arrays of a length known at run time.
struct Shared {
    u64 exchanges[EXCHANGES];
    Scratch scratch;
    Blocks blocks;
    float query[D];
    int count;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
search(const __grid_constant__ Search a) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int nlist = (int)a.nlist, p = (int)a.p, k = (int)a.k, room = (int)a.room, capacity = (int)a.capacity;
    const int rank = blockIdx.x % CLUSTER;
    const i64 number = blockIdx.x / CLUSTER;
    i64* chosen_ids = (i64*)(memory + (sizeof(Shared) + 15) / 16 * 16);
    i64 *best_ids = chosen_ids + a.chosen_room, *some_ids = best_ids + room, *merged_ids = some_ids + capacity;
    u32* chosen_keys = (u32*)(merged_ids + CLUSTER * room);
    u32 *best_keys = chosen_keys + a.chosen_room, *some_keys = best_keys + room, *merged_keys = some_keys + capacity;
    float* scores = (float*)(merged_keys + CLUSTER * room);
    int *before = (int*)(scores + nlist), *takes = before + p + 1;

    if (thread == 0)
        for (int i = 0; i < EXCHANGES; ++i) begin_exchange(&s.exchanges[i]);
    arrive_in_cluster();
    for (int i = thread; i < D; i += THREADS) s.query[i] = a.queries[number * D + i];
    if (thread == 0) {
        expect(&s.exchanges[SCORES], 4 * nlist);
        if (rank == 0) expect(&s.exchanges[RESULTS], 12 * CLUSTER * room);
    }
    wait_in_cluster();
    __syncthreads();

    const int blocks = (nlist + LANES - 1) / LANES;
#pragma unroll 1
    for (int block = rank * WARPS + warp; block < blocks; block += CLUSTER * WARPS) {
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
        if (lane & 4 || list >= nlist) continue;
        const u32 score = __float_as_uint(add(sum, a.bias[list]));
#pragma unroll 1
        for (int to = 0; to < CLUSTER; ++to) send_4(scores + list, to, score, &s.exchanges[SCORES]);
    }
    await(&s.exchanges[SCORES]);
    __syncthreads();

    const int chosen = choose_lists(scores, nlist, p, (int)a.chosen_room, chosen_keys, chosen_ids, s.scratch);
    for (int i = chosen + thread; i < p; i += THREADS) chosen_ids[i] = -1;
    __syncthreads();
    plan_query(chosen_ids, p, a.sizes, LAST_ID, before, takes, s.scratch);
    __syncthreads();

    const int total = before[p], first = (int)((i64)total * rank / CLUSTER), end = (int)((i64)total * (rank + 1) / CLUSTER);
    scan_part<DISTANCES>(s.query, a.vectors, a.ids, a.offsets, nullptr, chosen_ids, before, takes, p, first, end, k, room,
                  best_keys, best_ids, capacity, some_keys, some_ids, s.scratch, s.blocks, s.count);
    for (int i = thread; i < room; i += THREADS) {
        send_8(merged_ids + rank * room + i, 0, (u32)best_ids[i], (u32)(best_ids[i] >> 32), &s.exchanges[RESULTS]);
        send_4(merged_keys + rank * room + i, 0, best_keys[i], &s.exchanges[RESULTS]);
    }
    if (rank) return;
    await(&s.exchanges[RESULTS]);
    __syncthreads();
    const int kept = collect(CLUSTER * room, k, best_keys, best_ids, s.scratch, [&](int i, u32& key, i64& id) {
        key = merged_keys[i];
        id = merged_ids[i];
    });
    sort_entries(kept, room, best_keys, best_ids);
    write_best(kept, k, DISTANCES, best_keys, best_ids, a.best + number * k, a.found + number * k);
}
