// Copying rows, with each way to leave an array. grid (rows of a tile's multiple), block (32), shared as launched.
#include "kernel.cuh"

struct RowsParams {
    const float *in; // [num_rows, 32]
    float *out;      // [num_rows, 32]
    const int32_t *group_offsets; // [3], of two experts
    int32_t num_rows;
    int32_t padding;
};

namespace {

constexpr int TILE = 8;

__device__ __forceinline__ void copy_row(const RowsParams &p, int row, float factor = 1.0f) {
    p.out[row * 32 + static_cast<int>(threadIdx.x)] = factor * p.in[row * 32 + static_cast<int>(threadIdx.x)];
}

// Block b: the first TILE rows of expert b. Unclipped, they go on into the next expert's.
__device__ __forceinline__ void copy_tile(const RowsParams &p, bool clipped) {
    const int first = p.group_offsets[blockIdx.x];
    const int end = clipped ? p.group_offsets[blockIdx.x + 1] : first + TILE;
    for (int row = first; row < end && row < p.num_rows; ++row) {
        copy_row(p, row);
    }
}

} // namespace

TENP_KERNEL(test_rows, RowsParams, 32, 1) { copy_row(p, blockIdx.x); }

TENP_KERNEL(test_rows_read_past_end, RowsParams, 32, 1) {
    const float next = p.in[(blockIdx.x + 1) * 32 + threadIdx.x];
    p.out[blockIdx.x * 32 + threadIdx.x] = next;
}

TENP_KERNEL(test_rows_write_past_end, RowsParams, 32, 1) {
    p.out[(blockIdx.x + 1) * 32 + threadIdx.x] = p.in[blockIdx.x * 32 + threadIdx.x];
}

TENP_KERNEL(test_rows_write_before_start, RowsParams, 32, 1) { p.out[static_cast<int>(threadIdx.x) - 1] = 0.0f; }

TENP_KERNEL(test_rows_write_input, RowsParams, 32, 1) { const_cast<float *>(p.in)[threadIdx.x] = 0.0f; }

TENP_KERNEL(test_rows_one_left_out, RowsParams, 32, 1) {
    if (blockIdx.x != 2) {
        copy_row(p, blockIdx.x);
    }
}

// Half of an element is not the element.
TENP_KERNEL(test_rows_half_written, RowsParams, 32, 1) {
    reinterpret_cast<uint16_t *>(p.out)[2 * (blockIdx.x * 32 + threadIdx.x)] = 0;
}

TENP_KERNEL(test_rows_read_output, RowsParams, 32, 1) { p.out[threadIdx.x] += p.in[threadIdx.x]; }

TENP_KERNEL(test_tiles, RowsParams, 32, 1) { copy_tile(p, true); }

TENP_KERNEL(test_tiles_straddle, RowsParams, 32, 1) { copy_tile(p, false); }

TENP_KERNEL(test_shared_past_end, RowsParams, 32, 1) {
    TENP_SHARED(float, row);
    row[threadIdx.x + 1] = p.in[threadIdx.x];
}

TENP_KERNEL(test_shared_unwritten, RowsParams, 32, 1) {
    TENP_SHARED(float, row);
    if (threadIdx.x != 7) {
        row[threadIdx.x] = p.in[threadIdx.x];
    }
    __syncthreads();
    p.out[threadIdx.x] = row[threadIdx.x];
}

// What an earlier block left in shared memory is no one's to read.
TENP_KERNEL(test_shared_of_other_block, RowsParams, 32, 1) {
    TENP_SHARED(float, row);
    if (blockIdx.x == 0) {
        row[threadIdx.x] = 1.0f;
    }
    p.out[blockIdx.x * 32 + threadIdx.x] = row[threadIdx.x];
}

// One block writes what another reads.
TENP_KERNEL(test_rows_of_other_block, RowsParams, 32, 1) {
    if (blockIdx.x == 0) {
        p.out[threadIdx.x] = 1.0f;
    } else {
        p.out[blockIdx.x * 32 + threadIdx.x] = p.out[threadIdx.x];
    }
}

// All blocks read a value, and one changes it. Launched with `out` as `in`.
TENP_KERNEL(test_row_others_read, RowsParams, 32, 1) {
    const float first = p.in[threadIdx.x];
    if (blockIdx.x == 1) {
        p.out[threadIdx.x] = first + 1.0f;
    }
}

TENP_KERNEL(test_read_only_of_written, RowsParams, 32, 1) {
    float4 *out = reinterpret_cast<float4 *>(p.out);
    out[threadIdx.x] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    const uint4 v = tenp::load_streaming(out + threadIdx.x);
    p.out[4 * threadIdx.x] = __uint_as_float(v.x);
}

TENP_KERNEL(test_vector_misaligned, RowsParams, 32, 1) {
    const float4 v = *reinterpret_cast<const float4 *>(p.in + 1);
    p.out[threadIdx.x] = v.x + v.w;
}

TENP_KERNEL(test_local_index, RowsParams, 32, 1) {
    float values[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    values[p.num_rows] = 4.0f;
    p.out[threadIdx.x] = values[threadIdx.x % 4];
}

TENP_KERNEL(test_size_overflow, RowsParams, 32, 1) {
    const int elements = p.num_rows * 0x40000000;
    p.out[threadIdx.x] = static_cast<float>(elements);
}

TENP_KERNEL(test_null, RowsParams, 32, 1) { p.out[threadIdx.x] = static_cast<float>(p.group_offsets[threadIdx.x]); }

// An odd number times three is odd.
TENP_KERNEL(test_endless, RowsParams, 32, 1) {
    for (unsigned i = static_cast<unsigned>(p.num_rows) | 1u; i != 0; i *= 3) {
    }
}

TENP_KERNEL(test_endless_with_barriers, RowsParams, 32, 1) {
    while (p.num_rows != 0) {
        __syncthreads();
    }
}
