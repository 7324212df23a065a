// computes: the top_k experts of every token and their weights from its logits, as RouterSpec::route on the CPU: scores by
//           softmax or sigmoid, a bias and a limit to the best groups for the choice only, then normalising and scaling
// layout:   logits [T, E] f32; expert_ids, weights [T, k], best first
// requires: k <= E, with groups k <= top_groups * E / num_groups; NaN counts as the smallest, so ids are always in 0..E
// launch:   a warp per token: grid (ceil(T / warps)), block (32 warps), shared 4 warps (2 E + k + num_groups) bytes
// flops:    a few E a token. bytes: 4 E read and 8 k written a token
#include "reduce.cuh"

namespace {

constexpr unsigned TAKEN = 0;
constexpr unsigned NAN_KEY = 1;

// Keys order as the values do: NaN, then -infinity, ..., +infinity; none is TAKEN. No sum of a score and anything is -0.
__device__ __forceinline__ unsigned key_of(float value) {
    if (value != value) {
        return NAN_KEY;
    }
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
    if (key == NAN_KEY) {
        return __uint_as_float(0x7fffffffu);
    }
    return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Saturates where the CPU's does, so that the same scores tie; NaN falls through.
__device__ __forceinline__ float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    return expf(x < -87.0f ? -87.0f : x);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// The warp takes the largest of `count` keys, the first among equals. Key i is written by lane i % 32 alone.
__device__ __forceinline__ int take_largest(unsigned *keys, int count, int lane) {
    unsigned key = TAKEN;
    unsigned id = 0;
    for (int i = lane; i < count; i += 32) {
        if (keys[i] > key) {
            key = keys[i];
            id = i;
        }
    }
    // The largest complement is that of the lowest id.
    const unsigned largest = tenp::warp_max(key);
    const int best = static_cast<int>(~tenp::warp_max(key == largest ? ~id : 0u));
    if (best % 32 == lane) {
        keys[best] = TAKEN;
    }
    return best;
}

// A group's score. Lanes begin at different members, whose banks differ; the two best values do not depend on that.
__device__ __forceinline__ float group_score(const unsigned *keys, int size, bool top_two, int lane) {
    unsigned best = TAKEN;
    unsigned second = TAKEN;
    int at = lane % size;
    for (int i = 0; i < size; ++i) {
        const unsigned key = keys[at];
        if (key > best) {
            second = best;
            best = key;
        } else if (key > second) {
            second = key;
        }
        at = at + 1 < size ? at + 1 : 0;
    }
    return top_two && size > 1 ? value_of(best) + value_of(second) : value_of(best);
}

// Experts outside the best groups get -infinity.
__device__ __forceinline__ void mask_groups(const TenpRouterParams &p, unsigned *keys, unsigned *group_keys, int lane) {
    const int size = p.num_experts / p.num_groups;
    __syncwarp();
    for (int g = lane; g < p.num_groups; g += 32) {
        group_keys[g] = key_of(group_score(keys + g * size, size, p.top_two_sum != 0, lane));
    }
    for (int i = 0; i < p.top_groups; ++i) {
        take_largest(group_keys, p.num_groups, lane);
    }
    __syncwarp();
    for (int e = lane; e < p.num_experts; e += 32) {
        if (group_keys[e / size] != TAKEN) {
            keys[e] = key_of(-INFINITY);
        }
    }
}

// Scores of one token. Only lane e % 32 reads or writes element e.
__device__ __forceinline__ void make_scores(const TenpRouterParams &p, const float *logits, float *scores, int lane) {
    if (p.sigmoid != 0) {
        for (int e = lane; e < p.num_experts; e += 32) {
            scores[e] = sigmoid(logits[e]);
        }
        return;
    }
    float largest = -INFINITY;
    for (int e = lane; e < p.num_experts; e += 32) {
        const float logit = logits[e];
        scores[e] = logit;
        largest = fmaxf(largest, logit);
    }
    largest = tenp::warp_max(largest);
    float sum = 0.0f;
    for (int e = lane; e < p.num_experts; e += 32) {
        const float value = exponential(scores[e] - largest);
        scores[e] = value;
        sum += value;
    }
    const float scale = 1.0f / tenp::warp_sum(sum);
    for (int e = lane; e < p.num_experts; e += 32) {
        scores[e] *= scale;
    }
}

} // namespace

TENP_KERNEL(tenp_router, TenpRouterParams, 256, 1) {
    TENP_SHARED(float, shared);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
    if (token >= p.num_tokens) {
        return;
    }
    float *scores = shared + warp * (2 * p.num_experts + p.top_k + p.num_groups);
    unsigned *keys = reinterpret_cast<unsigned *>(scores + p.num_experts);
    int *chosen = reinterpret_cast<int *>(keys + p.num_experts);
    make_scores(p, p.logits + token * p.num_experts, scores, lane);
    for (int e = lane; e < p.num_experts; e += 32) {
        keys[e] = key_of(p.correction_bias == nullptr ? scores[e] : scores[e] + p.correction_bias[e]);
    }
    if (p.num_groups > 0) {
        mask_groups(p, keys, reinterpret_cast<unsigned *>(chosen + p.top_k), lane);
    }
    // The lanes see one another's scores from here on.
    __syncwarp();
    float sum = 0.0f;
    for (int i = 0; i < p.top_k; ++i) {
        const int id = take_largest(keys, p.num_experts, lane);
        sum += scores[id];
        if (i % 32 == lane) {
            chosen[i] = id;
        }
    }
    float divisor = 1.0f;
    if (p.normalise != 0) {
        divisor = p.sigmoid != 0 ? sum + 1e-20f : sum;
    }
    for (int i = lane; i < p.top_k; i += 32) {
        const int id = chosen[i];
        p.expert_ids[token * p.top_k + i] = id;
        p.weights[token * p.top_k + i] = scores[id] / divisor * p.scaling;
    }
}
