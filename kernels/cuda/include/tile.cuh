// Shared parts of the matrix products: tiles of weights (M) by tokens (N), fed by cp.async through a ring of stages and
// multiplied by mma.m16n8k16.
//
// A tile's operands lie in shared memory as rows of 16-byte chunks whose order is permuted so that the eight rows which
// one ldmatrix reads fall into different banks (`swizzled`).
#pragma once

#include "kernel.cuh"
#include "schedule.cuh"

namespace tenp {

template <int BM_, int BN_, int BK_, int WARPS_M_, int WARPS_N_, int STAGES_> struct TileShape {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    // Rows and columns of a warp, and its fragments.
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MI = WM / 16, NI = WN / 8;
    static constexpr int A_BYTES = 2 * BM * BK, STAGE_BYTES = A_BYTES + 2 * BN * BK;
    static constexpr int PIPELINE_BYTES = STAGES * STAGE_BYTES;
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 32 == 0, "whole fragments, read two at a time");
};

// Position of a 16-byte chunk in a tile with CHUNKS chunks a row.
template <int CHUNKS> __device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 or of whole 128 bytes");
    return row * CHUNKS + (CHUNKS == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7));
}

// Rows of an operand whose inner dimension is contiguous, a stage of BK elements at a time.
template <int ROWS, int BK, int THREADS> struct RowLoader {
    static constexpr int CHUNKS = BK / 8, STEP = THREADS / CHUNKS, COUNT = (ROWS + STEP - 1) / STEP;
    const uint16_t *pointers[COUNT];
    uint32_t live = 0;

    // `row_pointer(r)` is row r's first element, or null for a row of zeros.
    template <class RowPointer> __device__ __forceinline__ RowLoader(RowPointer row_pointer, const uint16_t *any) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = first_row() + i * STEP;
            const uint16_t *pointer = row < ROWS ? row_pointer(row) : nullptr;
            live |= (pointer != nullptr ? 1u : 0u) << i;
            pointers[i] = pointer != nullptr ? pointer : any;
        }
    }

    static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / CHUNKS; }

    // Elements k0..k0 + BK of every row; zeros from `inner` on.
    __device__ __forceinline__ void load(uint8_t *stage, int k0, int inner) const {
        const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
        const bool inside = k0 + chunk * 8 < inner;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = first_row() + i * STEP;
            if (ROWS % STEP == 0 || row < ROWS) {
                const bool valid = inside && (live >> i & 1u) != 0;
                cp_async_16(stage + 16 * swizzled<CHUNKS>(row, chunk), pointers[i] + (valid ? k0 + chunk * 8 : 0), valid);
            }
        }
    }
};

// The same for rows that lie `pitch` apart, of which the first `rows` exist: no table of pointers to keep in registers.
template <int ROWS, int BK, int THREADS> struct PitchedLoader {
    static constexpr int CHUNKS = BK / 8, STEP = THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0, "every thread copies alike");
    const uint16_t *first;
    int pitch;
    int rows;

    __device__ __forceinline__ void load(uint8_t *stage, int k0, int inner) const {
        const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
        const bool inside = k0 + chunk * 8 < inner;
#pragma unroll
        for (int i = 0; i < ROWS / STEP; ++i) {
            const int row = static_cast<int>(threadIdx.x) / CHUNKS + i * STEP;
            const bool valid = inside && row < rows;
            cp_async_16(stage + 16 * swizzled<CHUNKS>(row, chunk),
                        first + (valid ? static_cast<int64_t>(row) * pitch + k0 + chunk * 8 : 0), valid);
        }
    }
};

// Columns of an operand [inner, pitch] whose outer dimension is contiguous: BK inner rows of COLUMNS elements a stage.
template <int COLUMNS, int BK, int THREADS> struct ColumnLoader {
    static constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
    static_assert(BK % STEP == 0, "every thread copies alike");
    const uint16_t *base;
    int64_t pitch;
    bool inside;

    // `first` is element [0, first column]; `columns` of them exist.
    __device__ __forceinline__ ColumnLoader(const uint16_t *first, int64_t pitch_, int columns)
        : base(first), pitch(pitch_), inside(static_cast<int>(threadIdx.x) % CHUNKS * 8 < columns) {}

    __device__ __forceinline__ void load(uint8_t *stage, int k0, int inner) const {
        const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
#pragma unroll
        for (int i = 0; i < BK / STEP; ++i) {
            const int k = static_cast<int>(threadIdx.x) / CHUNKS + i * STEP;
            const bool valid = inside && k0 + k < inner;
            cp_async_16(stage + 16 * swizzled<CHUNKS>(k, chunk), base + (valid ? (k0 + k) * pitch + chunk * 8 : 0), valid);
        }
    }
};

// A's fragment of 16 rows by 16 inner elements; `rows` is [BM][BK], or [BK][BM] where TRANSPOSED.
template <class S, bool TRANSPOSED>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const uint8_t *stage, int row, int k, int lane) {
    if constexpr (TRANSPOSED) {
        const int inner = k + (lane >> 4) * 8 + (lane & 7);
        ldmatrix_x4_trans(a, stage + 16 * swizzled<S::BM / 8>(inner, row / 8 + (lane >> 3 & 1)));
    } else {
        ldmatrix_x4(a, stage + 16 * swizzled<S::BK / 8>(row + (lane & 15), k / 8 + (lane >> 4)));
    }
}

// B's fragments of two times 8 columns by 16 inner elements; the stage is [BN][BK].
template <class S>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const uint8_t *stage, int column, int k, int lane) {
    uint32_t r[4];
    ldmatrix_x4(r, stage + 16 * swizzled<S::BK / 8>(column + (lane & 7) + (lane >> 4) * 8, k / 8 + (lane >> 3 & 1)));
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
}

template <class S> struct WarpPlace {
    int lane = static_cast<int>(threadIdx.x) % 32;
    int row = static_cast<int>(threadIdx.x) / 32 % S::WARPS_M * S::WM;
    int column = static_cast<int>(threadIdx.x) / 32 / S::WARPS_M * S::WN;
};

// acc += A B over the first `inner` inner elements, of which both loaders have zeros behind; steps of 16 that lie wholly
// behind are left out. No copy is under way afterwards; a barrier is due before the stages are written again.
template <class S, bool TRANSPOSED, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&acc)[S::MI][S::NI][4], uint8_t *stages, const LoadA &load_from_a,
                                         const LoadB &load_from_b, int inner) {
    const WarpPlace<S> warp;
    const int steps = ceil_div(inner, S::BK);
    const auto fill = [&](int step) {
        if (step < steps) {
            uint8_t *stage = stages + step % S::STAGES * S::STAGE_BYTES;
            load_from_a.load(stage, step * S::BK, inner);
            load_from_b.load(stage + S::A_BYTES, step * S::BK, inner);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < S::STAGES - 1; ++step) {
        fill(step);
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<S::STAGES - 2>();
        // Everyone's part of this step has arrived, and no one still reads the stage that is filled next.
        __syncthreads();
        fill(step + S::STAGES - 1);
        const uint8_t *stage = stages + step % S::STAGES * S::STAGE_BYTES;
#pragma unroll
        for (int k = 0; k < S::BK; k += 16) {
            if (step * S::BK + k >= inner) {
                break;
            }
            uint32_t a[S::MI][4];
            uint32_t b[S::NI][2];
#pragma unroll
            for (int i = 0; i < S::MI; ++i) {
                load_a<S, TRANSPOSED>(a[i], stage, warp.row + 16 * i, k, warp.lane);
            }
#pragma unroll
            for (int j = 0; j < S::NI; j += 2) {
                uint32_t two[2][2];
                load_b<S>(two, stage + S::A_BYTES, warp.column + 8 * j, k, warp.lane);
                b[j][0] = two[0][0];
                b[j][1] = two[0][1];
                b[j + 1][0] = two[1][0];
                b[j + 1][1] = two[1][1];
            }
#pragma unroll
            for (int i = 0; i < S::MI; ++i) {
#pragma unroll
                for (int j = 0; j < S::NI; ++j) {
                    mma_bf16(acc[i][j], a[i], b[j]);
                }
            }
        }
    }
    cp_async_wait<0>();
}

// A tile of a grouped product.
struct GroupedTile {
    int expert;
    int token_tile;
    // First weight row (neuron, output) inside the expert.
    int weight;
    // Rows of this tile, and one past the expert's last.
    int first_row;
    int end_row;
    // The expert's first padded neuron.
    int neuron_offset;
    int width;
    int width_padded;
};

// Copies the schedule's offsets to shared memory; a barrier is due before they are read.
__device__ __forceinline__ void load_tile_offsets(const int32_t *from, int num_experts, int32_t *to) {
    for (int i = threadIdx.x; i <= num_experts; i += blockDim.x) {
        to[i] = from[i];
    }
}

// Tile number `tile` of a product whose experts have `outputs` weight rows each (0: their padded width).
template <class P>
__device__ __forceinline__ GroupedTile grouped_tile(const P &p, const int32_t *tile_offsets, int tile, int outputs,
                                                    int weight_tile, int token_tile) {
    const int place = find_place(tile_offsets, p.num_experts, tile);
    GroupedTile t;
    t.expert = p.order[place];
    t.end_row = p.group_offsets[t.expert + 1];
    t.neuron_offset = p.neuron_offsets[t.expert];
    t.width = p.widths[t.expert];
    t.width_padded = p.neuron_offsets[t.expert + 1] - t.neuron_offset;
    const int first_row = p.group_offsets[t.expert];
    const TilePlace at =
        place_of_tile(tile - tile_offsets[place], ceil_div(outputs > 0 ? outputs : t.width_padded, weight_tile),
                      ceil_div(t.end_row - first_row, token_tile));
    t.token_tile = at.token;
    t.weight = at.weight * weight_tile;
    t.first_row = first_row + at.token * token_tile;
    return t;
}

// x / (1 + e^-x); minus infinity stays what it is.
__device__ __forceinline__ float silu(float x) { return x / (1.0f + fast_exp(fminf(-x, 88.0f))); }

} // namespace tenp
