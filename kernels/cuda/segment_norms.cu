// computes: the squared norms of every neuron's gate row, up row and down column, and the inverse norms of the three and
//           of all together; an inverse is 0 where the norm is zero or not finite
// layout:   GU [2S, H], DT [S, H]; squares [3, S] f64, inverse [4, S] f32
// requires: H a multiple of 8, S of 16; sums in f64, in an order that H fixes
// launch:   grid (ceil(S / 8)), block (256): a warp per neuron; no shared memory
// flops:    6 H a neuron. bytes: 6 H read, at most 40 written, a neuron
#include "reduce.cuh"
#include "vector.cuh"

namespace {

// Every lane gets |row|^2.
__device__ __forceinline__ double square_of_row(const uint16_t *row, int hidden, int lane) {
    double sum = 0.0;
#pragma unroll 4
    for (int i = lane * 8; i < hidden; i += 256) {
        float values[8];
        tenp::widen(tenp::load_streaming(row + i), values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sum = fma(static_cast<double>(values[j]), static_cast<double>(values[j]), sum);
        }
    }
    return tenp::warp_sum(sum);
}

__device__ __forceinline__ float inverse_root(double square) {
    return square > 0.0 && tenp::is_finite(square) ? static_cast<float>(1.0 / sqrt(square)) : 0.0f;
}

} // namespace

TENP_KERNEL(tenp_segment_norms, TenpSegmentNormsParams, 256, 1) {
    const int64_t neuron = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (neuron >= p.num_neurons) {
        return;
    }
    const uint16_t *gate = p.gate_up + (neuron / 8 * 16 + neuron % 8) * p.hidden;
    const double squares[3] = {square_of_row(gate, p.hidden, lane),
                               square_of_row(gate + 8 * static_cast<int64_t>(p.hidden), p.hidden, lane),
                               square_of_row(p.down_t + neuron * p.hidden, p.hidden, lane)};
    if (lane != 0) {
        return;
    }
#pragma unroll
    for (int part = 0; part < 3; ++part) {
        const int64_t at = part * static_cast<int64_t>(p.num_neurons) + neuron;
        if (p.squares != nullptr) {
            p.squares[at] = squares[part];
        }
        if (p.inverse != nullptr) {
            p.inverse[at] = inverse_root(squares[part]);
        }
    }
    if (p.inverse != nullptr) {
        const double all = squares[0] + squares[1] + squares[2];
        p.inverse[3 * static_cast<int64_t>(p.num_neurons) + neuron] = inverse_root(all);
    }
}
