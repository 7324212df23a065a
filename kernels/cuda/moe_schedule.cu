// computes: for each grouped product the order of the experts, the tiles before each of them, and where the per-tile
//           partials of each begin. The widest expert comes first: where the inner dimension is the width (down, contributions in
//           Gram form) its tiles take longest, and those that come last should be short. Elsewhere all tiles take equally long
// layout:   order [E], tile_offsets [E + 1] in that order, partial_offsets [E + 1] by expert id
// requires: group_offsets and neuron_offsets do not decrease
// launch:   grid (num_specs), block (256), shared 16 E + 8 * 32 bytes
// flops:    none. bytes: 8 (E + 1) read, 16 (E + 1) written, a product
#include "kernel.cuh"
#include "schedule.cuh"

namespace {

constexpr int LANES = 32;

// offsets[i] = sum of counts[0..i], offsets[n] the total; the first 32 threads take a run of counts each.
template <class T> __device__ __forceinline__ void prefix_sums(const int64_t *counts, int n, int64_t *runs, T *offsets) {
    const int lane = threadIdx.x;
    const int per_lane = tenp::ceil_div(n, LANES);
    const int begin = lane * per_lane < n ? lane * per_lane : n;
    const int end = begin + per_lane < n ? begin + per_lane : n;
    if (lane < LANES) {
        int64_t sum = 0;
        for (int i = begin; i < end; ++i) {
            sum += counts[i];
        }
        runs[lane] = sum;
    }
    __syncthreads();
    if (lane < LANES) {
        int64_t sum = 0;
        for (int i = 0; i < lane; ++i) {
            sum += runs[i];
        }
        for (int i = begin; i < end; ++i) {
            offsets[i] = static_cast<T>(sum);
            sum += counts[i];
        }
        if (lane == LANES - 1) {
            offsets[n] = static_cast<T>(sum);
        }
    }
    __syncthreads();
}

} // namespace

TENP_KERNEL(tenp_moe_schedule, TenpMoeScheduleParams, 256, 1) {
    TENP_SHARED(int64_t, runs);
    int64_t *counts = runs + LANES;
    int32_t *widths = reinterpret_cast<int32_t *>(counts + p.num_experts);
    int32_t *order = widths + p.num_experts;
    const TenpScheduleSpec &spec = p.specs[blockIdx.x];
    const int n = p.num_experts;

    for (int e = threadIdx.x; e < n; e += blockDim.x) {
        widths[e] = p.neuron_offsets[e + 1] - p.neuron_offsets[e];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n; e += blockDim.x) {
        const int width = widths[e];
        int place = 0;
        for (int other = 0; other < n; ++other) {
            place += widths[other] > width || (widths[other] == width && other < e) ? 1 : 0;
        }
        order[place] = e;
    }
    __syncthreads();
    for (int place = threadIdx.x; place < n; place += blockDim.x) {
        const int e = order[place];
        spec.order[place] = e;
        const int rows = p.group_offsets[e + 1] - p.group_offsets[e];
        counts[place] = tenp::tiles_of_expert(rows, widths[e], spec.outputs, spec.token_tile, spec.weight_tile);
    }
    __syncthreads();
    prefix_sums(counts, n, runs, spec.tile_offsets);
    if (spec.partial_offsets == nullptr) {
        return;
    }
    for (int e = threadIdx.x; e < n; e += blockDim.x) {
        const int rows = p.group_offsets[e + 1] - p.group_offsets[e];
        counts[e] = tenp::partials_of_expert(rows, widths[e], spec.token_tile);
    }
    __syncthreads();
    prefix_sums(counts, n, runs, spec.partial_offsets);
}
