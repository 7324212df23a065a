// computes: the sums of each expert over its rows (ExpertSums of kernels/cpu/direction.rs), from the dot products of
//           tenp_moe_direction; added to running sums in f64
// layout:   row_dots [rows, 2], row_peaks [rows], token_dots [T, 5]; sums [8, E] f64, tokens and non_finite [E]
// requires: group_offsets, token_of_row and row_weights of the grouping that the dot products were made with
// launch:   grid (E), block (256), shared 576 bytes; a thread takes every 256th row, so the order is fixed
// flops:    about 60 a row. bytes: 68 a row
#include "reduce.cuh"

namespace {

constexpr int WARPS = 8, NUM_SUMS = TENP_EXPERT_OUTPUT_PEAK;

// max(0, 1 - cos(r, r + m)); 0 where either vector is zero.
__device__ __forceinline__ double residual_turn(const double *dots) {
    return dots[1] > 0.0 && dots[3] > 0.0 ? fmax(1.0 - dots[2] / sqrt(dots[1] * dots[3]), 0.0) : 0.0;
}

struct Sums {
    double values[NUM_SUMS] = {};
    double peak = 0.0;
    int non_finite = 0;

    __device__ __forceinline__ void add(const TenpExpertSumsParams &p, int64_t row) {
        const double *token = p.token_dots + 5 * static_cast<int64_t>(p.token_of_row[row]);
        const double gate = static_cast<double>(p.row_weights[row]);
        values[TENP_EXPERT_GATE] += gate;
        if (token[4] != 0.0) {
            values[TENP_EXPERT_NORMALISED_GATE] += gate / token[4];
        }
        const double xy = p.row_dots[2 * row];
        const double yy = p.row_dots[2 * row + 1];
        if (!tenp::is_finite(yy)) {
            ++non_finite;
            return;
        }
        const double norm = sqrt(yy);
        const double cosine = token[0] > 0.0 && yy > 0.0 ? xy / sqrt(token[0] * yy) : 0.0;
        values[TENP_EXPERT_NORM] += norm;
        values[TENP_EXPERT_NORM_SQ] += yy;
        values[TENP_EXPERT_GATED_NORM] += gate * norm;
        values[TENP_EXPERT_DIRECTION] += gate * norm * (1.0 - cosine);
        values[TENP_EXPERT_RESIDUAL_DIRECTION] += gate * norm * residual_turn(token);
        peak = fmax(peak, static_cast<double>(p.row_peaks[row]));
    }
};

} // namespace

TENP_KERNEL(tenp_expert_sums, TenpExpertSumsParams, 256, 1) {
    // [NUM_SUMS + 2][WARPS]
    TENP_SHARED(double, partial);
    const int expert = blockIdx.x;
    const int begin = p.group_offsets[expert];
    const int end = p.group_offsets[expert + 1];
    Sums own;
    for (int row = begin + static_cast<int>(threadIdx.x); row < end; row += blockDim.x) {
        own.add(p, row);
    }
    const int warp = threadIdx.x / 32;
    const auto keep = [&](int table, double value) {
        if (threadIdx.x % 32 == 0) {
            partial[table * WARPS + warp] = value;
        }
    };
#pragma unroll
    for (int s = 0; s < NUM_SUMS; ++s) {
        keep(s, tenp::warp_sum(own.values[s]));
    }
    double peak = own.peak;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        peak = fmax(peak, __shfl_xor_sync(tenp::WHOLE_WARP, peak, offset));
    }
    keep(TENP_EXPERT_OUTPUT_PEAK, peak);
    keep(TENP_NUM_EXPERT_SUMS, static_cast<double>(tenp::warp_sum(own.non_finite)));
    __syncthreads();
    if (threadIdx.x > TENP_NUM_EXPERT_SUMS) {
        return;
    }
    const int table = threadIdx.x;
    double total = 0.0;
    for (int w = 0; w < WARPS; ++w) {
        const double value = partial[table * WARPS + w];
        total = table == TENP_EXPERT_OUTPUT_PEAK ? fmax(total, value) : total + value;
    }
    if (table == TENP_NUM_EXPERT_SUMS) {
        p.tokens[expert] += end - begin;
        p.non_finite[expert] += static_cast<int64_t>(total);
        return;
    }
    double *to = p.sums + static_cast<int64_t>(table) * p.num_experts + expert;
    *to = table == TENP_EXPERT_OUTPUT_PEAK ? fmax(*to, total) : *to + total;
}
