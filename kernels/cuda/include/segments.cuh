// Segments: the gate row, up row and down column of one neuron, and the best match of one among others.
#pragma once

#include "kernel.cuh"

namespace tenp {

enum Part { GATE, UP, DOWN, ALL };

__device__ __forceinline__ const uint16_t *part_row(const uint16_t *gate_up, const uint16_t *down_t, int hidden, int part,
                                                    int64_t neuron) {
    if (part == DOWN) {
        return down_t + neuron * hidden;
    }
    return gate_up + (neuron / 8 * 16 + neuron % 8 + (part == UP ? 8 : 0)) * hidden;
}

// A column and how well it matches: its number in the item, then one bit: flipped; -1 for none.
struct BestColumn {
    float value = -INFINITY;
    int id = -1;

    // Columns come in no order, so ties are decided here. NaN never wins, nor does minus infinity.
    __device__ __forceinline__ void take(float other, int other_id) {
        if (other > value || (other == value && other > -INFINITY && other_id >= 0 && (id < 0 || other_id < id))) {
            value = other;
            id = other_id;
        }
    }

    // Over the four lanes that have the same row in an accumulator's fragment.
    __device__ __forceinline__ void merge_quad() {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, offset);
            const int other_id = __shfl_xor_sync(0xffffffffu, id, offset);
            take(other, other_id);
        }
    }

    __device__ __forceinline__ void store(const TenpSegmentMatchParams &p, int64_t at) const {
        p.best_value[at] = value;
        p.best_id[at] = id < 0 ? -1 : id / 2;
        if (p.best_flip != nullptr) {
            p.best_flip[at] = id < 0 ? 0 : id % 2;
        }
    }
};

} // namespace tenp
