// Scores of sixteen lists by a warp, whose rows stand interleaved in the table: what `route` and `search` share.

// Add what a warp has of the lists: four at a time of each lane, `sums`. Lanes without bit 2 get the one of `list_of_lane`.
__device__ __forceinline__ float sum_of_list(const float* sums) {
    const int lane = threadIdx.x % WARP;
    const bool up = lane & 16, upper = lane & 8;
    const float a = add(up ? sums[2] : sums[0], __shfl_xor_sync(FULL, up ? sums[0] : sums[2], 16));
    const float b = add(up ? sums[3] : sums[1], __shfl_xor_sync(FULL, up ? sums[1] : sums[3], 16));
    const float sum = add(upper ? b : a, __shfl_xor_sync(FULL, upper ? a : b, 8));
    return add(sum, __shfl_xor_sync(FULL, sum, 4));
}
__device__ __forceinline__ int list_of_lane() {
    const int lane = threadIdx.x % WARP;
    return lane % 4 * 4 + 2 * (lane >> 4) + (lane >> 3 & 1);
}
