// computes: attention of one query per sequence over its prefix and own keys, the keys split over blocks;
//           tenp_attention_merge adds the parts up. Grouped heads share one read of their keys and values
// layout:   as attention_prefill.cu; split_max (largest score in units of log 2), split_sum [sequences, heads, splits],
//           split_out [sequences, heads, splits, v_dim] f32, not divided by its sum; a part without keys has sum 0
// requires: as attention_prefill.cu; sequence s asks with row query_offsets[s]. The last split takes all keys left; with
//           one split the result is written at once and no merge is due
// launch:   grid (sequences * kv heads * ceil(heads / kv heads / 16) * splits), block (128, but 64 for _256), shared bytes
//           _64 34816, _128 69632, _192 88064, _256 73728. merge: grid (ceil(sequences * heads / 8)), block (256), none
// flops:    2 (qk_dim + v_dim) a head and key. bytes: k and v once; split_out twice
#include "attention.cuh"

namespace {

// Query heads that share a block, keys of a warp's tile.
constexpr int HEADS = 16;
constexpr int KEYS = 16;

template <int QK_, int V_, int WARPS_> struct Shape {
    static constexpr int QK = QK_, V = V_, WARPS = WARPS_, THREADS = 32 * WARPS;
    static constexpr int Q_BYTES = 2 * HEADS * QK, K_BYTES = 2 * KEYS * QK, STAGE_BYTES = K_BYTES + 2 * KEYS * V;
    static constexpr int WARP_BYTES = 2 * STAGE_BYTES;
    // f32 from one head of a warp's result to the next: the eight heads that a warp writes at once in different banks.
    static constexpr int PITCH = V + 8;
    static_assert(4 * HEADS * (PITCH + 2) <= WARP_BYTES, "a warp's result takes its stages' place");
};

using D64 = Shape<64, 64, 4>;
using D128 = Shape<128, 128, 4>;
using D192 = Shape<192, 128, 4>;
using D256 = Shape<256, 256, 2>;

// What a block does: some heads of one sequence over one part of its keys.
struct Part {
    int sequence;
    int head;
    int live;
    int kv_head;
    int split;

    __device__ __forceinline__ explicit Part(const TenpAttentionParams &p) {
        const int group = p.num_heads / p.num_kv_heads;
        const int tiles = tenp::ceil_div(group, HEADS);
        const int block = blockIdx.x;
        split = block % p.num_splits;
        const int tile = block / p.num_splits % tiles;
        kv_head = block / p.num_splits / tiles % p.num_kv_heads;
        sequence = block / p.num_splits / tiles / p.num_kv_heads;
        head = kv_head * group + tile * HEADS;
        live = min(group - tile * HEADS, HEADS);
    }
};

// One warp's result: [HEADS] largest scores, [HEADS] sums, [HEADS][PITCH] outputs.
template <class S>
__device__ __forceinline__ void leave(float *to, const tenp::Softmax<1, S::V> &rows, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * h;
        const float sum = rows.total(0, h);
        if (lane % 4 == 0) {
            to[row] = rows.largest[0][h];
            to[HEADS + row] = sum;
        }
        float *out = to + 2 * HEADS + row * S::PITCH + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < S::V / 8; ++d) {
            *reinterpret_cast<float2 *>(out + 8 * d) = make_float2(rows.o[0][d][2 * h], rows.o[0][d][2 * h + 1]);
        }
    }
}

// Adds the warps' results in their order and stores the heads of this part.
template <class S>
__device__ __forceinline__ void join(const TenpAttentionParams &p, const Part &part, const uint8_t *results) {
    const auto of_warp = [&](int w) { return reinterpret_cast<const float *>(results + w * S::WARP_BYTES); };
    for (int item = threadIdx.x; item < part.live * p.v_dim; item += S::THREADS) {
        const int row = item / p.v_dim;
        const int d = item % p.v_dim;
        float largest = -INFINITY;
#pragma unroll
        for (int w = 0; w < S::WARPS; ++w) {
            largest = fmaxf(largest, of_warp(w)[row]);
        }
        const float base = tenp::exponent_base(largest);
        float sum = 0.0f;
        float out = 0.0f;
#pragma unroll
        for (int w = 0; w < S::WARPS; ++w) {
            const float *from = of_warp(w);
            const float factor = tenp::fast_exp2(from[row] - base);
            sum += factor * from[HEADS + row];
            out += factor * from[2 * HEADS + row * S::PITCH + d];
        }
        const int head = part.head + row;
        if (p.num_splits == 1) {
            p.out[p.query_offsets[part.sequence] * p.out_pitch + head * p.v_dim + d] =
                tenp::float_to_bf16(out * tenp::inverse_sum(sum));
            continue;
        }
        const int64_t at = (static_cast<int64_t>(part.sequence) * p.num_heads + head) * p.num_splits + part.split;
        p.split_out[at * p.v_dim + d] = out;
        if (d == 0) {
            p.split_max[at] = largest;
            p.split_sum[at] = sum;
        }
    }
}

template <class S> __device__ __forceinline__ void decode(const TenpAttentionParams &p, uint8_t *shared) {
    const Part part(p);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const tenp::Keys keys(p, part.sequence);
    const int first = p.window > 0 ? max(keys.count - p.window, 0) : 0;
    const int begin = min(first + part.split * p.split_keys, keys.count);
    const int end = part.split == p.num_splits - 1 ? keys.count : min(begin + p.split_keys, keys.count);
    const uint16_t *q = p.q + p.query_offsets[part.sequence] * p.q_pitch + part.head * p.qk_dim;
    const uint16_t *k = p.k + part.kv_head * p.qk_dim;
    const uint16_t *v = p.v + part.kv_head * p.v_dim;
    uint8_t *results = shared + S::Q_BYTES;
    uint8_t *stages = results + warp * S::WARP_BYTES;
    // Tiles go to the warps in turn; a warp waits for its own alone.
    const int num_tiles = tenp::ceil_div(end - begin, KEYS);
    const auto fill = [&](int tile) {
        if (tile < num_tiles) {
            uint8_t *stage = stages + tile / S::WARPS % 2 * S::STAGE_BYTES;
            const int at = begin + tile * KEYS;
            const auto row = [&](int i) { return keys.row(at + i); };
            tenp::load_rows<KEYS, S::QK / 8, 32>(stage, k, p.k_pitch, p.qk_dim, end - at, row, lane);
            tenp::load_rows<KEYS, S::V / 8, 32>(stage + S::K_BYTES, v, p.v_pitch, p.v_dim, end - at, row, lane);
        }
        tenp::cp_async_commit();
    };
    tenp::load_rows<HEADS, S::QK / 8, S::THREADS>(
        shared, q, p.qk_dim, p.qk_dim, part.live, [](int i) { return static_cast<int64_t>(i); }, threadIdx.x);
    tenp::cp_async_commit();
    fill(warp);
    tenp::cp_async_wait<1>();
    __syncthreads();
    tenp::Softmax<1, S::V> rows;
    for (int tile = warp; tile < num_tiles; tile += S::WARPS) {
        fill(tile + S::WARPS);
        tenp::cp_async_wait<1>();
        __syncwarp();
        const uint8_t *stage = stages + tile / S::WARPS % 2 * S::STAGE_BYTES;
        float s[1][KEYS / 8][4];
        tenp::scores<1, KEYS, S::QK>(s, shared, 0, stage, lane);
        const int left = end - begin - tile * KEYS;
        if (left < KEYS) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    s[0][j][c] = 8 * j + lane % 4 * 2 + c % 2 < left ? s[0][j][c] : -INFINITY;
                }
            }
        }
        rows.template weigh<KEYS>(s, p.scale * tenp::LOG2_E);
        tenp::add_values<1, KEYS, S::V>(rows.o, s, stage + S::K_BYTES, lane);
        // No lane still reads the stage that is filled next.
        __syncwarp();
    }
    tenp::cp_async_wait<0>();
    __syncwarp();
    leave<S>(reinterpret_cast<float *>(stages), rows, lane);
    __syncthreads();
    join<S>(p, part, results);
}

} // namespace

TENP_KERNEL(tenp_attention_decode_64, TenpAttentionParams, 128, 4) {
    TENP_SHARED(uint8_t, shared);
    decode<D64>(p, shared);
}

TENP_KERNEL(tenp_attention_decode_128, TenpAttentionParams, 128, 3) {
    TENP_SHARED(uint8_t, shared);
    decode<D128>(p, shared);
}

TENP_KERNEL(tenp_attention_decode_192, TenpAttentionParams, 128, 2) {
    TENP_SHARED(uint8_t, shared);
    decode<D192>(p, shared);
}

TENP_KERNEL(tenp_attention_decode_256, TenpAttentionParams, 64, 2) {
    TENP_SHARED(uint8_t, shared);
    decode<D256>(p, shared);
}

// A warp per sequence and head.
TENP_KERNEL(tenp_attention_merge, TenpAttentionParams, 256, 4) {
    const int item = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    if (item >= p.num_sequences * p.num_heads) {
        return;
    }
    const int sequence = item / p.num_heads;
    const int head = item % p.num_heads;
    const int64_t first = static_cast<int64_t>(item) * p.num_splits;
    float largest = -INFINITY;
    for (int i = 0; i < p.num_splits; ++i) {
        largest = fmaxf(largest, p.split_max[first + i]);
    }
    const float base = tenp::exponent_base(largest);
    uint16_t *to = p.out + p.query_offsets[sequence] * p.out_pitch + head * p.v_dim;
    for (int d = threadIdx.x % 32; d < p.v_dim; d += 32) {
        float sum = 0.0f;
        float out = 0.0f;
        for (int i = 0; i < p.num_splits; ++i) {
            const float factor = tenp::fast_exp2(p.split_max[first + i] - base);
            sum += factor * p.split_sum[first + i];
            out += factor * p.split_out[(first + i) * p.v_dim + d];
        }
        to[d] = tenp::float_to_bf16(out * tenp::inverse_sum(sum));
    }
}
