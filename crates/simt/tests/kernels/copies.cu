// Doubling a row that cp.async brings in, right and with each mistake. grid (1), block (64), shared 1024 bytes.
// Thread i copies elements 4i..4i+4 of 256 and doubles elements i, i + 64, i + 128, i + 192, which others copied.
#include "kernel.cuh"

struct CopyParams {
    float *in;
    float *out;
};

namespace {

__device__ __forceinline__ void start(const CopyParams &p, float *row, bool valid = true) {
    tenp::cp_async_16(row + 4 * threadIdx.x, p.in + 4 * threadIdx.x, valid);
}

__device__ __forceinline__ void finish(const CopyParams &p, const float *row) {
    for (int i = threadIdx.x; i < 256; i += 64) {
        p.out[i] = 2.0f * row[i];
    }
}

} // namespace

TENP_KERNEL(test_copy, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    tenp::cp_async_wait<0>();
    __syncthreads();
    finish(p, row);
}

TENP_KERNEL(test_copy_zero_fill, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row, threadIdx.x < 32);
    tenp::cp_async_commit();
    tenp::cp_async_wait<0>();
    __syncthreads();
    finish(p, row);
}

TENP_KERNEL(test_copy_no_wait, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    __syncthreads();
    finish(p, row);
}

// The wait leaves the newest group pending, and there is no other.
TENP_KERNEL(test_copy_wait_too_few, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    tenp::cp_async_wait<1>();
    __syncthreads();
    finish(p, row);
}

TENP_KERNEL(test_copy_no_commit, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_wait<0>();
    __syncthreads();
    finish(p, row);
}

TENP_KERNEL(test_copy_no_barrier, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    tenp::cp_async_wait<0>();
    finish(p, row);
}

// A barrier, but before the wait: the bytes of the others need not have come.
TENP_KERNEL(test_copy_barrier_before_wait, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    __syncthreads();
    tenp::cp_async_wait<0>();
    finish(p, row);
}

// The ring's slot is filled again while others still read it.
TENP_KERNEL(test_copy_refill_too_soon, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    for (int round = 0; round < 2; ++round) {
        start(p, row);
        tenp::cp_async_commit();
        tenp::cp_async_wait<0>();
        __syncthreads();
        finish(p, row);
    }
}

TENP_KERNEL(test_copy_and_store, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    row[4 * threadIdx.x] = 0.0f;
    tenp::cp_async_wait<0>();
    __syncthreads();
    finish(p, row);
}

// The source changes while the copy is under way.
TENP_KERNEL(test_copy_source_changes, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    start(p, row);
    tenp::cp_async_commit();
    __syncthreads();
    p.in[threadIdx.x] = 0.0f;
    tenp::cp_async_wait<0>();
    __syncthreads();
    finish(p, row);
}

TENP_KERNEL(test_copy_misaligned, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    tenp::cp_async_16(row, p.in + 1, true);
}

TENP_KERNEL(test_copy_out_of_bounds, CopyParams, 64, 1) {
    TENP_SHARED(float, row);
    tenp::cp_async_16(row + 4 * threadIdx.x, p.in + 256, threadIdx.x == 1);
}
