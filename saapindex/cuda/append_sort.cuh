// Phase 2 of a flush: keys in the order of their lists, and new pages in the tables.

// Keys, new pages and lists with new keys, summed up at once.
#define PAGES_AT 26
#define LISTS_AT 46
__device__ __forceinline__ int keys_in(u64 sums) { return (int)(sums & ((1ull << PAGES_AT) - 1)); }
__device__ __forceinline__ int pages_in(u64 sums) { return (int)(sums >> PAGES_AT & ((1ull << (LISTS_AT - PAGES_AT)) - 1)); }
__device__ __forceinline__ int lists_in(u64 sums) { return (int)(sums >> LISTS_AT); }

__device__ __forceinline__ int full_pages(int keys) { return (keys + LANES - 1) / LANES; }

// What `count` keys add to the sums, in a list of `old`.
__device__ __forceinline__ u64 sums_of(int count, int old) {
    return (u64)count | (u64)(full_pages(old + count) - full_pages(old)) << PAGES_AT | 1ull << LISTS_AT;
}

// The same sums with another number in the place of lists.
__device__ __forceinline__ u64 with_list(u64 sums, int list) {
    return (sums & ((1ull << LISTS_AT) - 1)) | (u64)list << LISTS_AT;
}

#define LISTS_AT_ONCE (THREADS * LISTS_EACH)
#define PAGES_EACH 4  // of a list that a thread asks for together

// Phase 2: sort the entering keys of a stream by list and enter the pages that they need into the tables. Lists are
// looked at LISTS_AT_ONCE at a time: a thread first sums up what some of them need, then cares for one with new keys.
__device__ void place(const State& a, const Plan& plan, int s, char* shared) {
    const int m = plan.until - plan.first, L = a.lists, tid = threadIdx.x;
    const int lane = tid % WARP, warp = tid / WARP;
    u64* scratch = (u64*)shared;                // [WARPS]
    u64* found = scratch + WARPS;               // [LISTS_AT_ONCE]: lists with new keys, and the sums before them
    int* opens = (int*)(found + LISTS_AT_ONCE);  // [LISTS_AT_ONCE]: their last pages
    int* taken = opens + LISTS_AT_ONCE;         // top of the stack of free pages, number of the first task
    int* counts = taken + 4;                    // [tables][L]: of each part of the keys
    const int tables = min(a.tables, (m + 2 * WARP - 1) / (2 * WARP));
    const int part = (m + tables * WARP - 1) / (tables * WARP) * WARP;
    const i64 list0 = (i64)s * L, table = (i64)s * a.room, sorted0 = (i64)s * a.most;
    int old[LISTS_EACH], coded[LISTS_EACH], open[LISTS_EACH];  // of the lists that a thread comes to next
    auto fetch = [&](int j0) {
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            const int j = j0 + tid * LISTS_EACH + i;
            old[i] = j < L ? a.sizes[list0 + j] : 0;
            coded[i] = j < L ? a.coded[list0 + j] : 0;
            open[i] = j < L ? a.last[list0 + j] : -1;
        }
    };
    fetch(0);
    const int begin = warp < tables ? warp * part : m, end = min(m, begin + part);  // the part of a warp
    int next = begin + lane < end ? label_of(a, s, begin + lane) : -1;
    int sorted = 0, held = a.counts[s], loose = 0;
    for (int i = tid; i < tables * L; i += THREADS) counts[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = tid; i < m; i += THREADS) atomicAdd(counts + i / part * L + label_of(a, s, i), 1);
    for (int j0 = 0; j0 < L; j0 += LISTS_AT_ONCE) {
        int count[LISTS_EACH];
        u64 mine = 0, all;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            const int j = j0 + tid * LISTS_EACH + i;
            count[i] = 0;
            if (j < L)
#pragma unroll 2
                for (int t = 0; t < tables; ++t) count[i] += counts[t * L + j];
            if (count[i]) mine += sums_of(count[i], old[i]);
        }
        u64 before = block_scan(mine, scratch, &all);
        if (tid == 0) {
            taken[0] = atomicSub(a.available, pages_in(all)) - 1;
            taken[1] = atomicAdd(a.counters + TASKS, lists_in(all));
        }
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            if (!count[i]) continue;
            const int j = tid * LISTS_EACH + i, rank = lists_in(before);
            const bool renewed = old[i] + count[i] >= 2 * coded[i];
            found[rank] = with_list(before, 2 * j + renewed);
            opens[rank] = open[i];
            before += sums_of(count[i], old[i]);
            if (!renewed) loose += count[i];
        }
        __syncthreads();
        for (int r = tid; r < lists_in(all); r += THREADS) {
            const int j = j0 + lists_in(found[r]) / 2, number = taken[1] + r;
            const bool renewed = lists_in(found[r]) % 2;
            const int had = a.sizes[list0 + j], full = full_pages(had), start = sorted + keys_in(found[r]);
            const int top = taken[0] - pages_in(found[r]), base = held + pages_in(found[r]);
            const int open_page = had % LANES ? a.pages[table + opens[r]] : 0;
            int at = start;
#pragma unroll 1
            for (int t = 0; t < tables; ++t) {
                const int here = counts[t * L + j];
                counts[t * L + j] = at;
                at += here;
            }
            const int size = had + at - start, more = full_pages(size) - full;
            auto fill = [&](int page, int from) {  // rows of keys from `from` on, up to the end of the page
                int2* rows = a.rows + sorted0 + start - had;
                const int end = min(size, (from / LANES + 1) * LANES);
#pragma unroll 1
                for (int q = from, row = page * LANES + from % LANES; q < end; ++q, ++row)
                    rows[q] = make_int2(row, renewed ? ~j : j);
            };
#pragma unroll 1
            for (int p0 = 0; p0 < more; p0 += PAGES_EACH) {
                int pages[PAGES_EACH];
#pragma unroll
                for (int i = 0; i < PAGES_EACH; ++i) pages[i] = p0 + i < more ? a.free[top - p0 - i] : 0;
#pragma unroll
                for (int i = 0; i < PAGES_EACH; ++i) {
                    const int p = p0 + i, slot = base + p;
                    if (p >= more) continue;
                    a.pages[table + slot] = pages[i];
                    a.labels[table + slot] = j << 5 | min(LANES, size - (full + p) * LANES);
                    a.orders[table + slot] = full + p;
                    a.before[table + slot] = p ? slot - 1 : opens[r];
                    a.holders[pages[i]] = 1;
                    fill(pages[i], (full + p) * LANES);
                }
            }
            if (had % LANES) {
                a.labels[table + opens[r]] = j << 5 | min(LANES, size - (full - 1) * LANES);
                fill(open_page, had);
            }
            if (more) a.last[list0 + j] = base + more - 1;
            a.sizes[list0 + j] = size;
            const bool heavy = renewed || at - start > HEAVY;
            Task task = {s, j, start, at - start, had, opens[r], base, renewed ? 0 : -1, heavy, -1, 0, 0};
            a.tasks[number] = task;
            task.heavy = number;
            if (heavy) {
                const bool few = BLOCKS == 1 && renewed && size <= FEW * LANES && at - start <= HEAVY;
                const int parts = few ? full_pages(size) : 1;
                task.leader = atomicAdd(a.counters + HEAVIES, parts);
#pragma unroll 1
                for (int i = 0; i < parts; ++i) {
                    if (few) task.page = i;
                    a.heavy[task.leader + i] = task;
                }
            }
        }
        sorted += keys_in(all);
        held += pages_in(all);
        if (j0 + LISTS_AT_ONCE < L) fetch(j0 + LISTS_AT_ONCE);
    }
    loose = warp_sum_int(loose);
    if (lane == 0 && loose) atomicAdd(&a.amounts[s].y, loose);
    __syncthreads();
    if (tid == 0) a.counts[s] = held;
    if (warp < tables) {
        int* mine = counts + warp * L;
        for (int i = begin + lane; i - lane < end; i += WARP) {
            const int list = next;
            next = i + WARP < end ? label_of(a, s, i + WARP) : -1;
            const u32 same = __match_any_sync(FULL, list);
            const int ahead = __popc(same & ((1u << lane) - 1));
            const int at = list >= 0 ? mine[list] + ahead : 0;
            __syncwarp();
            if (list >= 0) {
                a.order[sorted0 + at] = i;
                if (!a.labels_in) a.best[sorted0 + i] = 0;
                if (ahead == 0) mine[list] += __popc(same);
            }
            __syncwarp();
        }
    }
    __syncthreads();
}
