// D = A B with wgmma, A [64, 64] and B [64, N] from boxes: right at every N, and with each mistake at N = 32.
// grid (1), block (128), shared 49152 bytes. maps.weights is A, box 64 x 64 (its transpose for the _t entries);
// maps.rows is B's transpose, box N x 64.
#include "hopper.cuh"

struct ProductParams {
    float *out; // [64, N]
};

namespace {

constexpr int A_BYTES = 8192, BARRIER = A_BYTES + 32768;

enum class Kind { Right, NoWait, OneLeft, NoFence, Overwritten, OutOfBounds, OneWarpLess, Stored, StoredFenced, WrongStride };

template <int N, bool TRANSPOSED, Kind KIND>
__device__ __forceinline__ void product(const ProductParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + BARRIER);
    if (threadIdx.x == 0) {
        tenp::mbarrier_init(barrier, 1);
        tenp::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        tenp::mbarrier_arrive_expect(barrier, A_BYTES + 128 * N);
        tenp::load_box<tenp::Keep::First>(shared, &maps.weights, barrier, 0, 0);
        tenp::load_box<tenp::Keep::Last>(shared + A_BYTES, &maps.rows, barrier, 0, 0);
    }
    tenp::mbarrier_wait(barrier, 0);
    if (KIND == Kind::Stored || KIND == Kind::StoredFenced) {
        // Writes back what is there.
        uint32_t *words = reinterpret_cast<uint32_t *>(shared);
        words[threadIdx.x] = words[threadIdx.x];
        if (KIND == Kind::StoredFenced) {
            tenp::fence_proxy_async();
        }
        __syncthreads();
    }
    float acc[N / 2];
    for (int i = 0; i < N / 2; ++i) {
        acc[i] = 0.0f;
    }
    uint64_t a = tenp::descriptor(shared);
    const uint64_t b = tenp::descriptor(shared + A_BYTES);
    if (KIND == Kind::OutOfBounds) {
        a += 1 << 12;
    }
    if (KIND == Kind::WrongStride) {
        a += uint64_t{64} << 32;
    }
    if (KIND != Kind::NoFence) {
        tenp::wgmma_fence();
    }
    for (int k = 0; k < 4; ++k) {
        if (KIND != Kind::OneWarpLess || threadIdx.x < 96) {
            tenp::wgmma<N, TRANSPOSED>(acc, a + k * tenp::INNER_STEP<TRANSPOSED>, b + k * tenp::INNER_STEP<false>);
        }
    }
    tenp::wgmma_commit();
    if (KIND == Kind::Overwritten && threadIdx.x == 0) {
        shared[0] = 0;
    }
    if (KIND == Kind::OneLeft) {
        tenp::wgmma_wait<1>();
    } else if (KIND != Kind::NoWait) {
        tenp::wgmma_wait<0>();
    }
    for (int i = 0; i < N / 2; ++i) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        p.out[row * N + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = acc[i];
    }
    tenp::wgmma_wait<0>();
}

} // namespace

#define TENP_PRODUCT(name, n, transposed, kind)                                                     \
    TENP_KERNEL_MAPS(test_wgmma_##name, ProductParams, 128, 1) {                                    \
        TENP_SHARED(uint8_t, shared);                                                               \
        product<n, transposed, Kind::kind>(p, maps, shared);                                        \
    }

TENP_PRODUCT(8, 8, false, Right)
TENP_PRODUCT(8_t, 8, true, Right)
TENP_PRODUCT(16, 16, false, Right)
TENP_PRODUCT(16_t, 16, true, Right)
TENP_PRODUCT(32, 32, false, Right)
TENP_PRODUCT(32_t, 32, true, Right)
TENP_PRODUCT(64, 64, false, Right)
TENP_PRODUCT(64_t, 64, true, Right)
TENP_PRODUCT(128, 128, false, Right)
TENP_PRODUCT(128_t, 128, true, Right)
TENP_PRODUCT(192, 192, false, Right)
TENP_PRODUCT(192_t, 192, true, Right)
TENP_PRODUCT(256, 256, false, Right)
TENP_PRODUCT(256_t, 256, true, Right)
TENP_PRODUCT(no_wait, 32, false, NoWait)
TENP_PRODUCT(one_left, 32, false, OneLeft)
TENP_PRODUCT(no_fence, 32, false, NoFence)
TENP_PRODUCT(overwritten, 32, false, Overwritten)
TENP_PRODUCT(out_of_bounds, 32, false, OutOfBounds)
TENP_PRODUCT(one_warp_less, 32, false, OneWarpLess)
TENP_PRODUCT(stored, 32, false, Stored)
TENP_PRODUCT(stored_fenced, 32, false, StoredFenced)
TENP_PRODUCT(wrong_stride, 32, false, WrongStride)

// One warpgroup of three gives registers up; or none does, or too few.
template <int GIVEN> __device__ __forceinline__ void registers(const ProductParams &p) {
    if (threadIdx.x < 128) {
        if (GIVEN > 0) {
            tenp::fewer_registers<GIVEN>();
        }
    } else {
        tenp::more_registers<240>();
        p.out[threadIdx.x - 128] = 1.0f;
    }
}

TENP_KERNEL(test_registers_right, ProductParams, 384, 1) { registers<24>(p); }
TENP_KERNEL(test_registers_kept, ProductParams, 384, 1) { registers<0>(p); }
TENP_KERNEL(test_registers_too_few_given, ProductParams, 384, 1) { registers<40>(p); }
