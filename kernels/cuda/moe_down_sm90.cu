// computes: as moe_down.cu, with wgmma and bulk tensor copies: y = down h in f32 and bf16 as asked for, and the sums of
//           squares of the f32 y over each tile's outputs
// layout:   as there; maps.weights is DT [S, H], box 64 x 64; maps.rows is h [rows, hidden_pitch], box N x 64
// requires: as there
// launch:   any grid (persistent), block (384). Output tile 128, token tile N; shared bytes without 4 (E + 1) from
//           WideShape: 16 KiB + 128 N a stage, 288 N, barriers
// flops:    2 H sum(rows * width). bytes: 2 H sum(width, experts with rows) + rows (2 width + 4 H and/or 2 H)
// sm_90a only
#include "hopper.cuh"
#include "reduce.cuh"

namespace {

using tenp::GroupedTile;

constexpr int OUTPUTS = 128;

// The two halves of the tile in bf16, and a sum of squares per warp and row.
template <int N>
using Shape = tenp::WideShape<N, N <= 64 ? 8 : N <= 128 ? 5 : 3,
                              (2 * N * OUTPUTS + 4 * N * tenp::CONSUMER_WARPS + 1023) / 1024 * 1024>;

__device__ __forceinline__ int inner_of(const GroupedTile &t) { return tenp::ceil_div(t.width, 16) * 16; }

template <class S>
__device__ __forceinline__ void produce(const TenpMoeDownParams &p, const TenpTensorMaps &maps, const tenp::Stages<S> &stages) {
    tenp::Ring<S::STAGES> ring;
    tenp::every_tile(p, stages, [&](int tile) {
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, p.hidden, OUTPUTS, S::N);
        const int inner = inner_of(t);
        for (int k0 = 0; k0 < inner; k0 += S::K) {
            uint64_t *full = stages.full(ring.stage);
            tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity ^ 1);
            tenp::mbarrier_arrive_expect(full, S::STAGE_BYTES);
            for (int half = 0; half < 2; ++half) {
                tenp::load_box<tenp::Keep::First>(stages.weights(ring.stage) + half * S::HALF_A_BYTES, &maps.weights, full,
                                                  t.weight + 64 * half, t.neuron_offset + k0);
            }
            tenp::load_box<tenp::Keep::Last>(stages.rows(ring.stage), &maps.rows, full, k0, t.first_row);
            ring.advance();
        }
    });
}

// Eight lanes write eight neighbouring outputs of one row, a whole sector.
template <int N>
__device__ __forceinline__ void store_f32(const TenpMoeDownParams &p, const GroupedTile &t, const tenp::ConsumerPlace &place,
                                          const float (&acc)[N / 2]) {
    const int output = t.weight + place.row + place.lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int64_t row = t.first_row + i / 4 * 8 + place.lane % 4 * 2 + i % 2;
        const int at = output + i / 2 % 2 * 8;
        if (row < t.end_row && at < p.hidden) {
            p.y_f32[row * p.hidden + at] = acc[i];
        }
    }
}

template <int N>
__device__ __forceinline__ void store_bf16(const TenpMoeDownParams &p, const GroupedTile &t, const tenp::ConsumerPlace &place,
                                           const float (&acc)[N / 2], uint8_t *half_tile) {
    // A warpgroup turns its own half, so it waits for itself alone: first for the last tile's reads.
    tenp::half_barrier(place.half);
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
        uint32_t pairs[N / 8];
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            pairs[j] = tenp::pack_bf16(acc[4 * j + 2 * eight], acc[4 * j + 2 * eight + 1]);
        }
        tenp::stage_transposed<N>(half_tile, 2 * place.warp + eight, pairs);
    }
    tenp::half_barrier(place.half);
    const int output = t.weight + 64 * place.half;
    tenp::write_staged<N, 8>(half_tile, 0, p.y_bf16 + static_cast<int64_t>(t.first_row) * p.hidden + output, p.hidden,
                             t.end_row - t.first_row, p.hidden - output);
}

template <int N>
__device__ __forceinline__ void store_squares(const TenpMoeDownParams &p, const GroupedTile &t,
                                              const tenp::ConsumerPlace &place, const float (&acc)[N / 2],
                                              float *sums_of_warps) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float sum = fmaf(acc[4 * j + c], acc[4 * j + c], acc[4 * j + 2 + c] * acc[4 * j + 2 + c]);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, offset);
            }
            if (place.lane < 4) {
                sums_of_warps[(4 * place.half + place.warp) * N + 8 * j + place.lane % 4 * 2 + c] = sum;
            }
        }
    }
    tenp::consumers_barrier();
    for (int token = static_cast<int>(threadIdx.x) - tenp::WARPGROUP; token < N; token += tenp::CONSUMERS) {
        float sum = 0.0f;
        for (int w = 0; w < tenp::CONSUMER_WARPS; ++w) {
            sum += sums_of_warps[w * N + token];
        }
        const int64_t row = t.first_row + token;
        if (row < t.end_row) {
            p.square_partials[t.weight / OUTPUTS * p.num_rows + row] = sum;
        }
    }
    tenp::consumers_barrier();
}

template <class S>
__device__ __forceinline__ void consume(const TenpMoeDownParams &p, const tenp::Stages<S> &stages) {
    constexpr int N = S::N;
    const tenp::ConsumerPlace place;
    tenp::Ring<S::STAGES> ring;
    tenp::every_tile(p, stages, [&](int tile) {
        float acc[N / 2];
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, p.hidden, OUTPUTS, N);
        tenp::clear(acc);
        tenp::consume<S, true>(stages, ring, inner_of(t), acc);
        if (p.y_f32 != nullptr) {
            store_f32<N>(p, t, place, acc);
        }
        if (p.y_bf16 != nullptr) {
            store_bf16<N>(p, t, place, acc, stages.staged() + place.half * (N * OUTPUTS));
        }
        if (p.square_partials != nullptr) {
            store_squares<N>(p, t, place, acc, reinterpret_cast<float *>(stages.staged() + 2 * N * OUTPUTS));
        }
    });
}

template <int N> __device__ __forceinline__ void down(const TenpMoeDownParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    const tenp::Stages<Shape<N>> stages{shared};
    stages.begin(p, 1);
    tenp::split_roles<false>([&] { produce(p, maps, stages); }, [&] { consume(p, stages); });
}

} // namespace

#define TENP_DOWN(n)                                                                                \
    TENP_KERNEL_MAPS(tenp_moe_down_w##n, TenpMoeDownParams, 384, 1) {                               \
        TENP_SHARED(uint8_t, shared);                                                               \
        down<n>(p, maps, shared);                                                                   \
    }

TENP_DOWN(8)
TENP_DOWN(16)
TENP_DOWN(32)
TENP_DOWN(64)
TENP_DOWN(128)
TENP_DOWN(192)
TENP_DOWN(256)
