/*
 * tenp: Mixture-of-Experts layers whose experts differ in width, on the CPU and on NVIDIA GPUs.
 *
 *     tenp_moe *moe;
 *     tenp_moe_create(widths, num_experts, hidden, &moe);
 *     tenp_moe_forward_cpu(moe, TENP_COMPUTE_BF16, experts, num_experts, &batch, out, out_len);
 *     tenp_moe_destroy(moe);
 *
 * A layer computes, for every token, the sum over its chosen experts of
 *     weight * down * (silu(gate * x) * (up * x))        (* between vectors: element by element)
 *
 * Status: every function returns one, but for the two that return text. After a failure nothing has been computed, and
 * tenp_last_error() has what was wrong, what was expected and what was given. No function ends the process or throws.
 *
 * Ownership: whoever makes a thing gives it back: tenp_moe_create and tenp_moe_destroy, tenp_gpu_open and
 * tenp_gpu_close. All other memory is the caller's: nothing is kept after a call, except that GPU work still reads and
 * writes the memory it was given until its stream has come to it. Memory that is written must not overlap memory that
 * is read in the same call. Pointers to zero elements may be null.
 *
 * Threads: one layer or GPU may be used by many threads at once; it must not be destroyed while it is in use. The CPU
 * functions run on a pool of as many threads as there are cores (environment variable RAYON_NUM_THREADS); results do
 * not depend on their number.
 */
#ifndef TENP_H
#define TENP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a function says of how it went. */
typedef int32_t tenp_status;
enum {
  TENP_OK = 0,
  TENP_ERROR_NULL = 1,            /* a pointer that is needed is null */
  TENP_ERROR_SIZE = 2,            /* sizes or shapes do not fit together */
  TENP_ERROR_RANGE = 3,           /* an index past what it indexes */
  TENP_ERROR_INVALID = 4,         /* a value that is not allowed */
  TENP_ERROR_MISALIGNED = 5,      /* an address that is not aligned as it must be */
  TENP_ERROR_NOT_BUILT = 6,       /* this library was built without the feature cuda */
  TENP_ERROR_NO_GPU = 7,          /* no NVIDIA driver, no GPU, or not that one */
  TENP_ERROR_UNSUPPORTED_GPU = 8, /* a GPU or a driver that cannot run the kernels */
  TENP_ERROR_OUT_OF_MEMORY = 9,   /* not enough GPU memory */
  TENP_ERROR_CUDA = 10,           /* a call of the CUDA driver failed */
  TENP_ERROR_INTERNAL = 11        /* a bug in this library */
};

/* Element types. */
typedef int32_t tenp_dtype;
enum {
  TENP_DTYPE_F32 = 0,
  TENP_DTYPE_F16 = 1,
  TENP_DTYPE_BF16 = 2,
  TENP_DTYPE_F8_E4M3 = 3 /* with an f32 scale for each block of 128 x 128 */
};

/* Precision of the products on the CPU; sums are f32. */
typedef int32_t tenp_compute;
enum {
  TENP_COMPUTE_F32 = 0, /* weights widened to f32 */
  TENP_COMPUTE_BF16 = 1 /* both factors rounded to bf16 */
};

/* The shape of a layer. */
typedef struct tenp_moe tenp_moe;

/* An open GPU. */
typedef struct tenp_gpu tenp_gpu;

/* A CUDA stream: CUstream of the driver, cudaStream_t of the runtime; null is the default stream. */
typedef struct CUstream_st *tenp_stream;

/* A row-major matrix as it lies in a checkpoint: little-endian, of any alignment. */
typedef struct tenp_matrix {
  const void *data;
  size_t bytes;
  const void *scales; /* f32 [ceil(rows / 128), ceil(columns / 128)] for TENP_DTYPE_F8_E4M3, otherwise null */
  size_t scale_bytes;
  tenp_dtype dtype;
} tenp_matrix;

/* Weights of one expert. */
typedef struct tenp_expert {
  tenp_matrix gate; /* [width, hidden] */
  tenp_matrix up;   /* [width, hidden], of the same type as gate */
  tenp_matrix down; /* [hidden, width] */
} tenp_expert;

/* Routed tokens in the CPU's memory. Lengths are in elements. */
typedef struct tenp_batch {
  const float *x; /* [num_tokens, hidden] */
  size_t x_len;
  const int32_t *expert_ids; /* [num_tokens, top_k]; a negative one is no expert and adds nothing */
  size_t expert_ids_len;
  const float *weights; /* [num_tokens, top_k] */
  size_t weights_len;
  size_t num_tokens;
  size_t top_k;
} tenp_batch;

/* A layer's weights in GPU memory: copies of what tenp_moe_pack wrote. */
typedef struct tenp_weights_cuda {
  const void *gate_up;
  size_t gate_up_bytes;
  const void *down;
  size_t down_bytes;
  const void *tables;
  size_t tables_bytes;
} tenp_weights_cuda;

/* Routed tokens in GPU memory. */
typedef struct tenp_batch_cuda {
  const void *x; /* bf16 [num_tokens, hidden], at a multiple of 16 */
  size_t x_bytes;
  const int32_t *expert_ids; /* [num_tokens, top_k]; one that is no expert's adds nothing */
  size_t expert_ids_len;
  const float *weights; /* [num_tokens, top_k] */
  size_t weights_len;
  size_t num_tokens;
  size_t top_k;
} tenp_batch_cuda;

/* Version of the library. */
tenp_status tenp_version(uint32_t *major, uint32_t *minor, uint32_t *patch);

/* What a status means in general. Never null; lives as long as the library. */
const char *tenp_status_string(tenp_status status);

/* What went wrong at this thread's last failure; empty before the first. Lives until the thread's next failure. */
const char *tenp_last_error(void);

/* A layer of experts with widths[i] neurons each (zero is allowed) over hidden features. */
tenp_status tenp_moe_create(const size_t *widths, size_t num_experts, size_t hidden, tenp_moe **moe);

/* Gives a layer back; null is nothing. */
tenp_status tenp_moe_destroy(tenp_moe *moe);

/*
 * out[num_tokens, hidden] = the layer's output, on the CPU. The experts' weights are read as they lie in memory; no
 * copy of them is made.
 */
tenp_status tenp_moe_forward_cpu(const tenp_moe *moe, tenp_compute compute, const tenp_expert *experts,
                                 size_t num_experts, const tenp_batch *batch, float *out, size_t out_len);

/*
 * Adds a batch to the sums that pruning goes by (arXiv 2606.09885), on the CPU:
 *   contribution[sum of widths]  of each neuron j, experts one after another: sum of h_j <w_j, y> / (|y| + 1e-8)
 *   direction[num_experts]       of each expert: sum of weight |y| (1 - cos(x, y))
 *   tokens[num_experts]          tokens that chose each expert
 * h: the neurons' activations, w_j: column j of down, y: the expert's output before its weight.
 */
tenp_status tenp_moe_score_cpu(const tenp_moe *moe, tenp_compute compute, const tenp_expert *experts,
                               size_t num_experts, const tenp_batch *batch, double *contribution,
                               size_t contribution_len, double *direction, size_t direction_len, int64_t *tokens,
                               size_t tokens_len);

/* Bytes of the three arrays that a GPU needs of a layer. The GPU's kernels take hidden sizes that 8 divides. */
tenp_status tenp_moe_packed_bytes(const tenp_moe *moe, size_t *gate_up_bytes, size_t *down_bytes,
                                  size_t *tables_bytes);

/*
 * Packs the experts' weights for a GPU, in the CPU's memory: bf16, rounded where they are not. The caller copies the
 * three arrays to the GPU, to addresses that are multiples of 16 (gate_up and down: of 128 is best).
 */
tenp_status tenp_moe_pack(const tenp_moe *moe, const tenp_expert *experts, size_t num_experts, void *gate_up,
                          size_t gate_up_bytes, void *down, size_t down_bytes, void *tables, size_t tables_bytes);

/* Bytes of GPU memory that tenp_moe_forward_cuda needs for itself, for up to so many tokens. */
tenp_status tenp_moe_workspace_bytes(const tenp_moe *moe, size_t num_tokens, size_t top_k, size_t *bytes);

/* Number of GPUs this process may use. */
tenp_status tenp_gpu_count(size_t *count);

/*
 * Opens GPU number ordinal, from 0, and loads the kernels there, all that tenp_moe_forward_cuda may ask for: nothing is
 * left for its first call to load. It uses the GPU's primary context. Not while a stream of this thread is captured.
 */
tenp_status tenp_gpu_open(size_t ordinal, tenp_gpu **gpu);

/* Gives a GPU back; null is nothing. All streams that work was given to must have been waited for. */
tenp_status tenp_gpu_close(tenp_gpu *gpu);

/*
 * out[num_tokens, hidden] = the layer's output, on a GPU. Asks for the kernels on the stream and does not wait;
 * allocates and loads nothing, and no size depends on the routing, so a CUDA graph can capture it, the first call too.
 * All pointers but those to structures are to memory of this GPU, and the stream is of its primary context. The
 * workspace begins at a multiple of 256 and belongs to this call until the stream has come past it: streams that run at
 * the same time need one each.
 */
tenp_status tenp_moe_forward_cuda(const tenp_moe *moe, const tenp_gpu *gpu, const tenp_weights_cuda *weights,
                                  const tenp_batch_cuda *batch, float *out, size_t out_len, void *workspace,
                                  size_t workspace_bytes, tenp_stream stream);

#ifdef __cplusplus
}
#endif

#endif
