// computes: new centres of weighted spherical k-means on v = [gate; up; w], up and w times the segment's sign. With
//           s = sum of weight v / |v| and n = sum of weight |v| / sum of weight, a centre becomes n s / |s|: the mean of the
//           members scaled to the norm n, scaled back to it. One counting member: a copy of its bits
// layout:   GU [2S, H], DT [S, H] of the segments and of the centres; scratch [C, 3, H] f32
// requires: H a multiple of 8. A member of weight 0 or without a finite norm above 0 counts nowhere; with no counting
//           member, or members that cancel out, the centre is left alone
// launch:   grid (C), block (256), shared 128 bytes; members are added in their order
// flops:    6 H a member. bytes: 6 H a member, 24 H a centre
#include "reduce.cuh"
#include "vector.cuh"

namespace {

constexpr int PARTS = 3, THREADS = 256;

struct Chunk {
    int part;
    int column;
};

// The i-th of the chunks of eight elements that v has.
__device__ __forceinline__ Chunk chunk_of(int i, int chunks_of_part) {
    return {i / chunks_of_part, i % chunks_of_part * 8};
}

__device__ __forceinline__ int64_t offset_of(int64_t neuron, Chunk chunk, int hidden) {
    const int64_t row = chunk.part == 2 ? neuron : neuron / 8 * 16 + neuron % 8 + 8 * chunk.part;
    return row * hidden + chunk.column;
}

struct Member {
    int64_t neuron;
    float weight; // 0: counts nowhere
    float inverse;
    bool flipped;

    __device__ __forceinline__ Member(const TenpKmeansCentresParams &p, int i) {
        const int member = p.member_ids[i];
        neuron = p.segment_ids[member];
        inverse = p.inverse[3 * p.stride + neuron];
        weight = inverse > 0.0f ? p.weights[member] : 0.0f;
        flipped = p.signs != nullptr && p.signs[member] < 0.0f;
    }

    __device__ __forceinline__ uint4 bits(const TenpKmeansCentresParams &p, Chunk chunk) const {
        const uint16_t *from = chunk.part == 2 ? p.down_t : p.gate_up;
        uint4 v = *reinterpret_cast<const uint4 *>(from + offset_of(neuron, chunk, p.hidden));
        if (flipped && chunk.part > 0) {
            v.x ^= 0x80008000u, v.y ^= 0x80008000u, v.z ^= 0x80008000u, v.w ^= 0x80008000u;
        }
        return v;
    }
};

__device__ __forceinline__ void store_bits(const TenpKmeansCentresParams &p, Chunk chunk, uint4 bits) {
    uint16_t *to = chunk.part == 2 ? p.centre_down_t : p.centre_gate_up;
    *reinterpret_cast<uint4 *>(to + offset_of(blockIdx.x, chunk, p.hidden)) = bits;
}

// Sums of weights and of weighted norms; every thread gets them.
struct Weights {
    double weight = 0.0;
    double norm = 0.0;
    int counting = 0;
    int last = 0;

    __device__ __forceinline__ Weights(const TenpKmeansCentresParams &p, int begin, int end, double *partial) {
        for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
            const Member member(p, i);
            if (member.weight > 0.0f) {
                weight += static_cast<double>(member.weight);
                norm += static_cast<double>(member.weight) / static_cast<double>(member.inverse);
                ++counting;
                last = i;
            }
        }
        weight = tenp::block_sum(weight, partial);
        __syncthreads();
        norm = tenp::block_sum(norm, partial);
        __syncthreads();
        counting = tenp::block_sum(counting, reinterpret_cast<int *>(partial));
        __syncthreads();
        // Of a single counting member the sum of all threads' is its own.
        last = tenp::block_sum(last, reinterpret_cast<int *>(partial));
        __syncthreads();
    }
};

// s to scratch; every thread gets |s|^2.
__device__ __forceinline__ double sum_members(const TenpKmeansCentresParams &p, int begin, int end, float *sums,
                                              double *partial) {
    const int chunks_of_part = p.hidden / 8;
    double square = 0.0;
    for (int c = threadIdx.x; c < PARTS * chunks_of_part; c += THREADS) {
        const Chunk chunk = chunk_of(c, chunks_of_part);
        float s[8] = {};
        for (int i = begin; i < end; ++i) {
            const Member member(p, i);
            if (member.weight > 0.0f) {
                float v[8];
                tenp::widen(member.bits(p, chunk), v);
                const float scale = member.weight * member.inverse;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    s[j] = fmaf(scale, v[j], s[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[8 * c + j] = s[j];
            square = fma(static_cast<double>(s[j]), static_cast<double>(s[j]), square);
        }
    }
    return tenp::block_sum(square, partial);
}

} // namespace

TENP_KERNEL(tenp_kmeans_centres, TenpKmeansCentresParams, 256, 1) {
    TENP_SHARED(double, partial);
    const int begin = p.group_offsets[blockIdx.x];
    const int end = p.group_offsets[blockIdx.x + 1];
    const int chunks_of_part = p.hidden / 8;
    const int chunks = PARTS * chunks_of_part;
    const Weights weights(p, begin, end, partial);
    if (threadIdx.x == 0) {
        p.num_weighted[blockIdx.x] = weights.counting;
    }
    if (weights.counting == 0) {
        return;
    }
    if (weights.counting == 1) {
        const Member member(p, weights.last);
        for (int c = threadIdx.x; c < chunks; c += THREADS) {
            const Chunk chunk = chunk_of(c, chunks_of_part);
            store_bits(p, chunk, member.bits(p, chunk));
        }
        return;
    }
    float *sums = p.scratch + static_cast<int64_t>(blockIdx.x) * PARTS * p.hidden;
    const double length = sqrt(sum_members(p, begin, end, sums, partial));
    // Rounding leaves about 1e-7 of what cancels; false for NaN.
    if (!(length > 1e-6 * weights.weight)) {
        return;
    }
    const float scale = static_cast<float>(weights.norm / weights.weight / length);
    for (int c = threadIdx.x; c < chunks; c += THREADS) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = scale * sums[8 * c + j];
        }
        store_bits(p, chunk_of(c, chunks_of_part), tenp::narrow(v));
    }
}
