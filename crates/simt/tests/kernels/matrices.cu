// ldmatrix and mma, by themselves and together, right and with each mistake. grid (1), block (32).
#include "kernel.cuh"

struct FragmentParams {
    const uint16_t *a;  // [16, 16], or as each kernel says
    const uint16_t *b;  // [8, 16] (columns of B one after another), or as each kernel says
    const float *c;     // [16, 8]
    float *d;           // [16, 8]
    uint32_t *registers; // [32, 4]
};

namespace {

constexpr int ROWS = 16, COLUMNS = 16;

__device__ __forceinline__ void to_shared(uint16_t *to, const uint16_t *from, int count) {
    for (int i = threadIdx.x; i < count; i += 32) {
        to[i] = from[i];
    }
}

__device__ __forceinline__ void multiply(const FragmentParams &p, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int row = threadIdx.x / 4;
    const int column = threadIdx.x % 4 * 2;
    float d[4];
    for (int i = 0; i < 4; ++i) {
        d[i] = p.c[(row + i / 2 * 8) * 8 + column + i % 2];
    }
    tenp::mma_bf16(d, a, b);
    for (int i = 0; i < 4; ++i) {
        p.d[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
    }
}

} // namespace

// a [32, 4, 2], b [32, 2, 2], c and d [32, 4]: fragments as they are.
TENP_KERNEL(test_mma_fragments, FragmentParams, 32, 1) {
    const uint32_t *a_words = reinterpret_cast<const uint32_t *>(p.a);
    const uint32_t *b_words = reinterpret_cast<const uint32_t *>(p.b);
    const int lane = threadIdx.x;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) {
        a[i] = a_words[lane * 4 + i];
        d[i] = p.c[lane * 4 + i];
    }
    for (int i = 0; i < 2; ++i) {
        b[i] = b_words[lane * 2 + i];
    }
    tenp::mma_bf16(d, a, b);
    for (int i = 0; i < 4; ++i) {
        p.d[lane * 4 + i] = d[i];
    }
}

// a [32, 8]: row i is what lane i gives the address of. c[0] chooses: 0 x4, 1 x4 trans, 2 x2, 3 x2 trans.
TENP_KERNEL(test_ldmatrix, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, rows);
    const int lane = threadIdx.x;
    to_shared(rows, p.a, 256);
    __syncwarp();
    const int kind = static_cast<int>(p.c[0]);
    uint32_t four[4] = {}, two[2] = {};
    if (kind == 0) {
        tenp::ldmatrix_x4(four, rows + lane * 8);
    } else if (kind == 1) {
        tenp::ldmatrix_x4_trans(four, rows + lane * 8);
    } else if (kind == 2) {
        // Addresses of lanes 16 and up are not used: these point nowhere.
        tenp::ldmatrix_x2(two, lane < 16 ? rows + lane * 8 : nullptr);
    } else {
        tenp::ldmatrix_x2_trans(two, lane < 16 ? rows + lane * 8 : nullptr);
    }
    for (int i = 0; i < 4; ++i) {
        p.registers[lane * 4 + i] = kind < 2 ? four[i] : i < 2 ? two[i] : 0;
    }
}

// D = A B + C. Shared memory: A, then B.
TENP_KERNEL(test_mma, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, a_rows);
    uint16_t *b_rows = a_rows + ROWS * COLUMNS;
    const int lane = threadIdx.x;
    to_shared(a_rows, p.a, 256);
    to_shared(b_rows, p.b, 128);
    __syncwarp();
    uint32_t a[4], b[2];
    tenp::ldmatrix_x4(a, a_rows + (lane & 15) * 16 + (lane >> 4) * 8);
    tenp::ldmatrix_x2(b, b_rows + (lane & 7) * 16 + (lane >> 3 & 1) * 8);
    multiply(p, a, b);
}

// The same from a [k 16, m 16] and b [k 16, n 8].
TENP_KERNEL(test_mma_transposed, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, a_rows);
    uint16_t *b_rows = a_rows + ROWS * COLUMNS;
    const int lane = threadIdx.x;
    to_shared(a_rows, p.a, 256);
    to_shared(b_rows, p.b, 128);
    __syncwarp();
    uint32_t a[4], b[2];
    tenp::ldmatrix_x4_trans(a, a_rows + ((lane & 7) + (lane >> 4) * 8) * 16 + (lane >> 3 & 1) * 8);
    tenp::ldmatrix_x2_trans(b, b_rows + (lane & 15) * 8);
    multiply(p, a, b);
}

TENP_KERNEL(test_ldmatrix_misaligned, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, rows);
    to_shared(rows, p.a, 256);
    __syncwarp();
    uint32_t r[4];
    tenp::ldmatrix_x4(r, rows + threadIdx.x * 7);
    p.registers[threadIdx.x] = r[0];
}

TENP_KERNEL(test_ldmatrix_no_syncwarp, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, rows);
    to_shared(rows, p.a, 256);
    uint32_t r[4];
    tenp::ldmatrix_x4(r, rows + threadIdx.x * 8);
    p.registers[threadIdx.x] = r[0];
}

// Every lane writes the row that it gives the address of, but others receive it.
TENP_KERNEL(test_ldmatrix_own_rows, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, rows);
    for (int i = 0; i < 8; ++i) {
        rows[threadIdx.x * 8 + i] = p.a[threadIdx.x * 8 + i];
    }
    uint32_t r[4];
    tenp::ldmatrix_x4(r, rows + threadIdx.x * 8);
    p.registers[threadIdx.x] = r[0];
}

TENP_KERNEL(test_ldmatrix_unwritten, FragmentParams, 32, 1) {
    TENP_SHARED(uint16_t, rows);
    to_shared(rows, p.a, 248);
    __syncwarp();
    uint32_t r[4];
    tenp::ldmatrix_x4(r, rows + threadIdx.x * 8);
    p.registers[threadIdx.x] = r[0];
}

TENP_KERNEL(test_ldmatrix_of_global, FragmentParams, 32, 1) {
    uint32_t r[4];
    tenp::ldmatrix_x4(r, p.a + threadIdx.x * 8);
    p.registers[threadIdx.x] = r[0];
}

TENP_KERNEL(test_mma_in_branch, FragmentParams, 32, 1) {
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x != 3) {
        multiply(p, a, b);
    }
}
