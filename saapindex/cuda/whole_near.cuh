// What is fetched into tiles: near keys, the one that this step adds among them, and pages.

// The near keys of a stream that this block attends to, by their places.
struct Near {
    i64 row;  // of the first place
    int start, end, sinks, turned;
    int added;  // the key that this step adds, if it is one of these
};

// Fetch a tile: near keys from the `i`-th on, or a page.
__device__ __forceinline__ void fetch_near(const Step& p, const Shared& s, const Near& near, int i, u8* tile) {
    const int lane = threadIdx.x % WARP;
#pragma unroll 4
    for (int c = lane; c < TILE * VECTORS; c += WARP) {
        const int r = c / VECTORS, v = c % VECTORS;
        const int key = min(i + r, near.end - 1);
        const i64 offset = (near.row + near_place(p, key, near.sinks, near.turned)) * D;
        const bool added = key == near.added;
        copy_16(tile + r * PITCH + 16 * v, (added ? s.key : p.near_keys + offset) + v * VECTOR);
        copy_16(tile + (TILE + r) * PITCH + 16 * v, (added ? s.value : p.near_values + offset) + v * VECTOR);
    }
}
__device__ __forceinline__ void fetch_page(const Step& p, int page, u8* tile) {
    const int lane = threadIdx.x % WARP, last = (page & 31) - 1;
    const i64 row = (i64)(page >> 5) * LANES * D;
#pragma unroll 4
    for (int c = lane; c < TILE * VECTORS; c += WARP) {
        const int r = c / VECTORS, v = c % VECTORS;
        const i64 offset = row + min(r, last) * D + v * VECTOR;  // the last key in the place of those that are missing
        copy_16(tile + r * PITCH + 16 * v, p.keys + offset);
        copy_16(tile + (TILE + r) * PITCH + 16 * v, p.values + offset);
    }
}

// Whether this step adds a token to a sequence: not if arrays have moved since the launch was prepared, or if there is no
// place, as keys that were due stayed (append.cu reports both).
__device__ __forceinline__ bool adds(const Step& p, int old, int from) {
    return p.new_keys && *p.moved == p.version && old + 1 - from <= p.ring;
}

// Store the key and value that this step adds, as a warp.
__device__ __forceinline__ void store_near(const Step& p, const Shared& s, const Near& near, int old) {
    const int place = old < p.sinks ? old : p.sinks + (int)((u32)(old - p.sinks) % (u32)p.ring);
    const i64 row = (near.row + place) * D;
#pragma unroll 1
    for (int v = threadIdx.x % WARP; v < VECTORS; v += WARP) {
        *(uint4*)(p.near_keys + row + v * VECTOR) = *(const uint4*)(s.key + v * VECTOR);
        *(uint4*)(p.near_values + row + v * VECTOR) = *(const uint4*)(s.value + v * VECTOR);
    }
}
