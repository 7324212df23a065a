// computes: m = sum over a token's slots of g y, in slot order; out = residual + (m + gate * shared), gate the sigmoid of
//           shared_logits or 1
// layout:   y [rows, H] in f32 or bf16; combined, shared, residual, out [T, H] f32
// requires: H a multiple of 8, matrices 16-byte aligned; a slot with row -1 and one of an expert of width 0 adds nothing;
//           out may be residual
// launch:   grid (T, ceil(H / 2048)), block (256), no shared memory
// flops:    2 k H a token. bytes: 4 (2) k H of y and 4 H of each matrix, a token
#include "combine.cuh"

namespace {

template <bool BF16> __device__ __forceinline__ void combine(const TenpMoeCombineParams &p) {
    const int64_t token = blockIdx.x;
    const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (column >= p.hidden) {
        return;
    }
    float m[8] = {};
    for (int first = 0; first < p.top_k; first += tenp::SLOT_GROUP) {
        const tenp::SlotGroup slots(p, token, first);
        uint4 bits[tenp::SLOT_GROUP][BF16 ? 1 : 2];
#pragma unroll
        for (int i = 0; i < tenp::SLOT_GROUP; ++i) {
            tenp::load_output<BF16>(p, slots.rows[i], column, bits[i]);
        }
#pragma unroll
        for (int i = 0; i < tenp::SLOT_GROUP; ++i) {
            if (slots.rows[i] >= 0) {
                float y[8];
                tenp::widen_output(bits[i], y);
                tenp::add_scaled(m, y, slots.weights[i]);
            }
        }
    }
    const int64_t at = token * p.hidden + column;
    if (p.combined != nullptr) {
        tenp::store_8(p.combined + at, m);
    }
    if (p.out == nullptr) {
        return;
    }
    float values[8];
    if (p.shared != nullptr) {
        const float gate = p.shared_logits == nullptr ? 1.0f : 1.0f / (1.0f + expf(-p.shared_logits[token]));
        tenp::load_8(p.shared + at, values);
        tenp::add_scaled(m, values, gate);
    }
    if (p.residual != nullptr) {
        tenp::load_8(p.residual + at, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            m[i] = values[i] + m[i];
        }
    }
    tenp::store_8(p.out + at, m);
}

} // namespace

TENP_KERNEL(tenp_moe_combine, TenpMoeCombineParams, 256, 4) {
    if (p.y_bf16 != nullptr) {
        combine<true>(p);
    } else {
        combine<false>(p);
    }
}
