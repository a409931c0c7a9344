// Gather rows to attend to: near keys, whole lists, or those that were chosen by their codes.

// Gather this block's share of the sinks and the recent keys that the query sees, from the `start`-th on; returns
// where it stopped for want of room. Rows below zero stand for places of near keys.
__device__ __forceinline__ int gather_near(const Step& p, Shared& s, int start, int end, int first, int position) {
    const int sinks = min(p.sinks, position + 1), recent = max(first, p.sinks), count = min(end - start, QUEUE);
    const int turned = (u32)(recent - p.sinks) % (u32)p.ring;  // where the first recent key is in the ring
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int place = start + i;
        if (place >= sinks) {
            place += turned - sinks;
            place += place < p.ring ? p.sinks : p.sinks - p.ring;
        }
        s.rows[i] = -1 - place;
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
