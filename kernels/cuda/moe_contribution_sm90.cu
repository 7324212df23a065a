// computes: as moe_contribution.cu, with wgmma and bulk tensor copies: per neuron and tile of rows the sum of
//           c = h <w, y> / (|y| + 1e-8) and of its absolute value, c = 0 where row_inverse is 0
// layout:   as there; maps.weights is DT [S, H], box 128 x 64; maps.rows is y [rows, H] and maps.h is h [rows, hidden_pitch],
//           box N x 64 both. _gram_: maps.weights is G [2 S, hidden_pitch], maps.rows is h too
// requires: as there, the token tile being N
// launch:   any grid (persistent), block (384). Weight tile 128 neurons, token tile N; shared bytes without 4 (E + 1) from
//           WideShape: 16 KiB + 128 N a stage, 256 N, barriers
// flops, bytes: as there
// sm_90a only
#include "hopper.cuh"
#include "reduce.cuh"

namespace {

using tenp::GroupedTile;

constexpr int NEURONS = 128;

// h of the tile, brought while the product runs, and the rows' 1 / |y|.
template <int N> using Shape = tenp::WideShape<N, N <= 64 ? 8 : N <= 128 ? 5 : N <= 192 ? 4 : 3, 2 * N * NEURONS + 1024>;

// <w, y> is a product over H, or two over the expert's neurons: with G's high parts, and with its low ones.
template <bool GRAM> constexpr int PARTS = GRAM ? 2 : 1;
template <bool GRAM>
__device__ __forceinline__ int inner_of(const TenpMoeContributionParams &p, const GroupedTile &t) {
    return GRAM ? t.width_padded : p.hidden;
}

template <class S, bool GRAM>
__device__ __forceinline__ void produce(const TenpMoeContributionParams &p, const TenpTensorMaps &maps,
                                        const tenp::Stages<S> &stages) {
    tenp::Ring<S::STAGES> ring;
    uint32_t h_parity = 1;
    tenp::every_tile(p, stages, [&](int tile) {
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, 0, NEURONS, S::N);
        for (int part = 0; part < PARTS<GRAM>; ++part) {
            const int weight = part * p.num_neurons + t.neuron_offset + t.weight;
            for (int k0 = 0; k0 < inner_of<GRAM>(p, t); k0 += S::K) {
                uint64_t *full = stages.full(ring.stage);
                tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity ^ 1);
                tenp::mbarrier_arrive_expect(full, S::STAGE_BYTES);
                tenp::load_box<tenp::Keep::First>(stages.weights(ring.stage), &maps.weights, full, k0, weight);
                tenp::load_box<tenp::Keep::Last>(stages.rows(ring.stage), &maps.rows, full, k0, t.first_row);
                ring.advance();
            }
        }
        // Behind the product's own loads, which are needed first and must not wait for the last tile's h to be used up.
        tenp::mbarrier_wait(stages.extra(1), h_parity);
        h_parity ^= 1;
        tenp::mbarrier_arrive_expect(stages.extra(0), 2 * S::N * NEURONS);
        for (int half = 0; half < 2; ++half) {
            tenp::load_box<tenp::Keep::Last>(stages.staged() + half * (S::N * NEURONS), &maps.h, stages.extra(0),
                                             t.weight + 64 * half, t.first_row);
        }
    });
}

// 1 / |y| of the tile's rows, 0 for those that are not the expert's.
template <int N>
__device__ __forceinline__ void load_inverse(const TenpMoeContributionParams &p, const GroupedTile &t, uint8_t *staged) {
    float *inverse = reinterpret_cast<float *>(staged + 2 * N * NEURONS);
    // Behind the last tile's reads, before this one's.
    tenp::consumers_barrier();
    for (int i = static_cast<int>(threadIdx.x) - tenp::WARPGROUP; i < N; i += tenp::CONSUMERS) {
        inverse[i] = t.first_row + i < t.end_row ? p.row_inverse[t.first_row + i] : 0.0f;
    }
    tenp::consumers_barrier();
}

// Sums over the rows of the tile for the warp's sixteen neurons; `staged` is h as two halves [N rows][64 neurons].
//
// No branch around the accumulators: they would be waited for before it, and the products no longer overlap. What is not
// there is read from a place that is, and not stored.
template <int N>
__device__ __forceinline__ void add_up(const TenpMoeContributionParams &p, const GroupedTile &t,
                                       const tenp::ConsumerPlace &place, const float (&acc)[N / 2],
                                       const uint8_t *staged) {
    const int lane = place.lane;
    const int last_row = t.end_row - t.first_row - 1;
    const int last_chunk = (t.width_padded - t.weight) / 8 - 1;
    const int chunk = min(place.row / 8 + lane / 8 % 2, last_chunk);
    const uint8_t *half_tile = staged + chunk / 8 * (N * NEURONS);
    const float *inverse = reinterpret_cast<const float *>(staged + 2 * N * NEURONS);
    float sums[2][TENP_NUM_CONTRIBUTION_SUMS] = {};
    // Sixteen rows at a time, where there are.
    constexpr int EIGHTS = N == 8 ? 1 : 2;
#pragma unroll
    for (int j = 0; j < N / 8; j += EIGHTS) {
        uint32_t h[2 * EIGHTS];
        // Rows behind the expert's last are another's, or no one's.
        const int token = min(8 * j + lane / 16 % EIGHTS * 8 + lane % 8, last_row);
        const uint8_t *row = half_tile + 16 * tenp::swizzled<8>(token, chunk % 8);
        if constexpr (EIGHTS == 1) {
            tenp::ldmatrix_x2_trans(h, row);
        } else {
            tenp::ldmatrix_x4_trans(h, row);
        }
#pragma unroll
        for (int part = 0; part < 2 * EIGHTS; ++part) {
            const float2 values = tenp::unpack_bf16(h[part]);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int row = 8 * (j + part / 2) + lane % 4 * 2 + c;
                const float scale = inverse[row];
                const float product = acc[4 * (j + part / 2) + 2 * (part % 2) + c];
                const float term = scale > 0.0f ? (c == 0 ? values.x : values.y) * product * scale : 0.0f;
                sums[part % 2][TENP_SUM_CONTRIBUTION] += term;
                sums[part % 2][TENP_SUM_CONTRIBUTION_ABS] += fabsf(term);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * TENP_NUM_CONTRIBUTION_SUMS; ++i) {
        float sum = sums[i % 2][i / 2];
        sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, 1);
        sum += __shfl_xor_sync(tenp::WHOLE_WARP, sum, 2);
        // Padded widths are multiples of 16: a warp's neurons are all there, or none is.
        if (lane % 4 == 0 && t.weight + place.row < t.width_padded) {
            p.partials[i / 2 * p.partial_stride + p.partial_offsets[t.expert] +
                       static_cast<int64_t>(t.token_tile) * t.width_padded + t.weight + place.row + lane / 4 + i % 2 * 8] = sum;
        }
    }
}

template <class S, bool GRAM>
__device__ __forceinline__ void consume(const TenpMoeContributionParams &p, const tenp::Stages<S> &stages) {
    constexpr int N = S::N;
    const tenp::ConsumerPlace place;
    tenp::Ring<S::STAGES> ring;
    uint32_t h_parity = 0;
    tenp::every_tile(p, stages, [&](int tile) {
        float acc[N / 2];
        const GroupedTile t = tenp::grouped_tile(p, stages.tile_offsets(), tile, 0, NEURONS, N);
        tenp::clear(acc);
#pragma unroll
        for (int part = 0; part < PARTS<GRAM>; ++part) {
            tenp::consume<S, false>(stages, ring, inner_of<GRAM>(p, t), acc);
        }
        load_inverse<N>(p, t, stages.staged());
        tenp::mbarrier_wait(stages.extra(0), h_parity);
        h_parity ^= 1;
        add_up<N>(p, t, place, acc, stages.staged());
        // One lane speaks for the warp, whose lanes have all read.
        __syncwarp();
        tenp::release_stage(stages.extra(1));
    });
}

template <int N, bool GRAM>
__device__ __forceinline__ void contribution(const TenpMoeContributionParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    const tenp::Stages<Shape<N>> stages{shared};
    stages.begin(p, 1);
    tenp::split_roles<false>([&] { produce<Shape<N>, GRAM>(p, maps, stages); },
                              [&] { consume<Shape<N>, GRAM>(p, stages); });
}

} // namespace

#define TENP_CONTRIBUTION(n)                                                                        \
    TENP_KERNEL_MAPS(tenp_moe_contribution_w##n, TenpMoeContributionParams, 384, 1) {               \
        TENP_SHARED(uint8_t, shared);                                                               \
        contribution<n, false>(p, maps, shared);                                                    \
    }                                                                                               \
    TENP_KERNEL_MAPS(tenp_moe_contribution_gram_w##n, TenpMoeContributionParams, 384, 1) {          \
        TENP_SHARED(uint8_t, shared);                                                               \
        contribution<n, true>(p, maps, shared);                                                     \
    }

TENP_CONTRIBUTION(8)
TENP_CONTRIBUTION(16)
TENP_CONTRIBUTION(32)
TENP_CONTRIBUTION(64)
TENP_CONTRIBUTION(128)
TENP_CONTRIBUTION(192)
TENP_CONTRIBUTION(256)
