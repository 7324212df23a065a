// The only place with inline PTX (sm_80 and newer). Under TENP_SIMT the executor supplies the same functions.
//
// Fragments of mma_bf16, lane l, group g = l / 4, pair t = 2 (l % 4), low half of a register first:
//   a[0] = A[g][t, t+1]   a[1] = A[g+8][t, t+1]   a[2] = A[g][t+8, t+9]   a[3] = A[g+8][t+8, t+9]
//   b[0] = B[t, t+1][g]   b[1] = B[t+8, t+9][g]
//   d[0..1] = D[g][t, t+1]   d[2..3] = D[g+8][t, t+1]
// ldmatrix: matrix i is 8 rows of 16 bytes whose addresses lanes 8i..8i+7 give; lane l receives row l / 4, elements
// t and t+1 (of the transpose, rows t and t+1 of column l / 4). PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix".
#pragma once

#include <stdint.h>

#if defined(TENP_SIMT)

#include "simt_ptx.hpp"

#else

namespace tenp {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes to shared memory past L1; zeros, and no read, where not `valid`.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N newest of this thread's groups are under way. Other threads see the bytes after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Lanes 0..15 give the addresses; those of the others are not used.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a b, m16n8k16, bf16 factors, fp32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes that no one writes during the launch and that are read once: kept out of L1, first to leave L2.
__device__ __forceinline__ uint4 load_streaming(const void *global) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global), "l"(policy));
    return v;
}

__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; NaN becomes 0x7fff.
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// About 2 ulp plus 1 ulp per unit of |value|; 0 below the normal range.
__device__ __forceinline__ float fast_exp(float value) { return __expf(value); }

// 2^value to 2 ulp; 0 below the normal range.
__device__ __forceinline__ float fast_exp2(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

} // namespace tenp

#endif

namespace tenp {

// The element with the lower address, or lower index, is x.
__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// OCP FP8 E4M3: bias 7, no infinity, S.1111.111 is NaN.
__device__ __forceinline__ float e4m3_to_float(uint8_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
    const uint32_t magnitude = bits & 0x7fu;
    if (magnitude == 0x7fu) {
        return __uint_as_float(sign | 0x7fffffffu);
    }
    // The bits as an f32 of the same exponent field are too small by 2^(127 - 7), subnormals included.
    return __uint_as_float(sign | magnitude << 20) * 0x1p120f;
}

} // namespace tenp
