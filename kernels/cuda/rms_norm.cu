// computes: s = x + addend; out = s / sqrt(mean(s^2) + eps) * weight over the first `width` elements of each row
// layout:   x, addend, sum_out [num_rows, x_pitch] f32; out_f32, out_bf16 [num_rows, out_pitch]; weight [width] f32
// requires: width >= 1, pitches >= width, no alignment beyond the element's; sums in f64, in an order that width fixes
// launch:   tenp_rms_norm: grid (num_rows), block (256), shared 64 bytes. tenp_rms_norm_heads, for narrow rows: a warp
//           per row, grid (ceil(num_rows / 8)), block (256), no shared memory.
// flops:    4 width a row. bytes: 4 width (2 with addend) read, 4 (sum_out, out_f32) and 2 (out_bf16) written, an element
#include "kernel.cuh"
#include "reduce.cuh"

namespace {

// A row by `threads` threads of which this is number `thread`; `total` adds up the threads' sums of squares.
template <class Total>
__device__ __forceinline__ void norm_row(const TenpRmsNormParams &p, int64_t row, int thread, int threads, Total total) {
    const float *x = p.x + row * p.x_pitch;
    const float *addend = p.addend == nullptr ? nullptr : p.addend + row * p.x_pitch;
    float *sum_out = p.sum_out == nullptr ? nullptr : p.sum_out + row * p.x_pitch;
    double squares = 0.0;
    for (int i = thread; i < p.width; i += threads) {
        float s = x[i];
        if (addend != nullptr) {
            s += addend[i];
        }
        if (sum_out != nullptr) {
            sum_out[i] = s;
        }
        squares += static_cast<double>(s) * static_cast<double>(s);
    }
    squares = total(squares);
    const float scale = static_cast<float>(1.0 / sqrt(squares / p.width + p.eps));
    for (int i = thread; i < p.width; i += threads) {
        // x may be overwritten by now, but only with s and only by this thread.
        float s;
        if (sum_out != nullptr) {
            s = sum_out[i];
        } else {
            s = addend != nullptr ? x[i] + addend[i] : x[i];
        }
        const float value = s * scale * p.weight[i];
        if (p.out_f32 != nullptr) {
            p.out_f32[row * p.out_pitch + i] = value;
        }
        if (p.out_bf16 != nullptr) {
            p.out_bf16[row * p.out_pitch + i] = tenp::float_to_bf16(value);
        }
    }
}

} // namespace

TENP_KERNEL(tenp_rms_norm, TenpRmsNormParams, 256, 1) {
    TENP_SHARED(double, partial);
    norm_row(p, blockIdx.x, threadIdx.x, blockDim.x,
             [&](double value) { return tenp::block_sum(value, partial); });
}

TENP_KERNEL(tenp_rms_norm_heads, TenpRmsNormParams, 256, 1) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row < p.num_rows) {
        norm_row(p, row, threadIdx.x % 32, 32, [](double value) { return tenp::warp_sum(value); });
    }
}
