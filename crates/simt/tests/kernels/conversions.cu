// Number formats. grid (ceil(count / 256)), block (256), no shared memory.
#include "kernel.cuh"

struct ConvertParams {
    const float *floats;      // [count]
    const uint16_t *halves;   // [count]
    const uint8_t *bytes;     // [count]
    uint16_t *bf16_of_float;  // [count] out
    uint32_t *packed;         // [count] out: of the float, and of its negative above it
    float *float_of_bf16;     // [count] out
    float *unpacked;          // [count, 2] out: of `packed`
    float *float_of_e4m3;     // [count] out
    int32_t count;
    int32_t padding;
};

TENP_KERNEL(test_conversions, ConvertParams, 256, 1) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= p.count) {
        return;
    }
    p.bf16_of_float[i] = tenp::float_to_bf16(p.floats[i]);
    p.packed[i] = tenp::pack_bf16(p.floats[i], -p.floats[i]);
    p.float_of_bf16[i] = tenp::bf16_to_float(p.halves[i]);
    const float2 two = tenp::unpack_bf16(p.packed[i]);
    p.unpacked[2 * i] = two.x;
    p.unpacked[2 * i + 1] = two.y;
    p.float_of_e4m3[i] = tenp::e4m3_to_float(p.bytes[i]);
}
