// Shared parts of the attention kernels: where a sequence's keys lie, tiles of them in shared memory, and the online
// softmax (Milakov and Gimelshein 2018; tiled as in FlashAttention-2, Dao 2023).
#pragma once

#include "reduce.cuh"
#include "tile.cuh"

namespace tenp {

// The keys of one sequence, counted from the first of its prefix on.
struct Keys {
    int prefix_row = 0;
    int prefix_len = 0;
    int own_row;
    int count;

    __device__ __forceinline__ Keys(const TenpAttentionParams &p, int sequence) : own_row(p.key_rows[sequence]) {
        if (p.prefix_lens != nullptr) {
            prefix_row = p.prefix_rows[sequence];
            prefix_len = p.prefix_lens[sequence];
        }
        count = prefix_len + p.key_lens[sequence];
    }

    // Row in the key and value matrices.
    __device__ __forceinline__ int64_t row(int key) const {
        return key < prefix_len ? prefix_row + key : own_row + (key - prefix_len);
    }
};

// Begins to copy a head's part of ROWS rows to a swizzled tile; zeros behind `dim` elements and from row `live` on.
// `row(i)` is row i's place in the matrix, of which `head` is the head's first element.
template <int ROWS, int CHUNKS, int THREADS, class Row>
__device__ __forceinline__ void load_rows(uint8_t *tile, const uint16_t *head, int64_t pitch, int dim, int live, Row row,
                                          int thread) {
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies alike");
#pragma unroll 2
    for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
        const int item = thread + i * THREADS;
        const int r = item / CHUNKS;
        const int chunk = item % CHUNKS;
        const bool valid = r < live && chunk * 8 < dim;
        cp_async_16(tile + 16 * swizzled<CHUNKS>(r, chunk), head + (valid ? row(r) * pitch + chunk * 8 : 0), valid);
    }
}

// s = Q K^T of MI * 16 rows of the query tile, from `row` on, and all N keys of a tile.
template <int MI, int N, int QK>
__device__ __forceinline__ void scores(float (&s)[MI][N / 8][4], const uint8_t *queries, int row, const uint8_t *keys,
                                       int lane) {
    constexpr int CHUNKS = QK / 8;
#pragma unroll
    for (int i = 0; i < MI; ++i) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
        uint32_t a[MI][4];
#pragma unroll
        for (int i = 0; i < MI; ++i) {
            ldmatrix_x4(a[i], queries + 16 * swizzled<CHUNKS>(row + 16 * i + (lane & 15), k + (lane >> 4)));
        }
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            uint32_t r[4];
            ldmatrix_x4(r, keys + 16 * swizzled<CHUNKS>(8 * j + (lane & 7) + (lane >> 4) * 8, k + (lane >> 3 & 1)));
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int i = 0; i < MI; ++i) {
                mma_bf16(s[i][j], a[i], b[0]);
                mma_bf16(s[i][j + 1], a[i], b[1]);
            }
        }
    }
}

// o += P V, where s holds P.
template <int MI, int N, int V>
__device__ __forceinline__ void add_values(float (&o)[MI][V / 8][4], const float (&s)[MI][N / 8][4], const uint8_t *values,
                                           int lane) {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        uint32_t a[MI][4];
#pragma unroll
        for (int i = 0; i < MI; ++i) {
            const float(&low)[4] = s[i][2 * k];
            const float(&high)[4] = s[i][2 * k + 1];
            a[i][0] = pack_bf16(low[0], low[1]);
            a[i][1] = pack_bf16(low[2], low[3]);
            a[i][2] = pack_bf16(high[0], high[1]);
            a[i][3] = pack_bf16(high[2], high[3]);
        }
#pragma unroll
        for (int d = 0; d < V / 8; d += 2) {
            uint32_t r[4];
            ldmatrix_x4_trans(r, values + 16 * swizzled<V / 8>(16 * k + (lane & 15), d + (lane >> 4)));
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int i = 0; i < MI; ++i) {
                mma_bf16(o[i][d], a[i], b[0]);
                mma_bf16(o[i][d + 1], a[i], b[1]);
            }
        }
    }
}

// What to subtract from the exponents of a row whose largest is `largest`; a row that has seen no key stays at 0.
__device__ __forceinline__ float exponent_base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Rows of one warp: row lane / 4 and the one 8 below it of each 16. `largest` is the largest score times log2_scale,
// `sum` this lane's part of the exponentials' sum.
template <int MI, int V> struct Softmax {
    float o[MI][V / 8][4] = {};
    float largest[MI][2];
    float sum[MI][2] = {};

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int i = 0; i < MI; ++i) {
            largest[i][0] = largest[i][1] = -INFINITY;
        }
    }

    // Takes in the scores of N keys, which become their weights. NaN scores make NaN weights.
    template <int N> __device__ __forceinline__ void weigh(float (&s)[MI][N / 8][4], float log2_scale) {
#pragma unroll
        for (int i = 0; i < MI; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = -INFINITY;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
                }
                top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 1));
                top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 2));
                const float before = largest[i][h];
                largest[i][h] = fmaxf(before, top * log2_scale);
                const float base = exponent_base(largest[i][h]);
                const float shrink = fast_exp2(before - base);
                float added = 0.0f;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float &weight = s[i][j][2 * h + c];
                        weight = fast_exp2(fmaf(weight, log2_scale, -base));
                        added += weight;
                    }
                }
                sum[i][h] = sum[i][h] * shrink + added;
#pragma unroll
                for (int d = 0; d < V / 8; ++d) {
                    o[i][d][2 * h] *= shrink;
                    o[i][d][2 * h + 1] *= shrink;
                }
            }
        }
    }

    // The whole sum of a row.
    __device__ __forceinline__ float total(int i, int h) const {
        const float pair = sum[i][h] + __shfl_xor_sync(WHOLE_WARP, sum[i][h], 1);
        return pair + __shfl_xor_sync(WHOLE_WARP, pair, 2);
    }
};

// 1 / sum; a row that saw no key becomes zeros.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

constexpr float LOG2_E = 1.4426950408889634f;

} // namespace tenp
