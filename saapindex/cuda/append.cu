// Append keys and values to the ring of each stream and, where a flush is due, move the oldest into lists.
//
// One launch for any number of new keys. Without a flush a block copies its rows and leaves. With one, all blocks
// of the grid go through the phases below, with a barrier of the grid between them; so there may be no more blocks
// than fit on the device at once. Whether a flush is due is decided here, from counters on the device.
//
// A flush must be the same as in saapindex/attention/table.py: `Table.entered`. Sums are formed in double precision
// in an order that does not depend on the schedule, so a flush gives the same bits each time it is run.
//
// Compiled with -DELEMENT, and -DD, the dimensions of a key: a multiple of 8.

#define THREADS 256
#define WARPS (THREADS / WARP)
#define ROW_WORDS (D * (int)sizeof(element) / 4)    // 32-bit words of a key
#define WORDS ((ROW_WORDS + WARP - 1) / WARP)       // of them, those of a lane of a warp
#define PART (4 / (int)sizeof(element))             // elements of a word
#define MINE (WORDS * PART)                         // elements of a lane
#define AHEAD (WORDS > 4 ? 2 : 4)                   // keys with their values that a warp has in flight
#define KEYS_AHEAD (WORDS > 4 ? 4 : WORDS > 2 ? 8 : 16)  // and keys alone
#define KEYS 64                                     // of a tile of the assignment
#define LISTS 128
#define SLAB 32
#define PAD 4                                       // keeps the lanes of a product on different banks
#define FEW LANES                                   // keys of a tile of the encoding, after a flush
#define MANY (D <= 128 ? 64 : 32)                   // and after a prompt
#define SHEAF (MANY / LANES)                        // pages of such a tile
#define LISTS_EACH 4                               // of a thread that places keys
#define ROWS_AHEAD (WORDS > 4 ? 4 : 8)              // and keys of a tile of the assignment
#define WINDOW 2048                                 // pages of a list that are looked up at a time
#define HEAVY 64                                    // more new keys than this are moved by a whole block
#define TINY 1e-30f

// Counters of a state; the last block of a launch leaves all but STATUS at zero.
enum { STATUS, TICKET, BARRIER, TASKS, HEAVIES, WORK };
enum { NO_PAGES = 1, NO_PLACE = 2, MOVED = 4 };

// Keys of one list that enter in this launch.
struct Task {
    int stream, list;
    int start, count;  // where they stand in the sorted order of the stream
    int old;           // keys that were in the list
    int open, base;    // its last page if that has free lanes; the first of its new pages
    int segment;       // its pages in the list of work if it is coded anew, else -1
    int heavy;         // whether a whole block moves it
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
    const float *forms, *bias;        // (H or S, L, D) and (H or S, L)
    const float *forward, *step, *base;
    const int* widths;
    const double* turns;      // (H, pairs): turns a position of the pairs that the view rotates; null for none
    const float* amplitudes;  // (H, pairs)

    const element *new_keys, *new_values;
    const int* fresh;   // (B,): only so many of the new keys, the last ones, belong to a sequence; null for all
    const int* labels_in;  // (S, M): lists of the entering keys where they are known; null where not
    u64* best;          // (S, M), zero between launches: score and list of each entering key
    int *order, *rows;  // (S, M): entering keys sorted by list, and the row that each went to
    Task* tasks;        // (S * min(M, L))
    int* heavy;         // (S * min(M, L)): tasks for whole blocks
    int2* work;         // (S * (P + 4 L)): stream and page to be coded anew
    int* counters;
    const int* moved;  // how often arrays have moved; `version` when this launch was prepared
    i64* stamps;  // with -DSTAMPS: nanoseconds at the beginning of each phase

    i64 key_batch, key_head, key_token, value_batch, value_head, value_token;  // strides in elements
    int batch, heads, lists, room, ring, sinks, kept, flush, dense_below;
    int words, coded_dimensions, pairs, interleaved, own_forms, most, tokens, tables, version, many;
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
    const int place = p < a.sinks ? p : a.sinks + (p - a.sinks) % a.ring;
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

__device__ __forceinline__ void load_row(const element* row, int lane, u32* words) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const int at = lane + w * WARP;
        words[w] = at < ROW_WORDS ? ((const u32*)row)[at] : 0;
    }
}

__device__ __forceinline__ void store_row(element* row, int lane, const u32* words) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const int at = lane + w * WARP;
        if (at < ROW_WORDS) ((u32*)row)[at] = words[w];
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
    return (lane + mine / PART * WARP) * PART + mine % PART;
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

// All threads of the grid have come here; what they wrote before can be read behind it.
__device__ void grid_barrier(const State& a, u32 target) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = (u32*)a.counters + BARRIER;
        __threadfence();
        atomicAdd(counter, 1u);
        u32 seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < target);
        __threadfence();
    }
    __syncthreads();
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

// x as the sum of two numbers, of which tensor cores take the first as it is and the second to eleven digits.
__device__ __forceinline__ void split(float x, u32& high, u32& low) {
    high = __float_as_uint(x) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
}

// c += a b for a of 16 x 8 and b of 8 x 8.
__device__ __forceinline__ void multiply(float* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Phase 1: the best list of a tile of keys among a tile of lists. Products on tensor cores, of which each takes as
// many digits as float32 has: forms, and keys in float32, in two parts.
__device__ void assign_tile(const State& a, const Plan& plan, int s, int key0, int list0, float* shared) {
    const int m = plan.until - plan.first, h = s % a.heads;
    float* xs = shared;                         // [KEYS][D + PAD]
    float* fs = xs + KEYS * (D + PAD);          // [LISTS][SLAB + PAD]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 own = (i64)(a.own_forms ? s : h) * a.lists;
    float4 held[SLAB * LISTS / 4 / THREADS];
    auto fetch = [&](int k0) {
#pragma unroll
        for (int i = 0; i < SLAB * LISTS / 4 / THREADS; ++i) {
            const int at = threadIdx.x + i * THREADS, list = list0 + at / (SLAB / 4), k = k0 + at % (SLAB / 4) * 4;
            held[i] = list < a.lists && k < D ? __ldg((const float4*)(a.forms + (own + list) * D + k))
                                              : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    };
    fetch(0);
    __syncthreads();
    for (int r0 = warp * ROWS_AHEAD; r0 < KEYS; r0 += WARPS * ROWS_AHEAD) {
        u32 words[ROWS_AHEAD][WORDS] = {};
#pragma unroll
        for (int u = 0; u < ROWS_AHEAD; ++u)
            if (key0 + r0 + u < m) load_row(entering_key(a, plan, s, plan.first + key0 + r0 + u), lane, words[u]);
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int at = element_of(lane, i);
#pragma unroll
            for (int u = 0; u < ROWS_AHEAD; ++u)
                if (at < D) xs[(r0 + u) * (D + PAD) + at] = part_of(words[u][i / PART], i % PART);
        }
    }
    if (a.turns) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * a.pairs; i += THREADS) {
            const int r = i % KEYS, pair = i / KEYS;
            const double turn = (double)(plan.first + key0 + r) * a.turns[h * a.pairs + pair];
            float sine, cosine;
            sincospif(2.f * (float)(turn - rint(turn)), &sine, &cosine);
            const float amplitude = a.amplitudes[h * a.pairs + pair];
            const int one = a.interleaved ? 2 * pair : pair, two = a.interleaved ? one + 1 : pair + a.pairs;
            float *x = xs + r * (D + PAD) + one, *y = xs + r * (D + PAD) + two;
            const float u = *x, v = *y;
            *x = u * (cosine * amplitude) - v * (sine * amplitude);
            *y = v * (cosine * amplitude) + u * (sine * amplitude);
        }
    }
    // A warp has 32 keys and 32 lists; lane 4 g + t has rows g and g + 8 and columns 2 t and 2 t + 1 of each product.
    const bool two_parts = sizeof(element) == 4 || a.turns;
    const int g = lane / 4, t = lane % 4, row0 = warp / 4 * 32, column0 = warp % 4 * 32;
    float acc[2][4][4] = {};
    for (int k0 = 0; k0 < D; k0 += SLAB) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SLAB * LISTS / 4 / THREADS; ++i) {
            const int at = threadIdx.x + i * THREADS;
            *(float4*)(fs + at / (SLAB / 4) * (SLAB + PAD) + at % (SLAB / 4) * 4) = held[i];
        }
        __syncthreads();
        if (k0 + SLAB < D) fetch(k0 + SLAB);
#pragma unroll
        for (int k = 0; k < SLAB; k += 8) {
            if (k0 + k >= D) break;
            u32 high[2][4], low[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* x = xs + (row0 + i * 16 + g + j % 2 * 8) * (D + PAD) + k0 + k + t + j / 2 * 4;
                    split(*x, high[i][j], low[i][j]);
                }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 form[2], rest[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    split(fs[(column0 + j * 8 + g) * (SLAB + PAD) + k + t + i * 4], form[i], rest[i]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (two_parts) multiply(acc[i][j], low[i], form);
                    multiply(acc[i][j], high[i], rest);
                    multiply(acc[i][j], high[i], form);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows row0 + 8 i + g
        u64 best = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int list = list0 + column0 + j / 2 * 8 + 2 * t + j % 2;
            if (list < a.lists) {
                const u32 bits = __float_as_uint(acc[i / 2][j / 2][i % 2 * 2 + j % 2] + __ldg(a.bias + own + list));
                const u32 rank = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
                const u64 found = (u64)rank << 32 | (u32)~list;
                best = found > best ? found : best;
            }
        }
#pragma unroll
        for (int step = 2; step; step >>= 1) {
            const u64 other = __shfl_xor_sync(FULL, best, step);
            best = other > best ? other : best;
        }
        const int key = key0 + row0 + i * 8 + g;
        if (t == 0 && key < m) atomicMax(a.best + (i64)s * a.most + key, best);
    }
}

__device__ __forceinline__ int label_of(const State& a, int s, int i) {
    const i64 at = (i64)s * a.most + i;
    return a.labels_in ? a.labels_in[at] : (int)~(u32)a.best[at];
}

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
    for (int i = tid; i < tables * L; i += THREADS) counts[i] = 0;
    __syncthreads();
    for (int t = 0; t < tables; ++t)
#pragma unroll 4
        for (int i = t * part + tid; i < min(m, (t + 1) * part); i += THREADS)
            atomicAdd(counts + t * L + label_of(a, s, i), 1);
    int sorted = 0, held = a.counts[s];
    for (int j0 = 0; j0 < L; j0 += THREADS * LISTS_EACH) {
        int count[LISTS_EACH], old[LISTS_EACH], coded[LISTS_EACH], open[LISTS_EACH];
        const i64 list = (i64)s * L + j0 + tid * LISTS_EACH;
        u64 mine = 0;
#pragma unroll
        for (int i = 0; i < LISTS_EACH; ++i) {
            const bool there = j0 + tid * LISTS_EACH + i < L;
            old[i] = there ? a.sizes[list + i] : 0;
            coded[i] = there ? a.coded[list + i] : 0;
            open[i] = there ? a.last[list + i] : -1;
        }
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
                const int slot = task.base + q, page = a.free[top - rank - q];
                a.pages[table + slot] = page;
                a.labels[table + slot] = j << 5 | min(LANES, old[i] + count[i] - (full + q) * LANES);
                a.orders[table + slot] = full + q;
                a.before[table + slot] = q ? slot - 1 : open[i];
                a.holders[page] = 1;
            }
            if (more) a.last[list + i] = task.base + more - 1;
            a.sizes[list + i] = old[i] + count[i];
            const bool renewed = old[i] + count[i] >= 2 * coded[i];
            if (renewed) task.segment = 0;
            task.heavy = renewed || count[i] > HEAVY;
            a.tasks[number] = task;
            if (task.heavy) a.heavy[atomicAdd(a.counters + HEAVIES, 1)] = number;
            before += (u64)count[i] | (u64)more << PAGES_AT | 1ull << LISTS_AT;
        }
        sorted += keys_in(all);
        held += pages_in(all);
    }
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

__device__ __forceinline__ int slot_of(const Task& task, int q) {
    const int full = full_pages(task.old);
    return q < full ? task.open : task.base + q - full;
}

// Copy the entering keys of a list into its pages, as warp `w` of `n`, and sum up what this warp has copied.
template <bool RENEWED>
__device__ void copy_in(const State& a, const Plan& plan, const Task& task, int w, int n, double* values, double* keys) {
    const int s = task.stream, lane = threadIdx.x % WARP;
    const int* order = a.order + (i64)s * a.most + task.start;
    for (int j0 = w * AHEAD; j0 < task.count; j0 += n * AHEAD) {
        u32 key[AHEAD][WORDS], value[AHEAD][WORDS];
        int p[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (j0 + u < task.count) {
                p[u] = plan.first + order[j0 + u];
                load_row(entering_key(a, plan, s, p[u]), lane, key[u]);
                load_row(entering_value(a, plan, s, p[u]), lane, value[u]);
            }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (j0 + u < task.count) {
                const int at = task.old + j0 + u;
                const int row = a.pages[(i64)s * a.room + slot_of(task, at / LANES)] * LANES + at % LANES;
                store_row(a.keys + (i64)row * D, lane, key[u]);
                store_row(a.values + (i64)row * D, lane, value[u]);
                if (lane == 0) {
                    a.ids[row] = p[u];
                    a.rows[(i64)s * a.most + task.start + j0 + u] = row;
                }
                add_row(value[u], values);
                if (RENEWED) add_row(key[u], keys);
            }
    }
}

// The sum and the mean of the values of a list after `more` was added; a warp does it.
__device__ void set_mean(const State& a, const Task& task, const double* more) {
    const int lane = threadIdx.x % WARP;
    const i64 list = (i64)task.stream * a.lists + task.list;
    double mean[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int at = element_of(lane, i);
        mean[i] = 0.0;
        if (at < D) {
            const float sum = (float)((double)a.sums[list * D + at] + more[i]);
            a.sums[list * D + at] = sum;
            mean[i] = (double)sum / (double)(task.old + task.count);
        }
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
#pragma unroll 4
        for (int slot0 = threadIdx.x * 4; slot0 < held; slot0 += THREADS * 4) {  // rooms are multiples of 4
            const int4 labels = *(const int4*)(a.labels + table + slot0);
            const int found[4] = {labels.x, labels.y, labels.z, labels.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (found[i] >> 5 == task.list && slot0 + i < held) {
                    const int q = a.orders[table + slot0 + i] - from;
                    if (q >= 0 && q < count && q + from < full) slots[q] = slot0 + i;
                }
        }
    }
    __syncthreads();
    return count;
}

// Phase 3 for a list with many new keys, or one that gets a new anchor, in a block.
__device__ void enter_by_block(const State& a, const Plan* plans, int number, char* shared) {
    double* sums = (double*)shared;                                  // [WARPS][MINE][WARP]
    int* slots = (int*)(shared + WARPS * MINE * WARP * 8);           // [WINDOW]
    int* fresh = slots + WINDOW;                                     // [WINDOW]
    int* failed = fresh + WINDOW;                                    // and where the work begins
    const Task task = a.tasks[number];
    const int s = task.stream, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 list = (i64)s * a.lists + task.list;
    double values[MINE] = {}, keys[MINE] = {};
    const int pages = full_pages(task.old + task.count), full = full_pages(task.old);
    bool renewed = task.segment >= 0;
    for (int from = 0; renewed && from < full; from += WINDOW) {
        const int count = look_up(a, task, from, slots);
        renewed = own_pages(a, s, slots, min(count, full - from), fresh, failed);
    }
    if (renewed) {
        copy_in<true>(a, plans[s / a.heads], task, warp, WARPS, values, keys);
        const int sheaves = (pages + SHEAF - 1) / SHEAF * SHEAF;
        if (threadIdx.x == 0) failed[1] = atomicAdd(a.counters + WORK, sheaves);
        __syncthreads();
        for (int from = 0; from < pages; from += WINDOW) {
            // They stand there from before where one look was enough.
            const int count = full && pages <= WINDOW ? pages : look_up(a, task, from, slots);
            for (int q = threadIdx.x; q < count; q += THREADS) a.work[failed[1] + from + q] = make_int2(s, slots[q]);
            for (int q = pages + threadIdx.x; q < sheaves; q += THREADS) a.work[failed[1] + q] = make_int2(-1, 0);
            for (int q = threadIdx.x; q < count; q += THREADS) fresh[q] = a.pages[(i64)s * a.room + slots[q]];
            __syncthreads();
            const int end = min(task.old - from * LANES, count * LANES);
            for (int j0 = warp * KEYS_AHEAD; j0 < end; j0 += WARPS * KEYS_AHEAD) {
                u32 key[KEYS_AHEAD][WORDS];
#pragma unroll
                for (int u = 0; u < KEYS_AHEAD; ++u)
                    if (j0 + u < end)
                        load_row(a.keys + ((i64)fresh[(j0 + u) / LANES] * LANES + (j0 + u) % LANES) * D, lane, key[u]);
#pragma unroll
                for (int u = 0; u < KEYS_AHEAD; ++u)
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
    if (warp == 0) set_mean(a, task, values);
    if (threadIdx.x == 0) a.tasks[number].segment = renewed ? failed[1] : -1;
    __syncthreads();
}

// A list that has its anchor from this very launch has as many keys as then.
__device__ __forceinline__ bool is_renewed(const State& a, i64 list) { return a.coded[list] == a.sizes[list]; }

// Phase 4: codes of up to ROWS keys of a stream, of which thread `r` of the first ROWS names list and row.
template <int ROWS>
__device__ void encode_tile(const State& a, int s, int list, int row, float* shared) {
    float* xs = shared;                      // [D][ROWS + 4]
    float* ys = xs + D * (ROWS + 4);         // [ROWS][R + 1]
    __shared__ int listed[MANY], rows[MANY];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, R = a.coded_dimensions, h = s % a.heads;
    __syncthreads();
    if (threadIdx.x < ROWS) {
        listed[threadIdx.x] = list;
        rows[threadIdx.x] = row;
    }
    if (!__syncthreads_or(threadIdx.x < ROWS && row >= 0)) return;
    constexpr int OWN = ROWS / WARPS;  // rows of a warp
    constexpr int FLIGHT = OWN < KEYS_AHEAD / 2 ? OWN : KEYS_AHEAD / 2;
#pragma unroll 1
    for (int r0 = warp; r0 < ROWS; r0 += FLIGHT * WARPS) {
        u32 words[FLIGHT][WORDS] = {};
        i8 anchor[FLIGHT][MINE] = {};
        float scale[FLIGHT] = {};
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
            const int r = r0 + u * WARPS;
            const i64 at = (i64)s * a.lists + listed[r];
            if (rows[r] < 0) continue;
            load_row(a.keys + (i64)rows[r] * D, lane, words[u]);
            scale[u] = a.anchor_scales[at];
#pragma unroll
            for (int i = 0; i < MINE; ++i)
                if (element_of(lane, i) < D) anchor[u][i] = a.anchors[at * D + element_of(lane, i)];
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u)
#pragma unroll
            for (int i = 0; i < MINE; ++i) {
                const int e = element_of(lane, i);
                if (e < D)
                    xs[e * (ROWS + 4) + r0 + u * WARPS] =
                        __fsub_rn(part_of(words[u][i / PART], i % PART), __fmul_rn((float)anchor[u][i], scale[u]));
            }
    }
    int fields = 0;
    for (int w = 0; w < a.words; ++w) fields += 32 / a.widths[h * a.words + w];
    fields = min(fields, R);
    __syncthreads();
    const int c = threadIdx.x % 64, group = threadIdx.x / 64;
    for (int c0 = c; c0 < fields; c0 += 64) {
        float acc[ROWS / 4] = {};
        const float* forward = a.forward + (i64)h * D * R + c0;
#pragma unroll 16
        for (int k = 0; k < D; ++k) {
            const float f = __ldg(forward + k * R);
#pragma unroll
            for (int i = 0; i < ROWS / 4; i += 4) {
                const float4 x = *(const float4*)(xs + k * (ROWS + 4) + group * (ROWS / 4) + i);
                acc[i] = fmaf(f, x.x, acc[i]);
                acc[i + 1] = fmaf(f, x.y, acc[i + 1]);
                acc[i + 2] = fmaf(f, x.z, acc[i + 2]);
                acc[i + 3] = fmaf(f, x.w, acc[i + 3]);
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS / 4; ++i) ys[(group * (ROWS / 4) + i) * (R + 1) + c0] = acc[i];
    }
    __syncthreads();
    const int owned = lane < OWN ? rows[warp + lane * WARPS] : -1;  // of which this lane stores the code
    float norm[OWN], product[OWN], length[OWN];
#pragma unroll
    for (int u = 0; u < OWN; ++u) {
        const float* y = ys + (warp + u * WARPS) * (R + 1);
        float square = 0.f;
        for (int i = lane; i < fields; i += WARP) square = fmaf(y[i], y[i], square);
        norm[u] = square;
        product[u] = length[u] = 0.f;
    }
#pragma unroll
    for (int u = 0; u < OWN; ++u) norm[u] = fmaxf(sqrtf(warp_sum(norm[u])), TINY);
    int begin = 0;
    for (int w = 0; w < a.words; ++w) {
        const int bits = a.widths[h * a.words + w], count = 32 / bits, i = begin + lane;
        const bool mine = lane < count && i < fields;
        const float high = (float)((1 << bits) - 1), step = mine ? a.step[h * R + i] : 0.f;
        u32 packed = 0;  // of the row `owned`
#pragma unroll
        for (int u = 0; u < OWN; ++u) {
            u32 field = 0;
            if (mine) {
                const float y = ys[(warp + u * WARPS) * (R + 1) + i];
                const float spot = step > 0.f ? __fadd_rn(__fdiv_rn(__fdiv_rn(y, norm[u]), step), high / 2) : 0.f;
                const float rounded = fminf(fmaxf(rintf(spot), 0.f), high);
                const float level = (rounded - high / 2) * step;
                product[u] = fmaf(y, level, product[u]);
                length[u] = fmaf(level, level, length[u]);
                field = (u32)rounded << (8 * (lane % 4) + bits * (lane / 4));
            }
            field = __reduce_or_sync(FULL, field);
            if (lane == u) packed = field;
        }
        if (owned >= 0) a.codes[((i64)(owned / LANES) * a.words + w) * LANES + owned % LANES] = packed;
        begin += count;
    }
    float scale = 0.f;  // of the row `owned`
#pragma unroll
    for (int u = 0; u < OWN; ++u) {
        const float found = warp_sum(product[u]) / fmaxf(warp_sum(length[u]), TINY);
        if (lane == u) scale = fmaxf(found, TINY);
    }
    if (owned >= 0) {
        const float exponent = rintf(16.f * log2f(__fdiv_rn(scale, a.base[h]))) + 128.f;
        a.exponents[owned] = (u8)(int)fminf(fmaxf(exponent, 0.f), 255.f);
    }
}

// All of phase 4: entering keys whose lists keep their anchors, then the pages of lists that have new ones.
template <int ROWS>
__device__ void encode(const State& a, const Plan* plans, int streams, float* shared) {
    const int tid = threadIdx.x, blocks = gridDim.x;
    int skip = blockIdx.x;  // tiles until the next one of this block
    for (int s = 0; s < streams; ++s) {
        const int m = plans[s / a.heads].until - plans[s / a.heads].first, tiles = (m + ROWS - 1) / ROWS;
        for (; skip < tiles; skip += blocks) {
            const int j = skip * ROWS + tid;
            int list = 0, row = -1;
            if (tid < ROWS && j < m) {
                list = label_of(a, s, a.order[(i64)s * a.most + j]);
                if (!is_renewed(a, (i64)s * a.lists + list)) row = a.rows[(i64)s * a.most + j];
            }
            encode_tile<ROWS>(a, s, list, row, shared);
        }
        skip -= tiles;
    }
    const int sheaf = ROWS / LANES, sheaves = a.counters[WORK] / sheaf;
    for (; skip < sheaves; skip += blocks) {
        const int s = a.work[skip * sheaf].x;
        if (s < 0) continue;
        int list = 0, row = -1;
        if (tid < ROWS) {
            const int2 work = a.work[skip * sheaf + tid / LANES];
            const i64 slot = (i64)s * a.room + work.y;
            if (work.x >= 0) {
                const int label = a.labels[slot];
                list = label >> 5;
                if (tid % LANES < (label & 31)) row = a.pages[slot] * LANES + tid % LANES;
            }
        }
        encode_tile<ROWS>(a, s, list, row, shared);
    }
}

__device__ __forceinline__ double squared_scale(const State& a, int h, int row) {
    const float f = __fmul_rn(a.base[h], exp2f(((float)a.exponents[row] - 128.f) / 16.f));
    return (double)__fmul_rn(f, f);
}

// Phase 5: the squared scales of the codes of a list; a warp does it.
__device__ void add_squares(const State& a, const Task& task) {
    const int s = task.stream, h = s % a.heads, lane = threadIdx.x % WARP;
    const i64 list = (i64)s * a.lists + task.list;
    double sum = 0.0;
    if (task.segment < 0) {
        for (int j = lane; j < task.count; j += WARP)
            sum += squared_scale(a, h, a.rows[(i64)s * a.most + task.start + j]);
    } else {
        for (int j = lane; j < task.old + task.count; j += WARP) {
            const int page = a.pages[(i64)s * a.room + a.work[task.segment + j / LANES].y];
            sum += squared_scale(a, h, page * LANES + j % LANES);
        }
    }
#pragma unroll
    for (int step = WARP / 2; step; step >>= 1) sum += __shfl_xor_sync(FULL, sum, step);
    if (lane == 0) a.squares[list] = (task.segment < 0 ? a.squares[list] : 0.f) + (float)sum;
}

// Copy the new keys that stay near into the ring, as warp `w` of `n`.
__device__ void store_near(const State& a, const Plan* plans, int w, int n) {
    const int lane = threadIdx.x % WARP;
    for (i64 i = w; i < (i64)a.batch * a.heads * a.tokens; i += n) {
        const int s = (int)(i / a.tokens), t = (int)(i % a.tokens);
        const Plan& plan = plans[s / a.heads];
        const int p = plan.old + t - skipped(a, plan);
        if (p < plan.old || (p < plan.until && p >= a.sinks)) continue;
        u32 key[WORDS], value[WORDS];
        load_row(new_key(a, s, t), lane, key);
        load_row(new_value(a, s, t), lane, value);
        const i64 row = near_row(a, s, p);
        store_row(a.near_keys + row, lane, key);
        store_row(a.near_values + row, lane, value);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) append(const State a) {
    extern __shared__ __align__(16) char shared[];
    __shared__ int needed, last;
    Plan* plans = (Plan*)shared;
    char* rest = shared + (a.batch * (int)sizeof(Plan) + 15) / 16 * 16;
    const int tid = threadIdx.x, blocks = gridDim.x, streams = a.batch * a.heads;
    const int warp = blockIdx.x * WARPS + tid / WARP, warps = blocks * WARPS;
    int due = 0;
    if (tid == 0) needed = 0;
    for (int b = tid; b < a.batch; b += THREADS) {
        plans[b] = plan_of(a, b);
        due |= plans[b].until > plans[b].first;
    }
    if (*a.moved != a.version) {  // a graph that was captured before: what it knows of is gone
        if (blockIdx.x == 0 && tid == 0) atomicOr(a.counters + STATUS, MOVED);
        return;
    }
    due = __syncthreads_or(due);
    if (due) {
        // Room for the most that it may need, or no flush at all: a flush cannot stop halfway.
        int full = 0;
        for (int s = tid; s < streams; s += THREADS) {
            const Plan& plan = plans[s / a.heads];
            const int pages = most_pages(a, plan.until - plan.first);
            if (pages) atomicAdd(&needed, pages);
            full |= a.counts[s] + pages > a.room;
        }
        full = __syncthreads_or(full) || needed > *a.available;
        if (full) {
            for (int b = tid; b < a.batch; b += THREADS) plans[b].until = plans[b].first;
            if (blockIdx.x == 0 && tid == 0) atomicOr(a.counters + STATUS, NO_PAGES);
            due = 0;
        }
        __syncthreads();
    }
    for (int b = tid; b < a.batch; b += THREADS)
        if (plans[b].now - plans[b].until > a.ring) {
            plans[b].now = plans[b].old;  // what has no place is lost, and the host will hear of it
            if (blockIdx.x == 0) atomicOr(a.counters + STATUS, NO_PLACE);
        }
    __syncthreads();
    STAMP(0);
    if (due) {
        u32 target = blocks;
        if (!a.labels_in) {
            const int columns = (a.lists + LISTS - 1) / LISTS;
            int skip = blockIdx.x;  // tiles until the next one of this block
            for (int s = 0; s < streams; ++s) {
                const Plan& plan = plans[s / a.heads];
                const int tiles = (plan.until - plan.first + KEYS - 1) / KEYS * columns;
                for (; skip < tiles; skip += blocks)
                    assign_tile(a, plan, s, skip / columns * KEYS, skip % columns * LISTS, (float*)rest);
                skip -= tiles;
            }
        }
        grid_barrier(a, target);  // every block has seen the counters that the next phase changes
        target += blocks;
        STAMP(1);
        for (int s = blockIdx.x; s < streams; s += blocks)
            if (plans[s / a.heads].until > plans[s / a.heads].first) place(a, plans[s / a.heads], s, rest);
        grid_barrier(a, target);
        target += blocks;

        STAMP(2);
        const int heavies = a.counters[HEAVIES], tasks = a.counters[TASKS];
        for (int i = blockIdx.x; i < heavies; i += blocks) enter_by_block(a, plans, a.heavy[i], rest);
        const int spared = heavies < blocks / 2 ? heavies : 0;  // blocks that have enough to do
        for (int i = warp - spared * WARPS; i >= 0 && i < tasks; i += warps - spared * WARPS) {
            const Task task = a.tasks[i];
            if (task.heavy) continue;
            double values[MINE] = {};
            copy_in<false>(a, plans[task.stream / a.heads], task, 0, 1, values, values);
            set_mean(a, task, values);
        }
        grid_barrier(a, target);
        target += blocks;

        STAMP(3);
        if (a.many)
            encode<MANY>(a, plans, streams, (float*)rest);
        else
            encode<FEW>(a, plans, streams, (float*)rest);
        grid_barrier(a, target);
        STAMP(4);
        for (int i = warp; i < tasks; i += warps) add_squares(a, a.tasks[i]);
        if (!a.labels_in)
            for (i64 i = (i64)blockIdx.x * THREADS + tid; i < (i64)streams * a.most; i += (i64)blocks * THREADS) {
                const Plan& plan = plans[i / a.most / a.heads];
                if (i % a.most < plan.until - plan.first) a.best[i] = 0;
            }
    }
    STAMP(5);

    // The last block to come here changes what all have read by now: the lengths, and the counters of a flush.
    __syncthreads();
    if (tid == 0) last = atomicAdd(a.counters + TICKET, 1) == blocks - 1;
    store_near(a, plans, warp, warps);
    __syncthreads();
    if (!last) return;
    for (int b = tid; b < a.batch; b += THREADS) {
        a.lengths[b] = plans[b].now;
        a.first[b] = plans[b].until;
    }
    if (tid >= TICKET && tid <= WORK) a.counters[tid] = 0;
}
