// What the phases of an addition share: the state, plans of sequences, rows of keys, barriers and sums.

// Counters of a state; the last block of a launch leaves all but STATUS at zero. ENTERED: blocks that have read all
// that leaves the ring. NEXT: heavy tasks that were begun.
enum { STATUS, TICKET, BARRIER, TASKS, HEAVIES, ENTERED, NEXT };
enum { NO_PAGES = 1, NO_PLACE = 2, MOVED = 4 };

enum { PARTS = 1, WHOLE };

// Keys of one list that enter in this launch.
struct Task {
    int stream, list;
    int start, count;  // where they stand in the sorted order of the stream
    int old;           // keys that were in the list
    int open, base;    // its last page if that has free lanes; the first of its new pages
    int segment;       // where its pages stand in the stream's work if it is coded anew, else -1
    int heavy;         // whether a whole block moves it
    int page, leader;  // which of its pages such a block codes, below zero for all; that of the first one
    int verdict;       // of that block: whether each codes its page (PARTS), or it sees to all (WHOLE)
};

struct State {
    int *lengths, *first;
    element *near_keys, *near_values, *keys, *values;
    u32* codes;
    u8* exponents;
    int *ids, *pages, *labels, *orders, *before, *counts, *sizes, *coded, *last;
    i8* anchors;
    float *anchor_scales, *sums;
    i8* means;
    float *mean_scales, *squares;

    int *holders, *free, *available;  // pages of the pool: how many streams hold each; a stack of free ones; its height
    const uint4* parts;       // (H or S, L, D / 4): four dimensions of a form, high and low
    const float *unit, *bias; // (H or S) and (H or S, L): the parts are to be multiplied with it
    const uint4* forward;     // of the codes, as lanes read it
    const float4* step;       // (H, R): step of a field, one by it, and what its products are to be multiplied with
    const float* base;
    const int* widths;
    const double* turns;      // (H, pairs): turns a position of the pairs that the view rotates; null for none
    const float* amplitudes;  // (H, pairs)

    const element *new_keys, *new_values;
    const int* fresh;   // (B,): only so many of the new keys, the last ones, belong to a sequence; null for all
    const int* labels_in;  // (S, M): lists of the entering keys where they are known; null where not
    u64* best;          // (S, M), zero between launches: score and list of each entering key
    int* order;         // (S, M): entering keys sorted by list
    int2* rows;         // (S, M): the row that each of these goes to, and its list, complemented if it is coded anew
    Task* tasks;        // (S * min(M, L))
    Task* heavy;        // (S * min(M, L)): those for whole blocks, with their numbers in the place of `heavy`
    int2* work;         // (S, P): pages to be coded anew, and their labels
    int4* amounts;      // (S), zero between launches: how many those are, how many keys enter beside them, and pages at
                        // the end of `work` that are coded with their anchor
    int* counters;
    const int* moved;  // how often arrays have moved; `version` when this launch was prepared
    i64* stamps;  // with -DSTAMPS: nanoseconds at the beginning of each phase

    i64 key_batch, key_head, key_token, value_batch, value_head, value_token;  // strides in elements
    int batch, heads, lists, room, ring, sinks, kept, flush, dense_below;
    int words, coded_dimensions, pairs, interleaved, own_forms, most, tokens, tables, version;
    int later;  // whether the new keys are added by the next launch
};

#ifdef STAMPS
__device__ __forceinline__ void stamp(const State& a, int phase) {
    i64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (blockIdx.x == 0 && threadIdx.x == 0) a.stamps[phase] = now;
}
#define STAMP(phase) stamp(a, phase)
#else
#define STAMP(phase)
#endif

// What one launch does to a sequence: keys `first` to `until` leave the ring.
struct Plan {
    int old, now, first, until;
};

__device__ __forceinline__ Plan plan_of(const State& a, int b) {
    Plan plan;
    plan.old = a.lengths[b];
    plan.now = plan.old + (a.fresh ? a.fresh[b] : a.tokens);
    plan.first = a.first[b];
    plan.until = plan.first;
    const int end = max(plan.now, a.sinks);
    const bool dense = end < a.dense_below && plan.first == a.sinks;
    if (!dense && end - plan.first >= a.kept + a.flush)
        plan.until = a.sinks + (end - a.kept - a.sinks) / LANES * LANES;
    return plan;
}

// The most pages that `m` keys entering the lists of a stream may need.
__device__ __forceinline__ int most_pages(const State& a, int m) { return min(m, m / LANES + min(m, a.lists)); }

__device__ __forceinline__ i64 near_row(const State& a, int s, int p) {
    const int place = p < a.sinks ? p : a.sinks + (u32)(p - a.sinks) % (u32)a.ring;
    return ((i64)s * (a.sinks + a.ring) + place) * D;
}

__device__ __forceinline__ const element* new_key(const State& a, int s, int t) {
    return a.new_keys + (s / a.heads) * a.key_batch + (s % a.heads) * a.key_head + t * a.key_token;
}

__device__ __forceinline__ const element* new_value(const State& a, int s, int t) {
    return a.new_values + (s / a.heads) * a.value_batch + (s % a.heads) * a.value_head + t * a.value_token;
}

// Which of the `tokens` new keys is the first of the sequence.
__device__ __forceinline__ int skipped(const State& a, const Plan& plan) { return a.tokens - (plan.now - plan.old); }

__device__ __forceinline__ const element* entering_key(const State& a, const Plan& plan, int s, int p) {
    return p < plan.old ? a.near_keys + near_row(a, s, p) : new_key(a, s, p - plan.old + skipped(a, plan));
}

__device__ __forceinline__ const element* entering_value(const State& a, const Plan& plan, int s, int p) {
    return p < plan.old ? a.near_values + near_row(a, s, p) : new_value(a, s, p - plan.old + skipped(a, plan));
}

// Of every TOGETHER * WARP words of a row a lane has TOGETHER that lie together.
__device__ __forceinline__ void load_row(const element* row, int lane, u32* words) {
#pragma unroll
    for (int w = 0; w < WORDS; w += TOGETHER) {
        const int at = w * WARP + lane * TOGETHER;
        const bool inside = at < ROW_WORDS;
        const u32* from = (const u32*)row + at;
#if TOGETHER == 4
        const uint4 x = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        words[w] = x.x, words[w + 1] = x.y, words[w + 2] = x.z, words[w + 3] = x.w;
#elif TOGETHER == 2
        const uint2 x = inside ? *(const uint2*)from : make_uint2(0, 0);
        words[w] = x.x, words[w + 1] = x.y;
#else
        words[w] = inside ? *from : 0;
#endif
    }
}

// The row that a lane of the warp found.
__device__ __forceinline__ const element* row_of_lane(const element* row, int lane) {
    return (const element*)__shfl_sync(FULL, (u64)row, lane);
}

__device__ __forceinline__ void store_row(element* row, int lane, const u32* words) {
#pragma unroll
    for (int w = 0; w < WORDS; w += TOGETHER) {
        const int at = w * WARP + lane * TOGETHER;
        u32* to = (u32*)row + at;
        if (at >= ROW_WORDS) continue;
#if TOGETHER == 4
        *(uint4*)to = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
#elif TOGETHER == 2
        *(uint2*)to = make_uint2(words[w], words[w + 1]);
#else
        *to = words[w];
#endif
    }
}

__device__ __forceinline__ float part_of(u32 word, int part) {
#if ELEMENT == 2
    return __uint_as_float(word);
#else
    return widen((element)(part ? word >> 16 : word));
#endif
}

// Number of the element that is `MINE`-th of a lane; may be D or more.
__device__ __forceinline__ int element_of(int lane, int mine) {
    const int word = mine / PART;
    return (word / TOGETHER * TOGETHER * WARP + lane * TOGETHER + word % TOGETHER) * PART + mine % PART;
}

__device__ __forceinline__ void add_row(const u32* words, double* sum) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) sum[i] += (double)part_of(words[i / PART], i % PART);
}

// Round a row that a warp holds to int8, see saapindex/codes/rows.py.
__device__ void quantise(const double* x, int lane, i8* row, float* scale) {
    double most = 0.0;
#pragma unroll
    for (int i = 0; i < MINE; ++i) most = fmax(most, fabs(x[i]));
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) most = fmax(most, __shfl_xor_sync(FULL, most, step));
    const float unit = (float)(most / 127.0);
    const float inverse = unit > 0.f ? __fdiv_rn(1.f, unit) : 0.f;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int at = element_of(lane, i);
        if (at < D) row[at] = (i8)(int)fmin(fmax(rint(x[i] * (double)inverse), -127.0), 127.0);
    }
    if (lane == 0) *scale = unit;
}

// Ask for memory that is read later: to find out where it lies takes a while by itself.
__device__ __forceinline__ void ask_for(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ double warp_sum_double(double x) {
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// A block has come to a barrier of the grid: what its threads wrote before can be read by who has waited for it.
__device__ __forceinline__ void come(const State& a, int barrier = BARRIER) {
    int* counter = a.counters + barrier;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Wait until blocks have come `target` times.
__device__ __forceinline__ void wait_for(const State& a, u32 target, int barrier = BARRIER) {
    if (threadIdx.x == 0) {
        u32 seen;
        do seen = load_acquire((const u32*)a.counters + barrier);
        while (seen < target);
    }
    __syncthreads();
}

// All threads of the grid have come here.
__device__ __forceinline__ void grid_barrier(const State& a, u32 target) {
    come(a);
    wait_for(a, target);
}

// Exclusive sum over the block, and the total; every thread must call it.
__device__ u64 block_scan(u64 x, u64* scratch, u64* total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 sum = x;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const u64 left = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += left;
    }
    __syncthreads();
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    u64 before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += scratch[w];
        all += scratch[w];
    }
    *total = all;
    return before + sum - x;
}
