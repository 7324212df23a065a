/* Parameter structures of every kernel: the one boundary between the .cu sources, the executor and Rust.
 *
 * Plain C. Pointers are to device memory; bf16 is uint16_t. Structures hold pointers first, then 64-bit and 32-bit
 * fields, with explicit padding, so that they have no holes. `nullable` pointers may be null, all others must be set
 * unless the count that sizes them is zero. Unless said otherwise matrices are row-major and dense, and every pitch of
 * a bf16 matrix is a multiple of 8 elements with a 16-byte aligned base.
 *
 * Words: tokens T, chosen experts per token k = top_k, slots T*k (slot = token*k + choice), rows = slots grouped by
 * expert, experts E, hidden size H, neurons S = sum of padded widths (multiples of 16). GU is [2S, H]: 8 gate rows,
 * then the 8 up rows of the same neurons, over and over. DT is [S, H], the down projection transposed.
 */
#ifndef TENP_PARAMS_H
#define TENP_PARAMS_H

#include <stdint.h>

#ifdef __cplusplus
#define TENP_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " has a hole")
#define TENP_ALIGNED(bytes) alignas(bytes)
#else
#define TENP_ALIGNED(bytes) _Alignas(bytes)
#define TENP_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " has a hole")
#endif

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

/* A CUtensorMap, or what the executor has in its place. The instructions want it aligned so. */
typedef struct TenpTensorMap {
    TENP_ALIGNED(128) uint64_t words[16];
} TenpTensorMap;
TENP_SIZE(TenpTensorMap, 128);

/* Second argument of the sm_90a products: weights and rows of activations, and for the contribution h. */
typedef struct TenpTensorMaps {
    TenpTensorMap weights;
    TenpTensorMap rows;
    TenpTensorMap h;
} TenpTensorMaps;
TENP_SIZE(TenpTensorMaps, 384);

/* ---- grouping ---------------------------------------------------------------------------------------------------- */

/* Slots that one block of tenp_moe_count and tenp_moe_group takes. */
#define TENP_GROUP_CHUNK 1024

/* tenp_moe_count, tenp_moe_offsets, tenp_moe_group, tenp_moe_group_small. */
typedef struct TenpMoeGroupParams {
    const int32_t *expert_ids;   /* [T, k]; an id outside 0..E is not routed anywhere */
    const float *slot_weights;   /* [T, k] */
    int32_t *chunk_counts;       /* [num_chunks, E + 1] scratch: counts, then first rows; unused by _small */
    int32_t *group_offsets;      /* [E + 1] out */
    int32_t *token_of_row;       /* [T*k] out; rows behind group_offsets[E] hold the slots routed nowhere */
    int32_t *row_of_slot;        /* [T, k] out; -1 for a slot routed nowhere */
    float *row_weights;          /* [T*k] out */
    int32_t num_slots;
    int32_t top_k;
    int32_t num_experts;
    int32_t num_chunks;          /* ceil(num_slots / TENP_GROUP_CHUNK) */
} TenpMoeGroupParams;
TENP_SIZE(TenpMoeGroupParams, 72);

/* tenp_gather_rows: out[r] = in[row_ids[r]]; a negative id gives a zero row. */
typedef struct TenpGatherRowsParams {
    const uint16_t *in;          /* [., cols] */
    const int32_t *row_ids;      /* [num_rows] */
    uint16_t *out;               /* [num_rows, cols] */
    const int32_t *num_live_rows; /* nullable: rows at and behind *num_live_rows are left alone */
    int32_t num_rows;
    int32_t cols;
} TenpGatherRowsParams;
TENP_SIZE(TenpGatherRowsParams, 40);

/* ---- schedule ---------------------------------------------------------------------------------------------------- */

/* Schedules that one launch of tenp_moe_schedule makes at most. */
#define TENP_MAX_SCHEDULES 4

/* How one grouped product is cut into tiles. */
typedef struct TenpScheduleSpec {
    int32_t *order;              /* [E] out: experts, widest first by padded width, ties to the lower id */
    int32_t *tile_offsets;       /* [E + 1] out: tiles before the expert at each place of `order` */
    int64_t *partial_offsets;    /* nullable, [E + 1] out, by expert id: elements of per-tile partials before it */
    int32_t token_tile;          /* rows of a tile */
    int32_t weight_tile;         /* weight rows (neurons, outputs) of a tile */
    int32_t outputs;             /* weight rows of every expert; 0: the expert's padded width */
    int32_t padding;
} TenpScheduleSpec;
TENP_SIZE(TenpScheduleSpec, 40);

/* tenp_moe_schedule: block b makes specs[b]. */
typedef struct TenpMoeScheduleParams {
    const int32_t *group_offsets;  /* [E + 1] */
    const int32_t *neuron_offsets; /* [E + 1] in padded neurons */
    TenpScheduleSpec specs[TENP_MAX_SCHEDULES];
    int32_t num_experts;
    int32_t num_specs;
} TenpMoeScheduleParams;
TENP_SIZE(TenpMoeScheduleParams, 184);

/* ---- grouped products -------------------------------------------------------------------------------------------- */

/* Per-neuron sums, in the order of their tables: what tenp_moe_gate_up_stats_* make first, then what
 * tenp_moe_contribution_* make. */
#define TENP_SUM_ACTIVATION 0     /* sum |h| */
#define TENP_SUM_GATED_ENERGY 1   /* sum (g h)^2 */
#define TENP_SUM_GATED_PEAK 2     /* max (g h)^2 */
#define TENP_SUM_MEAN 3           /* sum h */
#define TENP_SUM_SECOND_MOMENT 4  /* sum h^2 */
#define TENP_NUM_ACTIVATION_SUMS 5
#define TENP_SUM_CONTRIBUTION 0     /* sum h <w, y> / (|y| + 1e-8) */
#define TENP_SUM_CONTRIBUTION_ABS 1 /* sum of its absolute value */
#define TENP_NUM_CONTRIBUTION_SUMS 2

/* tenp_moe_gate_up_{n128,n64,n16,r2}, tenp_moe_gate_up_stats_{n128,n64}. */
typedef struct TenpMoeGateUpParams {
    const uint16_t *gate_up;       /* GU */
    const uint16_t *x;             /* [T, H], or [rows, H] without token_of_row */
    const int32_t *token_of_row;   /* nullable, [rows] */
    uint16_t *h;                   /* [rows, hidden_pitch] out */
    const int32_t *group_offsets;  /* [E + 1] */
    const int32_t *neuron_offsets; /* [E + 1] */
    const int32_t *widths;         /* [E] */
    const int32_t *order;          /* of the schedule */
    const int32_t *tile_offsets;   /* of the schedule */
    const float *row_weights;      /* [rows], statistics only */
    float *partials;               /* [TENP_NUM_ACTIVATION_SUMS, partial_stride] out, statistics only */
    const int64_t *partial_offsets; /* of the schedule, statistics only */
    int64_t partial_stride;
    int32_t num_experts;
    int32_t hidden;                /* H, a multiple of 8 */
    int32_t hidden_pitch;          /* a multiple of 16, at least the largest padded width */
    int32_t padding;
} TenpMoeGateUpParams;
TENP_SIZE(TenpMoeGateUpParams, 120);

/* tenp_moe_down_{n128,n64,n16,r2}. */
typedef struct TenpMoeDownParams {
    const uint16_t *down_t;        /* DT */
    const uint16_t *h;             /* [rows, hidden_pitch] */
    float *y_f32;                  /* nullable, [rows, H] out */
    uint16_t *y_bf16;              /* nullable, [rows, H] out */
    float *square_partials;        /* nullable, [ceil(H / weight tile), num_rows] out: squares of f32 y, by output tile */
    const int32_t *group_offsets;
    const int32_t *neuron_offsets;
    const int32_t *widths;
    const int32_t *order;
    const int32_t *tile_offsets;
    int64_t num_rows;              /* pitch of square_partials */
    int32_t num_experts;
    int32_t hidden;
    int32_t hidden_pitch;
    int32_t padding;
} TenpMoeDownParams;
TENP_SIZE(TenpMoeDownParams, 104);

/* tenp_moe_contribution_{n128,n64} with down_t and y, tenp_moe_contribution_gram_{n128,n64} with gram; the rest is null. */
typedef struct TenpMoeContributionParams {
    const uint16_t *down_t;
    const uint16_t *y;             /* [rows, H] */
    const uint16_t *gram;          /* [2 S, hidden_pitch]: tenp_gram_split */
    const uint16_t *h;             /* [rows, hidden_pitch] */
    const float *row_inverse;      /* [rows] 1 / (|y| + 1e-8); 0 where |y| is zero or not finite */
    float *partials;               /* [TENP_NUM_CONTRIBUTION_SUMS, partial_stride] out */
    const int64_t *partial_offsets;
    const int32_t *group_offsets;
    const int32_t *neuron_offsets;
    const int32_t *widths;
    const int32_t *order;
    const int32_t *tile_offsets;
    int64_t partial_stride;
    int32_t num_experts;
    int32_t hidden;
    int32_t hidden_pitch;
    int32_t num_neurons;           /* S */
} TenpMoeContributionParams;
TENP_SIZE(TenpMoeContributionParams, 120);

/* tenp_gram_split: an expert's Gram matrix in f32 into its high and low parts in bf16, rows of G. */
typedef struct TenpGramSplitParams {
    const float *in;               /* [width, width] */
    uint16_t *out;                 /* [2 S, pitch]: rows first_row.. get bf16(in), rows S + first_row.. bf16(in - that) */
    int32_t width;                 /* padded */
    int32_t pitch;
    int32_t first_row;
    int32_t num_neurons;           /* S */
} TenpGramSplitParams;
TENP_SIZE(TenpGramSplitParams, 32);

/* tenp_moe_row_norms: from the partial squares of tenp_moe_down_*. */
typedef struct TenpMoeRowNormsParams {
    const float *square_partials;  /* [num_partials, num_rows] */
    const int32_t *group_offsets;
    const int32_t *widths;
    float *row_inverse;            /* [rows] out: 1 / (|y| + 1e-8), 0 where |y| is zero or not finite */
    double *row_norms;             /* nullable, [rows] out: |y|, 0 where it is not finite */
    int32_t *non_finite;           /* [E], added to: rows whose norm is not finite */
    int64_t num_rows;
    int32_t num_partials;
    int32_t num_experts;
} TenpMoeRowNormsParams;
TENP_SIZE(TenpMoeRowNormsParams, 64);

/* tenp_accumulate_partials: adds per-tile partials in tile order to running sums. */
typedef struct TenpAccumulatePartialsParams {
    const float *partials;         /* [num_sums, partial_stride] */
    const int64_t *partial_offsets;
    const int32_t *group_offsets;
    const int32_t *neuron_offsets;
    double *sums;                  /* [num_sums, S], added to */
    int64_t partial_stride;
    int32_t num_experts;
    int32_t token_tile;            /* of the product that made the partials */
    int32_t num_sums;
    uint32_t maximum_mask;         /* bit i: table i keeps the maximum */
} TenpAccumulatePartialsParams;
TENP_SIZE(TenpAccumulatePartialsParams, 64);

/* tenp_segment_norms: squared norms and inverse norms of every neuron's three parts. */
typedef struct TenpSegmentNormsParams {
    const uint16_t *gate_up;
    const uint16_t *down_t;
    double *squares;               /* nullable, [3, S] out: gate row, up row, down column */
    float *inverse;                /* nullable, [4, S] out: 1/norm of the three and of all together; 0 if zero or not finite */
    int32_t num_neurons;           /* S */
    int32_t hidden;
} TenpSegmentNormsParams;
TENP_SIZE(TenpSegmentNormsParams, 40);

/* ---- combine and direction --------------------------------------------------------------------------------------- */

/* tenp_moe_combine: m = sum over a token's slots of g y, then out = residual + (m + gate * shared). */
typedef struct TenpMoeCombineParams {
    const float *y_f32;            /* [rows, H]; exactly one of y_f32 and y_bf16 is set */
    const uint16_t *y_bf16;
    const int32_t *row_of_slot;    /* [T, k] */
    const int32_t *expert_ids;     /* [T, k] */
    const float *slot_weights;     /* [T, k] */
    const int32_t *widths;         /* [E]; rows of an expert of width 0 are not read */
    const float *shared;           /* nullable, [T, H] */
    const float *shared_logits;    /* nullable, [T]: the shared output is multiplied by their sigmoid */
    const float *residual;         /* nullable, [T, H] */
    float *combined;               /* nullable, [T, H] out: m */
    float *out;                    /* nullable, [T, H] out; may be `residual` */
    int32_t num_tokens;
    int32_t top_k;
    int32_t hidden;
    int32_t padding;
} TenpMoeCombineParams;
TENP_SIZE(TenpMoeCombineParams, 104);

/* tenp_moe_direction: combine, and every dot product that the expert sums need, in one pass over y. */
typedef struct TenpMoeDirectionParams {
    const float *y_f32;            /* exactly one of y_f32 and y_bf16 is set */
    const uint16_t *y_bf16;
    const float *x;                /* [T, H] what the experts received */
    const float *residual;         /* [T, H] residual stream before the layer's norm */
    const int32_t *row_of_slot;
    const int32_t *expert_ids;
    const float *slot_weights;
    const int32_t *widths;
    float *combined;               /* [T, H] out: m */
    double *row_dots;              /* [rows, 2] out: x.y, y.y */
    float *row_peaks;              /* [rows] out: largest |y|, NaN if an element is NaN */
    float *row_inverse;            /* [rows] out, as in TenpMoeRowNormsParams */
    double *token_dots;            /* [T, 5] out: x.x, r.r, r.(r+m), (r+m).(r+m), sum of the token's weights */
    int32_t num_tokens;
    int32_t top_k;
    int32_t hidden;
    int32_t padding;
} TenpMoeDirectionParams;
TENP_SIZE(TenpMoeDirectionParams, 120);

/* Tables of tenp_expert_sums, [E] each. */
#define TENP_EXPERT_GATE 0
#define TENP_EXPERT_NORMALISED_GATE 1
#define TENP_EXPERT_NORM 2
#define TENP_EXPERT_NORM_SQ 3
#define TENP_EXPERT_GATED_NORM 4
#define TENP_EXPERT_DIRECTION 5
#define TENP_EXPERT_RESIDUAL_DIRECTION 6
#define TENP_EXPERT_OUTPUT_PEAK 7 /* maximum, not sum */
#define TENP_NUM_EXPERT_SUMS 8

/* tenp_expert_sums. */
typedef struct TenpExpertSumsParams {
    const int32_t *group_offsets;
    const int32_t *token_of_row;
    const float *row_weights;
    const double *row_dots;
    const float *row_peaks;
    const double *token_dots;
    double *sums;                  /* [TENP_NUM_EXPERT_SUMS, E], added to */
    int64_t *tokens;               /* [E], added to */
    int64_t *non_finite;           /* [E], added to: rows whose norm is not finite; they add to counts and gates only */
    int32_t num_experts;
    int32_t padding;
} TenpExpertSumsParams;
TENP_SIZE(TenpExpertSumsParams, 80);

/* ---- DERN -------------------------------------------------------------------------------------------------------- */

/* Rows row_ids[row_begin..row_end] against all columns col_begin..col_end; results at out_begin + (row - row_begin). */
typedef struct TenpSegmentItem {
    int64_t out_begin;
    int32_t row_begin;             /* at most TENP_SEGMENT_ROWS rows */
    int32_t row_end;
    int32_t col_begin;
    int32_t col_end;
} TenpSegmentItem;
TENP_SIZE(TenpSegmentItem, 24);

/* Rows of an item at most. */
#define TENP_SEGMENT_ROWS 64

/* tenp_segment_similarity, tenp_segment_assign: for every row its best column. */
typedef struct TenpSegmentMatchParams {
    const uint16_t *row_gate_up;   /* GU the rows come from */
    const uint16_t *row_down_t;
    const float *row_inverse;      /* [4, row_stride] of tenp_segment_norms */
    const int32_t *row_ids;        /* [.] neurons of the rows' GU */
    const float *row_signs;        /* nullable, [.] +1 or -1: a row's up and down parts are multiplied by it (assign) */
    const uint16_t *col_gate_up;   /* GU the columns come from */
    const uint16_t *col_down_t;
    const float *col_inverse;      /* [4, col_stride] */
    const TenpSegmentItem *items;  /* [num_items] */
    float *best_value;             /* out: -infinity where no column compares */
    int32_t *best_id;              /* out: column - col_begin of the largest value, ties to the lowest; -1 for none */
    int32_t *best_flip;            /* nullable out: 1 where the best match is the row with up and down negated */
    int64_t row_stride;
    int64_t col_stride;
    int32_t num_items;
    int32_t hidden;
    float lambda_gate;
    float lambda_up;
    float lambda_down;
    int32_t sign_canonical;        /* not 0: where both cosines of up and down are negative, both count positive */
} TenpSegmentMatchParams;
TENP_SIZE(TenpSegmentMatchParams, 136);

/* tenp_segment_best: over the kept experts of each row, the best of tenp_segment_similarity's results. */
typedef struct TenpSegmentBestParams {
    const float *values;           /* [num_groups, num_rows] */
    const int32_t *ids;            /* [num_groups, num_rows] */
    float *best_value;             /* [num_rows] out */
    int32_t *best_group;           /* [num_rows] out, ties to the lowest; -1 where no value compares */
    int32_t *best_id;              /* [num_rows] out */
    int32_t num_groups;
    int32_t num_rows;
} TenpSegmentBestParams;
TENP_SIZE(TenpSegmentBestParams, 48);

/* tenp_kmeans_centres: new centres from the members of each cluster, in the members' order. */
typedef struct TenpKmeansCentresParams {
    const uint16_t *gate_up;       /* GU the segments come from */
    const uint16_t *down_t;
    const float *inverse;          /* [4, stride] of tenp_segment_norms; only the last table is read */
    const int32_t *segment_ids;    /* [n] neurons of GU */
    const float *signs;            /* nullable, [n] */
    const float *weights;          /* [n], 0 or more */
    const int32_t *group_offsets;  /* [C + 1] members of each centre, in member_ids */
    const int32_t *member_ids;     /* [n] indices into segment_ids */
    float *scratch;                /* [C, 3, H] */
    uint16_t *centre_gate_up;      /* GU of C centres, C rounded up to a multiple of 16 */
    uint16_t *centre_down_t;
    int32_t *num_weighted;         /* [C] out: members of positive weight; with none the centre is left alone */
    int64_t stride;
    int32_t num_centres;
    int32_t hidden;
} TenpKmeansCentresParams;
TENP_SIZE(TenpKmeansCentresParams, 112);

/* ---- around the experts: norms, rotary positions, attention, routing, conversions ------------------------------ */

#include "params_model.h"

#endif
