// Phase 3 of a flush: keys and values enter the pages of their lists. Keys do so sixteen at a time, in the order of
// their lists, and get their codes on the way; values by list, whose mean they change. Keys of a list that gets a new
// anchor are a block's, and so are many values of one list. Phase 4: squared scales.

// Ask for what the phases after the first one read, of stream `s`.
__device__ __forceinline__ void ask_for_later(const State& a, const Plan* plans, int s) {
    if (threadIdx.x != THREADS - 1) return;
    ask_for(a.amounts + s);
    ask_for(a.order + (i64)s * a.most);
    ask_for(a.rows + (i64)s * a.most);
    ask_for(a.tasks);
    ask_for(a.heavy);
    ask_for(a.pages + (i64)s * a.room);
    ask_for(a.sums + (i64)s * a.lists * D);
    ask_for(a.anchors + (i64)s * a.lists * D);
    ask_for(a.anchor_scales + (i64)s * a.lists);
    ask_for(a.squares + (i64)s * a.lists);
    ask_for(a.widths);
    ask_for(a.step);
    ask_for(entering_value(a, plans[s / a.heads], s, plans[s / a.heads].first));
}
// The room of a block: pages that are looked up, sums of warps; of these, in other moments, sixteen keys.
struct Room {
    int slots[WINDOW], fresh[WINDOW], failed, segment, unused[2];
    double sums[MINE * THREADS];
};
static_assert(sizeof(Room) <= MOVING, "what a block moves a list with");
__device__ __forceinline__ Sixteen& sixteen_of(Room& room) { return *(Sixteen*)room.fresh; }

// Two of the keys from place `from` up to `until` of the sorted order of a stream, and their positions; none of lists
// that are to be coded anew, but if `all`.
__device__ __forceinline__ void of_order(const State& a, const Plan& plan, int s, int from, int until, bool all,
                                         Two& two, int* p) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int2 entry[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const i64 at = (i64)s * a.most + min(from + warp + i * WARPS, until - 1);
        entry[i] = a.rows[at], p[i] = plan.first + a.order[at];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool any = from + warp + i * WARPS < until && (all || entry[i].y >= 0);
        two.row[i] = entry[i].x;
        two.list[i] = any ? (i64)s * a.lists + (entry[i].y < 0 ? ~entry[i].y : entry[i].y) : -1;
        if (any) load_row(entering_key(a, plan, s, p[i]), lane, two.key[i]);
    }
}

// They enter the rows that they are for, but those without a position, which stand there.
__device__ __forceinline__ void store_two(const State& a, const Two& two, const int* p) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (two.list[i] < 0 || p[i] < 0) continue;
        store_row(a.keys + (i64)two.row[i] * D, lane, two.key[i]);
        if (lane == 0) a.ids[two.row[i]] = p[i];
    }
}

// Give a list the mean of its keys as anchor, whose sums the warps of a block have.
__device__ __forceinline__ void set_anchor(const State& a, i64 list, int size, double* sum, double* scratch) {
    block_sum(sum, scratch, 0);
    if (threadIdx.x < WARP) {
#pragma unroll
        for (int i = 0; i < MINE; ++i) sum[i] /= (double)size;
        quantise(sum, threadIdx.x, a.anchors + list * D, a.anchor_scales + list);
    }
    if (threadIdx.x == 0) a.coded[list] = size;
}

// A list of few pages gets a new anchor: for each page a block adds up the whole list and codes that page, whose keys
// stay in registers. Two of them, and the positions of those that enter. Nothing is changed, and false returned, if
// another stream holds a page of the list too, as the block of the first one sees.
__device__ __forceinline__ bool renew_page(const State& a, const Plan& plan, const Task& task, Room& room, Two& two,
                                           int* p, uint4* forward, int& held) {
    const int s = task.stream, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, size = task.old + task.count;
    const i64 list = (i64)s * a.lists + task.list, table = (i64)s * a.room, sorted = (i64)s * a.most + task.start;
    want_forward(a, s % a.heads, 0, forward, held);
    const int pages = look_up(a, task, 0, room.slots);
    if (threadIdx.x < pages) room.fresh[threadIdx.x] = a.pages[table + room.slots[threadIdx.x]];
    __syncthreads();
    const int holders = task.page == 0 && threadIdx.x < pages ? *(volatile int*)(a.holders + room.fresh[threadIdx.x]) : 1;
    double sum[MINE] = {};
#pragma unroll 1
    for (int q0 = 0; q0 < pages; q0 += PAGES_IN_FLIGHT) {
        u32 keys[PAGES_IN_FLIGHT][2][WORDS];
#pragma unroll
        for (int u = 0; u < PAGES_IN_FLIGHT; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int q = q0 + u, j = q * LANES + warp + i * WARPS;
                if (j >= size) continue;
                const int row = room.fresh[q] * LANES + j % LANES;
                const int from = j < task.old ? -1 : plan.first + a.order[sorted + j - task.old];
                load_row(from < 0 ? a.keys + (i64)row * D : entering_key(a, plan, s, from), lane, keys[u][i]);
                if (q == task.page) p[i] = from, two.row[i] = row, two.list[i] = list;
            }
#pragma unroll
        for (int u = 0; u < PAGES_IN_FLIGHT; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int q = q0 + u, j = q * LANES + warp + i * WARPS;
                if (j >= size) continue;
                add_row(keys[u][i], sum);
                if (q == task.page)
#pragma unroll
                    for (int w = 0; w < WORDS; ++w) two.key[i][w] = keys[u][i][w];
            }
    }
    int* verdict = &a.heavy[task.leader].verdict;
    int found;
    if (task.page == 0) {
        found = __syncthreads_or(holders > 1) ? WHOLE : PARTS;
        if (threadIdx.x == 0) *(volatile int*)verdict = found;
    } else {
        do found = (int)load_acquire((const u32*)verdict);
        while (!found);
    }
    if (found == WHOLE) return false;
    set_anchor(a, list, size, sum, room.sums);
    if (task.page == 0) {
        if (threadIdx.x == 0)
            a.tasks[task.heavy].segment = room.segment = a.room - pages - atomicAdd(&a.amounts[s].z, pages);
        __syncthreads();
        if (threadIdx.x < pages) a.work[table + room.segment + threadIdx.x].x = room.fresh[threadIdx.x];
    }
    return true;
}

// The keys of a list that gets a new anchor, and the values of one with many new keys. A block does it; of a list of few
// pages, a block for each if `by_pages`.
__device__ void enter_by_block(const State& a, const Plan* plans, const Task task, Room& room, uint4* forward,
                               int& held, bool by_pages) {
    const int s = task.stream, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Plan& plan = plans[s / a.heads];
    const i64 list = (i64)s * a.lists + task.list, table = (i64)s * a.room;
    const int size = task.old + task.count, pages = full_pages(size), full = full_pages(task.old);
    Two two = {{}, {}, {-1, -1}};
    int p[2];
    const bool one = BLOCKS == 1 && by_pages && task.page >= 0 && renew_page(a, plan, task, room, two, p, forward, held);
    if (!one && task.page > 0) return;
    bool renewed = task.segment >= 0 && !one;
    for (int from = 0; renewed && from < full; from += WINDOW) {
        const int count = look_up(a, task, from, room.slots);
        renewed = own_pages(a, s, room.slots, min(count, full - from), room.fresh, &room.failed);
    }
    if (renewed) {
        double keys[MINE] = {};
        if (threadIdx.x == 0) room.segment = atomicAdd(&a.amounts[s].x, pages);
        copy_in<true>(a, plan, task, warp * AHEAD, WARPS * AHEAD, keys);
        __syncthreads();
        for (int from = 0; from < pages; from += WINDOW) {
            // They stand there from before where one look was enough.
            const int count = full && pages <= WINDOW ? pages : look_up(a, task, from, room.slots);
            for (int q = threadIdx.x; q < count; q += THREADS)
                a.work[table + room.segment + from + q] =
                    make_int2(a.pages[table + room.slots[q]], task.list << 5 | min(LANES, size - (from + q) * LANES));
            const int end = min(task.old - from * LANES, count * LANES);
            for (int j0 = warp * AHEAD; j0 < end; j0 += WARPS * AHEAD) {
                const int j = min(j0 + lane % AHEAD, end - 1);
                const i64 row = (i64)a.pages[table + room.slots[j / LANES]] * LANES + j % LANES;
                u32 key[AHEAD][WORDS];
#pragma unroll
                for (int u = 0; u < AHEAD; ++u) {
                    const i64 from_row = __shfl_sync(FULL, row, u);
                    if (j0 + u < end) load_row(a.keys + from_row * D, lane, key[u]);
                }
#pragma unroll
                for (int u = 0; u < AHEAD; ++u)
                    if (j0 + u < end) add_row(key[u], keys);
            }
        }
        set_anchor(a, list, size, keys, room.sums);
    } else if (task.segment >= 0) {
        for (int j = 0; j < (one ? 1 : task.count); j += LANES) {  // else no page was free: the anchor stays
            if (!one) of_order(a, plan, s, task.start + j, task.start + task.count, true, two, p);
            encode(a, s % a.heads, two, sixteen_of(room), forward, held);
            store_two(a, two, p);
        }
    }
    if (threadIdx.x == 0 && task.segment >= 0 && !one) a.tasks[task.heavy].segment = renewed ? room.segment : -1;
    if (task.count <= HEAVY) return;
    double values[MINE] = {};
    float before[MINE];
    if (warp == 0) load_sums(a, task, before);
    copy_in<false>(a, plan, task, warp * AHEAD, WARPS * AHEAD, values);
    block_sum(values, room.sums, 0);
    if (warp == 0) set_mean(a, task, before, values);
}

// The values of lists with fewer new keys, as warp `w` of `n`: of as many at once as there are registers for.
__device__ __forceinline__ void enter_values(const State& a, const Plan* plans, int tasks, int w, int n) {
    constexpr int EACH = BLOCKS == 1 ? 2 : 1;
#pragma unroll 1
    for (int i = w; i < tasks; i += EACH * n) {
        Task task[EACH];
        Moving<false, AHEAD / 2> rows[EACH];
        float before[EACH][MINE];
        bool any[EACH];
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            any[k] = i + k * n < tasks;
            if (any[k]) task[k] = a.tasks[i + k * n];
        }
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            any[k] = any[k] && task[k].count <= HEAVY;
            if (any[k]) {
                load_sums(a, task[k], before[k]);
                rows[k].find(a, plans[task[k].stream / a.heads], task[k], 0);
            }
        }
#pragma unroll
        for (int k = 0; k < EACH; ++k)
            if (any[k]) rows[k].load(a, plans[task[k].stream / a.heads], task[k], 0);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            if (!any[k]) continue;
            double values[MINE] = {};
            rows[k].store(a, task[k], 0, values);
            copy_in<false>(a, plans[task[k].stream / a.heads], task[k], AHEAD / 2, AHEAD, values);
            set_mean(a, task[k], before[k], values);
        }
    }
}

// How many times sixteen keys of a stream are to be coded: entering ones in lists that keep their anchors, or pages.
__device__ __forceinline__ int times(const State& a, const Plan* plans, int s, bool pages) {
    const int4 amounts = a.amounts[s];
    const Plan& plan = plans[s / a.heads];
    return pages ? amounts.x : amounts.y ? (plan.until - plan.first + LANES - 1) / LANES : 0;
}

// How often that is for all streams, and at most for one.
struct Amount {
    int all, most;
};

__device__ __forceinline__ Amount amount_of(const State& a, const Plan* plans, int streams, bool pages) {
    Amount found = {0, 0};
    for (int s = threadIdx.x % WARP; s < streams; s += WARP) {
        const int here = times(a, plans, s, pages);
        found.all += here, found.most = max(found.most, here);
    }
    return {warp_sum_int(found.all), (int)__reduce_max_sync(FULL, (u32)found.most)};
}

// The stream that a block has the forward matrix of.
__device__ __forceinline__ int stream_of_block(int streams, int blocks) {
    const int block = blockIdx.x;
    return blocks >= streams ? min(block / (blocks / streams), streams - 1) : block * (u32)streams / (u32)blocks;
}

// Enter the keys that were sorted, or encode the pages that blocks left to all, as block `block` of `blocks`: each has
// its share next to each other, or what is of the stream that is its own if there is so little.
__device__ __forceinline__ void encode_share(const State& a, const Plan* plans, int streams, bool pages, Amount amount,
                                             int block, int blocks, Sixteen& x, uint4* forward, int& held) {
    if (block < 0) return;
    const bool little = pages && amount.most <= blocks / streams;
    int s = 0, skip = (u32)block * amount.all / (u32)blocks, left = (u32)(block + 1) * amount.all / (u32)blocks - skip;
    if (little) {
        s = stream_of_block(streams, blocks);
        skip = block - s * (blocks / streams);
        left = skip < times(a, plans, s, true);
    }
    for (; s < streams && left; ++s) {
        const int here = times(a, plans, s, pages);
        for (; skip < here && left; ++skip, --left) {
            const Plan& plan = plans[s / a.heads];
            Two two = {};
            int p[2];
            if (pages) {
                const int2 page = a.work[(i64)s * a.room + skip];
                of_page(a, s, page.x, page.y, two);
            } else {
                of_order(a, plan, s, skip * LANES, plan.until - plan.first, false, two, p);
            }
            encode(a, s % a.heads, two, x, forward, held);
            if (!pages) store_two(a, two, p);
        }
        skip -= here;
    }
}

// What the squared scales of a list are found with, of a task that its keys only entered: known before they are coded.
struct Squares {
    int row;       // of a key, for each lane
    float before;  // the sum of squares
};

__device__ __forceinline__ Squares squares_of(const State& a, const Task& task) {
    const int lane = threadIdx.x % WARP;
    return {lane < task.count ? a.rows[(i64)task.stream * a.most + task.start + lane].x : -1,
            a.squares[(i64)task.stream * a.lists + task.list]};
}

// Phase 4: the squared scales of the codes of a list; a warp does it.
__device__ __forceinline__ void add_squares(const State& a, const Task& task, const Squares& known) {
    const int s = task.stream, h = s % a.heads, lane = threadIdx.x % WARP;
    double sum = 0.0;
    if (task.segment >= 0) {
        for (int j = lane; j < task.old + task.count; j += WARP) {
            const i64 page = a.work[(i64)s * a.room + task.segment + j / LANES].x;
            sum += squared_scale(a, h, page * LANES + j % LANES);
        }
    } else if (known.row >= 0) {
        sum = squared_scale(a, h, known.row);
    }
    if (task.segment < 0 && task.count > WARP)
        for (int j = WARP + lane; j < task.count; j += WARP)
            sum += squared_scale(a, h, a.rows[(i64)s * a.most + task.start + j].x);
    sum = warp_sum_double(sum);
    if (lane == 0) a.squares[(i64)s * a.lists + task.list] = (task.segment < 0 ? known.before : 0.f) + (float)sum;
}
