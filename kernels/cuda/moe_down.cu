// computes: y = down h for every row of every expert, in f32 and rounded to bf16 as asked for, and the sums of squares of
//           the f32 y over each tile's outputs
// layout:   DT [S, H], h [rows, hidden_pitch], y [rows, H], square_partials [output tile, num_rows]
// requires: H a multiple of 8; h columns width..width_padded zero, those behind are not read; the schedule made with
//           outputs = H, this entry's tiles. Rows of an expert of width 0 are not written
// launch:   any grid (persistent), block (256). Output tile, token tile, shared bytes without 4 (E + 1):
//           n128 128, 128, 65536; n64 128, 64, 49152; n16 128, 16, 73728; r2 64, 2, 4096
// flops:    2 H sum(rows * width). bytes: 2 H sum(width, experts with rows) + rows (2 width + 4 H and/or 2 H)
#include "reduce.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace {

using tenp::GroupedTile;
using tenp::TileShape;

using N128 = TileShape<128, 128, 32, 2, 4, 4>;
using N64 = TileShape<128, 64, 32, 4, 2, 4>;
using N16 = TileShape<128, 16, 64, 8, 1, 4>;

// Outputs and their tokens of accumulator (i, j, c): output i * 16 + c / 2 * 8, token j * 8 + c % 2, from these on.
template <class S> struct Corner {
    int output;
    int token;
    __device__ __forceinline__ explicit Corner(const tenp::WarpPlace<S> &warp)
        : output(warp.row + warp.lane / 4), token(warp.column + warp.lane % 4 * 2) {}
};

// Eight lanes write eight neighbouring outputs of one row, a whole sector.
template <class S>
__device__ __forceinline__ void store_f32(const TenpMoeDownParams &p, const GroupedTile &t, Corner<S> at,
                                          const float (&acc)[S::MI][S::NI][4]) {
#pragma unroll
    for (int j = 0; j < S::NI; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int64_t row = t.first_row + at.token + 8 * j + c;
            if (row >= t.end_row) {
                continue;
            }
            float *y = p.y_f32 + row * p.hidden + t.weight + at.output;
#pragma unroll
            for (int i = 0; i < S::MI; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (t.weight + at.output + 16 * i + 8 * half < p.hidden) {
                        y[16 * i + 8 * half] = acc[i][j][2 * half + c];
                    }
                }
            }
        }
    }
}

// Through shared memory, as a row's outputs are spread over threads.
template <class S>
__device__ __forceinline__ void store_bf16(const TenpMoeDownParams &p, const GroupedTile &t, Corner<S> at,
                                           const float (&acc)[S::MI][S::NI][4], uint8_t *shared) {
    constexpr int CHUNKS = S::BM / 8;
    static_assert(2 * S::BM * S::BN <= S::PIPELINE_BYTES, "fits the stages");
    uint16_t *staged = reinterpret_cast<uint16_t *>(shared);
#pragma unroll
    for (int j = 0; j < S::NI; ++j) {
#pragma unroll
        for (int i = 0; i < S::MI; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int output = at.output + 16 * i + c / 2 * 8;
                const int token = at.token + 8 * j + c % 2;
                staged[8 * tenp::swizzled<CHUNKS>(token, output / 8) + output % 8] = tenp::float_to_bf16(acc[i][j][c]);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S::BN * CHUNKS; i += S::THREADS) {
        const int token = i / CHUNKS;
        const int chunk = i % CHUNKS;
        const int64_t row = t.first_row + token;
        const int output = t.weight + chunk * 8;
        if (row < t.end_row && output < p.hidden) {
            *reinterpret_cast<uint4 *>(p.y_bf16 + row * p.hidden + output) =
                reinterpret_cast<const uint4 *>(shared)[tenp::swizzled<CHUNKS>(token, chunk)];
        }
    }
    __syncthreads();
}

template <class S>
__device__ __forceinline__ void store_squares(const TenpMoeDownParams &p, const GroupedTile &t, Corner<S> at,
                                              const tenp::WarpPlace<S> &warp, const float (&acc)[S::MI][S::NI][4],
                                              float *sums_of_warps) {
#pragma unroll
    for (int j = 0; j < S::NI; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < S::MI; ++i) {
                sum = fmaf(acc[i][j][c], acc[i][j][c], sum);
                sum = fmaf(acc[i][j][2 + c], acc[i][j][2 + c], sum);
            }
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, offset);
            }
            if (warp.lane < 4) {
                sums_of_warps[warp.row / S::WM * S::BN + at.token + 8 * j + c] = sum;
            }
        }
    }
    __syncthreads();
    for (int token = threadIdx.x; token < S::BN; token += S::THREADS) {
        float sum = 0.0f;
        for (int w = 0; w < S::WARPS_M; ++w) {
            sum += sums_of_warps[w * S::BN + token];
        }
        const int64_t row = t.first_row + token;
        if (row < t.end_row) {
            p.square_partials[t.weight / S::BM * p.num_rows + row] = sum;
        }
    }
}

template <class S> __device__ __forceinline__ void down(const TenpMoeDownParams &p, uint8_t *shared) {
    int32_t *tile_offsets = reinterpret_cast<int32_t *>(shared + S::PIPELINE_BYTES);
    tenp::load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets);
    __syncthreads();
    const int num_tiles = tile_offsets[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, p.hidden, S::BM, S::BN);
        const tenp::ColumnLoader<S::BM, S::BK, S::THREADS> load_weights(
            p.down_t + static_cast<int64_t>(t.neuron_offset) * p.hidden + t.weight, p.hidden, p.hidden - t.weight);
        const tenp::RowLoader<S::BN, S::BK, S::THREADS> load_tokens(
            [&](int r) {
                const int64_t row = t.first_row + r;
                return row < t.end_row ? p.h + row * p.hidden_pitch : nullptr;
            },
            p.h);
        float acc[S::MI][S::NI][4] = {};
        tenp::multiply<S, true>(acc, shared, load_weights, load_tokens, tenp::ceil_div(t.width, 16) * 16);
        const tenp::WarpPlace<S> warp;
        const Corner<S> at(warp);
        if (p.y_f32 != nullptr) {
            store_f32<S>(p, t, at, acc);
        }
        __syncthreads();
        if (p.y_bf16 != nullptr) {
            store_bf16<S>(p, t, at, acc, shared);
        }
        if (p.square_partials != nullptr) {
            store_squares<S>(p, t, at, warp, acc, reinterpret_cast<float *>(shared));
            __syncthreads();
        }
    }
}

// One or two rows: 8 lanes take 64 outputs of a neuron, the block's 32 such groups every 32nd neuron.
constexpr int FEW_ROWS = 2, FEW_OUTPUTS = 64, GROUPS = 32;

__device__ __forceinline__ void down_rows(const TenpMoeDownParams &p, const GroupedTile &t, float *sums_of_warps) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int output = t.weight + lane % 8 * 8;
    const bool live = output < p.hidden;
    const uint16_t *h[FEW_ROWS];
    for (int r = 0; r < FEW_ROWS; ++r) {
        h[r] = p.h + static_cast<int64_t>(t.first_row + r < t.end_row ? t.first_row + r : t.first_row) * p.hidden_pitch;
    }
    const uint16_t *weights = p.down_t + static_cast<int64_t>(t.neuron_offset) * p.hidden + output;
    float acc[FEW_ROWS][8] = {};
#pragma unroll 4
    for (int j = threadIdx.x / 8; j < t.width; j += GROUPS) {
        float weight[8] = {};
        if (live) {
            tenp::widen(tenp::load_streaming(weights + static_cast<int64_t>(j) * p.hidden), weight);
        }
#pragma unroll
        for (int r = 0; r < FEW_ROWS; ++r) {
            const float value = tenp::bf16_to_float(h[r][j]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                acc[r][i] = fmaf(weight[i], value, acc[r][i]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < FEW_ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float sum = acc[r][i];
            sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, 8);
            sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, 16);
            if (lane < 8) {
                sums_of_warps[(warp * FEW_ROWS + r) * FEW_OUTPUTS + lane * 8 + i] = sum;
            }
        }
    }
}

// A warp per row.
__device__ __forceinline__ void store_rows(const TenpMoeDownParams &p, const GroupedTile &t, float *sums_of_warps) {
    const int lane = threadIdx.x % 32;
    const int r = threadIdx.x / 32;
    if (r >= FEW_ROWS) {
        return;
    }
    const int64_t row = t.first_row + r;
    float squares = 0.0f;
#pragma unroll
    for (int part = 0; part < FEW_OUTPUTS; part += 32) {
        float sum = 0.0f;
        for (int w = 0; w < 8; ++w) {
            sum += sums_of_warps[(w * FEW_ROWS + r) * FEW_OUTPUTS + part + lane];
        }
        const int output = t.weight + part + lane;
        if (output < p.hidden && row < t.end_row) {
            if (p.y_f32 != nullptr) {
                p.y_f32[row * p.hidden + output] = sum;
            }
            if (p.y_bf16 != nullptr) {
                p.y_bf16[row * p.hidden + output] = tenp::float_to_bf16(sum);
            }
        }
        squares = fmaf(sum, sum, squares);
    }
    squares = tenp::warp_sum(squares);
    if (p.square_partials != nullptr && lane == 0 && row < t.end_row) {
        p.square_partials[t.weight / FEW_OUTPUTS * p.num_rows + row] = squares;
    }
}

} // namespace

TENP_KERNEL(tenp_moe_down_n128, TenpMoeDownParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    down<N128>(p, shared);
}

TENP_KERNEL(tenp_moe_down_n64, TenpMoeDownParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    down<N64>(p, shared);
}

TENP_KERNEL(tenp_moe_down_n16, TenpMoeDownParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    down<N16>(p, shared);
}

TENP_KERNEL(tenp_moe_down_r2, TenpMoeDownParams, 256, 2) {
    TENP_SHARED(float, sums_of_warps);
    int32_t *tile_offsets = reinterpret_cast<int32_t *>(sums_of_warps + 8 * FEW_ROWS * FEW_OUTPUTS);
    tenp::load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets);
    __syncthreads();
    const int num_tiles = tile_offsets[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, p.hidden, FEW_OUTPUTS, FEW_ROWS);
        down_rows(p, t, sums_of_warps);
        __syncthreads();
        store_rows(p, t, sums_of_warps);
        __syncthreads();
    }
}
