// Estimates of the rest, and the merging of what warps and blocks found.

// Take the largest near logit as the reference: estimates up to it are below the bound. Without it none is known
// to be, and weights are taken relative to the norm.
__device__ __forceinline__ void find_reference(const Step& p, Shared& s, const u32* counters) {
    if (threadIdx.x < G) {
        const int g = threadIdx.x;
        const float known = unordered(__ldcg(counters + NEAREST + g));
        s.reference[g] = known;
        s.basis[g] = known > -INFINITE ? known : s.norm[g];
        s.bound[g] = INFINITE;
        s.lift[g] = exponential(fminf(fmaxf(s.norm[g] - s.basis[g], -80.f), 80.f));
    }
    __syncthreads();
}

// Estimates count for no more than the largest exact logit.
__device__ void find_bounds(Shared& s, const u32* counters) {
    if (threadIdx.x < G) {
        const u32 largest = max(__ldcg(counters + LARGEST + threadIdx.x), __ldcg(counters + NEAREST + threadIdx.x));
        s.bound[threadIdx.x] = largest ? unordered(largest) : INFINITE;
    }
    __syncthreads();
}

// Products of small matrices: (16, 8) with (8, 8), of floats that are rounded to ten digits.
__device__ __forceinline__ void multiply_floats(float* c, const float* a, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Add the mean values of this block's share of the lists, with the weight of their keys that were visited and not
// kept, and of those that were not visited: on tensor cores, weights in two parts. A warp takes eight dimensions, and
// warps share the lists where there are warps enough. Sums go to `sums`, (SHARES, G, D), those of weights to `totals`.
#define SLICES (D / 8)
#define SHARES (WARPS / SLICES > 1 ? WARPS / SLICES : 1)
__device__ __forceinline__ void add_means(
    const Step& p, Shared& s, const Part& part, const int* taken, float* sums, float* totals
) {
    float* weights = (float*)s.rows;
    const int most = QUEUE / (G + 1) / 8 * 8, end = part.last_list;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
    const i64 lists = (i64)part.stream * p.lists;
#pragma unroll 1
    for (int start = part.first_list, turn = 0; start < end || !turn; start += most, ++turn) {
        const int count = min(most, end - start), padded = (count + 7) / 8 * 8;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < padded; i += THREADS) {
            Group weight = {};
            const int list = start + i;
            if (i < count) {
                float* mass = p.masses + ((i64)part.unit * p.lists + list) * G;
                weight = rest_of_list(p, s, part, list, taken[list]);
                if (p.refine) {
                    const Group more = load_group(mass), none = {};
                    store_group(mass, none.x);  // as the next step expects it
#pragma unroll
                    for (int g = 0; g < G; ++g) weight.x[g] += more.x[g];
                }
            }
            store_group(weights + i * G, weight.x);
            weights[most * G + i] = i < count ? p.mean_scales[lists + list] : 0.f;
        }
        __syncthreads();
#pragma unroll 1
        for (int item = warp; item < SHARES * SLICES; item += WARPS) {
            const int share = item / SLICES, d = item % SLICES * 8;
            float products[4] = {};
#pragma unroll 4
            for (int l = 8 * share; l < padded; l += 8 * SHARES) {
                float a[4], b[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int one = l + quarter + 4 * i;
                    const float x = head < G ? weights[one * G + head] * weights[most * G + one] : 0.f;
                    a[2 * i] = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
                    a[2 * i + 1] = x - a[2 * i];
                    b[i] = (float)p.means[(lists + min(start + one, p.lists - 1)) * D + d + head];
                }
                multiply_floats(products, a, b[0], b[1]);
            }
            if (head < G) {
                float* at = sums + (share * G + head) * D + d + 2 * quarter;
                const float x = products[0] + products[2], y = products[1] + products[3];
                at[0] = turn ? at[0] + x : x, at[1] = turn ? at[1] + y : y;
            }
        }
#pragma unroll 1
        for (int g = warp; g < G; g += WARPS) {
            float sum = 0.f;
#pragma unroll 1
            for (int l = lane; l < count; l += WARP) sum += weights[l * G + g];
            sum = warp_sum(sum);
            if (lane == 0) totals[g] = turn ? totals[g] + sum : sum;
        }
    }
    __syncthreads();
}

// Merge what the warps of a block found, with `shares` sums of means, and leave it where the last block of the unit
// finds it.
__device__ __forceinline__ void reduce_block(
    const Step& p, Shared& s, const Part& part, Partial& mine, float* reduction, const float* sums, const float* totals, int shares
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4;
    if (head < G && lane % 4 == 0) s.reduced[warp][head] = mine.reference;
    __syncthreads();
    float top = shares ? s.basis[min(head, G - 1)] : -INFINITE;
#pragma unroll 4
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, s.reduced[w][min(head, G - 1)]);
    refer(mine, top > -INFINITE ? top : 0.f);
    mine.sum += __shfl_xor_sync(FULL, mine.sum, 1);
    mine.sum += __shfl_xor_sync(FULL, mine.sum, 2);
    float* own = reduction + warp * G * (D + 1) + head * (D + 1);
    if (head < G) {
        if (warp == 0 && lane % 4 == 0) {
            s.reference[head] = top;
            s.lift[head] = shares ? exponential(s.basis[head] - top) : 0.f;
        }
        if (lane % 4 == 0) own[D] = mine.sum;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int d = 8 * i + lane % 4 * 2;
            if (d < D) own[d] = mine.out[i][0] + mine.out[i][2], own[d + 1] = mine.out[i][1] + mine.out[i][3];
        }
    }
    __syncthreads();
    float* left = p.partial + ((i64)part.unit * part.blocks + part.block) * G * (D + 2);
#pragma unroll 1
    for (int i = threadIdx.x; i < G * (D + 1); i += THREADS) {
        const int g = i / (D + 1), d = i % (D + 1);
        float sum = 0.f, more = 0.f;
#pragma unroll 8
        for (int w = 0; w < WARPS; ++w) sum += reduction[w * G * (D + 1) + i];
        if (shares) {
            if (d == D) more = totals[g];
            else
#pragma unroll 1
                for (int share = 0; share < shares; ++share) more += sums[(share * G + g) * D + d];
            sum = fmaf(more, s.lift[g], sum);
        }
        left[g * (D + 2) + d] = sum;
    }
    if (threadIdx.x < G) left[threadIdx.x * (D + 2) + D + 1] = s.reference[threadIdx.x];
}
// Merge what the blocks of a unit found, and write the result.
__device__ void merge_blocks(const Step& p, Shared& s, const Part& part, float* weights) {
    const float* parts = p.partial + (i64)part.unit * part.blocks * G * (D + 2);
#pragma unroll 1
    for (int g = threadIdx.x / WARP; g < G; g += WARPS) {
        const int lane = threadIdx.x % WARP;
        float peak = -INFINITE, sum = 0.f;
#pragma unroll 1
        for (int b = lane; b < part.blocks; b += WARP) peak = fmaxf(peak, __ldcg(parts + (b * G + g) * (D + 2) + D + 1));
        peak = warp_max(peak);
#pragma unroll 1
        for (int b = lane; b < part.blocks; b += WARP) {
            const float* one = parts + (b * G + g) * (D + 2);
            const float weight = peak > -INFINITE ? exponential(__ldcg(one + D + 1) - peak) : 0.f;
            weights[b * G + g] = weight;
            sum = fmaf(weight, __ldcg(one + D), sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            s.bound[g] = sum > 0.f ? 1.f / sum : 0.f;
            p.lse[(i64)part.unit * G + g] = sum > 0.f ? peak + logf(sum) : -INFINITE;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < G * D; i += THREADS) {
        const int g = i / D;
        float out = 0.f;
#pragma unroll 8  // all that is needed is asked for at once: nobody else is at work any more
        for (int b = 0; b < part.blocks; ++b)
            out = fmaf(weights[b * G + g], __ldcg(parts + (b * G + g) * (D + 2) + i % D), out);
        store_out(p.out, (i64)part.unit * G * D + i, out * s.bound[g]);
    }
}
