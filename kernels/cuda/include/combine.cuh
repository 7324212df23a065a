// A token's expert outputs, a few slots at a time: shared by the combine and the direction kernels.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

namespace tenp {

// Slots whose outputs are on their way together.
constexpr int SLOT_GROUP = 4;

// Rows and weights of slots first..first + SLOT_GROUP of a token.
struct SlotGroup {
    int32_t slot_rows[SLOT_GROUP]; // -1: no such slot, or routed nowhere
    int32_t rows[SLOT_GROUP];      // the same, and -1 where the expert has no neurons: y is zero and not in memory
    float weights[SLOT_GROUP];

    template <class P> __device__ __forceinline__ SlotGroup(const P &p, int64_t token, int first) {
#pragma unroll
        for (int i = 0; i < SLOT_GROUP; ++i) {
            const int64_t slot = token * p.top_k + first + i;
            slot_rows[i] = first + i < p.top_k ? p.row_of_slot[slot] : -1;
            rows[i] = slot_rows[i] >= 0 && p.widths[p.expert_ids[slot]] > 0 ? slot_rows[i] : -1;
            weights[i] = slot_rows[i] >= 0 ? p.slot_weights[slot] : 0.0f;
        }
    }
};

__device__ __forceinline__ void load_8(const float *from, float (&to)[8]) {
    const float4 *quads = reinterpret_cast<const float4 *>(from);
    const float4 a = quads[0];
    const float4 b = quads[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ __forceinline__ void store_8(float *to, const float (&from)[8]) {
    float4 *quads = reinterpret_cast<float4 *>(to);
    quads[0] = make_float4(from[0], from[1], from[2], from[3]);
    quads[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// Eight elements of one output as they lie in memory, zeros for row -1.
template <bool BF16, class P>
__device__ __forceinline__ void load_output(const P &p, int32_t row, int column, uint4 (&bits)[BF16 ? 1 : 2]) {
    if (row < 0) {
#pragma unroll
        for (int i = 0; i < (BF16 ? 1 : 2); ++i) {
            bits[i] = make_uint4(0, 0, 0, 0);
        }
        return;
    }
    const int64_t at = static_cast<int64_t>(row) * p.hidden + column;
    if constexpr (BF16) {
        bits[0] = load_streaming(p.y_bf16 + at);
    } else {
        bits[0] = load_streaming(p.y_f32 + at);
        bits[1] = load_streaming(p.y_f32 + at + 4);
    }
}

__device__ __forceinline__ void widen_output(const uint4 (&bits)[1], float (&y)[8]) { widen(bits[0], y); }

__device__ __forceinline__ void widen_output(const uint4 (&bits)[2], float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        y[4 * i] = __uint_as_float(bits[i].x);
        y[4 * i + 1] = __uint_as_float(bits[i].y);
        y[4 * i + 2] = __uint_as_float(bits[i].z);
        y[4 * i + 3] = __uint_as_float(bits[i].w);
    }
}

__device__ __forceinline__ void add_scaled(float (&to)[8], const float (&values)[8], float scale) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        to[i] = fmaf(values[i], scale, to[i]);
    }
}

} // namespace tenp
