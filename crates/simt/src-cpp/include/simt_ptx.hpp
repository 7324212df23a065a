// The executor's side of ptx.cuh: the same functions, in the executor's terms.
// The Hopper instructions join here: mbarrier, bulk tensor copies, wgmma; what they do, beside async.cpp and matrix.cpp.
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
