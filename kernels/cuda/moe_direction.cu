// computes: m = sum over a token's slots of g y, in slot order; x.y, y.y and the largest |y| of each row; x.x, r.r,
//           r.(r+m), (r+m).(r+m) and the sum of g of each token, r the residual stream
// layout:   y [rows, H] in f32 or bf16; x, residual, combined [T, H] f32; row_dots [rows, 2], token_dots [T, 5] f64
// requires: H a multiple of 8, matrices 16-byte aligned; a slot with row -1 is skipped, the row of an expert of width 0
//           gets zeros. Products of eight neighbours are added in f32, all further sums in f64, in an order that H fixes
// launch:   grid (T), block (128), shared 4 H + 320 bytes
// flops:    6 k H + 8 H a token. bytes: 4 (2) k H of y, 12 H, a token
#include "combine.cuh"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32, GROUP = tenp::SLOT_GROUP;

// What one thread has seen of four rows.
struct RowSums {
    double dots[2][GROUP] = {}; // x.y, y.y
    uint32_t peaks[GROUP] = {}; // bits of |y|, ordered like the numbers, NaN above infinity

    __device__ __forceinline__ void add(int i, const float (&x)[8], const float (&y)[8]) {
        float xy = 0.0f;
        float yy = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            xy = fmaf(x[j], y[j], xy);
            yy = fmaf(y[j], y[j], yy);
            const uint32_t size = __float_as_uint(y[j]) & 0x7fffffffu;
            peaks[i] = size > peaks[i] ? size : peaks[i];
        }
        dots[0][i] += static_cast<double>(xy);
        dots[1][i] += static_cast<double>(yy);
    }
};

// Four sums over the lanes at once: lane l gets that of number l / 8, with 6 exchanges instead of 20.
template <class T, class Merge> __device__ __forceinline__ T fold_four(const T (&values)[GROUP], int lane, Merge merge) {
    T two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const T keep = (lane & 16) == 0 ? values[i] : values[i + 2];
        const T give = (lane & 16) == 0 ? values[i + 2] : values[i];
        two[i] = merge(keep, __shfl_xor_sync(tenp::WHOLE_WARP, give, 16));
    }
    const T keep = (lane & 8) == 0 ? two[0] : two[1];
    const T give = (lane & 8) == 0 ? two[1] : two[0];
    T one = merge(keep, __shfl_xor_sync(tenp::WHOLE_WARP, give, 8));
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
        one = merge(one, __shfl_xor_sync(tenp::WHOLE_WARP, one, offset));
    }
    return one;
}

// Sums of the warps, behind m in shared memory.
struct Scratch {
    double dots[2][GROUP][WARPS];
    uint32_t peaks[GROUP][WARPS];
};

__device__ __forceinline__ void store_rows(const TenpMoeDirectionParams &p, const tenp::SlotGroup &slots, Scratch &sums) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        if (threadIdx.x == i && slots.slot_rows[i] >= 0) {
            double dots[2] = {};
            uint32_t peak = 0;
            for (int w = 0; w < WARPS; ++w) {
                dots[0] += sums.dots[0][i][w];
                dots[1] += sums.dots[1][i][w];
                peak = sums.peaks[i][w] > peak ? sums.peaks[i][w] : peak;
            }
            const int64_t row = slots.slot_rows[i];
            p.row_dots[2 * row] = dots[0];
            p.row_dots[2 * row + 1] = dots[1];
            p.row_peaks[row] = __uint_as_float(peak);
            p.row_inverse[row] = tenp::inverse_norm(dots[1]);
        }
    }
}

// The sums of four slots; m so far is in shared memory, each thread's elements its own.
template <bool BF16>
__device__ __forceinline__ void add_slots(const TenpMoeDirectionParams &p, const tenp::SlotGroup &slots, bool first,
                                          float *m_row, Scratch &sums) {
    const float *x_row = p.x + static_cast<int64_t>(blockIdx.x) * p.hidden;
    RowSums own;
    for (int column = threadIdx.x * 8; column < p.hidden; column += THREADS * 8) {
        uint4 bits[GROUP][BF16 ? 1 : 2];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            tenp::load_output<BF16>(p, slots.rows[i], column, bits[i]);
        }
        float x[8];
        float m[8] = {};
        tenp::load_8(x_row + column, x);
        if (!first) {
            tenp::load_8(m_row + column, m);
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            if (slots.rows[i] >= 0) {
                float y[8];
                tenp::widen_output(bits[i], y);
                own.add(i, x, y);
                tenp::add_scaled(m, y, slots.weights[i]);
            }
        }
        tenp::store_8(m_row + column, m);
    }
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const auto add = [](double a, double b) { return a + b; };
    const double xy = fold_four(own.dots[0], lane, add);
    const double yy = fold_four(own.dots[1], lane, add);
    const uint32_t peak = fold_four(own.peaks, lane, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    if (lane % 8 == 0) {
        sums.dots[0][lane / 8][warp] = xy;
        sums.dots[1][lane / 8][warp] = yy;
        sums.peaks[lane / 8][warp] = peak;
    }
    __syncthreads();
    store_rows(p, slots, sums);
    __syncthreads();
}

// x.x, r.r, r.(r+m), (r+m).(r+m), with r + m rounded to f32 as in the model; writes m.
__device__ __forceinline__ void finish_token(const TenpMoeDirectionParams &p, const float *m_row, Scratch &sums) {
    const int64_t base = static_cast<int64_t>(blockIdx.x) * p.hidden;
    double own[4] = {};
    for (int column = threadIdx.x * 8; column < p.hidden; column += THREADS * 8) {
        float x[8], r[8], m[8];
        tenp::load_8(p.x + base + column, x);
        tenp::load_8(p.residual + base + column, r);
        tenp::load_8(m_row + column, m);
        tenp::store_8(p.combined + base + column, m);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const double before = static_cast<double>(r[i]);
            const double after = static_cast<double>(r[i] + m[i]);
            own[0] = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), own[0]);
            own[1] = fma(before, before, own[1]);
            own[2] = fma(before, after, own[2]);
            own[3] = fma(after, after, own[3]);
        }
    }
    const int lane = threadIdx.x % 32;
    const double total = fold_four(own, lane, [](double a, double b) { return a + b; });
    if (lane % 8 == 0) {
        sums.dots[0][lane / 8][threadIdx.x / 32] = total;
    }
    __syncthreads();
    double *out = p.token_dots + static_cast<int64_t>(blockIdx.x) * 5;
    if (threadIdx.x < 4) {
        double sum = 0.0;
        for (int w = 0; w < WARPS; ++w) {
            sum += sums.dots[0][threadIdx.x][w];
        }
        out[threadIdx.x] = sum;
    } else if (threadIdx.x == 4) {
        double sum = 0.0;
        for (int k = 0; k < p.top_k; ++k) {
            const int64_t slot = static_cast<int64_t>(blockIdx.x) * p.top_k + k;
            sum += p.row_of_slot[slot] >= 0 ? static_cast<double>(p.slot_weights[slot]) : 0.0;
        }
        out[4] = sum;
    }
}

template <bool BF16> __device__ __forceinline__ void direction(const TenpMoeDirectionParams &p, float *m_row) {
    Scratch &sums = *reinterpret_cast<Scratch *>(m_row + p.hidden);
    for (int first = 0; first < p.top_k; first += GROUP) {
        const tenp::SlotGroup slots(p, blockIdx.x, first);
        add_slots<BF16>(p, slots, first == 0, m_row, sums);
    }
    finish_token(p, m_row, sums);
}

} // namespace

TENP_KERNEL(tenp_moe_direction, TenpMoeDirectionParams, 128, 4) {
    TENP_SHARED(float, m_row);
    if (p.y_bf16 != nullptr) {
        direction<true>(p, m_row);
    } else {
        direction<false>(p, m_row);
    }
}
