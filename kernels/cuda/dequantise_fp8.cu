// computes: out = e4m3 element * the scale of its 128 x 128 block, in f32, rounded to bf16
// layout:   in, out [rows, cols]; scales [ceil(rows / 128), ceil(cols / 128)] f32
// requires: nothing beyond the elements' alignment; 16 elements at a time where cols is a multiple of 16 and the bases are
//           16-byte aligned. The codes of NaN give NaN
// launch:   a block per row: grid (rows), block (any multiple of 32 up to 256), no shared memory
// flops:    1 an element. bytes: 1 read and 2 written an element
#include "kernel.cuh"

namespace {

constexpr int BLOCK = 128;

__device__ __forceinline__ bool aligned_16(const void *pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Elements 0, 1 or 2, 3 of a word.
__device__ __forceinline__ uint32_t two(uint32_t codes, float scale) {
    return tenp::pack_bf16(tenp::e4m3_to_float(static_cast<uint8_t>(codes & 0xffu)) * scale,
                           tenp::e4m3_to_float(static_cast<uint8_t>(codes >> 8 & 0xffu)) * scale);
}

} // namespace

TENP_KERNEL(tenp_dequantise_fp8, TenpDequantiseFp8Params, 256, 1) {
    const int64_t row = blockIdx.x;
    const uint8_t *in = p.in + row * p.cols;
    uint16_t *out = p.out + row * p.cols;
    const float *scales = p.scales + row / BLOCK * ((p.cols + BLOCK - 1) / BLOCK);
    if (p.cols % 16 == 0 && aligned_16(p.in) && aligned_16(p.out)) {
        for (int col = 16 * static_cast<int>(threadIdx.x); col < p.cols; col += 16 * static_cast<int>(blockDim.x)) {
            const uint4 codes = *reinterpret_cast<const uint4 *>(in + col);
            const float scale = scales[col / BLOCK];
            uint4 *to = reinterpret_cast<uint4 *>(out + col);
            to[0] = make_uint4(two(codes.x, scale), two(codes.x >> 16, scale), two(codes.y, scale),
                               two(codes.y >> 16, scale));
            to[1] = make_uint4(two(codes.z, scale), two(codes.z >> 16, scale), two(codes.w, scale),
                               two(codes.w >> 16, scale));
        }
    } else {
        for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
            out[col] = tenp::float_to_bf16(tenp::e4m3_to_float(in[col]) * scales[col / BLOCK]);
        }
    }
}
