// Sums over the threads of a warp or a block, in an order that depends on nothing but the block size.
#pragma once

#include "kernel.cuh"

namespace tenp {

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// Every lane gets the same sum.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(WHOLE_WARP, value, offset);
    }
    return value;
}

// Largest value of the warp; NaN never wins.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, offset));
    }
    return value;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const unsigned other = __shfl_xor_sync(WHOLE_WARP, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

__device__ __forceinline__ bool is_finite(double value) { return fabs(value) <= 0x1.fffffffffffffp+1023; }

// 1 / (|y| + 1e-8) from the square of |y|, 0 where that is zero or not finite.
__device__ __forceinline__ float inverse_norm(double square) {
    return square > 0.0 && is_finite(square) ? static_cast<float>(1.0 / (sqrt(square) + 1e-8)) : 0.0f;
}

// Every thread gets the same sum; `partial` holds one value per warp and may be used again after the next barrier.
template <class T> __device__ __forceinline__ T block_sum(T value, T *partial) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    __syncthreads();
    T total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
        total += partial[warp];
    }
    return total;
}

} // namespace tenp
