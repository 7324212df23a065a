// Reversing a row through shared memory, right and with each barrier mistake. grid (1), block (64), shared 256 bytes.
#include "kernel.cuh"

struct RowParams {
    const float *in;
    float *out;
};

namespace {

// Thread i reads what thread n - 1 - i wrote, of another warp.
__device__ void reverse(const RowParams &p, bool barrier) {
    TENP_SHARED(float, row);
    row[threadIdx.x] = p.in[threadIdx.x];
    if (barrier) {
        __syncthreads();
    }
    p.out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

} // namespace

TENP_KERNEL(test_reverse, RowParams, 64, 1) { reverse(p, true); }

TENP_KERNEL(test_reverse_no_barrier, RowParams, 64, 1) { reverse(p, false); }

// The second round overwrites what the first may still read.
TENP_KERNEL(test_reuse_no_barrier, RowParams, 64, 1) {
    TENP_SHARED(float, row);
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        row[threadIdx.x] = p.in[threadIdx.x] * static_cast<float>(round);
        __syncthreads();
        sum += row[63 - threadIdx.x];
    }
    p.out[threadIdx.x] = sum;
}

TENP_KERNEL(test_barrier_in_branch, RowParams, 64, 1) {
    if (threadIdx.x < 32) {
        __syncthreads();
    }
    p.out[threadIdx.x] = p.in[threadIdx.x];
}

// Each half meets at its own barrier: as many arrivals as threads, and still no barrier of the block.
TENP_KERNEL(test_barrier_in_both_branches, RowParams, 64, 1) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        p.out[threadIdx.x] = 0.0f;
        __syncthreads();
    }
}

TENP_KERNEL(test_exit_before_barrier, RowParams, 64, 1) {
    if (threadIdx.x == 63) {
        return;
    }
    __syncthreads();
    p.out[threadIdx.x] = p.in[threadIdx.x];
}

// Both warps read the value, and one thread changes it once its own warp is through.
TENP_KERNEL(test_write_while_other_warp_reads, RowParams, 64, 1) {
    TENP_SHARED(float, row);
    if (threadIdx.x == 0) {
        row[0] = p.in[0];
    }
    __syncthreads();
    p.out[threadIdx.x] = row[0];
    __syncwarp();
    if (threadIdx.x == 0) {
        row[0] = 1.0f;
    }
}
