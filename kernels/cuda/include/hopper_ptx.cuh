// Inline PTX of sm_90a: barriers in shared memory, bulk tensor copies, products of warpgroups. PTX ISA 8.0 and newer.
// Included by ptx.cuh's users that are compiled for sm_90a alone; under TENP_SIMT simt_ptx.hpp has the same functions.
//
// Fragment of wgmma's accumulators, m64nN, warp w of its warpgroup, lane l, register i:
//   row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. "Register Fragments for wgmma.mma_async.m64nNk16".
#pragma once

#include "kernel.cuh"

#if !defined(TENP_SIMT)

namespace tenp {

template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Of `threads` threads of the block that name the same id, 1 to 15.
__device__ __forceinline__ void part_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes new mbarriers known to bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes this thread's ordinary accesses to shared memory come before later ones of wgmma and of bulk copies.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of bulk copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (done == 0);
}

// What leaves L2 first, or last.
enum class Keep { First, Last };

__device__ __forceinline__ uint64_t leaves_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t leaves_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Starts copying the box that begins at [row, inner]; its bytes count at `barrier`, zeros outside the matrix included.
template <Keep LEAVES>
__device__ __forceinline__ void load_box(void *shared, const TenpTensorMap *map, uint64_t *barrier, int inner, int row) {
    const uint64_t policy = LEAVES == Keep::First ? leaves_first() : leaves_last();
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(row), "l"(policy)
                 : "memory");
}

// The same by a map whose rows come in groups of eight, from row 8 `group` on.
__device__ __forceinline__ void load_groups(void *shared, const TenpTensorMap *map, uint64_t *barrier, int inner, int group) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(0), "r"(group), "l"(leaves_last())
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x1_trans(void *row, const uint32_t (&r)[1]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(r[0])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x2_trans(void *row, const uint32_t (&r)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(void *row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Hands the accumulators over to the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the N newest groups of products are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of accumulators over this line: it does not know that they are filled later.
template <int COUNT> __device__ __forceinline__ void hold_registers(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

// d += a b: A [64, 16] by its descriptor (K-major, or M-major where transposed), B [16, N] K-major.
template <int N, bool A_TRANSPOSED> struct Wgmma;

// The names of registers, ten at a time, and their operands, eight at a time.
#define TENP_TEN(t) "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define TENP_EIGHT(b)                                                                               \
    "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])
#define TENP_COMMA ,

// The operands behind `count` registers have numbers a, b and t.
#define TENP_WGMMA(n, registers, a, b, t, operands)                                              \
    template <bool A_TRANSPOSED> struct Wgmma<n, A_TRANSPOSED> {                                    \
        static __device__ __forceinline__ void run(float (&d)[n / 2], uint64_t a_at, uint64_t b_at) {                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, %" a ", %" b \
                         ", 1, 1, 1, %" t ", 0;"                                                 \
                         : operands                                                                 \
                         : "l"(a_at), "l"(b_at), "n"(A_TRANSPOSED ? 1 : 0));                        \
        }                                                                                           \
    }

#define TENP_16 TENP_EIGHT(0), TENP_EIGHT(8)
#define TENP_32 TENP_16, TENP_EIGHT(16), TENP_EIGHT(24)
#define TENP_64 TENP_32, TENP_EIGHT(32), TENP_EIGHT(40), TENP_EIGHT(48), TENP_EIGHT(56)
#define TENP_96 TENP_64, TENP_EIGHT(64), TENP_EIGHT(72), TENP_EIGHT(80), TENP_EIGHT(88)
#define TENP_TEN_TO_60 TENP_TEN("") ", " TENP_TEN("1") ", " TENP_TEN("2") ", " TENP_TEN("3") ", " TENP_TEN("4") ", " TENP_TEN("5")

TENP_WGMMA(8, "%0, %1, %2, %3", "4", "5", "6", "+f"(d[0]) TENP_COMMA "+f"(d[1]) TENP_COMMA "+f"(d[2]) TENP_COMMA "+f"(d[3]));
TENP_WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", "8", "9", "10", TENP_EIGHT(0));
TENP_WGMMA(32, TENP_TEN("") ", %10, %11, %12, %13, %14, %15", "16", "17", "18", TENP_16);
TENP_WGMMA(64, TENP_TEN("") ", " TENP_TEN("1") ", " TENP_TEN("2") ", %30, %31", "32", "33", "34", TENP_32);
TENP_WGMMA(128, TENP_TEN_TO_60 ", %60, %61, %62, %63", "64", "65", "66", TENP_64);
TENP_WGMMA(192,
           TENP_TEN_TO_60 ", " TENP_TEN("6") ", " TENP_TEN("7") ", " TENP_TEN("8") ", %90, %91, %92, %93, %94, %95",
           "96", "97", "98", TENP_96);
TENP_WGMMA(256,
           TENP_TEN_TO_60 ", " TENP_TEN("6") ", " TENP_TEN("7") ", " TENP_TEN("8") ", " TENP_TEN("9") ", " TENP_TEN("10") ", "
           TENP_TEN("11") ", %120, %121, %122, %123, %124, %125, %126, %127",
           "128", "129", "130",
           TENP_96 TENP_COMMA TENP_EIGHT(96) TENP_COMMA TENP_EIGHT(104) TENP_COMMA TENP_EIGHT(112) TENP_COMMA TENP_EIGHT(120));

template <int N, bool A_TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    Wgmma<N, A_TRANSPOSED>::run(d, a, b);
}

#undef TENP_WGMMA
#undef TENP_TEN_TO_60
#undef TENP_96
#undef TENP_64
#undef TENP_32
#undef TENP_16
#undef TENP_COMMA
#undef TENP_EIGHT
#undef TENP_TEN

} // namespace tenp

#endif
