// computes: as moe_gate_up.cu, with wgmma and bulk tensor copies: h = silu(gate x) * (up x), and the sums over h
// layout:   as there; maps.weights is GU [2S, H], box 128 x 64; maps.rows is x [rows, H] in the experts' order, box N x 64
// requires: as there. The _gather entries take x [T, H] and token_of_row and no map of it
// launch:   any grid (persistent), block (384). Weight tile 64 neurons, token tile N; shared bytes without 4 (E + 1) from
//           WideShape: 16 KiB + 128 N a stage, 128 N, barriers
// flops:    4 H sum(rows * width). bytes: 4 H sum(width, experts with rows) + rows (2 H + 2 width)
// sm_90a only
#include "activation_sums.cuh"
#include "hopper.cuh"

namespace {

using tenp::GroupedTile;

constexpr int NEURONS = 64;

template <int N> using Shape = tenp::WideShape<N, N <= 64 ? 8 : N <= 128 ? 6 : 4, 2 * N * NEURONS>;

template <bool GATHER, class S>
__device__ __forceinline__ void produce(const TenpMoeGateUpParams &p, const TenpTensorMaps &maps, const tenp::Stages<S> &stages) {
    tenp::Ring<S::STAGES> ring;
    tenp::Gather<S, S::N> gather;
    tenp::every_tile(p, stages, [&](int tile) {
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, 0, NEURONS, S::N);
        if constexpr (GATHER) {
            gather.choose([&](int r) { return t.first_row + r < t.end_row ? p.token_of_row[t.first_row + r] : -1; });
        }
        for (int k0 = 0; k0 < p.hidden; k0 += S::K) {
            if (GATHER || threadIdx.x == 0) {
                tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity ^ 1);
            }
            if (threadIdx.x == 0) {
                tenp::mbarrier_arrive_expect(stages.full(ring.stage), GATHER ? S::A_BYTES : S::STAGE_BYTES);
                tenp::load_box<tenp::Keep::First>(stages.weights(ring.stage), &maps.weights, stages.full(ring.stage), k0,
                                                  2 * (t.neuron_offset + t.weight));
                if constexpr (!GATHER) {
                    tenp::load_box<tenp::Keep::Last>(stages.rows(ring.stage), &maps.rows, stages.full(ring.stage), k0,
                                                     t.first_row);
                }
            }
            if constexpr (GATHER) {
                gather.load(stages, stages.rows(ring.stage), k0, p.hidden, p.x,
                            [&](int token) { return p.x + static_cast<int64_t>(token) * p.hidden; });
            }
            ring.advance();
        }
    });
    if constexpr (GATHER) {
        gather.finish(stages);
    }
}

// The five sums of one neuron over the tile's rows that this thread has, then over the four threads of a neuron.
template <int N>
__device__ __forceinline__ void add_sums(const TenpMoeGateUpParams &p, const GroupedTile &t, const float (&h)[N / 4],
                                         int neuron) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    tenp::ActivationSums sums;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        const int row = t.first_row + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (row < t.end_row) {
            sums.add(h[i], p.row_weights[row]);
        }
    }
    sums.merge_quad();
#pragma unroll
    for (int s = 0; s < TENP_NUM_ACTIVATION_SUMS; ++s) {
        if (lane % 4 == 0 && t.weight + neuron < t.width_padded) {
            p.partials[s * p.partial_stride + p.partial_offsets[t.expert] +
                       static_cast<int64_t>(t.token_tile) * t.width_padded + t.weight + neuron] = sums.values[s];
        }
    }
}

template <bool STATS, class S>
__device__ __forceinline__ void consume(const TenpMoeGateUpParams &p, const tenp::Stages<S> &stages) {
    constexpr int N = S::N;
    const tenp::ConsumerPlace place;
    tenp::Ring<S::STAGES> ring;
    tenp::every_tile(p, stages, [&](int tile) {
        float acc[N / 2];
        tenp::clear(acc);
        tenp::consume<S, false>(stages, ring, p.hidden, acc);
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, 0, NEURONS, N);
        const int neuron = place.row / 2 + place.lane / 4;
        const bool real = t.weight + neuron < t.width;
        uint32_t pairs[N / 8];
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float even = tenp::silu(acc[4 * j]) * acc[4 * j + 2];
            const float odd = tenp::silu(acc[4 * j + 1]) * acc[4 * j + 3];
            pairs[j] = real ? tenp::pack_bf16(even, odd) : 0;
        }
        // The other half's chunks are its own, so a warpgroup waits for itself alone: first for the last tile's reads.
        tenp::half_barrier(place.half);
        tenp::stage_transposed<N>(stages.staged(), 4 * place.half + place.warp, pairs);
        tenp::half_barrier(place.half);
        tenp::write_staged<N, 4>(stages.staged(), 4 * place.half, p.h + static_cast<int64_t>(t.first_row) * p.hidden_pitch + t.weight,
                                 p.hidden_pitch, t.end_row - t.first_row, t.width_padded - t.weight);
        if constexpr (STATS) {
            float h[N / 4];
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                const float2 two = tenp::unpack_bf16(pairs[j]);
                h[2 * j] = two.x;
                h[2 * j + 1] = two.y;
            }
            add_sums<N>(p, t, h, neuron);
        }
    });
}

template <int N, bool GATHER, bool STATS>
__device__ __forceinline__ void gate_up(const TenpMoeGateUpParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    using S = Shape<N>;
    const tenp::Stages<S> stages{shared};
    stages.begin(p, GATHER ? 1 + tenp::WARPGROUP : 1);
    tenp::split_roles<GATHER>([&] { produce<GATHER>(p, maps, stages); }, [&] { consume<STATS>(p, stages); });
}

} // namespace

#define TENP_GATE_UP(n)                                                                             \
    TENP_KERNEL_MAPS(tenp_moe_gate_up_w##n, TenpMoeGateUpParams, 384, 1) {                          \
        TENP_SHARED(uint8_t, shared);                                                               \
        gate_up<n, false, false>(p, maps, shared);                                                  \
    }                                                                                               \
    TENP_KERNEL_MAPS(tenp_moe_gate_up_gather_w##n, TenpMoeGateUpParams, 384, 1) {                   \
        TENP_SHARED(uint8_t, shared);                                                               \
        gate_up<n, true, false>(p, maps, shared);                                                   \
    }

#define TENP_GATE_UP_STATS(n)                                                                       \
    TENP_KERNEL_MAPS(tenp_moe_gate_up_stats_w##n, TenpMoeGateUpParams, 384, 1) {                    \
        TENP_SHARED(uint8_t, shared);                                                               \
        gate_up<n, false, true>(p, maps, shared);                                                   \
    }                                                                                               \
    TENP_KERNEL_MAPS(tenp_moe_gate_up_stats_gather_w##n, TenpMoeGateUpParams, 384, 1) {             \
        TENP_SHARED(uint8_t, shared);                                                               \
        gate_up<n, true, true>(p, maps, shared);                                                    \
    }

TENP_GATE_UP(8)
TENP_GATE_UP(16)
TENP_GATE_UP(32)
TENP_GATE_UP(64)
TENP_GATE_UP(128)
TENP_GATE_UP(192)
TENP_GATE_UP(256)
TENP_GATE_UP_STATS(8)
TENP_GATE_UP_STATS(16)
TENP_GATE_UP_STATS(32)
TENP_GATE_UP_STATS(64)
TENP_GATE_UP_STATS(128)
TENP_GATE_UP_STATS(192)
TENP_GATE_UP_STATS(256)
