// What each thread is told of its place. Any grid and block.
#include "kernel.cuh"

struct PlaceParams {
    uint32_t *out; // [blocks, threads, 2]: packed indices, packed sizes
};

TENP_KERNEL(test_places, PlaceParams, 1024, 1) {
    const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    uint32_t *out = p.out + 2 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
    out[0] = blockIdx.x | blockIdx.y << 4 | blockIdx.z << 8 | threadIdx.x << 12 | threadIdx.y << 18 | threadIdx.z << 24;
    out[1] = gridDim.x | gridDim.y << 4 | gridDim.z << 8 | blockDim.x << 12 | blockDim.y << 18 | blockDim.z << 24;
}

TENP_KERNEL(test_bounded, PlaceParams, 64, 1) { p.out[threadIdx.x] = 0; }
