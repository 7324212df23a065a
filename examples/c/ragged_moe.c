/*
 * A MoE layer whose experts differ in width, from C: on the CPU, and on a GPU where there is one, both compared with
 * plain loops. Exits with 1 if they differ or a call fails.
 *
 * To build and run: make run (Makefile).
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_memory.h"
#include "tenp.h"

#define HIDDEN 64
#define EXPERTS 5
#define TOKENS 37
#define TOP_K 2

/* As pruning leaves them: no two alike, one gone. */
static const size_t WIDTHS[EXPERTS] = {96, 33, 1, 0, 64};
#define NEURONS (96 + 33 + 1 + 0 + 64)

/* Weights in bf16, one expert behind the other, and the batch. */
static uint16_t gate[NEURONS * HIDDEN], up[NEURONS * HIDDEN], down[NEURONS * HIDDEN];
static tenp_expert experts[EXPERTS];
static float x[TOKENS * HIDDEN];
static int32_t expert_ids[TOKENS * TOP_K];
static float weights[TOKENS * TOP_K];
static float want[TOKENS * HIDDEN], out[TOKENS * HIDDEN];
/* Sum of |y| over the experts' outputs y: what all contributions add up to. */
static double norm_sum;

static void require(tenp_status status, const char *what) {
  if (status == TENP_OK) return;
  fprintf(stderr, "%s: %s (%s)\n", what, tenp_last_error(), tenp_status_string(status));
  exit(1);
}

/* The upper half of an f32, rounded to the nearest. */
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static float from_bf16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

static float number(void) {
  static uint32_t state = 2463534242u;
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static tenp_matrix matrix(const uint16_t *values, size_t len) {
  tenp_matrix matrix = {values, len * sizeof *values, NULL, 0, TENP_DTYPE_BF16};
  return matrix;
}

static void make_data(void) {
  for (size_t i = 0; i < NEURONS * HIDDEN; i++) {
    gate[i] = to_bf16(0.2f * number());
    up[i] = to_bf16(0.2f * number());
    down[i] = to_bf16(0.2f * number());
  }
  /* x in bf16 too, so that the GPU is given the same numbers. */
  for (size_t i = 0; i < TOKENS * HIDDEN; i++) x[i] = from_bf16(to_bf16(number()));
  for (size_t t = 0; t < TOKENS; t++) {
    for (size_t k = 0; k < TOP_K; k++) {
      expert_ids[t * TOP_K + k] = (int32_t)((t * 3 + k) % EXPERTS);
      weights[t * TOP_K + k] = 0.5f + 0.5f * number();
    }
  }
  /* A slot that no expert was chosen for. */
  expert_ids[5] = -1;
  size_t first = 0;
  for (size_t e = 0; e < EXPERTS; e++) {
    size_t len = WIDTHS[e] * HIDDEN;
    experts[e].gate = matrix(gate + first, len);
    experts[e].up = matrix(up + first, len);
    experts[e].down = matrix(down + first, len);
    first += len;
  }
}

/* to += weight * y, y = down (silu(gate x) * (up x)), one number after the other. */
static void plain_expert(size_t expert, const float *token, float weight, float *to) {
  double y[HIDDEN] = {0}, square = 0;
  size_t first = 0, width = WIDTHS[expert];
  for (size_t e = 0; e < expert; e++) first += WIDTHS[e] * HIDDEN;
  for (size_t j = 0; j < width; j++) {
    double g = 0, u = 0;
    for (size_t i = 0; i < HIDDEN; i++) {
      g += (double)from_bf16(gate[first + j * HIDDEN + i]) * token[i];
      u += (double)from_bf16(up[first + j * HIDDEN + i]) * token[i];
    }
    double h = g / (1 + exp(-g)) * u;
    for (size_t o = 0; o < HIDDEN; o++) y[o] += h * from_bf16(down[first + o * width + j]);
  }
  for (size_t o = 0; o < HIDDEN; o++) {
    to[o] += (float)(weight * y[o]);
    square += y[o] * y[o];
  }
  norm_sum += sqrt(square);
}

static void plain_layer(void) {
  for (size_t t = 0; t < TOKENS; t++) {
    for (size_t k = 0; k < TOP_K; k++) {
      int32_t e = expert_ids[t * TOP_K + k];
      if (e >= 0) plain_expert((size_t)e, x + t * HIDDEN, weights[t * TOP_K + k], want + t * HIDDEN);
    }
  }
}

/* Whether the largest difference is at most the tolerance, relative to the largest output; says so. */
static int same(const char *what, double tolerance) {
  double difference = 0, largest = 0;
  for (size_t i = 0; i < TOKENS * HIDDEN; i++) {
    /* Written so that NaN is a difference. */
    if (!(fabs((double)out[i] - want[i]) <= difference)) difference = fabs((double)out[i] - want[i]);
    if (fabs(want[i]) > largest) largest = fabs(want[i]);
  }
  int is_same = largest > 0 && difference <= tolerance * largest;
  printf("%s: %s, largest difference %.1e of %.2f (allowed %.0e of it)\n", what, is_same ? "same" : "DIFFERENT",
         difference, largest, tolerance);
  return is_same;
}

static int on_cpu(const tenp_moe *moe) {
  static double contribution[NEURONS], direction[EXPERTS];
  static int64_t tokens[EXPERTS];
  tenp_batch batch = {x,       TOKENS * HIDDEN, expert_ids, TOKENS * TOP_K,
                      weights, TOKENS * TOP_K,  TOKENS,     TOP_K};
  require(tenp_moe_forward_cpu(moe, TENP_COMPUTE_F32, experts, EXPERTS, &batch, out, TOKENS * HIDDEN), "cpu f32");
  int all = same("cpu f32", 1e-5);
  require(tenp_moe_forward_cpu(moe, TENP_COMPUTE_BF16, experts, EXPERTS, &batch, out, TOKENS * HIDDEN), "cpu bf16");
  all &= same("cpu bf16", 2e-2);
  require(tenp_moe_score_cpu(moe, TENP_COMPUTE_F32, experts, EXPERTS, &batch, contribution, NEURONS, direction, EXPERTS,
                             tokens, EXPERTS),
          "scores");
  int64_t chosen = 0;
  double sum = 0;
  for (size_t e = 0; e < EXPERTS; e++) chosen += tokens[e];
  for (size_t j = 0; j < NEURONS; j++) sum += contribution[j];
  int are_right = chosen == TOKENS * TOP_K - 1 && fabs(sum - norm_sum) <= 1e-5 * norm_sum;
  printf("cpu scores: %s, %d of %d slots, contributions add up to %.3f of %.3f\n", are_right ? "same" : "DIFFERENT",
         (int)chosen, TOKENS * TOP_K, sum, norm_sum);
  return all && are_right;
}

/* Copies of host memory on the GPU. */
static void *there(const cuda_memory *cuda, const void *from, size_t bytes) {
  void *to = cuda_allocate(cuda, bytes);
  if (!to || !cuda_upload(cuda, to, from, bytes)) {
    fprintf(stderr, "cuda: %zu bytes could not be copied to the GPU\n", bytes);
    exit(1);
  }
  return to;
}

static int on_gpu(const tenp_moe *moe, const tenp_gpu *gpu, const cuda_memory *cuda) {
  size_t gate_up_bytes, down_bytes, tables_bytes, workspace_bytes;
  require(tenp_moe_packed_bytes(moe, &gate_up_bytes, &down_bytes, &tables_bytes), "packed bytes");
  require(tenp_moe_workspace_bytes(moe, TOKENS, TOP_K, &workspace_bytes), "workspace bytes");
  void *packed[3] = {malloc(gate_up_bytes), malloc(down_bytes), malloc(tables_bytes)};
  require(tenp_moe_pack(moe, experts, EXPERTS, packed[0], gate_up_bytes, packed[1], down_bytes, packed[2], tables_bytes),
          "packing");
  static uint16_t x_bf16[TOKENS * HIDDEN];
  for (size_t i = 0; i < TOKENS * HIDDEN; i++) x_bf16[i] = to_bf16(x[i]);
  tenp_weights_cuda layer = {there(cuda, packed[0], gate_up_bytes), gate_up_bytes,
                             there(cuda, packed[1], down_bytes),    down_bytes,
                             there(cuda, packed[2], tables_bytes),  tables_bytes};
  tenp_batch_cuda batch = {there(cuda, x_bf16, sizeof x_bf16),
                           sizeof x_bf16,
                           there(cuda, expert_ids, sizeof expert_ids),
                           TOKENS * TOP_K,
                           there(cuda, weights, sizeof weights),
                           TOKENS * TOP_K,
                           TOKENS,
                           TOP_K};
  memset(out, 0xff, sizeof out);
  float *out_there = there(cuda, out, sizeof out);
  void *workspace = cuda_allocate(cuda, workspace_bytes);
  tenp_stream stream = cuda_new_stream(cuda);
  require(tenp_moe_forward_cuda(moe, gpu, &layer, &batch, out_there, TOKENS * HIDDEN, workspace, workspace_bytes, stream),
          "cuda");
  if (!cuda_wait(cuda, stream) || !cuda_download(cuda, out, out_there, sizeof out)) {
    fprintf(stderr, "cuda: the kernels failed\n");
    return 0;
  }
  /* The process ends here: its GPU memory goes with it. */
  for (int i = 0; i < 3; i++) free(packed[i]);
  return same("cuda bf16", 2e-2);
}

int main(void) {
  uint32_t major, minor, patch;
  require(tenp_version(&major, &minor, &patch), "version");
  printf("tenp %u.%u.%u\n", major, minor, patch);
  make_data();
  plain_layer();
  tenp_moe *moe;
  require(tenp_moe_create(WIDTHS, EXPERTS, HIDDEN, &moe), "layer");
  int all = on_cpu(moe);

  /* What is wrong is said, not done. */
  size_t bytes;
  if (tenp_moe_workspace_bytes(NULL, TOKENS, TOP_K, &bytes) != TENP_ERROR_NULL) {
    printf("a null layer was taken\n");
    all = 0;
  }

  tenp_gpu *gpu;
  cuda_memory cuda;
  tenp_status status = tenp_gpu_open(0, &gpu);
  if (status == TENP_ERROR_NOT_BUILT || status == TENP_ERROR_NO_GPU || status == TENP_ERROR_UNSUPPORTED_GPU) {
    printf("skipped: cuda: %s\n", tenp_last_error());
  } else {
    require(status, "GPU");
    if (!cuda_open(&cuda)) {
      fprintf(stderr, "cuda: the driver's memory functions are missing\n");
      return 1;
    }
    all &= on_gpu(moe, gpu, &cuda);
    require(tenp_gpu_close(gpu), "GPU");
  }
  require(tenp_moe_destroy(moe), "layer");
  return all ? 0 : 1;
}
