/* Parameter structures of what is around the experts; a part of params.h, which says what its words mean. */
#ifndef TENP_PARAMS_MODEL_H
#define TENP_PARAMS_MODEL_H

/* tenp_rms_norm (a block per row), tenp_rms_norm_heads (a warp per row).
 *
 * s = x + addend, out = s / sqrt(mean(s^2) + eps) * weight over the first `width` elements of each row. */
typedef struct TenpRmsNormParams {
    const float *x;                /* [num_rows, x_pitch] */
    const float *addend;           /* nullable, [num_rows, x_pitch] */
    const float *weight;           /* [width] */
    float *sum_out;                /* nullable, [num_rows, x_pitch] out: s; may be x */
    float *out_f32;                /* nullable, [num_rows, out_pitch] out; may be x where the pitches agree */
    uint16_t *out_bf16;            /* nullable, [num_rows, out_pitch] out */
    double eps;
    int64_t x_pitch;
    int64_t out_pitch;
    int32_t num_rows;
    int32_t width;
} TenpRmsNormParams;
TENP_SIZE(TenpRmsNormParams, 80);

/* tenp_rotary: rotates the last 2*num_pairs elements of each head, or the first, and copies the others. */
typedef struct TenpRotaryParams {
    const float *x;                /* [T, x_pitch], heads one after another */
    const float *cosines;          /* [positions, num_pairs] */
    const float *sines;
    const int32_t *positions;      /* [T] */
    const int32_t *out_rows;       /* nullable, [T]: row of each token in the outputs */
    float *out_f32;                /* nullable, [., out_pitch] out; may be x where the pitches agree and out_rows is null */
    uint16_t *out_bf16;            /* nullable, [., out_pitch] out */
    int64_t x_pitch;
    int64_t out_pitch;
    float clip;                    /* above 0: elements are clamped to [-clip, clip] first */
    int32_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t num_pairs;
    int32_t num_positions;         /* a position outside 0..num_positions gives NaN */
    int32_t interleaved;           /* not 0: pairs are neighbours, else element i and i + num_pairs */
    int32_t leading;               /* not 0: the first 2*num_pairs elements are rotated */
} TenpRotaryParams;
TENP_SIZE(TenpRotaryParams, 104);

/* Element types of tenp_convert_rows. */
#define TENP_F32 0
#define TENP_BF16 1
#define TENP_F16 2

/* tenp_convert_rows: clip, bias and rounding of [rows, cols]: out = clamp(in + bias). */
typedef struct TenpConvertRowsParams {
    const void *in;                /* [num_rows, in_pitch] */
    const float *bias;             /* nullable, [cols] */
    const int32_t *out_rows;       /* nullable, [num_rows]: row in the outputs */
    float *out_f32;                /* nullable, [., out_pitch] out */
    uint16_t *out_bf16;            /* nullable, [., out_pitch] out */
    int64_t in_pitch;              /* any */
    int64_t out_pitch;             /* any */
    int32_t num_rows;
    int32_t cols;
    int32_t in_dtype;
    float clip;                    /* above 0: clamp to [-clip, clip] */
} TenpConvertRowsParams;
TENP_SIZE(TenpConvertRowsParams, 72);

/* tenp_scale_rows: out[i] = scales[row_ids[i]] * in[row_ids[i]], as f32. */
typedef struct TenpScaleRowsParams {
    const uint16_t *in;            /* [., in_pitch] */
    const int32_t *row_ids;        /* [num_rows] */
    const float *scales;           /* nullable, by row of in */
    float *out;                    /* [num_rows, out_pitch] out */
    int64_t in_pitch;              /* a multiple of 8 */
    int64_t out_pitch;             /* a multiple of 8, at least cols rounded up to one */
    int32_t num_rows;
    int32_t cols;
} TenpScaleRowsParams;
TENP_SIZE(TenpScaleRowsParams, 56);

/* tenp_mla_keys: keys and values of multi-head latent attention from their expanded and compressed forms. */
typedef struct TenpMlaKeysParams {
    const float *expanded;         /* [T, num_heads * (nope_dim + v_dim)] */
    const float *compressed;       /* [T, compressed_pitch], the rotated shared key in the last rope_dim elements */
    const int32_t *out_rows;       /* nullable, [T] */
    uint16_t *keys;                /* [., num_heads * (nope_dim + rope_dim)] out */
    uint16_t *values;              /* [., num_heads * v_dim] out */
    int64_t compressed_pitch;
    int32_t num_tokens;
    int32_t num_heads;
    int32_t nope_dim;
    int32_t rope_dim;
    int32_t v_dim;
    int32_t padding;
} TenpMlaKeysParams;
TENP_SIZE(TenpMlaKeysParams, 72);

/* Keys and values of sequence s are rows prefix_rows[s].. (prefix_lens[s] of them), then rows key_rows[s].. of the same
 * matrices; its last query stands at its last key. */
typedef struct TenpAttentionParams {
    const uint16_t *q;             /* [T, q_pitch], heads of qk_dim one after another */
    const uint16_t *k;             /* [., k_pitch] */
    const uint16_t *v;             /* [., v_pitch], heads of v_dim */
    uint16_t *out;                 /* [T, out_pitch] out, heads of v_dim */
    const int32_t *query_offsets;  /* [num_sequences + 1] */
    const int32_t *prefix_rows;    /* nullable together with prefix_lens */
    const int32_t *prefix_lens;
    const int32_t *key_rows;       /* [num_sequences] */
    const int32_t *key_lens;       /* [num_sequences] keys behind the prefix */
    float *split_max;              /* [num_sequences, num_heads, num_splits] (decode) */
    float *split_sum;              /* [num_sequences, num_heads, num_splits] (decode) */
    float *split_out;              /* [num_sequences, num_heads, num_splits, v_dim] (decode) */
    int64_t q_pitch;
    int64_t k_pitch;
    int64_t v_pitch;
    int64_t out_pitch;
    int32_t num_sequences;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t qk_dim;                /* a multiple of 8 */
    int32_t v_dim;                 /* a multiple of 8 */
    int32_t window;                /* keys that a query sees at most, itself included; 0: all */
    int32_t num_splits;            /* decode: parts of the keys, a block each */
    int32_t split_keys;            /* decode: keys of a part, a multiple of 64 */
    float scale;
    int32_t padding;
} TenpAttentionParams;
TENP_SIZE(TenpAttentionParams, 168);

/* tenp_router. */
typedef struct TenpRouterParams {
    const float *logits;           /* [T, E] */
    const float *correction_bias;  /* nullable, [E], added for the choice only */
    int32_t *expert_ids;           /* [T, k] out, best first, ties to the lower id */
    float *weights;                /* [T, k] out */
    int32_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t num_groups;            /* 0: no groups; else a divisor of num_experts */
    int32_t top_groups;            /* groups in play */
    int32_t top_two_sum;           /* not 0: a group's score is the sum of its best two, else its best */
    int32_t sigmoid;               /* not 0: sigmoid scores, else softmax */
    int32_t normalise;             /* not 0: weights are divided by their sum */
    float scaling;                 /* multiplies the weights last */
    int32_t padding;
} TenpRouterParams;
TENP_SIZE(TenpRouterParams, 72);

/* tenp_embedding: hidden[t] = table[ids[t]]. */
typedef struct TenpEmbeddingParams {
    const uint16_t *table;         /* [vocab, H] */
    const int32_t *ids;            /* [T]; an id outside the vocabulary gives NaN */
    float *hidden_states;          /* [T, H] out */
    int32_t num_tokens;
    int32_t vocab_size;
    int32_t hidden;
    int32_t padding;
} TenpEmbeddingParams;
TENP_SIZE(TenpEmbeddingParams, 40);

/* tenp_silu_mul: out = silu(gate) * up. */
typedef struct TenpSiluMulParams {
    const float *gate;             /* [rows, pitch] */
    const float *up;               /* [rows, pitch] */
    uint16_t *out;                 /* [rows, cols] */
    int64_t pitch;
    int32_t num_rows;
    int32_t cols;
} TenpSiluMulParams;
TENP_SIZE(TenpSiluMulParams, 40);

/* tenp_add: out = a + gate * b, gate = sigmoid(row_logits) or 1. */
typedef struct TenpAddParams {
    const float *a;                /* [rows, cols] */
    const float *b;                /* [rows, cols] */
    const float *row_logits;       /* nullable, [rows] */
    float *out;                    /* [rows, cols]; may be a */
    int32_t num_rows;
    int32_t cols;
} TenpAddParams;
TENP_SIZE(TenpAddParams, 40);

/* tenp_count_non_finite: adds the number of NaN and infinite elements of x. */
typedef struct TenpCountNonFiniteParams {
    const float *x;
    int32_t *count;
    int64_t len;
} TenpCountNonFiniteParams;
TENP_SIZE(TenpCountNonFiniteParams, 24);

/* tenp_dequantise_fp8: e4m3 with one scale per 128x128 block, to bf16. */
typedef struct TenpDequantiseFp8Params {
    const uint8_t *in;             /* [rows, cols] */
    const float *scales;           /* [ceil(rows / 128), ceil(cols / 128)] */
    uint16_t *out;                 /* [rows, cols] */
    int32_t num_rows;
    int32_t cols;
} TenpDequantiseFp8Params;
TENP_SIZE(TenpDequantiseFp8Params, 32);

/* tenp_pack_gate_up: one expert's gate and up rows into its part of GU. */
typedef struct TenpPackGateUpParams {
    const uint16_t *gate;          /* [., H] */
    const uint16_t *up;            /* [., H] */
    const int32_t *keep;           /* nullable, [width]: neurons to take, in order; null takes 0..width */
    uint16_t *out;                 /* [2 * width_padded, H], the expert's part of GU */
    int32_t width;
    int32_t width_padded;
    int32_t hidden;
    int32_t padding;
} TenpPackGateUpParams;
TENP_SIZE(TenpPackGateUpParams, 48);

/* tenp_pack_down: columns of one expert's down projection into its part of DT. */
typedef struct TenpPackDownParams {
    const uint16_t *down;          /* [H, source_width], any alignment of rows */
    const int32_t *keep;           /* nullable, [width] columns to take, in order */
    uint16_t *out;                 /* [width_padded, H], the expert's part of DT */
    int32_t source_width;
    int32_t width;
    int32_t width_padded;
    int32_t hidden;
} TenpPackDownParams;
TENP_SIZE(TenpPackDownParams, 40);

#endif
