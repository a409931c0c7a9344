// Phase 3 of a flush: keys and values enter the pages of their lists. Keys do so sixteen at a time, in the order of their
// lists, and get their codes on the way; values by list, whose mean they change. A list with many new keys, or one that
// gets a new anchor, is a block's.

// The room of a block: pages that are looked up, sums of warps; of these, in other moments, sixteen keys.
struct Room {
    int slots[WINDOW], fresh[WINDOW], failed, segment, unused[2];
    double sums[MINE * THREADS];
};
static_assert(sizeof(Room) <= MOVING, "what a block moves a list with");
__device__ __forceinline__ Sixteen& sixteen_of(Room& room) { return *(Sixteen*)room.fresh; }

// Keys `from` and the next fifteen, up to `until`, of the sorted order of a stream enter lists, but for those of lists
// that are coded anew. If it is not so, `number` tells of which task they are. A block does it.
__device__ __forceinline__ void enter_sixteen(const State& a, const Plan& plan, int s, int from, int until, int number,
                                              Sixteen& x, uint4* forward, int& held) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 sorted = (i64)s * a.most;
    Two two = {};
    int place[2], p[2];
    int2 entry[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        place[i] = from + warp + i * WARPS;
        const i64 at = sorted + min(place[i], until - 1);
        entry[i] = a.rows[at], p[i] = plan.first + a.order[at];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (number >= 0) entry[i].x = (int)row_of(a, a.tasks[number], a.tasks[number].old + place[i] - a.tasks[number].start);
        two.row[i] = place[i] < until ? entry[i].x : -1;
        two.list[i] = two.row[i] < 0 ? -1 : (i64)s * a.lists + entry[i].y;
        if (two.row[i] >= 0) load_row(entering_key(a, plan, s, p[i]), lane, two.key[i]);
    }
    encode(a, s % a.heads, two, x, forward, held);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (two.list[i] < 0) continue;
        store_row(a.keys + (i64)two.row[i] * D, lane, two.key[i]);
        if (lane == 0) a.ids[two.row[i]] = p[i];
    }
}

// A list with many new keys, or one that gets a new anchor. A block does it.
__device__ void enter_by_block(const State& a, const Plan* plans, const Task& task, Room& room, uint4* forward, int& held) {
    const int number = task.heavy;
    const int s = task.stream, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Plan& plan = plans[s / a.heads];
    const i64 list = (i64)s * a.lists + task.list;
    double values[MINE] = {}, keys[MINE] = {};
    float before[MINE];
    if (warp == 1) load_sums(a, task, before);
    const int size = task.old + task.count, pages = full_pages(size), full = full_pages(task.old);
    const bool at_once = pages <= AT_ONCE, due = task.segment >= 0;
    bool renewed = due;
    for (int from = 0; renewed && from < full; from += WINDOW) {
        const int count = look_up(a, task, from, room.slots);
        renewed = own_pages(a, s, room.slots, min(count, full - from), room.fresh, &room.failed);
    }
    if (renewed) {
        copy_in<true>(a, plan, task, warp, WARPS, values, keys);
        if (!at_once && threadIdx.x == 0) room.segment = atomicAdd(&a.amounts[s].x, pages);
        __syncthreads();
        for (int from = 0; from < pages; from += WINDOW) {
            // They stand there from before where one look was enough.
            const int count = full && pages <= WINDOW ? pages : look_up(a, task, from, room.slots);
            if (!at_once)
                for (int q = threadIdx.x; q < count; q += THREADS)
                    a.work[(i64)s * a.room + room.segment + from + q] = room.slots[q];
            const int end = min(task.old - from * LANES, count * LANES);
            for (int j0 = warp * AHEAD; j0 < end; j0 += WARPS * AHEAD) {
                const int j = min(j0 + lane % AHEAD, end - 1);
                const i64 row = (i64)a.pages[(i64)s * a.room + room.slots[j / LANES]] * LANES + j % LANES;
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
        block_sum(keys, room.sums, 0);
        if (threadIdx.x == 0) a.coded[list] = size;
    } else {
        copy_in<false>(a, plan, task, warp, WARPS, values, keys);
    }
    block_sum(values, room.sums, 1);
    if (warp == 1) set_mean(a, task, before, values);
    if (renewed && warp == 0) {
#pragma unroll
        for (int i = 0; i < MINE; ++i) keys[i] /= (double)size;
        quantise(keys, lane, a.anchors + list * D, a.anchor_scales + list);
    }
    const int segment = !due ? -1 : !renewed || at_once ? DONE : room.segment;
    __syncthreads();
    if (threadIdx.x == 0) a.tasks[number].segment = segment;
    if (segment != DONE) return;
    if (renewed)
        for (int q = 0; q < pages; ++q) encode_page(a, s, room.slots[q], sixteen_of(room), forward, held);
    else  // no page was free: the anchor stays
        for (int j = 0; j < task.count; j += LANES)
            enter_sixteen(a, plan, s, task.start + j, task.start + task.count, number, sixteen_of(room), forward, held);
    __syncthreads();
    if (warp == 0) {
        double sum = 0.0;
        for (int j = (renewed ? 0 : task.old) + lane; j < size; j += WARP) {
            const int slot = renewed ? room.slots[j / LANES] : slot_of(task, j / LANES);
            sum += squared_scale(a, s % a.heads, (i64)a.pages[(i64)s * a.room + slot] * LANES + j % LANES);
        }
        sum = warp_sum_double(sum);
        if (lane == 0) a.squares[list] = (renewed ? 0.f : a.squares[list]) + (float)sum;
    }
    __syncthreads();
}

// The values of all other lists, as warp `w` of `n`; `next` is the first of its tasks.
__device__ __forceinline__ void enter_values(const State& a, const Plan* plans, int tasks, Task next, int w, int n) {
#pragma unroll 1
    for (int i = w; i < tasks; i += n) {
        const Task task = next;
        if (i + n < tasks) next = a.tasks[i + n];
        if (task.heavy) continue;
        double values[MINE] = {};
        float before[MINE];
        load_sums(a, task, before);
        copy_in<false>(a, plans[task.stream / a.heads], task, 0, 1, values, values);
        set_mean(a, task, before, values);
    }
}

// How many times sixteen keys of a stream are to be coded: entering ones in lists that keep their anchors, or pages.
template <bool PAGES>
__device__ __forceinline__ int times(const State& a, const Plan* plans, int s) {
    const int2 amounts = a.amounts[s];
    const Plan& plan = plans[s / a.heads];
    return PAGES ? amounts.x : amounts.y ? (plan.until - plan.first + LANES - 1) / LANES : 0;
}

template <bool PAGES>
__device__ __forceinline__ int all_times(const State& a, const Plan* plans, int streams) {
    int all = 0;
    for (int s = threadIdx.x % WARP; s < streams; s += WARP) all += times<PAGES>(a, plans, s);
    return warp_sum_int(all);
}

// Enter the keys that were sorted, or encode the pages that blocks left to all, as block `block` of `blocks`: each has
// its share of `all` next to each other.
template <bool PAGES>
__device__ __forceinline__ void enter_shares(const State& a, const Plan* plans, int streams, int all, int block, int blocks,
                                             Room& room, uint4* forward, int& held) {
    if (block < 0) return;
    const int each = ((u32)all + blocks - 1) / (u32)blocks;
    int skip = block * each, left = each;
    for (int s = 0; s < streams && left; ++s) {
        const int here = times<PAGES>(a, plans, s);
        for (; skip < here && left; ++skip, --left) {
            const Plan& plan = plans[s / a.heads];
            if (PAGES)
                encode_page(a, s, a.work[(i64)s * a.room + skip], sixteen_of(room), forward, held);
            else
                enter_sixteen(a, plan, s, skip * LANES, plan.until - plan.first, -1, sixteen_of(room), forward, held);
        }
        skip -= here;
    }
}

// Phase 5: the squared scales of the codes of a list; a warp does it.
__device__ void add_squares(const State& a, const Task& task) {
    if (task.segment == DONE) return;
    const int s = task.stream, lane = threadIdx.x % WARP;
    const i64 list = (i64)s * a.lists + task.list;
    const bool renewed = task.segment >= 0;
    const float before = renewed ? 0.f : a.squares[list];
    double sum = 0.0;
    if (renewed)
        for (int j = lane; j < task.old + task.count; j += WARP) {
            const int slot = a.work[(i64)s * a.room + task.segment + j / LANES];
            sum += squared_scale(a, s % a.heads, (i64)a.pages[(i64)s * a.room + slot] * LANES + j % LANES);
        }
    else
        for (int j = lane; j < task.count; j += WARP)
            sum += squared_scale(a, s % a.heads, a.rows[(i64)s * a.most + task.start + j].x);
    sum = warp_sum_double(sum);
    if (lane == 0) a.squares[list] = before + (float)sum;
}
