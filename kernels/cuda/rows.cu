// computes: tenp_embedding: hidden[t] = table[ids[t]], NaN for an id outside the vocabulary. tenp_convert_rows: rows of
//           f32, bf16 or f16 plus a bias, clamped, as f32 and as bf16, each at its row in the outputs. tenp_scale_rows:
//           chosen rows of bf16 as f32, each times its row's scale
// layout:   table [vocab, H] bf16, hidden [T, H] f32; in [num_rows, in_pitch], out_f32, out_bf16 [., out_pitch]
// requires: embedding: H a multiple of 8, 16-byte aligned bases. convert_rows: nothing beyond the elements' alignment;
//           eight elements at a time where everything is aligned to 16 bytes. NaN stays NaN, clamped or not. scale_rows:
//           pitches a multiple of 8, 16-byte aligned bases; what fills the last eight columns of a row is written as zeros
// launch:   a block per row: grid (rows), block (any multiple of 32 up to 256), no shared memory
// flops:    none. bytes: 2 read, 4 written an element; as the types say
#include "vector.cuh"

namespace {

// IEEE 754 binary16: bias 15.
__device__ __forceinline__ float f16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    // The bits as an f32 of the same exponent field are too small by 2^(127 - 15), subnormals included.
    return __uint_as_float(sign | magnitude << 13) * 0x1p112f;
}

__device__ __forceinline__ void store8(float *to, const float (&v)[8]) {
    float4 *quads = reinterpret_cast<float4 *>(to);
    quads[0] = make_float4(v[0], v[1], v[2], v[3]);
    quads[1] = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ void load8(const float *from, float (&v)[8]) {
    const float4 *quads = reinterpret_cast<const float4 *>(from);
    const float4 a = quads[0];
    const float4 b = quads[1];
    v[0] = a.x;
    v[1] = a.y;
    v[2] = a.z;
    v[3] = a.w;
    v[4] = b.x;
    v[5] = b.y;
    v[6] = b.z;
    v[7] = b.w;
}

// Element types: what lies in memory and how it is widened, one or eight at a time.
struct F32 {
    using Bits = float;
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[1]) { v[0] = *from; }
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[8]) { load8(from, v); }
};

struct Bf16 {
    using Bits = uint16_t;
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[1]) { v[0] = tenp::bf16_to_float(*from); }
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[8]) { tenp::widen(from, v); }
};

struct F16 {
    using Bits = uint16_t;
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[1]) { v[0] = f16_to_float(*from); }
    static __device__ __forceinline__ void load(const Bits *from, float (&v)[8]) {
        const uint4 bits = *reinterpret_cast<const uint4 *>(from);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = f16_to_float(static_cast<uint16_t>(words[i] & 0xffffu));
            v[2 * i + 1] = f16_to_float(static_cast<uint16_t>(words[i] >> 16));
        }
    }
};

__device__ __forceinline__ void store(const TenpConvertRowsParams &p, int64_t at, const float (&v)[1]) {
    if (p.out_f32 != nullptr) {
        p.out_f32[at] = v[0];
    }
    if (p.out_bf16 != nullptr) {
        p.out_bf16[at] = tenp::float_to_bf16(v[0]);
    }
}

__device__ __forceinline__ void store(const TenpConvertRowsParams &p, int64_t at, const float (&v)[8]) {
    if (p.out_f32 != nullptr) {
        store8(p.out_f32 + at, v);
    }
    if (p.out_bf16 != nullptr) {
        *reinterpret_cast<uint4 *>(p.out_bf16 + at) = tenp::narrow(v);
    }
}

__device__ __forceinline__ bool aligned_16(const void *pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class Element, int STEP> __device__ __forceinline__ void convert_row(const TenpConvertRowsParams &p) {
    const int64_t row = blockIdx.x;
    const typename Element::Bits *in = static_cast<const typename Element::Bits *>(p.in) + row * p.in_pitch;
    const int64_t out = (p.out_rows == nullptr ? row : p.out_rows[row]) * p.out_pitch;
    for (int col = STEP * static_cast<int>(threadIdx.x); col < p.cols; col += STEP * static_cast<int>(blockDim.x)) {
        float v[STEP];
        Element::load(in + col, v);
        if (p.bias != nullptr) {
            float bias[STEP];
            F32::load(p.bias + col, bias);
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                v[i] += bias[i];
            }
        }
        if (p.clip > 0.0f) {
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                v[i] = v[i] > p.clip ? p.clip : v[i];
                v[i] = v[i] < -p.clip ? -p.clip : v[i];
            }
        }
        store(p, out + col, v);
    }
}

template <class Element> __device__ __forceinline__ void convert_row(const TenpConvertRowsParams &p) {
    const bool whole = p.cols % 8 == 0 && p.in_pitch % 8 == 0 && p.out_pitch % 8 == 0 && aligned_16(p.in) &&
                       aligned_16(p.bias) && aligned_16(p.out_f32) && aligned_16(p.out_bf16);
    if (whole) {
        convert_row<Element, 8>(p);
    } else {
        convert_row<Element, 1>(p);
    }
}

} // namespace

TENP_KERNEL(tenp_embedding, TenpEmbeddingParams, 256, 1) {
    const int64_t token = blockIdx.x;
    const int id = p.ids[token];
    const bool known = id >= 0 && id < p.vocab_size;
    const uint16_t *from = p.table + static_cast<int64_t>(known ? id : 0) * p.hidden;
    float *to = p.hidden_states + token * p.hidden;
    for (int col = 8 * static_cast<int>(threadIdx.x); col < p.hidden; col += 8 * static_cast<int>(blockDim.x)) {
        float v[8];
        if (known) {
            tenp::widen(from + col, v);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = __uint_as_float(0x7fffffffu);
            }
        }
        store8(to + col, v);
    }
}

TENP_KERNEL(tenp_convert_rows, TenpConvertRowsParams, 256, 1) {
    if (p.in_dtype == TENP_F32) {
        convert_row<F32>(p);
    } else if (p.in_dtype == TENP_BF16) {
        convert_row<Bf16>(p);
    } else {
        convert_row<F16>(p);
    }
}

TENP_KERNEL(tenp_scale_rows, TenpScaleRowsParams, 256, 1) {
    const int64_t row = p.row_ids[blockIdx.x];
    const float scale = p.scales == nullptr ? 1.0f : p.scales[row];
    const uint16_t *from = p.in + row * p.in_pitch;
    float *to = p.out + blockIdx.x * p.out_pitch;
    for (int col = 8 * static_cast<int>(threadIdx.x); col < p.cols; col += 8 * static_cast<int>(blockDim.x)) {
        float v[8];
        if (col + 8 <= p.cols) {
            tenp::widen(from + col, v);
        } else {
            // Nothing need be written in the input behind the last column.
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = col + i < p.cols ? tenp::bf16_to_float(from[col + i]) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] *= scale;
        }
        store8(to + col, v);
    }
}
