//! Parameter structs of the kernels, generated from `cuda/include/params.h` by `scripts/bindings.sh`.
#![allow(
    missing_docs,
    non_snake_case,
    non_camel_case_types,
    clippy::pedantic,
    rustdoc::all
)]

pub const TENP_GROUP_CHUNK: u32 = 1024;
pub const TENP_MAX_SCHEDULES: u32 = 4;
pub const TENP_SUM_ACTIVATION: u32 = 0;
pub const TENP_SUM_GATED_ENERGY: u32 = 1;
pub const TENP_SUM_GATED_PEAK: u32 = 2;
pub const TENP_SUM_MEAN: u32 = 3;
pub const TENP_SUM_SECOND_MOMENT: u32 = 4;
pub const TENP_NUM_ACTIVATION_SUMS: u32 = 5;
pub const TENP_SUM_CONTRIBUTION: u32 = 0;
pub const TENP_SUM_CONTRIBUTION_ABS: u32 = 1;
pub const TENP_NUM_CONTRIBUTION_SUMS: u32 = 2;
pub const TENP_EXPERT_GATE: u32 = 0;
pub const TENP_EXPERT_NORMALISED_GATE: u32 = 1;
pub const TENP_EXPERT_NORM: u32 = 2;
pub const TENP_EXPERT_NORM_SQ: u32 = 3;
pub const TENP_EXPERT_GATED_NORM: u32 = 4;
pub const TENP_EXPERT_DIRECTION: u32 = 5;
pub const TENP_EXPERT_RESIDUAL_DIRECTION: u32 = 6;
pub const TENP_EXPERT_OUTPUT_PEAK: u32 = 7;
pub const TENP_NUM_EXPERT_SUMS: u32 = 8;
pub const TENP_SEGMENT_ROWS: u32 = 64;
pub const TENP_F32: u32 = 0;
pub const TENP_BF16: u32 = 1;
pub const TENP_F16: u32 = 2;
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct TenpTensorMap {
    pub words: [u64; 16usize],
}
#[repr(C)]
#[repr(align(128))]
#[derive(Debug, Copy, Clone)]
pub struct TenpTensorMaps {
    pub weights: TenpTensorMap,
    pub rows: TenpTensorMap,
    pub h: TenpTensorMap,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeGroupParams {
    pub expert_ids: *const i32,
    pub slot_weights: *const f32,
    pub chunk_counts: *mut i32,
    pub group_offsets: *mut i32,
    pub token_of_row: *mut i32,
    pub row_of_slot: *mut i32,
    pub row_weights: *mut f32,
    pub num_slots: i32,
    pub top_k: i32,
    pub num_experts: i32,
    pub num_chunks: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpGatherRowsParams {
    pub in_: *const u16,
    pub row_ids: *const i32,
    pub out: *mut u16,
    pub num_live_rows: *const i32,
    pub num_rows: i32,
    pub cols: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpScheduleSpec {
    pub order: *mut i32,
    pub tile_offsets: *mut i32,
    pub partial_offsets: *mut i64,
    pub token_tile: i32,
    pub weight_tile: i32,
    pub outputs: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeScheduleParams {
    pub group_offsets: *const i32,
    pub neuron_offsets: *const i32,
    pub specs: [TenpScheduleSpec; 4usize],
    pub num_experts: i32,
    pub num_specs: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeGateUpParams {
    pub gate_up: *const u16,
    pub x: *const u16,
    pub token_of_row: *const i32,
    pub h: *mut u16,
    pub group_offsets: *const i32,
    pub neuron_offsets: *const i32,
    pub widths: *const i32,
    pub order: *const i32,
    pub tile_offsets: *const i32,
    pub row_weights: *const f32,
    pub partials: *mut f32,
    pub partial_offsets: *const i64,
    pub partial_stride: i64,
    pub num_experts: i32,
    pub hidden: i32,
    pub hidden_pitch: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeDownParams {
    pub down_t: *const u16,
    pub h: *const u16,
    pub y_f32: *mut f32,
    pub y_bf16: *mut u16,
    pub square_partials: *mut f32,
    pub group_offsets: *const i32,
    pub neuron_offsets: *const i32,
    pub widths: *const i32,
    pub order: *const i32,
    pub tile_offsets: *const i32,
    pub num_rows: i64,
    pub num_experts: i32,
    pub hidden: i32,
    pub hidden_pitch: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeContributionParams {
    pub down_t: *const u16,
    pub y: *const u16,
    pub gram: *const u16,
    pub h: *const u16,
    pub row_inverse: *const f32,
    pub partials: *mut f32,
    pub partial_offsets: *const i64,
    pub group_offsets: *const i32,
    pub neuron_offsets: *const i32,
    pub widths: *const i32,
    pub order: *const i32,
    pub tile_offsets: *const i32,
    pub partial_stride: i64,
    pub num_experts: i32,
    pub hidden: i32,
    pub hidden_pitch: i32,
    pub num_neurons: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpGramSplitParams {
    pub in_: *const f32,
    pub out: *mut u16,
    pub width: i32,
    pub pitch: i32,
    pub first_row: i32,
    pub num_neurons: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeRowNormsParams {
    pub square_partials: *const f32,
    pub group_offsets: *const i32,
    pub widths: *const i32,
    pub row_inverse: *mut f32,
    pub row_norms: *mut f64,
    pub non_finite: *mut i32,
    pub num_rows: i64,
    pub num_partials: i32,
    pub num_experts: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpAccumulatePartialsParams {
    pub partials: *const f32,
    pub partial_offsets: *const i64,
    pub group_offsets: *const i32,
    pub neuron_offsets: *const i32,
    pub sums: *mut f64,
    pub partial_stride: i64,
    pub num_experts: i32,
    pub token_tile: i32,
    pub num_sums: i32,
    pub maximum_mask: u32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpSegmentNormsParams {
    pub gate_up: *const u16,
    pub down_t: *const u16,
    pub squares: *mut f64,
    pub inverse: *mut f32,
    pub num_neurons: i32,
    pub hidden: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeCombineParams {
    pub y_f32: *const f32,
    pub y_bf16: *const u16,
    pub row_of_slot: *const i32,
    pub expert_ids: *const i32,
    pub slot_weights: *const f32,
    pub widths: *const i32,
    pub shared: *const f32,
    pub shared_logits: *const f32,
    pub residual: *const f32,
    pub combined: *mut f32,
    pub out: *mut f32,
    pub num_tokens: i32,
    pub top_k: i32,
    pub hidden: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMoeDirectionParams {
    pub y_f32: *const f32,
    pub y_bf16: *const u16,
    pub x: *const f32,
    pub residual: *const f32,
    pub row_of_slot: *const i32,
    pub expert_ids: *const i32,
    pub slot_weights: *const f32,
    pub widths: *const i32,
    pub combined: *mut f32,
    pub row_dots: *mut f64,
    pub row_peaks: *mut f32,
    pub row_inverse: *mut f32,
    pub token_dots: *mut f64,
    pub num_tokens: i32,
    pub top_k: i32,
    pub hidden: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpExpertSumsParams {
    pub group_offsets: *const i32,
    pub token_of_row: *const i32,
    pub row_weights: *const f32,
    pub row_dots: *const f64,
    pub row_peaks: *const f32,
    pub token_dots: *const f64,
    pub sums: *mut f64,
    pub tokens: *mut i64,
    pub non_finite: *mut i64,
    pub num_experts: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpSegmentItem {
    pub out_begin: i64,
    pub row_begin: i32,
    pub row_end: i32,
    pub col_begin: i32,
    pub col_end: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpSegmentMatchParams {
    pub row_gate_up: *const u16,
    pub row_down_t: *const u16,
    pub row_inverse: *const f32,
    pub row_ids: *const i32,
    pub row_signs: *const f32,
    pub col_gate_up: *const u16,
    pub col_down_t: *const u16,
    pub col_inverse: *const f32,
    pub items: *const TenpSegmentItem,
    pub best_value: *mut f32,
    pub best_id: *mut i32,
    pub best_flip: *mut i32,
    pub row_stride: i64,
    pub col_stride: i64,
    pub num_items: i32,
    pub hidden: i32,
    pub lambda_gate: f32,
    pub lambda_up: f32,
    pub lambda_down: f32,
    pub sign_canonical: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpSegmentBestParams {
    pub values: *const f32,
    pub ids: *const i32,
    pub best_value: *mut f32,
    pub best_group: *mut i32,
    pub best_id: *mut i32,
    pub num_groups: i32,
    pub num_rows: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpKmeansCentresParams {
    pub gate_up: *const u16,
    pub down_t: *const u16,
    pub inverse: *const f32,
    pub segment_ids: *const i32,
    pub signs: *const f32,
    pub weights: *const f32,
    pub group_offsets: *const i32,
    pub member_ids: *const i32,
    pub scratch: *mut f32,
    pub centre_gate_up: *mut u16,
    pub centre_down_t: *mut u16,
    pub num_weighted: *mut i32,
    pub stride: i64,
    pub num_centres: i32,
    pub hidden: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpRmsNormParams {
    pub x: *const f32,
    pub addend: *const f32,
    pub weight: *const f32,
    pub sum_out: *mut f32,
    pub out_f32: *mut f32,
    pub out_bf16: *mut u16,
    pub eps: f64,
    pub x_pitch: i64,
    pub out_pitch: i64,
    pub num_rows: i32,
    pub width: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpRotaryParams {
    pub x: *const f32,
    pub cosines: *const f32,
    pub sines: *const f32,
    pub positions: *const i32,
    pub out_rows: *const i32,
    pub out_f32: *mut f32,
    pub out_bf16: *mut u16,
    pub x_pitch: i64,
    pub out_pitch: i64,
    pub clip: f32,
    pub num_tokens: i32,
    pub num_heads: i32,
    pub head_dim: i32,
    pub num_pairs: i32,
    pub num_positions: i32,
    pub interleaved: i32,
    pub leading: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpConvertRowsParams {
    pub in_: *const ::std::os::raw::c_void,
    pub bias: *const f32,
    pub out_rows: *const i32,
    pub out_f32: *mut f32,
    pub out_bf16: *mut u16,
    pub in_pitch: i64,
    pub out_pitch: i64,
    pub num_rows: i32,
    pub cols: i32,
    pub in_dtype: i32,
    pub clip: f32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpScaleRowsParams {
    pub in_: *const u16,
    pub row_ids: *const i32,
    pub scales: *const f32,
    pub out: *mut f32,
    pub in_pitch: i64,
    pub out_pitch: i64,
    pub num_rows: i32,
    pub cols: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpMlaKeysParams {
    pub expanded: *const f32,
    pub compressed: *const f32,
    pub out_rows: *const i32,
    pub keys: *mut u16,
    pub values: *mut u16,
    pub compressed_pitch: i64,
    pub num_tokens: i32,
    pub num_heads: i32,
    pub nope_dim: i32,
    pub rope_dim: i32,
    pub v_dim: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpAttentionParams {
    pub q: *const u16,
    pub k: *const u16,
    pub v: *const u16,
    pub out: *mut u16,
    pub query_offsets: *const i32,
    pub prefix_rows: *const i32,
    pub prefix_lens: *const i32,
    pub key_rows: *const i32,
    pub key_lens: *const i32,
    pub split_max: *mut f32,
    pub split_sum: *mut f32,
    pub split_out: *mut f32,
    pub q_pitch: i64,
    pub k_pitch: i64,
    pub v_pitch: i64,
    pub out_pitch: i64,
    pub num_sequences: i32,
    pub num_heads: i32,
    pub num_kv_heads: i32,
    pub qk_dim: i32,
    pub v_dim: i32,
    pub window: i32,
    pub num_splits: i32,
    pub split_keys: i32,
    pub scale: f32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpRouterParams {
    pub logits: *const f32,
    pub correction_bias: *const f32,
    pub expert_ids: *mut i32,
    pub weights: *mut f32,
    pub num_tokens: i32,
    pub num_experts: i32,
    pub top_k: i32,
    pub num_groups: i32,
    pub top_groups: i32,
    pub top_two_sum: i32,
    pub sigmoid: i32,
    pub normalise: i32,
    pub scaling: f32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpEmbeddingParams {
    pub table: *const u16,
    pub ids: *const i32,
    pub hidden_states: *mut f32,
    pub num_tokens: i32,
    pub vocab_size: i32,
    pub hidden: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpSiluMulParams {
    pub gate: *const f32,
    pub up: *const f32,
    pub out: *mut u16,
    pub pitch: i64,
    pub num_rows: i32,
    pub cols: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpAddParams {
    pub a: *const f32,
    pub b: *const f32,
    pub row_logits: *const f32,
    pub out: *mut f32,
    pub num_rows: i32,
    pub cols: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpCountNonFiniteParams {
    pub x: *const f32,
    pub count: *mut i32,
    pub len: i64,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpDequantiseFp8Params {
    pub in_: *const u8,
    pub scales: *const f32,
    pub out: *mut u16,
    pub num_rows: i32,
    pub cols: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpPackGateUpParams {
    pub gate: *const u16,
    pub up: *const u16,
    pub keep: *const i32,
    pub out: *mut u16,
    pub width: i32,
    pub width_padded: i32,
    pub hidden: i32,
    pub padding: i32,
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TenpPackDownParams {
    pub down: *const u16,
    pub keep: *const i32,
    pub out: *mut u16,
    pub source_width: i32,
    pub width: i32,
    pub width_padded: i32,
    pub hidden: i32,
}
const _: () = assert!(size_of::<TenpTensorMap>() == 128);
const _: () = assert!(size_of::<TenpTensorMaps>() == 384);
const _: () = assert!(size_of::<TenpMoeGroupParams>() == 72);
const _: () = assert!(size_of::<TenpGatherRowsParams>() == 40);
const _: () = assert!(size_of::<TenpScheduleSpec>() == 40);
const _: () = assert!(size_of::<TenpMoeScheduleParams>() == 184);
const _: () = assert!(size_of::<TenpMoeGateUpParams>() == 120);
const _: () = assert!(size_of::<TenpMoeDownParams>() == 104);
const _: () = assert!(size_of::<TenpMoeContributionParams>() == 120);
const _: () = assert!(size_of::<TenpGramSplitParams>() == 32);
const _: () = assert!(size_of::<TenpMoeRowNormsParams>() == 64);
const _: () = assert!(size_of::<TenpAccumulatePartialsParams>() == 64);
const _: () = assert!(size_of::<TenpSegmentNormsParams>() == 40);
const _: () = assert!(size_of::<TenpMoeCombineParams>() == 104);
const _: () = assert!(size_of::<TenpMoeDirectionParams>() == 120);
const _: () = assert!(size_of::<TenpExpertSumsParams>() == 80);
const _: () = assert!(size_of::<TenpSegmentItem>() == 24);
const _: () = assert!(size_of::<TenpSegmentMatchParams>() == 136);
const _: () = assert!(size_of::<TenpSegmentBestParams>() == 48);
const _: () = assert!(size_of::<TenpKmeansCentresParams>() == 112);
const _: () = assert!(size_of::<TenpRmsNormParams>() == 80);
const _: () = assert!(size_of::<TenpRotaryParams>() == 104);
const _: () = assert!(size_of::<TenpConvertRowsParams>() == 72);
const _: () = assert!(size_of::<TenpScaleRowsParams>() == 56);
const _: () = assert!(size_of::<TenpMlaKeysParams>() == 72);
const _: () = assert!(size_of::<TenpAttentionParams>() == 168);
const _: () = assert!(size_of::<TenpRouterParams>() == 72);
const _: () = assert!(size_of::<TenpEmbeddingParams>() == 40);
const _: () = assert!(size_of::<TenpSiluMulParams>() == 40);
const _: () = assert!(size_of::<TenpAddParams>() == 40);
const _: () = assert!(size_of::<TenpCountNonFiniteParams>() == 24);
const _: () = assert!(size_of::<TenpDequantiseFp8Params>() == 32);
const _: () = assert!(size_of::<TenpPackGateUpParams>() == 48);
const _: () = assert!(size_of::<TenpPackDownParams>() == 40);
