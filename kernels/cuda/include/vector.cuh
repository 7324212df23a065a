// Eight bf16 at a time.
#pragma once

#include "kernel.cuh"

namespace tenp {

__device__ __forceinline__ void widen(uint4 bits, float (&out)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_bf16(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void widen(const uint16_t *from, float (&out)[8]) {
    widen(*reinterpret_cast<const uint4 *>(from), out);
}

__device__ __forceinline__ uint4 narrow(const float (&values)[8]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                      pack_bf16(values[6], values[7]));
}

} // namespace tenp
