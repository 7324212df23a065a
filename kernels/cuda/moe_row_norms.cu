// computes: |y| of each row from the squares that tenp_moe_down_* left per output tile, 1 / (|y| + 1e-8), and the number
//           of rows of each expert whose norm is not finite
// layout:   square_partials [num_partials, num_rows]; row_inverse, row_norms [num_rows]; non_finite [E], added to
// requires: group_offsets[0] = 0. Rows of an expert of width 0 are not read and get 0; rows in no group are left alone
// launch:   grid (ceil(num_rows / 256)), block (256), shared 4 (E + 1) bytes
// flops:    num_partials a row. bytes: 4 num_partials read, 4 or 12 written, a row
#include "reduce.cuh"
#include "schedule.cuh"

TENP_KERNEL(tenp_moe_row_norms, TenpMoeRowNormsParams, 256, 1) {
    TENP_SHARED(int32_t, offsets);
    for (int e = threadIdx.x; e <= p.num_experts; e += blockDim.x) {
        offsets[e] = p.group_offsets[e];
    }
    __syncthreads();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= p.num_rows || row >= offsets[p.num_experts]) {
        return;
    }
    const int expert = tenp::find_place(offsets, p.num_experts, static_cast<int>(row));
    double squares = 0.0;
    if (p.widths[expert] > 0) {
        for (int i = 0; i < p.num_partials; ++i) {
            squares += static_cast<double>(p.square_partials[i * p.num_rows + row]);
        }
    }
    const bool finite = tenp::is_finite(squares);
    if (!finite) {
        atomicAdd(&p.non_finite[expert], 1);
    }
    p.row_inverse[row] = tenp::inverse_norm(squares);
    if (p.row_norms != nullptr) {
        p.row_norms[row] = finite ? sqrt(squares) : 0.0;
    }
}
