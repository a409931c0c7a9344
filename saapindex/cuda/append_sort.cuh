// Phase 2 of a flush: keys in the order of their lists, and new pages in the tables.

// Keys, new pages and lists with new keys, summed up at once.
#define PAGES_AT 26
#define LISTS_AT 46
__device__ __forceinline__ int keys_in(u64 sums) { return (int)(sums & ((1ull << PAGES_AT) - 1)); }
__device__ __forceinline__ int pages_in(u64 sums) { return (int)(sums >> PAGES_AT & ((1ull << (LISTS_AT - PAGES_AT)) - 1)); }
__device__ __forceinline__ int lists_in(u64 sums) { return (int)(sums >> LISTS_AT); }

__device__ __forceinline__ int full_pages(int keys) { return (keys + LANES - 1) / LANES; }

// Phase 2: sort the entering keys of a stream by list and enter the pages that they need into the tables.
__device__ void place(const State& a, const Plan& plan, int s, char* shared) {
    const int m = plan.until - plan.first, L = a.lists, tid = threadIdx.x;
    const int lane = tid % WARP, warp = tid / WARP;
    u64* scratch = (u64*)shared;             // [WARPS]
    int* taken = (int*)(scratch + WARPS);    // top of the stack of free pages, number of the first task
    int* counts = taken + 4;                 // [tables][L]: of each part of the keys
    const int tables = min(a.tables, (m + 4 * WARP - 1) / (4 * WARP));
    const int part = (m + tables * WARP - 1) / (tables * WARP) * WARP;
    int old[LISTS_EACH], coded[LISTS_EACH], open[LISTS_EACH];  // of the lists that a thread comes to next
    auto fetch = [&](int j0) {
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            const int j = j0 + tid * LISTS_EACH + i;
            const i64 list = (i64)s * L + j;
            old[i] = j < L ? a.sizes[list] : 0;
            coded[i] = j < L ? a.coded[list] : 0;
            open[i] = j < L ? a.last[list] : -1;
        }
    };
    fetch(0);
    int sorted = 0, held = a.counts[s], loose = 0;
    for (int i = tid; i < tables * L; i += THREADS) counts[i] = 0;
    __syncthreads();
    for (int t = 0; t < tables; ++t)
#pragma unroll 4
        for (int i = t * part + tid; i < min(m, (t + 1) * part); i += THREADS)
            atomicAdd(counts + t * L + label_of(a, s, i), 1);
    for (int j0 = 0; j0 < L; j0 += THREADS * LISTS_EACH) {
        int count[LISTS_EACH], page[LISTS_EACH], heavy[LISTS_EACH];
        const i64 list = (i64)s * L + j0 + tid * LISTS_EACH;
        u64 mine = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            const int j = j0 + tid * LISTS_EACH + i;
            count[i] = 0;
            if (j < L)
                for (int t = 0; t < tables; ++t) count[i] += counts[t * L + j];
            if (count[i])
                mine += (u64)count[i] | (u64)(full_pages(old[i] + count[i]) - full_pages(old[i])) << PAGES_AT |
                        1ull << LISTS_AT;
        }
        u64 all;
        u64 before = block_scan(mine, scratch, &all);
        if (tid == 0) {
            taken[0] = atomicSub(a.available, pages_in(all)) - 1;
            taken[1] = atomicAdd(a.counters + TASKS, lists_in(all));
        }
        __syncthreads();
        const int top = taken[0], task0 = taken[1];
        int rank0 = pages_in(before);
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {  // what must be waited for, all at once
            const int more = count[i] ? full_pages(old[i] + count[i]) - full_pages(old[i]) : 0;
            const bool renewed = count[i] && old[i] + count[i] >= 2 * coded[i];
            page[i] = more ? a.free[top - rank0] : 0;
            heavy[i] = renewed || count[i] > HEAVY ? atomicAdd(a.counters + HEAVIES, 1) : -1;
            if (count[i] && !renewed) loose += count[i];
            rank0 += more;
        }
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            if (!count[i]) continue;
            const int j = j0 + tid * LISTS_EACH + i;
            const int full = full_pages(old[i]), more = full_pages(old[i] + count[i]) - full;
            const int rank = pages_in(before), number = task0 + lists_in(before);
            int at = sorted + keys_in(before);
            Task task = {s, j, at, count[i], old[i], open[i], held + rank, -1, 0};
            for (int t = 0; t < tables; ++t) {
                const int here = counts[t * L + j];
                counts[t * L + j] = at;
                at += here;
            }
            const i64 table = (i64)s * a.room;
            if (old[i] % LANES)
                a.labels[table + open[i]] = j << 5 | min(LANES, old[i] + count[i] - (full - 1) * LANES);
            for (int q = 0; q < more; ++q) {
                const int slot = task.base + q, taken_page = q ? a.free[top - rank - q] : page[i];
                a.pages[table + slot] = taken_page;
                a.labels[table + slot] = j << 5 | min(LANES, old[i] + count[i] - (full + q) * LANES);
                a.orders[table + slot] = full + q;
                a.before[table + slot] = q ? slot - 1 : open[i];
                a.holders[taken_page] = 1;
            }
            if (more) a.last[list + i] = task.base + more - 1;
            a.sizes[list + i] = old[i] + count[i];
            if (old[i] + count[i] >= 2 * coded[i]) task.segment = 0;
            task.heavy = heavy[i] >= 0;
            a.tasks[number] = task;
            if (task.heavy) a.heavy[heavy[i]] = number;
            before += (u64)count[i] | (u64)more << PAGES_AT | 1ull << LISTS_AT;
        }
        sorted += keys_in(all);
        held += pages_in(all);
        if (j0 + THREADS * LISTS_EACH < L) fetch(j0 + THREADS * LISTS_EACH);
    }
    loose = warp_sum_int(loose);
    if (lane == 0 && loose) atomicAdd(&a.amounts[s].y, loose);
    __syncthreads();
    if (tid == 0) a.counts[s] = held;
    if (warp < tables) {
        int* mine = counts + warp * L;
        const int begin = warp * part, end = min(m, begin + part);
        int next = begin + lane < end ? label_of(a, s, begin + lane) : -1;
        for (int i = begin + lane; i - lane < end; i += WARP) {
            const int list = next;
            next = i + WARP < end ? label_of(a, s, i + WARP) : -1;
            const u32 same = __match_any_sync(FULL, list);
            const int ahead = __popc(same & ((1u << lane) - 1));
            const int at = list >= 0 ? mine[list] + ahead : 0;
            __syncwarp();
            if (list >= 0) {
                a.order[(i64)s * a.most + at] = i;
                if (ahead == 0) mine[list] += __popc(same);
            }
            __syncwarp();
        }
    }
    __syncthreads();
}
