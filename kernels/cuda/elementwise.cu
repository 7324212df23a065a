// computes: tenp_silu_mul: out = silu(gate) * up. tenp_add: out = a + gate * b, gate = sigmoid(row_logits) or 1.
//           tenp_count_non_finite: adds the number of NaN and infinite elements of x to *count
// layout:   gate, up [rows, pitch] f32, out [rows, cols] bf16; a, b, out [rows, cols] f32; x [len] f32
// requires: nothing beyond the elements' alignment; vectors where everything is aligned to 16 bytes. out may be a
// launch:   silu_mul, add: a block per row: grid (rows), block (any multiple of 32 up to 256), no shared memory.
//           count_non_finite: any grid, block (256), shared 32 bytes
// flops:    a few an element. bytes: 8 read and 2 written; 8 and 4 (12 and 4 of shared rows); 4
#include "reduce.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace {

__device__ __forceinline__ bool aligned_16(const void *pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

__device__ __forceinline__ int is_non_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u ? 1 : 0;
}

__device__ __forceinline__ float4 add_scaled(float4 a, float scale, float4 b) {
    return make_float4(a.x + scale * b.x, a.y + scale * b.y, a.z + scale * b.z, a.w + scale * b.w);
}

// Never zero, so that an infinite summand stays infinite; NaN falls through.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x > 88.0f ? 88.0f : -x)); }

__device__ __forceinline__ float silu_mul(float gate, float up) { return tenp::silu(gate) * up; }

} // namespace

TENP_KERNEL(tenp_silu_mul, TenpSiluMulParams, 256, 1) {
    const int64_t row = blockIdx.x;
    const float *gate = p.gate + row * p.pitch;
    const float *up = p.up + row * p.pitch;
    uint16_t *out = p.out + row * p.cols;
    if (p.cols % 8 == 0 && p.pitch % 4 == 0 && aligned_16(p.gate) && aligned_16(p.up) && aligned_16(p.out)) {
        for (int col = 8 * static_cast<int>(threadIdx.x); col < p.cols; col += 8 * static_cast<int>(blockDim.x)) {
            const float4 *g = reinterpret_cast<const float4 *>(gate + col);
            const float4 *u = reinterpret_cast<const float4 *>(up + col);
            const float4 g0 = g[0], g1 = g[1], u0 = u[0], u1 = u[1];
            const float v[8] = {silu_mul(g0.x, u0.x), silu_mul(g0.y, u0.y), silu_mul(g0.z, u0.z), silu_mul(g0.w, u0.w),
                                silu_mul(g1.x, u1.x), silu_mul(g1.y, u1.y), silu_mul(g1.z, u1.z), silu_mul(g1.w, u1.w)};
            *reinterpret_cast<uint4 *>(out + col) = tenp::narrow(v);
        }
    } else {
        for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
            out[col] = tenp::float_to_bf16(silu_mul(gate[col], up[col]));
        }
    }
}

TENP_KERNEL(tenp_add, TenpAddParams, 256, 1) {
    const int64_t row = blockIdx.x;
    const float scale = p.row_logits == nullptr ? 1.0f : sigmoid(p.row_logits[row]);
    // No restrict: each thread reads an element of a before it writes the same one of out.
    const float *a = p.a + row * p.cols;
    const float *b = p.b + row * p.cols;
    float *out = p.out + row * p.cols;
    if (p.cols % 4 == 0 && aligned_16(p.a) && aligned_16(p.b) && aligned_16(p.out)) {
        for (int col = 4 * static_cast<int>(threadIdx.x); col < p.cols; col += 4 * static_cast<int>(blockDim.x)) {
            *reinterpret_cast<float4 *>(out + col) = add_scaled(*reinterpret_cast<const float4 *>(a + col), scale,
                                                                *reinterpret_cast<const float4 *>(b + col));
        }
    } else {
        for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
            out[col] = a[col] + scale * b[col];
        }
    }
}

TENP_KERNEL(tenp_count_non_finite, TenpCountNonFiniteParams, 256, 1) {
    TENP_SHARED(int, partial);
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int count = 0;
    int64_t done = 0;
    if (aligned_16(p.x)) {
        const float4 *quads = reinterpret_cast<const float4 *>(p.x);
        for (int64_t i = thread; i < p.len / 4; i += threads) {
            const float4 v = quads[i];
            count += is_non_finite(v.x) + is_non_finite(v.y) + is_non_finite(v.z) + is_non_finite(v.w);
        }
        done = p.len / 4 * 4;
    }
    for (int64_t i = done + thread; i < p.len; i += threads) {
        count += is_non_finite(p.x[i]);
    }
    count = tenp::block_sum(count, partial);
    if (threadIdx.x == 0 && count != 0) {
        atomicAdd(p.count, count);
    }
}
