// computes: high = bf16(g), low = bf16(g - high) of every element g of an expert's Gram matrix
// layout:   in [width, width] f32; out [2 S, pitch]: high parts from row first_row on, low parts from row S + first_row on
// requires: width a multiple of 16, pitch of 8; 16-byte aligned bases. An infinity has a NaN for its low part
// launch:   a block per row: grid (width), block (any multiple of 32 up to 256), no shared memory
// flops:    1 an element. bytes: 4 read and 4 written an element
#include "vector.cuh"

TENP_KERNEL(tenp_gram_split, TenpGramSplitParams, 256, 1) {
    const int64_t row = blockIdx.x;
    const float4 *in = reinterpret_cast<const float4 *>(p.in + row * p.width);
    uint16_t *high = p.out + (p.first_row + row) * p.pitch;
    uint16_t *low = high + static_cast<int64_t>(p.num_neurons) * p.pitch;
    for (int chunk = threadIdx.x; 8 * chunk < p.width; chunk += blockDim.x) {
        const float4 first = in[2 * chunk];
        const float4 second = in[2 * chunk + 1];
        float values[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
        const uint4 rounded = tenp::narrow(values);
        float back[8];
        tenp::widen(rounded, back);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            values[i] -= back[i];
        }
        *reinterpret_cast<uint4 *>(high + 8 * chunk) = rounded;
        *reinterpret_cast<uint4 *>(low + 8 * chunk) = tenp::narrow(values);
    }
}
