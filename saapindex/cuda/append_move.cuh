// What phase 3 of a flush moves keys and values with, to the pages of their lists, and adds up sums with.

__device__ __forceinline__ int slot_of(const Task& task, int q) {
    const int full = full_pages(task.old);
    return q < full ? task.open : task.base + q - full;
}

// Rows of a list on their way from the ring to its pages, keys or values. A lane for each of the next ones knows where it
// goes, and all have a part of each.
template <bool OF_KEYS, int ROWS>
struct Moving {
    int position, row;
    u32 words[ROWS][WORDS];

    __device__ __forceinline__ void find(const State& a, const Plan& plan, const Task& task, int first) {
        const i64 at = (i64)task.stream * a.most + task.start + min(first + (int)(threadIdx.x % ROWS), task.count - 1);
        position = plan.first + a.order[at], row = a.rows[at].x;
    }
    __device__ __forceinline__ void load(const State& a, const Plan& plan, const Task& task, int first) {
        const int s = task.stream, lane = threadIdx.x % WARP;
        const element* from = OF_KEYS ? entering_key(a, plan, s, position) : entering_value(a, plan, s, position);
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
            const element* here = row_of_lane(from, u);
            if (first + u < task.count) load_row(here, lane, words[u]);
        }
    }
    __device__ __forceinline__ void store(const State& a, const Task& task, int first, double* sum) const {
        const int lane = threadIdx.x % WARP;
        if (OF_KEYS && lane < ROWS && first + lane < task.count) a.ids[row] = position;
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
            const i64 to = __shfl_sync(FULL, row, u);
            if (first + u >= task.count) continue;
            store_row((OF_KEYS ? a.keys : a.values) + to * D, lane, words[u]);
            add_row(words[u], sum);
        }
    }
};

// Copy the entering keys or values of a list into its pages, from row `first` on and then every `step`, and sum them up;
// a warp does it.
template <bool OF_KEYS>
__device__ __forceinline__ void copy_in(const State& a, const Plan& plan, const Task& task, int first, int step, double* sum) {
#pragma unroll 1
    for (; first < task.count; first += step) {
        Moving<OF_KEYS, AHEAD> rows;
        rows.find(a, plan, task, first);
        rows.load(a, plan, task, first);
        rows.store(a, task, first, sum);
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

// Add up what the warps of a block hold, in the order of the warps; warp `to` has the result.
__device__ __forceinline__ void block_sum(double* x, double* shared, int to) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; ++i) shared[(warp * MINE + i) * WARP + lane] = x[i];
    __syncthreads();
    if (warp == to)
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            x[i] = shared[i * WARP + lane];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) x[i] += shared[(w * MINE + i) * WARP + lane];
        }
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
    if (full <= WALK) {  // the pages before a page are soon found
        if (from == 0 && threadIdx.x == 0)
            for (int q = full - 1, slot = task.open; q >= 0; --q) {
                slots[q] = slot;
                if (q) slot = a.before[table + slot];
            }
    } else if (from < full) {
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
