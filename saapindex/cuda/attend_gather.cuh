// Gather rows to attend to: near keys, whole lists, or those that were chosen by their codes, and attend to them.

#define STASH (PARTS * 8 * G + 2 * WARP)  // floats of a warp's stashed result, see `stash`

// Fetch the keys and values of the gathered rows `start : start + TILE`; the last one again in the place of those
// that are missing. Rows below zero stand for places of near keys.
__device__ __forceinline__ void fetch_tile(const Step& p, const Shared& s, const Part& part, u8* tile, int start) {
    const int lane = threadIdx.x % WARP, last = s.gathered - 1;
    const i64 near = (i64)part.stream * (p.sinks + p.ring);
#pragma unroll 4
    for (int c = lane; c < TILE * VECTORS; c += WARP) {
        const int r = c / VECTORS, v = c % VECTORS, row = s.rows[min(start + r, last)];
        const i64 offset = (row < 0 ? near - 1 - row : (i64)row) * D + v * VECTOR;
        copy_16(tile + r * PITCH + 16 * v, (row < 0 ? p.near_keys : p.keys) + offset);
        copy_16(tile + (TILE + r) * PITCH + 16 * v, (row < 0 ? p.near_values : p.values) + offset);
    }
#if D % 16
    const int missing = (STEPS * 16 - D) / VECTOR;
    for (int c = lane; c < 2 * TILE * missing; c += WARP)
        *(uint4*)(tile + c / missing * PITCH + 16 * (VECTORS + c % missing)) = make_uint4(0, 0, 0, 0);
#endif
}

// Attend to the rows that were gathered; `fetched` where the first tile of each warp is on its way already.
__device__ __forceinline__ void attend_gathered(
    const Step& p, Shared& s, const Part& part, Partial& mine, u8* tiles, bool fetched
) {
    const int warp = threadIdx.x / WARP, count = s.gathered;
    u8* tile = tiles + warp * TILE_BYTES;
#pragma unroll 1
    for (int start = warp * TILE; start < count; start += WARPS * TILE) {
        if (!fetched) fetch_tile(p, s, part, tile, start);
        fetched = false;
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        attend_tile(p, s, mine, tile, count - start);
        __syncwarp();
    }
    __syncthreads();
    if (threadIdx.x == 0) s.gathered = 0;
    __syncthreads();
}

// Put aside what was found, and take it up again: registers are scarce in between.
__device__ __forceinline__ void stash(const Partial& mine, float* all) {
    const int lane = threadIdx.x % WARP;
    float* own = all + threadIdx.x / WARP * STASH;
    own[lane] = mine.reference;
    own[WARP + lane] = mine.sum;
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
        if (lane < 4 * G)
            *(float2*)(own + 2 * WARP + (i * 4 * G + lane) * 2) =
                make_float2(mine.out[i][0] + mine.out[i][2], mine.out[i][1] + mine.out[i][3]);
}
__device__ __forceinline__ void take_up(Partial& mine, const float* all) {
    const int lane = threadIdx.x % WARP;
    const float* own = all + threadIdx.x / WARP * STASH;
    clear(mine);
    mine.reference = own[lane];
    mine.sum = own[WARP + lane];
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
        if (lane < 4 * G) {
            const float2 two = *(const float2*)(own + 2 * WARP + (i * 4 * G + lane) * 2);
            mine.out[i][0] = two.x, mine.out[i][1] = two.y;
        }
}

// Tell all blocks the largest logit of each head.
__device__ __forceinline__ void publish_peaks(const Partial& mine, u32* own, u32* all) {
    const int head = threadIdx.x % WARP / 4;
    if (head < G && mine.peak > -INFINITE) atomicMax(own + head, ordered(mine.peak));
    __syncthreads();
    if (threadIdx.x < G && own[threadIdx.x]) atomicMax(all + threadIdx.x, own[threadIdx.x]);
}

// Gather this block's share of the sinks and the recent keys that the query sees, from the `start`-th on; returns
// where it stopped for want of room. Rows below zero stand for places of near keys.
__device__ __forceinline__ int gather_near(const Step& p, Shared& s, int start, int end, int first, int position) {
    const int sinks = min(p.sinks, position + 1), recent = max(first, p.sinks), count = min(end - start, QUEUE);
    const int turned = (u32)(recent - p.sinks) % (u32)p.ring;  // where the first recent key is in the ring
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        s.rows[i] = -1 - near_place(p, start + i, sinks, turned);
    }
    if (threadIdx.x == 0) s.gathered = max(count, 0);
    __syncthreads();
    return start + count;
}

// Gather the keys of whole pages, from this block's `start`-th page on: of visited lists, or everything up to the
// position of the query. Returns where it stopped for want of room.
__device__ __forceinline__ int gather_whole(
    const Step& p, Shared& s, const Part& part, const int* taken, bool everything, int position, int start
) {
    const i64 row = (i64)part.stream * p.most_pages;
    const int end = min(part.pages, start + QUEUE / LANES);
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - start) * LANES; i += THREADS) {
        const int page = part.page(start + i / LANES), label = p.labels[row + page], lane = i % LANES;
        if (lane >= (label & 31)) continue;
        if (!everything && p.orders[row + page] * LANES + lane >= taken[label >> 5]) continue;
        const int at = p.pages[row + page] * LANES + lane;
        if (everything && p.ids[at] > position) continue;
        if (p.bits) {
            const int id = p.ids[at];
            atomicOr(p.bits + (i64)part.unit * p.width + (id >> 5), 1u << (id & 31));
        } else {
            s.rows[atomicAdd(&s.gathered, 1)] = at;
        }
    }
    __syncthreads();
    return end;
}

// Gather rows that `cut` left, from the `start`-th on.
__device__ __forceinline__ int gather_rows(const Step& p, Shared& s, const Part& part, int start, int end) {
    const int count = min(end - start, QUEUE);
    const int* rows = p.rows + part.first_place - part.block * part.places + start;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) s.rows[i] = __ldcg(rows + i);
    if (threadIdx.x == 0) s.gathered = max(count, 0);
    __syncthreads();
    return start + count;
}
