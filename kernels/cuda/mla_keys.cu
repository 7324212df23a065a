// computes: keys and values of multi-head latent attention, rounded to bf16: each head's key is its own nope part and
//           the rotated part that all heads share, its value follows its nope part in `expanded`
// layout:   expanded [T, heads (nope + v)] f32, compressed [T, compressed_pitch] f32 with the shared part last;
//           keys [., heads (nope + rope)], values [., heads v] bf16
// requires: nothing beyond the elements' alignment; eight elements at a time where sizes and bases allow vectors
// launch:   a block per token: grid (T), block (any multiple of 32 up to 256), no shared memory
// flops:    none. bytes: 4 read an element of expanded and 2 written an element of keys and values
#include "vector.cuh"

namespace {

__device__ __forceinline__ bool aligned_16(const void *pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <int STEP> __device__ __forceinline__ void copy(const float *from, uint16_t *to) {
    if constexpr (STEP == 8) {
        const float4 *quads = reinterpret_cast<const float4 *>(from);
        const float4 a = quads[0], b = quads[1];
        const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        *reinterpret_cast<uint4 *>(to) = tenp::narrow(v);
    } else {
        *to = tenp::float_to_bf16(*from);
    }
}

template <int STEP> __device__ __forceinline__ void make_keys(const TenpMlaKeysParams &p) {
    const int64_t token = blockIdx.x;
    const int64_t row = p.out_rows == nullptr ? token : p.out_rows[token];
    const int qk_dim = p.nope_dim + p.rope_dim;
    const int own = p.nope_dim + p.v_dim;
    const float *expanded = p.expanded + token * p.num_heads * own;
    const float *rope = p.compressed + (token + 1) * p.compressed_pitch - p.rope_dim;
    uint16_t *keys = p.keys + row * p.num_heads * qk_dim;
    uint16_t *values = p.values + row * p.num_heads * p.v_dim;
    const int items = (qk_dim + p.v_dim) / STEP;
    for (int i = threadIdx.x; i < p.num_heads * items; i += blockDim.x) {
        const int head = i / items;
        const int at = i % items * STEP;
        const float *from = expanded + head * own;
        if (at < p.nope_dim) {
            copy<STEP>(from + at, keys + head * qk_dim + at);
        } else if (at < qk_dim) {
            copy<STEP>(rope + at - p.nope_dim, keys + head * qk_dim + at);
        } else {
            copy<STEP>(from + at - p.rope_dim, values + head * p.v_dim + at - qk_dim);
        }
    }
}

} // namespace

TENP_KERNEL(tenp_mla_keys, TenpMlaKeysParams, 256, 1) {
    const bool whole = p.nope_dim % 8 == 0 && p.rope_dim % 8 == 0 && p.v_dim % 8 == 0 && p.compressed_pitch % 4 == 0 &&
                       aligned_16(p.expanded) && aligned_16(p.compressed) && aligned_16(p.keys) && aligned_16(p.values);
    if (whole) {
        make_keys<8>(p);
    } else {
        make_keys<1>(p);
    }
}
