// Phases 4 and 5 of a flush: codes of keys that entered, or whose list has a new anchor; squared scales.

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
#pragma unroll
    for (int r0 = warp; r0 < ROWS; r0 += 2 * WARPS) {
        u32 words[2][WORDS] = {};
        i8 anchor[2][MINE] = {};
        float scale[2] = {};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
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
        for (int u = 0; u < 2; ++u)
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
    for (int r = warp; r < ROWS; r += WARPS) {
        if (rows[r] < 0) continue;
        const float* y = ys + r * (R + 1);
        float square = 0.f;
        for (int i = lane; i < fields; i += WARP) square = fmaf(y[i], y[i], square);
        const float norm = fmaxf(sqrtf(warp_sum(square)), TINY);
        const i64 page = rows[r] / LANES, place = rows[r] % LANES;
        float product = 0.f, length = 0.f;
        int begin = 0;
        for (int w = 0; w < a.words; ++w) {
            const int bits = a.widths[h * a.words + w], count = 32 / bits, i = begin + lane;
            u32 field = 0;
            if (lane < count && i < fields) {
                const float high = (float)((1 << bits) - 1), step = a.step[h * R + i];
                const float spot = step > 0.f ? __fadd_rn(__fdiv_rn(__fdiv_rn(y[i], norm), step), high / 2) : 0.f;
                const float rounded = fminf(fmaxf(rintf(spot), 0.f), high);
                const float level = (rounded - high / 2) * step;
                product = fmaf(y[i], level, product);
                length = fmaf(level, level, length);
                field = (u32)rounded << (8 * (lane % 4) + bits * (lane / 4));
            }
            field = __reduce_or_sync(FULL, field);
            if (lane == 0) a.codes[(page * a.words + w) * LANES + place] = field;
            begin += count;
        }
        const float scale = fmaxf(warp_sum(product) / fmaxf(warp_sum(length), TINY), TINY);
        const float exponent = rintf(16.f * log2f(__fdiv_rn(scale, a.base[h]))) + 128.f;
        if (lane == 0) a.exponents[rows[r]] = (u8)(int)fminf(fmaxf(exponent, 0.f), 255.f);
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
