// computes: per neuron and tile of rows the sum of c = h <w, y> / (|y| + 1e-8) and of its absolute value, c = 0 where
//           row_inverse is 0 (an output that is zero or not finite)
//           _gram_: the same with <w, y> = (G h) of the neuron, G = G_high + G_low the expert's own DT DT^T in two bf16
//           numbers; y is not read
// layout:   DT [S, H], y [rows, H] bf16, h [rows, hidden_pitch]; G [2 S, hidden_pitch], all high parts, then all low ones;
//           partials [2, token tile, padded width] by expert
// requires: H a multiple of 8, hidden_pitch of 16; neuron_offsets multiples of 16; the schedule made with outputs 0, weight tile 128 and this
//           entry's token tile
// launch:   any grid (persistent), block (256). Token tile, shared bytes without 4 (E + 1): n128 128, 65536; n64 64, 49152
// flops:    2 H sum(rows * width). bytes: 2 H sum(width, experts with rows) + rows (2 H + 2 width)
//           _gram_: 4 sum(rows * width^2). 4 sum(width^2, experts with rows) + 2 rows width
#include "reduce.cuh"
#include "tile.cuh"

namespace {

using tenp::GroupedTile;
using tenp::TileShape;

using N128 = TileShape<128, 128, 32, 2, 4, 4>;
using N64 = TileShape<128, 64, 32, 4, 2, 4>;

// h of the tile to shared memory as [BN tokens][BM neurons], zeros past the expert's rows and width, and the tokens' 1/|y|.
template <class S>
__device__ __forceinline__ void load_rows(const TenpMoeContributionParams &p, const GroupedTile &t, uint8_t *shared,
                                          float *inverse) {
    constexpr int CHUNKS = S::BM / 8;
    // Unrolled, its addresses would be kept in registers over the product.
#pragma unroll 1
    for (int i = threadIdx.x; i < S::BN * CHUNKS; i += S::THREADS) {
        const int token = i / CHUNKS;
        const int chunk = i % CHUNKS;
        const int64_t row = t.first_row + token;
        const int neuron = t.weight + chunk * 8;
        const bool valid = row < t.end_row && neuron < t.width_padded;
        tenp::cp_async_16(shared + 16 * tenp::swizzled<CHUNKS>(token, chunk),
                          p.h + (valid ? row * p.hidden_pitch + neuron : 0), valid);
    }
    tenp::cp_async_commit();
    for (int token = threadIdx.x; token < S::BN; token += S::THREADS) {
        inverse[token] = t.first_row + token < t.end_row ? p.row_inverse[t.first_row + token] : 0.0f;
    }
    tenp::cp_async_wait<0>();
}

template <class S>
__device__ __forceinline__ void add_up(const TenpMoeContributionParams &p, const GroupedTile &t, const uint8_t *shared,
                                       const float *inverse, float *sums_of_warps,
                                       const float (&acc)[S::MI][S::NI][4]) {
    constexpr int CHUNKS = S::BM / 8;
    const tenp::WarpPlace<S> warp;
    const uint16_t *staged = reinterpret_cast<const uint16_t *>(shared);
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int neuron = warp.row + 16 * i + 8 * half + warp.lane / 4;
            float sum = 0.0f;
            float sum_abs = 0.0f;
#pragma unroll
            for (int j = 0; j < S::NI; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int token = warp.column + 8 * j + warp.lane % 4 * 2 + c;
                    const float h = tenp::bf16_to_float(staged[8 * tenp::swizzled<CHUNKS>(token, neuron / 8) + neuron % 8]);
                    const float scale = inverse[token];
                    const float term = scale > 0.0f ? h * acc[i][j][2 * half + c] * scale : 0.0f;
                    sum += term;
                    sum_abs += fabsf(term);
                }
            }
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, offset);
                sum_abs += __shfl_xor_sync(tenp::WHOLE_WARP, sum_abs, offset);
            }
            if (warp.lane % 4 == 0) {
                float *to = sums_of_warps + warp.column / S::WN * TENP_NUM_CONTRIBUTION_SUMS * S::BM + neuron;
                to[TENP_SUM_CONTRIBUTION * S::BM] = sum;
                to[TENP_SUM_CONTRIBUTION_ABS * S::BM] = sum_abs;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TENP_NUM_CONTRIBUTION_SUMS * S::BM; i += S::THREADS) {
        const int neuron = t.weight + i % S::BM;
        float sum = 0.0f;
        for (int w = 0; w < S::WARPS_N; ++w) {
            sum += sums_of_warps[w * TENP_NUM_CONTRIBUTION_SUMS * S::BM + i];
        }
        if (neuron < t.width_padded) {
            p.partials[i / S::BM * p.partial_stride + p.partial_offsets[t.expert] +
                       static_cast<int64_t>(t.token_tile) * t.width_padded + neuron] = sum;
        }
    }
}

// <w, y> of the tile's neurons and rows, over H elements of DT and y; or over the expert's neurons, of G's high parts and h
// and then of its low parts and h.
template <class S, bool GRAM>
__device__ __forceinline__ void multiply(const TenpMoeContributionParams &p, const int32_t *tile_offsets, int tile,
                                         uint8_t *shared, float (&acc)[S::MI][S::NI][4]) {
#pragma unroll 1
    for (int part = 0; part < (GRAM ? 2 : 1); ++part) {
        // Inside, where it is over before the next product begins: registers are what there is least of.
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, 0, S::BM, S::BN);
        const int pitch = GRAM ? p.hidden_pitch : p.hidden;
        const int64_t neuron = static_cast<int64_t>(part) * p.num_neurons + t.neuron_offset + t.weight;
        const tenp::PitchedLoader<S::BM, S::BK, S::THREADS> load_weights{(GRAM ? p.gram : p.down_t) + neuron * pitch, pitch,
                                                                         t.width_padded - t.weight};
        const tenp::PitchedLoader<S::BN, S::BK, S::THREADS> load_tokens{
            (GRAM ? p.h : p.y) + static_cast<int64_t>(t.first_row) * pitch, pitch, t.end_row - t.first_row};
        tenp::multiply<S, false>(acc, shared, load_weights, load_tokens, GRAM ? t.width_padded : p.hidden);
        if (GRAM) {
            __syncthreads();
        }
    }
}

template <class S, bool GRAM>
__device__ __forceinline__ void contribution(const TenpMoeContributionParams &p, uint8_t *shared) {
    constexpr int STAGED_BYTES = 2 * S::BM * S::BN;
    static_assert(STAGED_BYTES + 4 * S::BN + 4 * S::WARPS_N * TENP_NUM_CONTRIBUTION_SUMS * S::BM <= S::PIPELINE_BYTES,
                  "fits the stages");
    float *inverse = reinterpret_cast<float *>(shared + STAGED_BYTES);
    int32_t *tile_offsets = reinterpret_cast<int32_t *>(shared + S::PIPELINE_BYTES);
    tenp::load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets);
    __syncthreads();
    const int num_tiles = tile_offsets[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        float acc[S::MI][S::NI][4] = {};
        multiply<S, GRAM>(p, tile_offsets, tile, shared, acc);
        // Looked up again: held over the product, these numbers would be the registers that spill.
        const GroupedTile t = tenp::grouped_tile(p, tile_offsets, tile, 0, S::BM, S::BN);
        __syncthreads();
        load_rows<S>(p, t, shared, inverse);
        __syncthreads();
        add_up<S>(p, t, shared, inverse, inverse + S::BN, acc);
        __syncthreads();
    }
}

} // namespace

#define TENP_CONTRIBUTION(name, Shape, gram)                                                        \
    TENP_KERNEL(name, TenpMoeContributionParams, 256, 2) {                                          \
        TENP_SHARED(uint8_t, shared);                                                               \
        contribution<Shape, gram>(p, shared);                                                       \
    }

TENP_CONTRIBUTION(tenp_moe_contribution_n128, N128, false)
TENP_CONTRIBUTION(tenp_moe_contribution_n64, N64, false)
TENP_CONTRIBUTION(tenp_moe_contribution_gram_n128, N128, true)
TENP_CONTRIBUTION(tenp_moe_contribution_gram_n64, N64, true)
