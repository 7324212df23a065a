// computes: for each row the best of its results in all groups (the kept experts); ties go to the lower group, and a
//           value that is NaN or belongs to no column never wins
// layout:   values, ids [num_groups, num_rows]; best_value, best_group, best_id [num_rows]
// requires: ids below 0 where tenp_segment_similarity found no column
// launch:   grid (ceil(num_rows / 256)), block (256), no shared memory
// flops:    none. bytes: 8 a row and group
#include "kernel.cuh"

TENP_KERNEL(tenp_segment_best, TenpSegmentBestParams, 256, 1) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= p.num_rows) {
        return;
    }
    float best = -INFINITY;
    int group = -1;
    int id = -1;
#pragma unroll 4
    for (int g = 0; g < p.num_groups; ++g) {
        const int64_t at = g * static_cast<int64_t>(p.num_rows) + row;
        const float value = p.values[at];
        const int own = p.ids[at];
        if (own >= 0 && value > best) {
            best = value;
            group = g;
            id = own;
        }
    }
    p.best_value[row] = best;
    p.best_group[row] = group;
    p.best_id[row] = id;
}
