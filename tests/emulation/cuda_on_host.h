// Enough of CUDA for a host compiler: every thread of every block is a fiber, and all of them take turns.
//
// So kernels run whole, barriers of blocks and of the grid included, slowly and without a GPU. Shared memory begins
// as NaN. What inline PTX does, emulation.py puts in its place.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(x)
#define __cvta_generic_to_shared(x) (x)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Dimension { unsigned x, y, z; };
struct Fiber {
    ucontext_t context;
    bool done;
    Dimension thread, block;
};
struct Block {
    std::vector<char> shared;
    unsigned waiting = 0, turn = 0;
    int count = 0;
};
struct Warp {
    uint64_t slots[32];
    uint32_t a[32][4], b[32][2];
    unsigned waiting = 0, turn = 0;
};

static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static std::vector<Warp> warps;
static Fiber* current;
static ucontext_t scheduler;
static unsigned threads_of_block;
static std::function<void()> body;

#define threadIdx (current->thread)
#define blockIdx (current->block)
#define gridDim (Dimension{(unsigned)::blocks.size(), 1, 1})

inline void let_others_run() { swapcontext(&current->context, &scheduler); }

template <typename Group>
inline void meet(Group& group, unsigned members) {
    const unsigned turn = group.turn;
    if (++group.waiting == members) {
        group.waiting = 0;
        ++group.turn;
    } else {
        while (group.turn == turn) let_others_run();
    }
}
inline Block& this_block() { return blocks[blockIdx.x]; }
inline Warp& this_warp() { return warps[blockIdx.x * (threads_of_block / 32) + threadIdx.x / 32]; }
inline int this_lane() { return threadIdx.x % 32; }
inline unsigned char* shared_memory() { return (unsigned char*)this_block().shared.data(); }


// Clusters of CLUSTER blocks: what one sends to another stands in its shared memory at once. A barrier holds the bytes
// that are still to come, and whether these have been announced.
struct Exchange { int missing, announced; };
static std::vector<Block> clusters;
inline void begin_emulated(void* barrier) { *(Exchange*)barrier = {0, 0}; }
inline void expect_emulated(void* barrier, unsigned bytes) {
    Exchange& exchange = *(Exchange*)barrier;
    exchange.missing += bytes, exchange.announced = 1;
}
inline bool come_emulated(void* barrier) {
    const Exchange& exchange = *(Exchange*)barrier;
    if (exchange.announced && !exchange.missing) return true;
    let_others_run();
    return false;
}
inline void send_bytes(void* to, const void* from, unsigned bytes, int rank, void* barrier) {
    char* there = blocks[blockIdx.x / CLUSTER * CLUSTER + rank].shared.data();
    char* here = (char*)shared_memory();
    memcpy(there + ((char*)to - here), from, bytes);
    ((Exchange*)(there + ((char*)barrier - here)))->missing -= bytes;
}
inline void fetch_bytes(void* to, const void* from, unsigned bytes, void* barrier) {
    memcpy(to, from, bytes);
    ((Exchange*)barrier)->missing -= bytes;
}
inline void send_emulated(void* to, int rank, std::initializer_list<unsigned> words, void* barrier) {
    send_bytes(to, words.begin(), 4 * words.size(), rank, barrier);
}
// Some threads of a block meet at a barrier of a number; some wait there, others come by.
static std::vector<Block> some[5];
inline Block& some_of_block(int barrier) { return some[barrier][blockIdx.x]; }
inline void come_by(Block& group, unsigned members) {
    if (++group.waiting == members) group.waiting = 0, ++group.turn;
}
inline void meet_in_cluster() { meet(clusters[blockIdx.x / CLUSTER], threads_of_block * CLUSTER); }

inline void __syncthreads() { meet(this_block(), threads_of_block); }
inline void __syncwarp(unsigned = ~0u) { meet(this_warp(), 32); }
inline void __threadfence() {}
inline int __syncthreads_count(int x) {
    Block& block = this_block();
    block.count += x != 0;
    __syncthreads();
    const int count = block.count;
    __syncthreads();
    block.count = 0;
    __syncthreads();
    return count;
}
inline int __syncthreads_or(int x) { return __syncthreads_count(x) != 0; }

template <typename T>
inline T from_lane(T x, int lane) {
    Warp& warp = this_warp();
    memcpy(&warp.slots[this_lane()], &x, sizeof x);
    __syncwarp();
    T y;
    memcpy(&y, &warp.slots[lane], sizeof y);
    __syncwarp();
    return y;
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T x, int mask) { return from_lane(x, this_lane() ^ mask); }
template <typename T>
inline T __shfl_sync(unsigned, T x, int lane, int width = 32) {
    return from_lane(x, this_lane() / width * width + lane % width);
}
template <typename T>
inline T __shfl_up_sync(unsigned, T x, int by) { return from_lane(x, max(this_lane() - by, 0)); }
template <typename T>
inline T __shfl_down_sync(unsigned, T x, int by) { return from_lane(x, min(this_lane() + by, 31)); }
inline bool __any_sync(unsigned, int x) {
    bool any = false;
    Warp& warp = this_warp();
    warp.slots[this_lane()] = x != 0;
    __syncwarp();
    for (int lane = 0; lane < 32; ++lane) any |= warp.slots[lane] != 0;
    __syncwarp();
    return any;
}

inline unsigned __ballot_sync(unsigned, int x) {
    unsigned all = 0;
    Warp& warp = this_warp();
    warp.slots[this_lane()] = x != 0;
    __syncwarp();
    for (int lane = 0; lane < 32; ++lane) all |= (unsigned)(warp.slots[lane] != 0) << lane;
    __syncwarp();
    return all;
}
inline unsigned __match_any_sync(unsigned, int x) {
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= (unsigned)(from_lane(x, lane) == x) << lane;
    return same;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    unsigned most = 0;
    for (int lane = 0; lane < 32; ++lane) most = max(most, from_lane(x, lane));
    return most;
}

template <typename T>
inline T __ldcg(const T* p) { return *p; }
template <typename T>
inline T __ldg(const T* p) { return *p; }
template <typename T, typename U>
inline T atomicSub(T* p, U x) { T old = *p; *p -= (T)x; return old; }
template <typename T, typename U>
inline T atomicAdd(T* p, U x) { T old = *p; *p += (T)x; return old; }
template <typename T, typename U>
inline T atomicMax(T* p, U x) { T old = *p; *p = max(*p, (T)x); return old; }
template <typename T, typename U>
inline T atomicMin(T* p, U x) { T old = *p; *p = min(*p, (T)x); return old; }
template <typename T, typename U>
inline T atomicOr(T* p, U x) { T old = *p; *p |= (T)x; return old; }

template <typename To, typename From>
inline To same_bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = x | (uint64_t)y << 32;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = (float)sin(M_PI * (double)x), *cosine = (float)cos(M_PI * (double)x);
}

// mma.sync.m16n8 of matrices with `PER` numbers in a register, fragments laid out as PTX says; `product` multiplies
// those in the lower bits of two registers.
template <int PER, typename T, typename Product>
inline void multiply_fragments(T* c, const uint32_t* a, uint32_t b0, uint32_t b1, Product product) {
    Warp& warp = this_warp();
    const int lane = this_lane();
    memcpy(warp.a[lane], a, sizeof warp.a[lane]);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8 * PER; ++k) {
            const int from = k % (4 * PER) / PER, upper = k >= 4 * PER, shift = 32 / PER * (k % PER);
            const uint32_t x = warp.a[row % 8 * 4 + from][2 * upper + (row >= 8)];
            const uint32_t y = warp.b[column * 4 + from][upper];
            c[i] += product(x >> shift, y >> shift);
        }
    }
    __syncwarp();
}

// Unsigned with signed bytes; pairs of a 16-bit type, which `widen` turns into float; tf32.
inline void multiply_quads(int* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    multiply_fragments<4>(c, a, b0, b1, [](uint32_t x, uint32_t y) { return (int)(uint8_t)x * (int)(int8_t)y; });
}
inline void multiply_signed_quads(int* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    multiply_fragments<4>(c, a, b0, b1, [](uint32_t x, uint32_t y) { return (int)(int8_t)x * (int)(int8_t)y; });
}
template <typename Widen>
inline void multiply_pairs(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Widen widen) {
    const auto product = [=](uint32_t x, uint32_t y) { return widen((uint16_t)x) * widen((uint16_t)y); };
    multiply_fragments<2>(c, a, b0, b1, product);
}
inline void multiply_tf32(float* c, const float* a, float b0, float b1) {
    const auto rounded = [](uint32_t x) { return same_bits<float>(x & 0xffffe000u); };
    const auto product = [=](uint32_t x, uint32_t y) { return rounded(x) * rounded(y); };
    uint32_t bits[4];
    memcpy(bits, a, sizeof bits);
    multiply_fragments<1>(c, bits, same_bits<uint32_t>(b0), same_bits<uint32_t>(b1), product);
}

inline uint32_t pair_of_bits(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }

// ldmatrix.m8n8.x4: eight lanes give the rows of each matrix.
inline void load_fragments(uint32_t* x, const void* row, bool transposed) {
    Warp& warp = this_warp();
    const int lane = this_lane();
    warp.slots[lane] = (uint64_t)row;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int at = lane / 4, pair = lane % 4 * 2;
        const uint16_t* rows[2];
        for (int j = 0; j < 2; ++j) rows[j] = (const uint16_t*)warp.slots[8 * i + (transposed ? pair + j : at)];
        x[i] = transposed ? pair_of_bits(rows[0][at], rows[1][at]) : pair_of_bits(rows[0][pair], rows[0][pair + 1]);
    }
    __syncwarp();
}

static void run_fiber() {
    body();
    current->done = true;
    while (true) let_others_run();
}

// Run `kernel` for a grid; 0 when it ends, 1 when no end is in sight.
static int run_grid(unsigned grid, unsigned threads, size_t shared, std::function<void()> kernel) {
    constexpr size_t STACK = 48 << 10;
    body = kernel;
    threads_of_block = threads;
    std::vector<char> stacks((size_t)grid * threads * STACK);
    fibers.assign((size_t)grid * threads, Fiber());
    blocks.assign(grid, Block());
    clusters.assign(grid, Block());
    for (auto& group : some) group.assign(grid, Block());
    warps.assign((size_t)grid * (threads / 32), Warp());
    for (Block& block : blocks) block.shared.assign(shared, (char)0xff);
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        fiber.thread = {(unsigned)(i % threads), 0, 0};
        fiber.block = {(unsigned)(i / threads), 0, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (long round = 0; round < 500000; ++round) {
        bool any = false;
        for (Fiber& fiber : fibers) {
            if (fiber.done) continue;
            any = true;
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
        }
        if (!any) return 0;
    }
    return 1;
}
