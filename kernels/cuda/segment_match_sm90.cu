// computes: as segment_match.cu, with wgmma and bulk tensor copies: for each row its best column, by similarity or cosine
// layout:   as there; maps in groups of eight rows, box 128 x 64, of the columns' gate rows, up rows and down columns:
//           maps.weights, maps.rows, maps.h
// requires: as there. NaN never wins
// launch:   grid (num_items), block (384), shared 208992 bytes: a block per item, 256 columns at a time
// flops:    2 H a row, column and part (similarity), 6 H (assign). bytes: 2 H a row and part, once per 256 columns; 2 H a
//           column and part
// sm_90a only
#include "hopper.cuh"
#include "segments.cuh"

namespace {

using tenp::ALL;
using tenp::DOWN;
using tenp::GATE;
using tenp::UP;

// The rows are gathered, 64 of an item; each of the two warpgroups has all of them, and half of the columns.
struct Shape {
    static constexpr int N = 128, STAGES = 5, M = TENP_SEGMENT_ROWS, K = 64, COLUMNS = 2 * N;
    static constexpr int A_BYTES = 2 * M * K, HALF_A_BYTES = 0, HALF_B_BYTES = 2 * N * K;
    static constexpr int STAGE_BYTES = A_BYTES + 2 * HALF_B_BYTES, STAGED = STAGES * STAGE_BYTES;
    // Inverse norms of the columns by part, then values and columns of both warpgroups' best.
    static constexpr int INVERSE_BYTES = 4 * ALL * COLUMNS, STAGED_BYTES = INVERSE_BYTES + 1024;
    static constexpr int BARRIERS = STAGED + STAGED_BYTES;
    static_assert(M == 64, "a warpgroup's rows");
};

using Acc = float[Shape::N / 2];

// Which parts are multiplied, in which order: gate last, so that of the others' signs only bits are kept.
template <bool ASSIGN> struct Order {
    __device__ __forceinline__ static int part(int i) { return i == 0 ? UP : i == 1 ? DOWN : GATE; }
    __device__ __forceinline__ static bool wanted(const TenpSegmentMatchParams &p, int part) {
        if (ASSIGN) {
            return true;
        }
        const bool signs = p.sign_canonical != 0;
        return part == GATE ? p.lambda_gate != 0.0f
               : part == UP ? signs || p.lambda_up != 0.0f
                            : signs || p.lambda_down != 0.0f;
    }
};

// Columns come in groups of eight, so the first tile may begin before the item does.
__device__ __forceinline__ int first_column(const TenpSegmentItem &item) { return item.col_begin / 8 * 8; }

template <bool ASSIGN>
__device__ __forceinline__ void produce(const TenpSegmentMatchParams &p, const TenpTensorMaps &maps,
                                        const tenp::Stages<Shape> &stages) {
    const TenpSegmentItem item = p.items[blockIdx.x];
    tenp::Ring<Shape::STAGES> ring;
    tenp::Gather<Shape, Shape::M> gather;
    gather.choose([&](int r) { return item.row_begin + r < item.row_end ? p.row_ids[item.row_begin + r] : -1; });
    for (int column = first_column(item); column < item.col_end; column += Shape::COLUMNS) {
        for (int i = 0; i < ALL; ++i) {
            const int part = Order<ASSIGN>::part(i);
            if (!Order<ASSIGN>::wanted(p, part)) {
                continue;
            }
            const TenpTensorMap *map = part == GATE ? &maps.weights : part == UP ? &maps.rows : &maps.h;
            for (int k0 = 0; k0 < p.hidden; k0 += Shape::K) {
                uint64_t *full = stages.full(ring.stage);
                tenp::mbarrier_wait(stages.empty(ring.stage), ring.parity ^ 1);
                if (threadIdx.x == 0) {
                    tenp::mbarrier_arrive_expect(full, 2 * Shape::HALF_B_BYTES);
                    for (int half = 0; half < 2; ++half) {
                        tenp::load_groups(stages.rows(ring.stage) + half * Shape::HALF_B_BYTES, map, full, k0,
                                          (column + half * Shape::N) / 8);
                    }
                }
                gather.load(stages, stages.weights(ring.stage), k0, p.hidden, p.row_down_t, [&](int neuron) {
                    return tenp::part_row(p.row_gate_up, p.row_down_t, p.hidden, part, neuron);
                });
                ring.advance();
            }
        }
    }
    gather.finish(stages);
}

// The best columns that a thread has seen for its two rows.
using Best = tenp::BestColumn[2];

// Row and column of accumulator i of a consumer thread, in the item's rows and the tile's columns.
struct Place {
    int half = static_cast<int>(threadIdx.x) / tenp::WARPGROUP - 1;
    int lane = static_cast<int>(threadIdx.x) % 32;
    int row = static_cast<int>(threadIdx.x) % tenp::WARPGROUP / 32 * 16 + lane / 4;
    int column = half * Shape::N + lane % 4 * 2;

    __device__ __forceinline__ int column_of(int i) const { return column + i / 4 * 8 + i % 2; }
};

__device__ __forceinline__ int eight(int i) { return i / 2 % 2; }

// Inverse norms of the tile's columns, a row for each part; zeros where there is no column.
__device__ __forceinline__ void load_inverse(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, int first,
                                             int parts, float *to) {
    tenp::consumers_barrier();
    for (int i = static_cast<int>(threadIdx.x) - tenp::WARPGROUP; i < parts * Shape::COLUMNS; i += tenp::CONSUMERS) {
        const int column = first + i % Shape::COLUMNS;
        const int part = parts == 1 ? static_cast<int>(ALL) : i / Shape::COLUMNS;
        to[i] = column >= item.col_begin && column < item.col_end ? p.col_inverse[part * p.col_stride + column] : 0.0f;
    }
    tenp::consumers_barrier();
}

__device__ __forceinline__ float inverse_of_row(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, int part, int row) {
    const int at = item.row_begin + row;
    return at < item.row_end ? p.row_inverse[part * p.row_stride + p.row_ids[at]] : 0.0f;
}

__device__ __forceinline__ void to_cosines(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, const Place &place,
                                           int part, const float *table, Acc &acc) {
    const float rows[2] = {inverse_of_row(p, item, part, place.row), inverse_of_row(p, item, part, place.row + 8)};
#pragma unroll
    for (int i = 0; i < Shape::N / 2; ++i) {
        acc[i] *= rows[eight(i)] * table[place.column_of(i)];
    }
}

// Offers every element of the tile whose column is there; `value(i, flipped)` gives it.
template <class Value>
__device__ __forceinline__ void take_tile(const TenpSegmentItem &item, const Place &place, int first, Best &best, Value value) {
#pragma unroll
    for (int i = 0; i < Shape::N / 2; ++i) {
        const int column = first + place.column_of(i);
        int flipped = 0;
        const float own = value(i, flipped);
        if (column >= item.col_begin && column < item.col_end) {
            best[eight(i)].take(own, 2 * (column - item.col_begin) + flipped);
        }
    }
}

// Over the four lanes of a row, then over the two warpgroups, and out.
__device__ __forceinline__ void store(const TenpSegmentMatchParams &p, const TenpSegmentItem &item, const Place &place,
                                      Best &best, uint8_t *room) {
    float *values = reinterpret_cast<float *>(room);
    int *ids = reinterpret_cast<int *>(room) + 2 * Shape::M;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        best[half].merge_quad();
        if (place.lane % 4 == 0) {
            values[place.half * Shape::M + place.row + 8 * half] = best[half].value;
            ids[place.half * Shape::M + place.row + 8 * half] = best[half].id;
        }
    }
    tenp::consumers_barrier();
    const int row = static_cast<int>(threadIdx.x) - tenp::WARPGROUP;
    if (row < item.row_end - item.row_begin) {
        tenp::BestColumn found;
        for (int half = 0; half < 2; ++half) {
            found.take(values[half * Shape::M + row], ids[half * Shape::M + row]);
        }
        found.store(p, item.out_begin + row);
    }
}

// The product of one part, or nothing where it is not asked for.
template <bool ASSIGN>
__device__ __forceinline__ void add_part(const TenpSegmentMatchParams &p, const tenp::Stages<Shape> &stages,
                                         tenp::Ring<Shape::STAGES> &ring, int part, Acc &acc) {
    if (Order<ASSIGN>::wanted(p, part)) {
        tenp::consume<Shape, false>(stages, ring, p.hidden, acc);
    }
}

__device__ __forceinline__ void match_similar(const TenpSegmentMatchParams &p, const tenp::Stages<Shape> &stages) {
    const TenpSegmentItem item = p.items[blockIdx.x];
    const Place place;
    float *table = reinterpret_cast<float *>(stages.staged());
    const bool signs = p.sign_canonical != 0;
    tenp::Ring<Shape::STAGES> ring;
    Best best;
    for (int first = first_column(item); first < item.col_end; first += Shape::COLUMNS) {
        load_inverse(p, item, first, ALL, table);
        Acc rest, other;
        tenp::clear(rest);
        tenp::clear(other);
        add_part<false>(p, stages, ring, UP, rest);
        to_cosines(p, item, place, UP, table + UP * Shape::COLUMNS, rest);
        add_part<false>(p, stages, ring, DOWN, other);
        to_cosines(p, item, place, DOWN, table + DOWN * Shape::COLUMNS, other);
        uint64_t flips = 0;
#pragma unroll
        for (int i = 0; i < Shape::N / 2; ++i) {
            const bool flipped = signs && rest[i] < 0.0f && other[i] < 0.0f;
            const float sum = p.lambda_up * rest[i] + p.lambda_down * other[i];
            rest[i] = flipped ? -sum : sum;
            flips |= static_cast<uint64_t>(flipped) << i;
        }
        tenp::clear(other);
        add_part<false>(p, stages, ring, GATE, other);
        to_cosines(p, item, place, GATE, table + GATE * Shape::COLUMNS, other);
        take_tile(item, place, first, best, [&](int i, int &flipped) {
            flipped = static_cast<int>(flips >> i & 1u);
            return fmaf(p.lambda_gate, other[i], rest[i]);
        });
    }
    store(p, item, place, best, stages.staged() + Shape::INVERSE_BYTES);
}

__device__ __forceinline__ void match_cosine(const TenpSegmentMatchParams &p, const tenp::Stages<Shape> &stages) {
    const TenpSegmentItem item = p.items[blockIdx.x];
    const Place place;
    float *table = reinterpret_cast<float *>(stages.staged());
    float signs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = item.row_begin + place.row + 8 * half;
        signs[half] = p.row_signs != nullptr && row < item.row_end ? p.row_signs[row] : 1.0f;
    }
    tenp::Ring<Shape::STAGES> ring;
    Best best;
    for (int first = first_column(item); first < item.col_end; first += Shape::COLUMNS) {
        load_inverse(p, item, first, 1, table);
        Acc acc;
        tenp::clear(acc);
        add_part<true>(p, stages, ring, UP, acc);
        add_part<true>(p, stages, ring, DOWN, acc);
#pragma unroll
        for (int i = 0; i < Shape::N / 2; ++i) {
            acc[i] *= signs[eight(i)];
        }
        add_part<true>(p, stages, ring, GATE, acc);
        to_cosines(p, item, place, ALL, table, acc);
        take_tile(item, place, first, best, [&](int i, int &) { return acc[i]; });
    }
    store(p, item, place, best, stages.staged() + Shape::INVERSE_BYTES);
}

template <bool ASSIGN>
__device__ __forceinline__ void match(const TenpSegmentMatchParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    const tenp::Stages<Shape> stages{shared};
    stages.begin_barriers(1 + tenp::WARPGROUP);
    __syncthreads();
    tenp::split_roles<true>([&] { produce<ASSIGN>(p, maps, stages); },
                            [&] {
                                if (ASSIGN) {
                                    match_cosine(p, stages);
                                } else {
                                    match_similar(p, stages);
                                }
                            });
}

} // namespace

TENP_KERNEL_MAPS(tenp_segment_similarity_w, TenpSegmentMatchParams, 384, 1) {
    TENP_SHARED(uint8_t, shared);
    match<false>(p, maps, shared);
}

TENP_KERNEL_MAPS(tenp_segment_assign_w, TenpSegmentMatchParams, 384, 1) {
    TENP_SHARED(uint8_t, shared);
    match<true>(p, maps, shared);
}
