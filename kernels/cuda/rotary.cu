// computes: rotary position embedding of the last 2 num_pairs elements of each head, or of the first (leading), as
//           RotaryTable::rotate on the CPU; the other elements are copied, all are clamped first if asked for; f32 and bf16
//           results, in place too
// layout:   x [T, x_pitch] f32, heads one after another; cosines, sines [positions, num_pairs]; outputs [., out_pitch]
// requires: nothing beyond the elements' alignment; four pairs at a time where sizes, pitches and bases allow vectors.
//           A position outside the tables makes the rotated elements NaN
// launch:   a block per token: grid (T), block (any multiple of 32 up to 256), no shared memory
// flops:    6 a pair. bytes: 4 read and 4 (out_f32) and 2 (out_bf16) written an element
#include "kernel.cuh"

namespace {

__device__ __forceinline__ void load(const float *from, float (&v)[1]) { v[0] = *from; }

__device__ __forceinline__ void load(const float *from, float (&v)[4]) {
    const float4 quad = *reinterpret_cast<const float4 *>(from);
    v[0] = quad.x;
    v[1] = quad.y;
    v[2] = quad.z;
    v[3] = quad.w;
}

__device__ __forceinline__ void store_f32(float *to, const float (&v)[1]) { *to = v[0]; }

__device__ __forceinline__ void store_f32(float *to, const float (&v)[4]) {
    *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void store_bf16(uint16_t *to, const float (&v)[1]) { *to = tenp::float_to_bf16(v[0]); }

__device__ __forceinline__ void store_bf16(uint16_t *to, const float (&v)[4]) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(tenp::pack_bf16(v[0], v[1]), tenp::pack_bf16(v[2], v[3]));
}

__device__ __forceinline__ bool aligned(const void *pointer, unsigned bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// One token. Each thread reads all it writes before it writes it, and no thread reads another's: x may be the output.
template <int STEP> struct Token {
    const TenpRotaryParams &p;
    const float *x;
    int64_t out;

    __device__ __forceinline__ explicit Token(const TenpRotaryParams &params) : p(params) {
        const int64_t token = blockIdx.x;
        x = p.x + token * p.x_pitch;
        out = (p.out_rows == nullptr ? token : p.out_rows[token]) * p.out_pitch;
    }

    __device__ __forceinline__ void read(int at, float (&v)[STEP]) const {
        load(x + at, v);
        if (p.clip > 0.0f) {
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                // Comparisons, so that NaN falls through.
                v[i] = v[i] > p.clip ? p.clip : v[i];
                v[i] = v[i] < -p.clip ? -p.clip : v[i];
            }
        }
    }

    __device__ __forceinline__ void write(int at, const float (&v)[STEP]) const {
        if (p.out_f32 != nullptr) {
            store_f32(p.out_f32 + out + at, v);
        }
        if (p.out_bf16 != nullptr) {
            store_bf16(p.out_bf16 + out + at, v);
        }
    }

    // Pairs first..first + STEP of the head part that begins at `at`, by their angles.
    __device__ __forceinline__ void rotate(int at, int first, const float (&c)[STEP], const float (&s)[STEP]) const {
        float u[STEP];
        float v[STEP];
        if (p.interleaved != 0) {
            const int low = at + 2 * first;
            read(low, u);
            read(low + STEP, v);
            float both[2 * STEP];
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                both[i] = u[i];
                both[STEP + i] = v[i];
            }
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                const float a = both[2 * i];
                const float b = both[2 * i + 1];
                both[2 * i] = a * c[i] - b * s[i];
                both[2 * i + 1] = a * s[i] + b * c[i];
            }
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                u[i] = both[i];
                v[i] = both[STEP + i];
            }
            write(low, u);
            write(low + STEP, v);
        } else {
            const int low = at + first;
            const int high = low + p.num_pairs;
            read(low, u);
            read(high, v);
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                const float a = u[i];
                const float b = v[i];
                u[i] = a * c[i] - b * s[i];
                v[i] = b * c[i] + a * s[i];
            }
            write(low, u);
            write(high, v);
        }
    }
};

template <int STEP> __device__ __forceinline__ void rotate_token(const TenpRotaryParams &p) {
    const Token<STEP> token(p);
    const int position = p.positions[blockIdx.x];
    const bool known = position >= 0 && position < p.num_positions;
    const int64_t angles = static_cast<int64_t>(known ? position : 0) * p.num_pairs;
    const int copied = p.head_dim - 2 * p.num_pairs;
    const int rotated_at = p.leading != 0 ? 0 : copied;
    const int copied_at = p.leading != 0 ? 2 * p.num_pairs : 0;
    // What stays as it is where it is need not be touched.
    const bool in_place = p.out_f32 == p.x && p.out_bf16 == nullptr && !(p.clip > 0.0f);
    const int copies = in_place ? 0 : copied / STEP;
    const int items = copies + p.num_pairs / STEP;
    for (int i = threadIdx.x; i < p.num_heads * items; i += blockDim.x) {
        const int at = i / items * p.head_dim;
        const int item = i % items;
        if (item < copies) {
            float v[STEP];
            token.read(at + copied_at + item * STEP, v);
            token.write(at + copied_at + item * STEP, v);
            continue;
        }
        const int first = (item - copies) * STEP;
        float c[STEP];
        float s[STEP];
        if (known) {
            load(p.cosines + angles + first, c);
            load(p.sines + angles + first, s);
        } else {
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                c[j] = s[j] = __uint_as_float(0x7fffffffu);
            }
        }
        token.rotate(at + rotated_at, first, c, s);
    }
}

} // namespace

TENP_KERNEL(tenp_rotary, TenpRotaryParams, 256, 1) {
    const bool whole = p.num_pairs % 4 == 0 && p.head_dim % 4 == 0 && p.x_pitch % 4 == 0 && p.out_pitch % 4 == 0 &&
                       aligned(p.x, 16) && aligned(p.cosines, 16) && aligned(p.sines, 16) && aligned(p.out_f32, 16) &&
                       aligned(p.out_bf16, 8);
    if (whole) {
        rotate_token<4>(p);
    } else {
        rotate_token<1>(p);
    }
}
