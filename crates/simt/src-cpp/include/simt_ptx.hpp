// The executor's side of ptx.cuh: the same functions, in the executor's terms.
#pragma once

#include "simt_kernel.hpp"

namespace tenp {

SIMT_INLINE void cp_async_16(void *shared, const void *global, bool valid) {
    ::simt::cp_async_16(shared, global, valid);
}
SIMT_INLINE void cp_async_commit() { ::simt::cp_async_commit(); }
template <int N> SIMT_INLINE void cp_async_wait() {
    static_assert(N >= 0);
    ::simt::cp_async_wait(N);
}

SIMT_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void *row, SIMT_SITE) {
    ::simt::ldmatrix(r, 4, false, row, site);
}
SIMT_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, SIMT_SITE) {
    ::simt::ldmatrix(r, 4, true, row, site);
}
SIMT_INLINE void ldmatrix_x2(uint32_t (&r)[2], const void *row, SIMT_SITE) {
    ::simt::ldmatrix(r, 2, false, row, site);
}
SIMT_INLINE void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row, SIMT_SITE) {
    ::simt::ldmatrix(r, 2, true, row, site);
}
SIMT_INLINE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
    ::simt::mma_bf16(d, a, b, site);
}

SIMT_INLINE void stmatrix_x1_trans(void *row, const uint32_t (&r)[1], SIMT_SITE) {
    ::simt::stmatrix_transposed(r, 1, row, site);
}
SIMT_INLINE void stmatrix_x2_trans(void *row, const uint32_t (&r)[2], SIMT_SITE) {
    ::simt::stmatrix_transposed(r, 2, row, site);
}
SIMT_INLINE void stmatrix_x4_trans(void *row, const uint32_t (&r)[4], SIMT_SITE) {
    ::simt::stmatrix_transposed(r, 4, row, site);
}

SIMT_INLINE uint32_t shared_address(const void *pointer) { return ::simt::shared_address(pointer); }
SIMT_INLINE void part_barrier(int id, int threads, SIMT_SITE) { ::simt::part_barrier(id, threads, site); }
SIMT_INLINE void mbarrier_init(uint64_t *barrier, int arrivals) { ::simt::mbarrier_init(barrier, arrivals); }
SIMT_INLINE void mbarrier_arrive(uint64_t *barrier) { ::simt::mbarrier_arrive(barrier, 0); }
SIMT_INLINE void mbarrier_arrive_expect(uint64_t *barrier, int bytes) { ::simt::mbarrier_arrive(barrier, bytes); }
SIMT_INLINE void mbarrier_wait(uint64_t *barrier, uint32_t parity, SIMT_SITE) {
    ::simt::mbarrier_wait(barrier, parity, site);
}
SIMT_INLINE void fence_mbarrier_init() { ::simt::fence_proxy_async(); }
SIMT_INLINE void fence_proxy_async() { ::simt::fence_proxy_async(); }
enum class Keep { First, Last };
template <Keep> SIMT_INLINE void load_box(void *shared, const TenpTensorMap *map, uint64_t *barrier, int inner, int row) {
    ::simt::load_box(map, shared, barrier, inner, row);
}
SIMT_INLINE void load_groups(void *shared, const TenpTensorMap *map, uint64_t *barrier, int inner, int group) {
    ::simt::load_groups(map, shared, barrier, inner, group);
}
SIMT_INLINE void store_box(const TenpTensorMap *map, const void *shared, int inner, int row) {
    ::simt::store_box(map, shared, inner, row);
}
SIMT_INLINE void store_box_commit() { ::simt::store_commit(); }
template <int N> SIMT_INLINE void store_box_wait_read() { ::simt::store_wait(N); }
template <int N, bool A_TRANSPOSED>
SIMT_INLINE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, SIMT_SITE) {
    ::simt::wgmma_bf16(d, N, A_TRANSPOSED, a, b, site);
}
SIMT_INLINE void wgmma_fence() { ::simt::wgmma_fence(); }
SIMT_INLINE void wgmma_commit() { ::simt::wgmma_commit(); }
template <int N> SIMT_INLINE void wgmma_wait(SIMT_SITE) { ::simt::wgmma_wait(N, site); }
template <int COUNT> SIMT_INLINE void hold_registers(float (&)[COUNT]) {}
template <int COUNT> SIMT_INLINE void more_registers(SIMT_SITE) { ::simt::set_max_registers(COUNT, true, site); }
template <int COUNT> SIMT_INLINE void fewer_registers(SIMT_SITE) { ::simt::set_max_registers(COUNT, false, site); }

SIMT_INLINE uint4 load_streaming(const void *global) {
    uint4 v;
    ::simt::load_read_only_16(&v, global);
    return v;
}

SIMT_INLINE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN becomes 0x7fff, as cvt.rn.bf16.f32 gives it.
SIMT_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
SIMT_INLINE uint32_t pack_bf16(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}

SIMT_INLINE float fast_exp(float value) { return expf(value); }
SIMT_INLINE float fast_exp2(float value) { return exp2f(value); }

} // namespace tenp
