// computes: causal attention of whole or chunked sequences: the last query of each stands at its last key; optional shared
//           prefix and window; grouped key/value heads; scores and sums in f32, weights rounded to bf16
// layout:   q [T, q_pitch], k [., k_pitch], v [., v_pitch], out [T, out_pitch] bf16, heads one after another
// requires: qk_dim, v_dim, pitches multiples of 8, 16-byte aligned bases, scale > 0; qk_dim, v_dim at most the entry's. A
//           query that sees no key gets zeros. NaN and infinities reach only the queries that see them
// launch:   grid (heads * (floor(T / BM) + num_sequences)), block (128). Entry (its qk, v), BM, shared bytes:
//           _64 (64, 64), 128, 49168; _128 (128, 128), 128, 65552; _192 (192, 128), 128, 90128; _256 (256, 256), 64, 98320
// flops:    2 (qk_dim + v_dim) a query, head and key seen. bytes: q and out once; k and v once per BM queries, from L2
#include "attention.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

// MI * 16 queries a warp, N keys a step.
template <int QK_, int V_, int MI_, int N_> struct Shape {
    static constexpr int QK = QK_, V = V_, MI = MI_, N = N_;
    static constexpr int WARP_ROWS = 16 * MI, BM = WARPS * WARP_ROWS;
    static constexpr int Q_BYTES = 2 * BM * QK, K_BYTES = 2 * N * QK, STAGE_BYTES = K_BYTES + 2 * N * V;
    static_assert(V <= QK, "the results are staged where the queries were");
};

using D64 = Shape<64, 64, 2, 64>;
using D128 = Shape<128, 128, 2, 32>;
using D192 = Shape<192, 128, 2, 32>;
using D256 = Shape<256, 256, 1, 32>;

// A tile of one sequence's queries.
struct QueryTile {
    int sequence;
    // The tile's first query row, and how many of its rows are queries; 0: there is no such tile.
    int64_t row;
    int live;
    // First query of the tile in its sequence, queries of the sequence.
    int first;
    int queries;
};

// Sequence s begins at tile floor(offset_s / BM) + s, which leaves room for ceil(queries / BM) tiles before the next.
__device__ __forceinline__ QueryTile query_tile(const TenpAttentionParams &p, int tile, int rows) {
    int low = 0;
    int high = p.num_sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.query_offsets[middle] / rows + middle <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    QueryTile t;
    const int begin = p.query_offsets[low];
    t.sequence = low;
    t.queries = p.query_offsets[low + 1] - begin;
    t.first = (tile - begin / rows - low) * rows;
    t.live = min(max(t.queries - t.first, 0), rows);
    t.row = static_cast<int64_t>(begin) + t.first;
    return t;
}

// Keys that the query at `position` sees: low..=position.
__device__ __forceinline__ int lowest_key(const TenpAttentionParams &p, int position) {
    return p.window > 0 ? max(position - p.window + 1, 0) : 0;
}

__device__ __forceinline__ bool sees(const TenpAttentionParams &p, int position, int key) {
    return key <= position && key >= lowest_key(p, position);
}

// Scores of keys that a query does not see become -infinity. `position` is that of the lane's first row.
template <class S>
__device__ __forceinline__ void hide(const TenpAttentionParams &p, float (&s)[S::MI][S::N / 8][4], int position, int key,
                                     int lane) {
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
#pragma unroll
        for (int j = 0; j < S::N / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (!sees(p, position + 16 * i + c / 2 * 8, key + 8 * j + lane % 4 * 2 + c % 2)) {
                    s[i][j][c] = -INFINITY;
                }
            }
        }
    }
}

__device__ __forceinline__ bool is_damaged(uint32_t bf16) { return (bf16 & 0x7f80u) == 0x7f80u; }

__device__ __forceinline__ uint32_t repaired(uint32_t pair) {
    return (is_damaged(pair) ? 0u : pair & 0xffffu) | (is_damaged(pair >> 16) ? 0u : pair & 0xffff0000u);
}

// Zero times NaN is NaN: where some queries of the tile do not see all keys of the step, values that are not finite are
// added by hand to the queries that see them, and taken out. `votes` holds an int for every warp.
template <class S>
__device__ __forceinline__ void contain(const TenpAttentionParams &p, tenp::Softmax<S::MI, S::V> &rows, uint8_t *values,
                                        int *votes, int position, int key, int lane) {
    constexpr int ITEMS = S::N * S::V / 8 / THREADS;
    uint4 *chunks = reinterpret_cast<uint4 *>(values);
    bool damaged = false;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const uint4 v = chunks[threadIdx.x + i * THREADS];
        damaged |= repaired(v.x) != v.x || repaired(v.y) != v.y || repaired(v.z) != v.z || repaired(v.w) != v.w;
    }
    const int any = __any_sync(tenp::WHOLE_WARP, damaged ? 1 : 0);
    if (lane == 0) {
        votes[threadIdx.x / 32] = any;
    }
    __syncthreads();
    if ((votes[0] | votes[1] | votes[2] | votes[3]) == 0) {
        return;
    }
#pragma unroll 1
    for (int k = 0; k < S::N; ++k) {
#pragma unroll
        for (int d = 0; d < S::V / 8; ++d) {
            const uint32_t pair =
                *reinterpret_cast<const uint32_t *>(values + 16 * tenp::swizzled<S::V / 8>(k, d) + lane % 4 * 4);
            const float2 v = tenp::unpack_bf16(pair & ~repaired(pair));
#pragma unroll
            for (int i = 0; i < S::MI; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (sees(p, position + 16 * i + 8 * h, key + k)) {
                        rows.o[i][d][2 * h] += v.x;
                        rows.o[i][d][2 * h + 1] += v.y;
                    }
                }
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < ITEMS; ++i) {
        const uint4 v = chunks[threadIdx.x + i * THREADS];
        chunks[threadIdx.x + i * THREADS] = make_uint4(repaired(v.x), repaired(v.y), repaired(v.z), repaired(v.w));
    }
    __syncthreads();
}

// The warp's rows, divided by their sums, through shared memory and out.
template <class S>
__device__ __forceinline__ void store(const TenpAttentionParams &p, const QueryTile &t, int head,
                                      const tenp::Softmax<S::MI, S::V> &rows, uint8_t *staged, int warp_row, int lane) {
    constexpr int CHUNKS = S::V / 8;
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float inverse = tenp::inverse_sum(rows.total(i, h));
            const int row = warp_row + 16 * i + 8 * h + lane / 4;
#pragma unroll
            for (int d = 0; d < CHUNKS; ++d) {
                *reinterpret_cast<uint32_t *>(staged + 16 * tenp::swizzled<CHUNKS>(row, d) + lane % 4 * 4) =
                    tenp::pack_bf16(rows.o[i][d][2 * h] * inverse, rows.o[i][d][2 * h + 1] * inverse);
            }
        }
    }
    __syncwarp();
    uint16_t *out = p.out + t.row * p.out_pitch + head * p.v_dim;
    for (int item = lane; item < S::WARP_ROWS * CHUNKS; item += 32) {
        const int row = warp_row + item / CHUNKS;
        const int chunk = item % CHUNKS;
        if (row < t.live && chunk * 8 < p.v_dim) {
            *reinterpret_cast<uint4 *>(out + row * p.out_pitch + chunk * 8) =
                *reinterpret_cast<const uint4 *>(staged + 16 * tenp::swizzled<CHUNKS>(row, chunk));
        }
    }
}

template <class S> __device__ __forceinline__ void prefill(const TenpAttentionParams &p, uint8_t *shared) {
    const int num_tiles = static_cast<int>(gridDim.x) / p.num_heads;
    const int head = static_cast<int>(blockIdx.x) % p.num_heads;
    // The tiles that see the most keys come first.
    const QueryTile t = query_tile(p, num_tiles - 1 - static_cast<int>(blockIdx.x) / p.num_heads, S::BM);
    if (t.live == 0) {
        return;
    }
    const int lane = threadIdx.x % 32;
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * S::WARP_ROWS;
    const tenp::Keys keys(p, t.sequence);
    // Position of the tile's first query; one past the last key that any of its queries sees.
    const int first = keys.count - t.queries + t.first;
    const int end = first + t.live;
    const int first_step = lowest_key(p, first) / S::N;
    const int last_step = tenp::ceil_div(max(end, 0), S::N);
    const int kv_head = head / (p.num_heads / p.num_kv_heads);
    const uint16_t *k = p.k + kv_head * p.qk_dim;
    const uint16_t *v = p.v + kv_head * p.v_dim;
    uint8_t *stages = shared + S::Q_BYTES;
    int *votes = reinterpret_cast<int *>(stages + 2 * S::STAGE_BYTES);
    const auto fill = [&](int step, bool is_value) {
        if (step < last_step) {
            uint8_t *stage = stages + step % 2 * S::STAGE_BYTES;
            const auto row = [&](int i) { return keys.row(step * S::N + i); };
            if (is_value) {
                tenp::load_rows<S::N, S::V / 8, THREADS>(stage + S::K_BYTES, v, p.v_pitch, p.v_dim, end - step * S::N, row,
                                                         threadIdx.x);
            } else {
                tenp::load_rows<S::N, S::QK / 8, THREADS>(stage, k, p.k_pitch, p.qk_dim, end - step * S::N, row,
                                                          threadIdx.x);
            }
        }
        tenp::cp_async_commit();
    };
    tenp::load_rows<S::BM, S::QK / 8, THREADS>(
        shared, p.q + t.row * p.q_pitch + head * p.qk_dim, p.q_pitch, p.qk_dim, t.live,
        [](int i) { return static_cast<int64_t>(i); }, threadIdx.x);
    fill(first_step, false);
    fill(first_step, true);
    tenp::Softmax<S::MI, S::V> rows;
    const int position = first + warp_row + lane / 4;
    for (int step = first_step; step < last_step; ++step) {
        // The keys have arrived, and no one still reads the stage that is filled next.
        tenp::cp_async_wait<1>();
        __syncthreads();
        fill(step + 1, false);
        fill(step + 1, true);
        uint8_t *stage = stages + step % 2 * S::STAGE_BYTES;
        const int key = step * S::N;
        const bool all_seen = key + S::N - 1 <= first && key >= lowest_key(p, end - 1);
        float s[S::MI][S::N / 8][4];
        tenp::scores<S::MI, S::N, S::QK>(s, shared, warp_row, stage, lane);
        if (!all_seen) {
            hide<S>(p, s, position, key, lane);
        }
        rows.template weigh<S::N>(s, p.scale * tenp::LOG2_E);
        tenp::cp_async_wait<2>();
        __syncthreads();
        if (!all_seen) {
            contain<S>(p, rows, stage + S::K_BYTES, votes, position, key, lane);
        }
        tenp::add_values<S::MI, S::N, S::V>(rows.o, s, stage + S::K_BYTES, lane);
    }
    // The results take the queries' place.
    tenp::cp_async_wait<0>();
    __syncthreads();
    store<S>(p, t, head, rows, shared, warp_row, lane);
}

} // namespace

TENP_KERNEL(tenp_attention_prefill_64, TenpAttentionParams, 128, 1) {
    TENP_SHARED(uint8_t, shared);
    prefill<D64>(p, shared);
}

TENP_KERNEL(tenp_attention_prefill_128, TenpAttentionParams, 128, 1) {
    TENP_SHARED(uint8_t, shared);
    prefill<D128>(p, shared);
}

TENP_KERNEL(tenp_attention_prefill_192, TenpAttentionParams, 128, 1) {
    TENP_SHARED(uint8_t, shared);
    prefill<D192>(p, shared);
}

TENP_KERNEL(tenp_attention_prefill_256, TenpAttentionParams, 128, 1) {
    TENP_SHARED(uint8_t, shared);
    prefill<D256>(p, shared);
}
