// Phase 3 of a flush: keys and values move to the pages of their lists, and sums of lists grow.

__device__ __forceinline__ int slot_of(const Task& task, int q) {
    const int full = full_pages(task.old);
    return q < full ? task.open : task.base + q - full;
}

// Copy the entering keys of a list into its pages, as warp `w` of `n`, and sum up what this warp has copied. A lane for
// each of the next keys finds out where it goes.
template <bool RENEWED>
__device__ void copy_in(const State& a, const Plan& plan, const Task& task, int w, int n, double* values, double* keys) {
    const int s = task.stream, lane = threadIdx.x % WARP;
    const i64 sorted = (i64)s * a.most + task.start;
    auto next_key = [&](int j0) { return lane < AHEAD && j0 + lane < task.count ? a.order[sorted + j0 + lane] : 0; };
    int next = next_key(w * AHEAD);
    for (int j0 = w * AHEAD; j0 < task.count; j0 += n * AHEAD) {
        u32 key[AHEAD][WORDS], value[AHEAD][WORDS];
        const int p = plan.first + next;
        int row = 0;
        if (lane < AHEAD && j0 + lane < task.count) {
            const int at = task.old + j0 + lane;
            row = a.pages[(i64)s * a.room + slot_of(task, at / LANES)] * LANES + at % LANES;
        }
        next = next_key(j0 + n * AHEAD);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int from = __shfl_sync(FULL, p, u);
            if (j0 + u < task.count) {
                load_row(entering_key(a, plan, s, from), lane, key[u]);
                load_row(entering_value(a, plan, s, from), lane, value[u]);
            }
        }
        if (lane < AHEAD && j0 + lane < task.count) {
            a.ids[row] = p;
            a.rows[sorted + j0 + lane] = make_int2(row, RENEWED ? -1 : task.list);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const i64 to = __shfl_sync(FULL, row, u);
            if (j0 + u < task.count) {
                store_row(a.keys + to * D, lane, key[u]);
                store_row(a.values + to * D, lane, value[u]);
                add_row(value[u], values);
                if (RENEWED) add_row(key[u], keys);
            }
        }
    }
}

// The sum of the values of a list before; a warp asks for it early.
__device__ __forceinline__ void load_sums(const State& a, const Task& task, float* sums) {
    const i64 list = (i64)task.stream * a.lists + task.list;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int at = element_of(threadIdx.x % WARP, i);
        sums[i] = at < D ? a.sums[list * D + at] : 0.f;
    }
}

// The sum and the mean of the values of a list after `more` was added; a warp does it.
__device__ void set_mean(const State& a, const Task& task, const float* before, const double* more) {
    const int lane = threadIdx.x % WARP;
    const i64 list = (i64)task.stream * a.lists + task.list;
    double mean[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int at = element_of(lane, i);
        const float sum = (float)((double)before[i] + more[i]);
        if (at < D) a.sums[list * D + at] = sum;
        mean[i] = at < D ? (double)sum / (double)(task.old + task.count) : 0.0;
    }
    quantise(mean, lane, a.means + list * D, a.mean_scales + list);
}

// Add up what the warps of a block hold, in the order of the warps; the first warp has the result.
__device__ void block_sum(double* x, double* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; ++i) shared[(warp * MINE + i) * WARP + lane] = x[i];
    __syncthreads();
    if (warp == 0)
#pragma unroll
        for (int i = 0; i < MINE; ++i)
            for (int w = 1; w < WARPS; ++w) x[i] += shared[(w * MINE + i) * WARP + lane];
}

// Give a page that other streams hold too a copy of its own; false if no page is free. A block does it.
__device__ bool own_pages(const State& a, int s, const int* slots, int count, int* fresh, int* failed) {
    const i64 table = (i64)s * a.room;
    if (threadIdx.x == 0) *failed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int page = a.pages[table + slots[i]];
        fresh[i] = -1;
        if (*(volatile int*)(a.holders + page) > 1) {
            const int top = atomicSub(a.available, 1);
            if (top > 0) {
                fresh[i] = a.free[top - 1];
                a.holders[fresh[i]] = 1;
                atomicSub(a.holders + page, 1);  // if all holders do so at once, the host frees it
            } else {
                atomicAdd(a.available, 1);
                *failed = 1;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < count; i += WARPS) {
        if (fresh[i] < 0) continue;
        const int lane = threadIdx.x % WARP;
        const i64 from = a.pages[table + slots[i]], to = fresh[i];
        for (int e = lane; e < LANES * ROW_WORDS; e += WARP) {
            ((u32*)(a.keys + to * LANES * D))[e] = ((const u32*)(a.keys + from * LANES * D))[e];
            ((u32*)(a.values + to * LANES * D))[e] = ((const u32*)(a.values + from * LANES * D))[e];
        }
        for (int e = lane; e < LANES * a.words; e += WARP)
            a.codes[to * a.words * LANES + e] = a.codes[from * a.words * LANES + e];
        if (lane < LANES) {
            a.exponents[to * LANES + lane] = a.exponents[from * LANES + lane];
            a.ids[to * LANES + lane] = a.ids[from * LANES + lane];
        }
        __syncwarp();
        if (lane == 0) a.pages[table + slots[i]] = (int)to;
    }
    __syncthreads();
    return !*failed;
}

// Look up the pages `from` up of a list, at most WINDOW. A block does it.
__device__ int look_up(const State& a, const Task& task, int from, int* slots) {
    const int pages = full_pages(task.old + task.count), full = full_pages(task.old);
    const int count = min(WINDOW, pages - from);
    const i64 table = (i64)task.stream * a.room;
    __syncthreads();
    for (int q = max(full, from) + threadIdx.x; q < from + count; q += THREADS) slots[q - from] = task.base + q - full;
    if (from < full) {
        const int held = a.counts[task.stream];
        constexpr int ONCE = 8 / BLOCKS;
        for (int first = threadIdx.x * 4; first < held; first += THREADS * 4 * ONCE) {
            int4 labels[ONCE];
#pragma unroll
            for (int j = 0; j < ONCE; ++j) {
                const int slot = first + j * THREADS * 4;  // rooms are multiples of 4
                labels[j] = slot < held ? *(const int4*)(a.labels + table + slot) : make_int4(-1, -1, -1, -1);
            }
#pragma unroll
            for (int j = 0; j < ONCE; ++j) {
                const int found[4] = {labels[j].x, labels[j].y, labels[j].z, labels[j].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int slot = first + j * THREADS * 4 + i;
                    if (found[i] >> 5 != task.list || slot >= held) continue;
                    const int q = a.orders[table + slot] - from;
                    if (q >= 0 && q < count && q + from < full) slots[q] = slot;
                }
            }
        }
    }
    __syncthreads();
    return count;
}

// Phase 3 for a list with many new keys, or one that gets a new anchor, in a block.
__device__ void enter_by_block(const State& a, const Plan* plans, int number, char* shared) {
    double* sums = (double*)shared;                                  // [WARPS][MINE][WARP]
    int* slots = (int*)(shared + MOVING - 8 * WINDOW - 16);          // [WINDOW]
    int* fresh = slots + WINDOW;                                     // [WINDOW]
    int* failed = fresh + WINDOW;                                    // and where the work begins
    const Task task = a.tasks[number];
    const int s = task.stream, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 list = (i64)s * a.lists + task.list;
    double values[MINE] = {}, keys[MINE] = {};
    float before[MINE];
    if (warp == 0) load_sums(a, task, before);
    const int pages = full_pages(task.old + task.count), full = full_pages(task.old);
    bool renewed = task.segment >= 0;
    for (int from = 0; renewed && from < full; from += WINDOW) {
        const int count = look_up(a, task, from, slots);
        renewed = own_pages(a, s, slots, min(count, full - from), fresh, failed);
    }
    if (renewed) {
        copy_in<true>(a, plans[s / a.heads], task, warp, WARPS, values, keys);
        if (threadIdx.x == 0) failed[1] = atomicAdd(&a.amounts[s].x, pages);
        __syncthreads();
        for (int from = 0; from < pages; from += WINDOW) {
            // They stand there from before where one look was enough.
            const int count = full && pages <= WINDOW ? pages : look_up(a, task, from, slots);
            for (int q = threadIdx.x; q < count; q += THREADS) a.work[(i64)s * a.room + failed[1] + from + q] = slots[q];
            const int end = min(task.old - from * LANES, count * LANES);
            for (int j0 = warp * AHEAD; j0 < end; j0 += THREADS / WARP * AHEAD) {
                u32 key[AHEAD][WORDS];
#pragma unroll
                for (int u = 0; u < AHEAD; ++u)
                    if (j0 + u < end) {
                        const i64 page = a.pages[(i64)s * a.room + slots[(j0 + u) / LANES]];
                        load_row(a.keys + (page * LANES + (j0 + u) % LANES) * D, lane, key[u]);
                    }
#pragma unroll
                for (int u = 0; u < AHEAD; ++u)
                    if (j0 + u < end) add_row(key[u], keys);
            }
        }
        block_sum(keys, sums);
        if (warp == 0) {
#pragma unroll
            for (int i = 0; i < MINE; ++i) keys[i] /= (double)(task.old + task.count);
            quantise(keys, lane, a.anchors + list * D, a.anchor_scales + list);
        }
        if (threadIdx.x == 0) a.coded[list] = task.old + task.count;
    } else {
        copy_in<false>(a, plans[s / a.heads], task, warp, WARPS, values, keys);
    }
    block_sum(values, sums);
    if (warp == 0) set_mean(a, task, before, values);
    if (threadIdx.x == 0) {
        if (!renewed && task.segment >= 0) atomicAdd(&a.amounts[s].y, task.count);
        a.tasks[number].segment = renewed ? failed[1] : -1;
    }
    __syncthreads();
}
