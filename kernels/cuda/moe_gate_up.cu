// computes: h = silu(gate x) * (up x) for every row of every expert; the _stats entries also each neuron's sums over the
//           rows of a tile: |h|, (g h)^2, its maximum, h, h^2, from the h that is stored
// layout:   GU [2S, H], x [T, H], h [rows, hidden_pitch]; partials [5, token tile, padded width] of each expert in turn
// requires: H a multiple of 8; neuron_offsets multiples of 16; the schedule made with outputs 0 and this entry's tiles;
//           h columns width..width_padded are written as zeros, those behind are left alone
// launch:   any grid (persistent), block (256). Weight tile (neurons), token tile, shared bytes without 4 (E + 1):
//           n128 64, 128, 65536; n64 64, 64, 49152; n16 64, 16, 73728; r2 32, 2, 0
// flops:    4 H sum(rows * width). bytes: 4 H sum(width, experts with rows) + rows (2 H + 2 width)
#include "activation_sums.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace {

using tenp::GroupedTile;
using tenp::TileShape;

// BM rows of GU are BM / 2 neurons.
using N128 = TileShape<128, 128, 32, 2, 4, 4>;
using N64 = TileShape<128, 64, 32, 4, 2, 4>;
using N16 = TileShape<128, 16, 64, 8, 1, 4>;

__device__ __forceinline__ const uint16_t *x_row(const TenpMoeGateUpParams &p, int row) {
    return p.x + static_cast<int64_t>(p.token_of_row == nullptr ? row : p.token_of_row[row]) * p.hidden;
}

__device__ __forceinline__ const uint16_t *gate_row(const TenpMoeGateUpParams &p, const GroupedTile &t, int neuron) {
    return p.gate_up + (2 * static_cast<int64_t>(t.neuron_offset + neuron)) * p.hidden;
}

// Stores the tile [BN tokens][BM / 2 neurons] that lies swizzled in `staged`, clipped at the expert's rows and width.
template <class S>
__device__ __forceinline__ void store_h(const TenpMoeGateUpParams &p, const GroupedTile &t, const uint4 *staged) {
    constexpr int CHUNKS = S::BM / 16;
    for (int i = threadIdx.x; i < S::BN * CHUNKS; i += S::THREADS) {
        const int token = i / CHUNKS;
        const int chunk = i % CHUNKS;
        const int64_t row = t.first_row + token;
        const int neuron = t.weight + chunk * 8;
        if (row < t.end_row && neuron < t.width_padded) {
            *reinterpret_cast<uint4 *>(p.h + row * p.hidden_pitch + neuron) = staged[tenp::swizzled<CHUNKS>(token, chunk)];
        }
    }
}

// h of the tile from the accumulators, to shared memory and out; gate and up of a neuron are in one thread.
template <class S, bool STATS>
__device__ __forceinline__ void finish(const TenpMoeGateUpParams &p, const GroupedTile &t, uint8_t *shared,
                                       const float (&acc)[S::MI][S::NI][4]) {
    constexpr int NEURONS = S::BM / 2;
    const tenp::WarpPlace<S> warp;
    uint16_t *staged = reinterpret_cast<uint16_t *>(shared);
    // [WARPS_N][5][NEURONS] behind the staged tile.
    float *sums_of_warps = reinterpret_cast<float *>(shared + 2 * S::BN * NEURONS);
    static_assert(2 * S::BN * NEURONS + 4 * S::WARPS_N * 5 * NEURONS <= S::PIPELINE_BYTES, "fits the stages");
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
        const int neuron = warp.row / 2 + 8 * i + warp.lane / 4;
        const bool real = t.weight + neuron < t.width;
        tenp::ActivationSums sums;
#pragma unroll
        for (int j = 0; j < S::NI; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int token = warp.column + 8 * j + warp.lane % 4 * 2 + c;
                const uint16_t h = real ? tenp::float_to_bf16(tenp::silu(acc[i][j][c]) * acc[i][j][2 + c]) : 0;
                staged[8 * tenp::swizzled<NEURONS / 8>(token, neuron / 8) + neuron % 8] = h;
                if (STATS && t.first_row + token < t.end_row) {
                    sums.add(tenp::bf16_to_float(h), p.row_weights[t.first_row + token]);
                }
            }
        }
        if constexpr (STATS) {
            sums.merge_quad();
#pragma unroll
            for (int s = 0; s < TENP_NUM_ACTIVATION_SUMS; ++s) {
                if (warp.lane % 4 == 0) {
                    sums_of_warps[(warp.column / S::WN * TENP_NUM_ACTIVATION_SUMS + s) * NEURONS + neuron] = sums.values[s];
                }
            }
        }
    }
    __syncthreads();
    store_h<S>(p, t, reinterpret_cast<const uint4 *>(shared));
    if constexpr (STATS) {
        for (int i = threadIdx.x; i < TENP_NUM_ACTIVATION_SUMS * NEURONS; i += S::THREADS) {
            const int s = i / NEURONS;
            const int neuron = i % NEURONS;
            float value = sums_of_warps[i];
            for (int w = 1; w < S::WARPS_N; ++w) {
                value = tenp::ActivationSums::merge(s, value, sums_of_warps[w * TENP_NUM_ACTIVATION_SUMS * NEURONS + i]);
            }
            if (t.weight + neuron < t.width_padded) {
                p.partials[s * p.partial_stride + p.partial_offsets[t.expert] +
                           static_cast<int64_t>(t.token_tile) * t.width_padded + t.weight + neuron] = value;
            }
        }
    }
}

template <class S, bool STATS>
__device__ __forceinline__ void gate_up(const TenpMoeGateUpParams &p, uint8_t *shared) {
    int32_t *tile_offsets = reinterpret_cast<int32_t *>(shared + S::PIPELINE_BYTES);
    tenp::load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets);
    __syncthreads();
    const int num_tiles = tile_offsets[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, 0, S::BM / 2, S::BN);
        const uint16_t *weights = gate_row(p, t, t.weight);
        const int weight_rows = 2 * (t.width_padded - t.weight);
        const tenp::RowLoader<S::BM, S::BK, S::THREADS> load_weights(
            [&](int r) { return r < weight_rows ? weights + static_cast<int64_t>(r) * p.hidden : nullptr; }, p.gate_up);
        const tenp::RowLoader<S::BN, S::BK, S::THREADS> load_tokens(
            [&](int r) { return t.first_row + r < t.end_row ? x_row(p, t.first_row + r) : nullptr; }, p.x);
        float acc[S::MI][S::NI][4] = {};
        tenp::multiply<S, false>(acc, shared, load_weights, load_tokens, p.hidden);
        __syncthreads();
        finish<S, STATS>(p, t, shared, acc);
        __syncthreads();
    }
}

// One or two rows: a warp per four neurons, weights straight to registers.
constexpr int FEW_ROWS = 2, WARP_NEURONS = 4;

__device__ __forceinline__ void gate_up_rows(const TenpMoeGateUpParams &p, const GroupedTile &t, int neuron) {
    const int lane = threadIdx.x % 32;
    const uint16_t *x[FEW_ROWS];
    for (int r = 0; r < FEW_ROWS; ++r) {
        x[r] = x_row(p, t.first_row + r < t.end_row ? t.first_row + r : t.first_row);
    }
    // Neurons come in groups of 8 gate rows and 8 up rows; `neuron` is a multiple of 4, so its four are in one group.
    const uint16_t *gate = gate_row(p, t, neuron / 8 * 8) + neuron % 8 * static_cast<int64_t>(p.hidden);
    float acc[2][WARP_NEURONS][FEW_ROWS] = {};
    for (int k = lane * 8; k < p.hidden; k += 256) {
        uint4 weights[2][WARP_NEURONS];
#pragma unroll
        for (int n = 0; n < WARP_NEURONS; ++n) {
            weights[0][n] = tenp::load_streaming(gate + static_cast<int64_t>(n) * p.hidden + k);
            weights[1][n] = tenp::load_streaming(gate + static_cast<int64_t>(n + 8) * p.hidden + k);
        }
        float values[FEW_ROWS][8];
#pragma unroll
        for (int r = 0; r < FEW_ROWS; ++r) {
            tenp::widen(x[r] + k, values[r]);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int n = 0; n < WARP_NEURONS; ++n) {
                float weight[8];
                tenp::widen(weights[part][n], weight);
#pragma unroll
                for (int r = 0; r < FEW_ROWS; ++r) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        acc[part][n][r] = fmaf(weight[i], values[r][i], acc[part][n][r]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < WARP_NEURONS; ++n) {
#pragma unroll
        for (int r = 0; r < FEW_ROWS; ++r) {
            const float g = tenp::warp_sum(acc[0][n][r]);
            const float u = tenp::warp_sum(acc[1][n][r]);
            const int64_t row = t.first_row + r;
            if (lane == 0 && row < t.end_row) {
                p.h[row * p.hidden_pitch + neuron + n] =
                    neuron + n < t.width ? tenp::float_to_bf16(tenp::silu(g) * u) : 0;
            }
        }
    }
}

} // namespace

TENP_KERNEL(tenp_moe_gate_up_n128, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    gate_up<N128, false>(p, shared);
}

TENP_KERNEL(tenp_moe_gate_up_n64, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    gate_up<N64, false>(p, shared);
}

TENP_KERNEL(tenp_moe_gate_up_n16, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    gate_up<N16, false>(p, shared);
}

TENP_KERNEL(tenp_moe_gate_up_stats_n128, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    gate_up<N128, true>(p, shared);
}

TENP_KERNEL(tenp_moe_gate_up_stats_n64, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    gate_up<N64, true>(p, shared);
}

TENP_KERNEL(tenp_moe_gate_up_r2, TenpMoeGateUpParams, 256, 2) {
    TENP_SHARED(int32_t, tile_offsets);
    constexpr int TILE = 8 * WARP_NEURONS;
    tenp::load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets);
    __syncthreads();
    const int num_tiles = tile_offsets[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, 0, TILE, FEW_ROWS);
        const int neuron = t.weight + static_cast<int>(threadIdx.x) / 32 * WARP_NEURONS;
        if (neuron < t.width_padded) {
            gate_up_rows(p, t, neuron);
        }
    }
}
