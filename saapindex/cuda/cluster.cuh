// Clusters of blocks (sm_90): each writes into the shared memory of the others, and waits for what they send.
//
// A barrier that is used once stands for what one exchange brings: its bytes are announced by `expect`, and those who
// `await` it go on when all have come. What was sent in registers needs no fence at either end.

// The address of something of this block in the block of a rank.
__device__ __forceinline__ u32 address_in(const void* here, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(here)), "r"(rank));
    return there;
}

__device__ __forceinline__ void begin_exchange(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool has_come(u64* barrier) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
    return done;
}
__device__ __forceinline__ void await(u64* barrier) {
    while (!has_come(barrier)) {}
}

// Write to the same place in the block of a rank, as a part of an exchange.
__device__ __forceinline__ void send_4(void* to, int rank, u32 x, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_in(to, rank)), "r"(x), "r"(address_in(barrier, rank)) : "memory");
}
__device__ __forceinline__ void send_8(void* to, int rank, u32 x, u32 y, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address_in(to, rank)), "r"(x), "r"(y), "r"(address_in(barrier, rank)) : "memory");
}
__device__ __forceinline__ void send_16(void* to, int rank, const u32* x, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address_in(to, rank)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(address_in(barrier, rank)) : "memory");
}
// The same of many bytes, a multiple of 16, that stand in this block. Who wrote them has called `end_writing` before;
// they may not change until the exchange is over.
__device__ __forceinline__ void end_writing() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void send_many(void* to, const void* here, u32 bytes, int rank, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_in(to, rank)), "r"((u32)__cvta_generic_to_shared(here)), "r"(bytes), "r"(address_in(barrier, rank)) : "memory");
}

// Many bytes of memory, a multiple of 16, on their way to this block.
__device__ __forceinline__ void fetch_many(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}

// All blocks meet: arrive, do something else, wait. Exchanges that were begun before can be sent to behind it.
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_in_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
