// computes: for each row (a segment: gate row, up row, down column w of one neuron) its best column. similarity:
//           lambda_g cos(gate, gate') + lambda_u cos(up, up') + lambda_d cos(w, w'); assign: cos(v, v') of v = [gate; up; w],
//           up and w times the row's sign
// layout:   GU [2S, H], DT [S, H]; best_value, best_id, best_flip at an item's out_begin on. Nothing of size rows x columns
// requires: H a multiple of 8; at most TENP_SEGMENT_ROWS rows an item; ties go to the lower column; a part whose lambda
//           is 0 is not read, unless its sign is needed
// launch:   grid (num_items), block (256), shared 58112 bytes: a block per item
// flops:    2 H a row, column and part (similarity), 6 H (assign). bytes: 2 H a row and part, once per 128 columns; 2 H a
//           column and part
#include "segments.cuh"
#include "tile.cuh"

namespace {

using Shape = tenp::TileShape<TENP_SEGMENT_ROWS, 128, 32, 2, 4, 4>;
using Tile = float[Shape::MI][Shape::NI][4];

using tenp::ALL;
using tenp::DOWN;
using tenp::GATE;
using tenp::part_row;
using tenp::UP;

// What one block works on: an item, looked up when needed (held over a product it would be the registers that spill),
// and its columns from `column` on.
struct Place {
    const TenpSegmentItem &item;
    int column;
};

// acc += the products of one part.
__device__ __forceinline__ void multiply_part(const TenpSegmentMatchParams &p, const Place &at, int part, uint8_t *stages,
                                              Tile &acc) {
    const tenp::RowLoader<Shape::BM, Shape::BK, Shape::THREADS> load_rows(
        [&](int r) {
            const int row = at.item.row_begin + r;
            return row < at.item.row_end
                       ? part_row(p.row_gate_up, p.row_down_t, p.hidden, part, p.row_ids[row])
                       : nullptr;
        },
        p.row_down_t);
    const tenp::RowLoader<Shape::BN, Shape::BK, Shape::THREADS> load_columns(
        [&](int c) {
            const int column = at.column + c;
            return column < at.item.col_end ? part_row(p.col_gate_up, p.col_down_t, p.hidden, part, column) : nullptr;
        },
        p.col_down_t);
    tenp::multiply<Shape, false>(acc, stages, load_rows, load_columns, p.hidden);
    // The stages are filled again by the next product.
    __syncthreads();
}

// Row and column inside the tile of accumulator (i, j, c): row 16 i + c / 2 * 8, column 8 j + c % 2, from these on.
struct Corner {
    int row;
    int column;
    __device__ __forceinline__ Corner() {
        const tenp::WarpPlace<Shape> warp;
        row = warp.row + warp.lane / 4;
        column = warp.column + warp.lane % 4 * 2;
    }
};

// Multiplies products by the inverse norms: `row_inverse` of the tile's rows in shared memory, the columns' in `table`.
__device__ __forceinline__ void to_cosines(const Place &at, const float *row_inverse, const float *table, Tile &acc) {
    const Corner corner;
#pragma unroll
    for (int j = 0; j < Shape::NI; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int column = at.column + corner.column + 8 * j + c;
            const float scale = column < at.item.col_end ? table[column] : 0.0f;
#pragma unroll
            for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    acc[i][j][2 * half + c] *= row_inverse[corner.row + 16 * i + 8 * half] * scale;
                }
            }
        }
    }
}

// The best column that a thread has seen for each of its rows.
struct Best {
    tenp::BestColumn rows[Shape::MI][2];

    Best() = default;

    // A thread's own words of shared memory, where this waits while products need the registers.
    static constexpr int WORDS = 2 * Shape::MI * 2 * Shape::THREADS;

    __device__ __forceinline__ explicit Best(const int *kept) {
#pragma unroll
        for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = 2 * (2 * i + half) * Shape::THREADS + static_cast<int>(threadIdx.x);
                rows[i][half].value = __int_as_float(kept[at]);
                rows[i][half].id = kept[at + Shape::THREADS];
            }
        }
    }

    __device__ __forceinline__ void keep(int *to) const {
#pragma unroll
        for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = 2 * (2 * i + half) * Shape::THREADS + static_cast<int>(threadIdx.x);
                to[at] = __float_as_int(rows[i][half].value);
                to[at + Shape::THREADS] = rows[i][half].id;
            }
        }
    }

    // Over the four lanes of a row, then over the warps beside each other, and out.
    __device__ __forceinline__ void store(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, uint8_t *shared) {
        const tenp::WarpPlace<Shape> warp;
        float *values_of_warps = reinterpret_cast<float *>(shared);
        int *ids_of_warps = reinterpret_cast<int *>(shared) + Shape::WARPS_N * Shape::BM;
#pragma unroll
        for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                rows[i][half].merge_quad();
                if (warp.lane % 4 == 0) {
                    const int at = warp.column / Shape::WN * Shape::BM + warp.row + 16 * i + 8 * half + warp.lane / 4;
                    values_of_warps[at] = rows[i][half].value;
                    ids_of_warps[at] = rows[i][half].id;
                }
            }
        }
        __syncthreads();
        const int row = threadIdx.x;
        if (row >= item.row_end - item.row_begin) {
            return;
        }
        tenp::BestColumn best;
        for (int w = 0; w < Shape::WARPS_N; ++w) {
            best.take(values_of_warps[w * Shape::BM + row], ids_of_warps[w * Shape::BM + row]);
        }
        best.store(p, item.out_begin + row);
    }
};

// Inverse norms of the item's rows to shared memory; zeros past its end.
__device__ __forceinline__ void load_inverse(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, int part,
                                             float *to) {
    for (int r = threadIdx.x; r < Shape::BM; r += Shape::THREADS) {
        const int row = item.row_begin + r;
        to[r] = row < item.row_end ? p.row_inverse[part * p.row_stride + p.row_ids[row]] : 0.0f;
    }
}

// Offers every element of the tile's columns that are there; `value(i, j, c, flipped)` gives it.
template <class Value> __device__ __forceinline__ void take_tile(const Place &at, int *kept, Value value) {
    const Corner corner;
    Best best(kept);
#pragma unroll
    for (int j = 0; j < Shape::NI; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int column = at.column + corner.column + 8 * j + c % 2;
            if (column < at.item.col_end) {
#pragma unroll
                for (int i = 0; i < Shape::MI; ++i) {
                    int flipped = 0;
                    const float own = value(i, j, c, flipped);
                    best.rows[i][c / 2].take(own, 2 * (column - at.item.col_begin) + flipped);
                }
            }
        }
    }
    best.keep(kept);
}

static_assert(Shape::MI * Shape::NI * 4 == 32, "a bit for every accumulator");
__device__ __forceinline__ int bit_of(int i, int j, int c) { return (i * Shape::NI + j) * 4 + c; }

// rest = lambda_u cos(up, up') + lambda_d cos(w, w'), and for which elements it is that of the flipped row.
template <class Cosines>
__device__ __forceinline__ uint32_t up_and_down(const TenpSegmentMatchParams &p, const Cosines &cosines, Tile &rest) {
    const bool signs = p.sign_canonical != 0;
    if (signs || p.lambda_up != 0.0f) {
        cosines(UP, rest);
    }
    Tile down = {};
    if (signs || p.lambda_down != 0.0f) {
        cosines(DOWN, down);
    }
    uint32_t flips = 0;
#pragma unroll
    for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::NI; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const bool flipped = signs && rest[i][j][c] < 0.0f && down[i][j][c] < 0.0f;
                const float sum = p.lambda_up * rest[i][j][c] + p.lambda_down * down[i][j][c];
                rest[i][j][c] = flipped ? -sum : sum;
                flips |= (flipped ? 1u : 0u) << bit_of(i, j, c);
            }
        }
    }
    return flips;
}

} // namespace

TENP_KERNEL(tenp_segment_similarity, TenpSegmentMatchParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    int *kept = reinterpret_cast<int *>(shared + Shape::PIPELINE_BYTES);
    float *row_inverse = reinterpret_cast<float *>(kept + Best::WORDS);
    Place at = {p.items[blockIdx.x], 0};
    for (int part = GATE; part <= DOWN; ++part) {
        load_inverse(p, at.item, part, row_inverse + part * Shape::BM);
    }
    __syncthreads();
    const auto cosines = [&](int part, Tile &acc) {
        multiply_part(p, at, part, shared, acc);
        to_cosines(at, row_inverse + part * Shape::BM, p.col_inverse + part * p.col_stride, acc);
    };
    Best().keep(kept);
    for (at.column = at.item.col_begin; at.column < at.item.col_end; at.column += Shape::BN) {
        // Gate comes last, so that two tiles are alive at most: of the flips only the bits are kept.
        Tile rest = {};
        const uint32_t flips = up_and_down(p, cosines, rest);
        Tile gate = {};
        if (p.lambda_gate != 0.0f) {
            cosines(GATE, gate);
        }
        take_tile(at, kept, [&](int i, int j, int c, int &flipped) {
            flipped = static_cast<int>(flips >> bit_of(i, j, c) & 1u);
            return fmaf(p.lambda_gate, gate[i][j][c], rest[i][j][c]);
        });
    }
    Best(kept).store(p, at.item, shared);
}

TENP_KERNEL(tenp_segment_assign, TenpSegmentMatchParams, 256, 2) {
    TENP_SHARED(uint8_t, shared);
    int *kept = reinterpret_cast<int *>(shared + Shape::PIPELINE_BYTES);
    float *row_inverse = reinterpret_cast<float *>(kept + Best::WORDS);
    float *signs = row_inverse + Shape::BM;
    Place at = {p.items[blockIdx.x], 0};
    load_inverse(p, at.item, ALL, row_inverse);
    for (int r = threadIdx.x; r < Shape::BM; r += Shape::THREADS) {
        const int row = at.item.row_begin + r;
        signs[r] = p.row_signs != nullptr && row < at.item.row_end ? p.row_signs[row] : 1.0f;
    }
    __syncthreads();
    const Corner corner;
    Best().keep(kept);
    for (at.column = at.item.col_begin; at.column < at.item.col_end; at.column += Shape::BN) {
        Tile acc = {};
        multiply_part(p, at, UP, shared, acc);
        multiply_part(p, at, DOWN, shared, acc);
#pragma unroll
        for (int i = 0; i < Shape::MI; ++i) {
#pragma unroll
            for (int j = 0; j < Shape::NI; ++j) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    acc[i][j][c] *= signs[corner.row + 16 * i + c / 2 * 8];
                }
            }
        }
        multiply_part(p, at, GATE, shared, acc);
        to_cosines(at, row_inverse, p.col_inverse + ALL * p.col_stride, acc);
        take_tile(at, kept, [&](int i, int j, int c, int &) { return acc[i][j][c]; });
    }
    Best(kept).store(p, at.item, shared);
}
