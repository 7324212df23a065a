// The sums over h that the gate and up products leave for every neuron.
#pragma once

#include "reduce.cuh"

namespace tenp {

// The five sums of one neuron over the rows a thread has seen.
struct ActivationSums {
    float values[TENP_NUM_ACTIVATION_SUMS] = {};

    __device__ __forceinline__ void add(float h, float gate) {
        const float square = h * h;
        const float gated = square * (gate * gate);
        values[TENP_SUM_ACTIVATION] += fabsf(h);
        values[TENP_SUM_GATED_ENERGY] += gated;
        values[TENP_SUM_GATED_PEAK] = fmaxf(values[TENP_SUM_GATED_PEAK], gated);
        values[TENP_SUM_MEAN] += h;
        values[TENP_SUM_SECOND_MOMENT] += square;
    }

    __device__ __forceinline__ static float merge(int which, float a, float b) {
        return which == TENP_SUM_GATED_PEAK ? fmaxf(a, b) : a + b;
    }

    // Over the four lanes that have the same neuron in an accumulator's fragment.
    __device__ __forceinline__ void merge_quad() {
#pragma unroll
        for (int s = 0; s < TENP_NUM_ACTIVATION_SUMS; ++s) {
            values[s] = merge(s, values[s], __shfl_xor_sync(WHOLE_WARP, values[s], 1));
            values[s] = merge(s, values[s], __shfl_xor_sync(WHOLE_WARP, values[s], 2));
        }
    }
};

} // namespace tenp
