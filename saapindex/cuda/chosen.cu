// What was chosen, from bits: for each stream its positions and its lists, rising, padded with -1.
//
// A row holds a bit for each position and, from a word of its own on, one for each list; attend.cu sets them.
// `blocks` blocks work on a row: the last on its lists, each other on a part of the positions. All of them count the
// bits before their part, which takes less time than to wait for each other. Who is done last clears the row, so the
// next step finds it as this one did.

#ifndef THREADS
#define THREADS 512
#endif
#define WARPS (THREADS / WARP)

struct Step {
    u32* bits;                   // (streams, width)
    const int *sizes;            // (streams, lists)
    const int *lengths, *first;  // (sequences,)
    i64 *ids, *counts;           // written: (streams, most), (streams,)
    i64* partitions;             // (streams, lists)
    i64 *starts, *ends;          // (sequences,)
    u32* done;                   // (streams,), zero
    int heads, lists, width, most, blocks;
    int everything;              // all lists that hold keys were visited, though no bit says so
};

struct Shared {
    int sums[2][WARPS];
    int last;
};

// The sum of `x` over the threads before this one; over all of them in `total`.
__device__ __forceinline__ int sum_before(int* sums, int x, int& total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int sum = x;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const int other = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) sums[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    return before + sum - x;
}

__device__ __forceinline__ void list_positions(const Step& p, Shared& s, const u32* row, int stream, int part) {
    const int parts = p.blocks - 1, words = p.width - (p.lists + 31) / 32;
    const int begin = (i64)words * part / parts, end = (i64)words * (part + 1) / parts;
    int own = 0, all = 0;
    for (int i = threadIdx.x; i < words; i += THREADS) {
        const int count = __popc(row[i]);
        all += count;
        if (i < begin) own += count;
    }
    int at, total;
    sum_before(s.sums[0], own, at);
    sum_before(s.sums[1], all, total);
    i64* ids = p.ids + (i64)stream * p.most;
    for (int start = begin; start < end; start += THREADS) {
        const int i = start + threadIdx.x;
        u32 word = i < end ? row[i] : 0;
        int added, place = at + sum_before(s.sums[0], __popc(word), added);
        for (; word; word &= word - 1, ++place)
            if (place < p.most) ids[place] = 32 * i + __ffs(word) - 1;
        at += added;
    }
    for (int i = total + part * THREADS + threadIdx.x; i < p.most; i += parts * THREADS) ids[i] = -1;
    if (part == 0 && threadIdx.x == 0) p.counts[stream] = min(total, p.most);
}

__device__ __forceinline__ void list_lists(const Step& p, Shared& s, const u32* row, int stream) {
    const u32* words = row + p.width - (p.lists + 31) / 32;
    i64* partitions = p.partitions + (i64)stream * p.lists;
    int at = 0;
    for (int start = 0; start < p.lists; start += THREADS) {
        const int list = start + threadIdx.x;
        bool visited = false;
        if (list < p.lists)
            visited = p.everything ? p.sizes[(i64)stream * p.lists + list] > 0 : words[list >> 5] >> (list & 31) & 1;
        int added;
        const int place = at + sum_before(s.sums[0], visited, added);
        if (visited) partitions[place] = list;
        at += added;
    }
    for (int i = at + threadIdx.x; i < p.lists; i += THREADS) partitions[i] = -1;
    const int sequence = stream / p.heads;
    if (threadIdx.x == 0 && stream % p.heads == 0) {
        p.starts[sequence] = p.first[sequence];
        p.ends[sequence] = p.lengths[sequence];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) chosen(const __grid_constant__ Step p) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int stream = blockIdx.x / p.blocks, part = blockIdx.x % p.blocks;
    u32* row = p.bits + (i64)stream * p.width;
    if (part < p.blocks - 1) list_positions(p, s, row, stream, part);
    else list_lists(p, s, row, stream);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.last = atomicAdd(p.done + stream, 1u) == (u32)p.blocks - 1;
    }
    __syncthreads();
    if (!s.last) return;
    for (int i = threadIdx.x; i < p.width; i += THREADS) row[i] = 0;
    if (threadIdx.x == 0) p.done[stream] = 0;
}
