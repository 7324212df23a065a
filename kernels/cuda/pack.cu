// computes: one expert's weights in device form, all or chosen neurons: tenp_pack_gate_up gathers rows into its part of
//           GU, tenp_pack_down columns into rows of its part of DT; padding neurons are zeros
// layout:   gate, up [., H], GU part [2 width_padded, H] with 8 gate rows, then the 8 up rows of the same neurons, over
//           and over; down [H, source_width], DT part [width_padded, H]; all bf16; keep [width] neurons in order
// requires: H a multiple of 8, 16-byte aligned bases but for down, whose rows may begin anywhere; width_padded a multiple
//           of 16. pack_down: an id outside the source gives a row of NaN
// launch:   gate_up: a warp per row of GU: grid (width_padded / 4), block (256), no shared memory.
//           down: grid (ceil(H / 64), ceil(width_padded / 64)), block (256), shared 8448 bytes
// flops:    none. bytes: 4 read and 4 written an element of gate; 2 and 2 of down
#include "kernel.cuh"

namespace {

constexpr int TILE = 64;
// Words of a row of the tile: odd, so that the lanes of a warp, a column each, write to different banks.
constexpr int PITCH = TILE / 2 + 1;
constexpr uint32_t BF16_NAN = 0x7fff;

// Column of down that neuron `neuron` is taken from: -1 for padding, -2 for one that is not there.
__device__ __forceinline__ int source_column(const TenpPackDownParams &p, int neuron) {
    if (neuron >= p.width) {
        return -1;
    }
    const int column = p.keep == nullptr ? neuron : p.keep[neuron];
    return column >= 0 && column < p.source_width ? column : -2;
}

__device__ __forceinline__ uint32_t element(const TenpPackDownParams &p, int row, int column) {
    if (row >= p.hidden || column == -1) {
        return 0;
    }
    return column < 0 ? BF16_NAN : p.down[static_cast<int64_t>(row) * p.source_width + column];
}

} // namespace

TENP_KERNEL(tenp_pack_gate_up, TenpPackGateUpParams, 256, 1) {
    const int row = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    if (row >= 2 * p.width_padded) {
        return;
    }
    const int neuron = row / 16 * 8 + row % 8;
    const bool real = neuron < p.width;
    const int source = real && p.keep != nullptr ? p.keep[neuron] : neuron;
    const int64_t chunks = p.hidden / 8;
    const uint4 *from = reinterpret_cast<const uint4 *>(row % 16 < 8 ? p.gate : p.up) + source * chunks;
    uint4 *to = reinterpret_cast<uint4 *>(p.out) + row * chunks;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < chunks; i += 32) {
        to[i] = real ? from[i] : make_uint4(0, 0, 0, 0);
    }
}

// A tile is TILE columns of down by TILE of its rows. Two rows of a column share a word.
TENP_KERNEL(tenp_pack_down, TenpPackDownParams, 256, 4) {
    TENP_SHARED(uint32_t, tile);
    const int first_row = blockIdx.x * TILE;
    const int first_neuron = blockIdx.y * TILE;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    // Even warps take the first 32 columns, odd ones the others.
    const int place = lane + warp % 2 * 32;
    const int column = source_column(p, first_neuron + place);
    // Eight loads in flight; all sixteen take more than 64 registers on sm_80.
#pragma unroll 4
    for (int i = 0; i < TILE / 2 / 4; ++i) {
        const int pair = warp / 2 + 4 * i;
        const int row = first_row + 2 * pair;
        tile[place * PITCH + pair] = element(p, row, column) | element(p, row + 1, column) << 16;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int item = threadIdx.x + 256 * i;
        const int neuron = item / 8;
        const int chunk = item % 8;
        const uint32_t *words = tile + neuron * PITCH + 4 * chunk;
        const int row = first_row + 8 * chunk;
        if (first_neuron + neuron < p.width_padded && row < p.hidden) {
            uint16_t *to = p.out + static_cast<int64_t>(first_neuron + neuron) * p.hidden + row;
            *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
