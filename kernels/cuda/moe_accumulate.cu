// computes: sums += the per-tile partials of each neuron, in f64, tile by tile in order; tables whose bit is set in
//           maximum_mask keep the maximum instead
// layout:   partials [num_sums, partial_stride], of each expert [token tile, padded width]; sums [num_sums, S]
// requires: group_offsets, token_tile and partial_offsets those of the product that made the partials
// launch:   grid (ceil(S / 256), num_sums), block (256), shared 4 (E + 1) bytes
// flops:    one a partial. bytes: 4 a partial, 16 a neuron and sum
#include "kernel.cuh"
#include "schedule.cuh"

TENP_KERNEL(tenp_accumulate_partials, TenpAccumulatePartialsParams, 256, 1) {
    TENP_SHARED(int32_t, offsets);
    for (int e = threadIdx.x; e <= p.num_experts; e += blockDim.x) {
        offsets[e] = p.neuron_offsets[e];
    }
    __syncthreads();
    const int neuron = blockIdx.x * blockDim.x + threadIdx.x;
    const int num_neurons = offsets[p.num_experts];
    if (neuron >= num_neurons) {
        return;
    }
    const int expert = tenp::find_place(offsets, p.num_experts, neuron);
    const int width = offsets[expert + 1] - offsets[expert];
    const int tiles = tenp::ceil_div(p.group_offsets[expert + 1] - p.group_offsets[expert], p.token_tile);
    const bool maximum = (p.maximum_mask >> blockIdx.y & 1u) != 0;
    const float *partial =
        p.partials + blockIdx.y * p.partial_stride + p.partial_offsets[expert] + (neuron - offsets[expert]);
    double *to = p.sums + static_cast<int64_t>(blockIdx.y) * num_neurons + neuron;
    double sum = *to;
#pragma unroll 4
    for (int tile = 0; tile < tiles; ++tile) {
        const double value = static_cast<double>(partial[static_cast<int64_t>(tile) * width]);
        if (!maximum) {
            sum += value;
        } else if (value > sum) {
            sum = value;
        }
    }
    *to = sum;
}
