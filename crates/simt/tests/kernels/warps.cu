// Warp operations, right and with each mistake. grid (1), block (32) unless said otherwise, shared 256 bytes.
#include "kernel.cuh"

struct WarpParams {
    const int32_t *in; // [32]
    int32_t *out;
};

namespace {
constexpr unsigned ALL = 0xffffffffu;
} // namespace

// out [14, 32]: what each operation gives each lane.
TENP_KERNEL(test_warp_operations, WarpParams, 32, 1) {
    const int lane = threadIdx.x;
    const int v = p.in[lane];
    int32_t *out = p.out + lane;
    out[0 * 32] = __shfl_sync(ALL, v, 5);
    out[1 * 32] = __shfl_sync(ALL, v, lane + 3);
    out[2 * 32] = __shfl_sync(ALL, v, 2, 8);
    out[3 * 32] = __shfl_up_sync(ALL, v, 3);
    out[4 * 32] = __shfl_up_sync(ALL, v, 3, 8);
    out[5 * 32] = __shfl_down_sync(ALL, v, 3);
    out[6 * 32] = __shfl_down_sync(ALL, v, 3, 8);
    out[7 * 32] = __shfl_xor_sync(ALL, v, 9);
    out[8 * 32] = __shfl_xor_sync(ALL, v, 12, 8);
    out[9 * 32] = static_cast<int>(__ballot_sync(ALL, v % 3 == 0));
    out[10 * 32] = __any_sync(ALL, v == 1007) + 2 * __any_sync(ALL, v == -1);
    out[11 * 32] = __all_sync(ALL, v >= 1000) + 2 * __all_sync(ALL, v > 1000);
    out[12 * 32] = static_cast<int>(__shfl_down_sync(ALL, static_cast<double>(v) + 0.25, 1) * 4.0);
    out[13 * 32] = lane < 8 ? static_cast<int>(__ballot_sync(0xffu, lane % 2)) : -1;
}

TENP_KERNEL(test_shuffle_exited, WarpParams, 32, 1) {
    if (threadIdx.x == 31) {
        return;
    }
    p.out[threadIdx.x] = __shfl_xor_sync(ALL, p.in[threadIdx.x], 1);
}

TENP_KERNEL(test_shuffle_in_branch, WarpParams, 32, 1) {
    int v = p.in[threadIdx.x];
    if (threadIdx.x < 16) {
        v += __shfl_xor_sync(ALL, v, 1);
    }
    p.out[threadIdx.x] = v;
}

// The mask is right for those who come, and lane 15 reads lane 16.
TENP_KERNEL(test_shuffle_outside_mask, WarpParams, 32, 1) {
    int v = p.in[threadIdx.x];
    if (threadIdx.x < 16) {
        v = __shfl_down_sync(0xffffu, v, 1);
    }
    p.out[threadIdx.x] = v;
}

TENP_KERNEL(test_shuffle_not_in_own_mask, WarpParams, 32, 1) {
    p.out[threadIdx.x] = __shfl_sync(0xffffu, p.in[threadIdx.x], 0);
}

TENP_KERNEL(test_masks_disagree, WarpParams, 32, 1) {
    p.out[threadIdx.x] = __any_sync(threadIdx.x < 16 ? ALL : 0xffff0001u, 1);
}

// Lane i hands its value to lane i ^ 1 through shared memory.
TENP_KERNEL(test_syncwarp, WarpParams, 32, 1) {
    TENP_SHARED(int32_t, values);
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = p.in[threadIdx.x] + round;
        __syncwarp();
        p.out[threadIdx.x] = values[threadIdx.x ^ 1];
        __syncwarp();
    }
}

// A shuffle synchronises lanes, not memory.
TENP_KERNEL(test_syncwarp_missing, WarpParams, 32, 1) {
    TENP_SHARED(int32_t, values);
    values[threadIdx.x] = p.in[threadIdx.x];
    p.out[threadIdx.x] = __shfl_sync(ALL, values[threadIdx.x], 0);
    p.out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// The next round's write meets this round's read.
TENP_KERNEL(test_syncwarp_missing_behind_read, WarpParams, 32, 1) {
    TENP_SHARED(int32_t, values);
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = p.in[threadIdx.x] + round;
        __syncwarp();
        p.out[threadIdx.x] = values[threadIdx.x ^ 1];
    }
}

// Pairs synchronise with themselves alone.
TENP_KERNEL(test_syncwarp_pairs, WarpParams, 32, 1) {
    TENP_SHARED(int32_t, values);
    const unsigned pair = 3u << (threadIdx.x & ~1u);
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = p.in[threadIdx.x] + round;
        __syncwarp(pair);
        p.out[threadIdx.x] = values[threadIdx.x ^ 1];
        __syncwarp(pair);
    }
}

TENP_KERNEL(test_syncwarp_wrong_pairs, WarpParams, 32, 1) {
    TENP_SHARED(int32_t, values);
    const unsigned pair = 3u << (threadIdx.x & ~1u);
    values[threadIdx.x] = p.in[threadIdx.x];
    __syncwarp(pair);
    p.out[threadIdx.x] = values[threadIdx.x ^ 2];
}

// block (64): one warp's __syncwarp says nothing to the other.
TENP_KERNEL(test_syncwarp_across_warps, WarpParams, 64, 1) {
    TENP_SHARED(int32_t, values);
    if (threadIdx.x < 32) {
        values[threadIdx.x] = p.in[threadIdx.x];
    }
    __syncwarp();
    if (threadIdx.x >= 32) {
        p.out[threadIdx.x - 32] = values[threadIdx.x - 32];
    }
}

// grid (4), out [2] set to zero: the number of threads and the largest value.
TENP_KERNEL(test_atomics, WarpParams, 32, 1) {
    atomicAdd(p.out, 1);
    atomicMax(p.out + 1, p.in[threadIdx.x]);
}

TENP_KERNEL(test_atomic_and_plain, WarpParams, 32, 1) {
    atomicAdd(p.out, 1);
    if (threadIdx.x == 31) {
        p.out[1] = p.out[0];
    }
}
