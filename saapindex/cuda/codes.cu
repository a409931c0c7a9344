// Transform codes of residuals: see AttentionOps.encode. Compiled with -DCOLUMNS=ceil(R / 32), 1 to 8.

#define WARPS 8
#define ROWS 8    // of a warp
#define DEPTH 16  // dimensions held at once
#define TINY 1e-30f

// Grid (ceil(n / (WARPS * ROWS)), heads), WARPS * WARP threads. Residuals are (heads, n, d), forward is (heads, d, r).
// A lane holds every 32nd column of the rows of its warp.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, COLUMNS <= 4 ? 2 : 1)
encode(const float* __restrict__ residuals, const float* __restrict__ forward, const float* __restrict__ step,
       const i64* __restrict__ widths, const float* __restrict__ base, u32* __restrict__ words, u8* __restrict__ exponents,
       int n, int d, int r, int w) {
    __shared__ float4 left[WARPS * ROWS][DEPTH / 4];
    __shared__ float right[DEPTH][COLUMNS * WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 head = blockIdx.y;
    const int first = blockIdx.x * WARPS * ROWS;
    residuals += head * n * d;
    forward += head * d * r;
    float y[ROWS][COLUMNS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) y[i][j] = 0.f;
    // What comes next is on its way while what is here is used.
    float next_left[ROWS * DEPTH / WARP], next_right[DEPTH * COLUMNS / WARPS];
    const auto fetch = [&](int start) {
#pragma unroll
        for (int i = 0; i < ROWS * DEPTH / WARP; ++i) {
            const int place = threadIdx.x + i * WARPS * WARP, row = first + place / DEPTH, k = start + place % DEPTH;
            next_left[i] = row < n && k < d ? residuals[(i64)row * d + k] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < DEPTH * COLUMNS / WARPS; ++i) {
            const int place = threadIdx.x + i * WARPS * WARP;
            const int k = start + place / (COLUMNS * WARP), column = place % (COLUMNS * WARP);
            next_right[i] = k < d && column < r ? forward[(i64)k * r + column] : 0.f;
        }
    };
    fetch(0);
    for (int start = 0; start < d; start += DEPTH) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS * DEPTH / WARP; ++i) {
            const int place = threadIdx.x + i * WARPS * WARP;
            ((float*)left[place / DEPTH])[place % DEPTH] = next_left[i];
        }
#pragma unroll
        for (int i = 0; i < DEPTH * COLUMNS / WARPS; ++i) {
            const int place = threadIdx.x + i * WARPS * WARP;
            right[place / (COLUMNS * WARP)][place % (COLUMNS * WARP)] = next_right[i];
        }
        __syncthreads();
        if (start + DEPTH < d) fetch(start + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH; k += 4) {
            float4 x[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) x[i] = left[warp * ROWS + i][k / 4];
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                float f[4];
#pragma unroll
                for (int l = 0; l < 4; ++l) f[l] = right[k + l][j * WARP + lane];
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    y[i][j] = fmaf(x[i].x, f[0], y[i][j]);
                    y[i][j] = fmaf(x[i].y, f[1], y[i][j]);
                    y[i][j] = fmaf(x[i].z, f[2], y[i][j]);
                    y[i][j] = fmaf(x[i].w, f[3], y[i][j]);
                }
            }
        }
    }
    // Where the field of each column lies.
    int word[COLUMNS], shift[COLUMNS], bits[COLUMNS];
    float steps[COLUMNS], turn[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        int local = lane + WARP * j;
        bits[j] = 0, word[j] = -1, shift[j] = 0;
        for (int i = 0; i < w; ++i) {
            const int width = (int)widths[head * w + i];
            if (!bits[j] && local < WARP / width) {
                bits[j] = width, word[j] = i;
                shift[j] = 8 * (local % 4) + width * (local / 4);
            }
            local -= WARP / width;
        }
        if (lane + WARP * j >= r) bits[j] = 0, word[j] = -1;
        steps[j] = bits[j] ? step[head * r + lane + WARP * j] : 0.f;
        turn[j] = steps[j] > 0.f ? 1.f / steps[j] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = first + warp * ROWS + i;
        if (row >= n) break;
        float norm = 0.f;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
            if (bits[j]) norm = fmaf(y[i][j], y[i][j], norm);
        const float inverse = 1.f / fmaxf(sqrtf(warp_sum(norm)), TINY);
        float along = 0.f, square = 0.f;
        u32 fields[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            const float high = (float)((1 << bits[j]) - 1);
            float field = 0.f;
            if (steps[j] > 0.f) field = fminf(fmaxf(rintf(y[i][j] * (inverse * turn[j]) + high / 2), 0.f), high);
            const float level = (field - high / 2) * steps[j];
            along = fmaf(y[i][j], level, along);
            square = fmaf(level, level, square);
            fields[j] = (u32)field << shift[j];
        }
        const float scale = warp_sum(along) / fmaxf(warp_sum(square), TINY);
        const i64 place = head * n + row;
        for (int k = 0; k < w; ++k) {
            u32 mine = 0;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                if (word[j] == k) mine |= fields[j];
            const u32 all = __reduce_or_sync(FULL, mine);
            if (lane == 0) words[place * w + k] = all;
        }
        if (lane == 0) {
            const float exponent = rintf(16 * log2f(fmaxf(scale, TINY) / base[head])) + 128;
            exponents[place] = (u8)fminf(fmaxf(exponent, 0.f), 255.f);
        }
    }
}
