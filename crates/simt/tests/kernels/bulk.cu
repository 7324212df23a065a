// Boxes of a matrix to shared memory and back, barriers of some threads: right, and with each mistake.
// grid (1), block (128), shared 32768 bytes. maps.rows is a matrix of bf16, box 32 x 64.
#include "hopper.cuh"

struct BulkParams {
    uint16_t *out; // [32, 64] as it lies in shared memory
    int32_t inner, row;
};

namespace {

constexpr int BYTES = 32 * 128, BARRIER = 16384;

enum class Load { Right, NoWait, OtherPhase, FewBytes, ManyBytes, NoFence, Left, Shifted, Refilled };

template <Load KIND>
__device__ __forceinline__ void load(const BulkParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + BARRIER);
    if (threadIdx.x == 0) {
        tenp::mbarrier_init(barrier, 1);
        if (KIND != Load::NoFence) {
            tenp::fence_mbarrier_init();
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const int bytes = KIND == Load::FewBytes ? BYTES / 2 : KIND == Load::ManyBytes ? BYTES + 16 : BYTES;
        tenp::mbarrier_arrive_expect(barrier, bytes);
        tenp::load_box<tenp::Keep::First>(shared + (KIND == Load::Shifted ? 128 : 0), &maps.rows, barrier, p.inner, p.row);
    }
    if (KIND == Load::Left) {
        return;
    }
    if (KIND != Load::NoWait) {
        tenp::mbarrier_wait(barrier, KIND == Load::OtherPhase ? 1 : 0);
    }
    for (int i = threadIdx.x; i < BYTES / 16; i += 128) {
        reinterpret_cast<uint4 *>(p.out)[i] = reinterpret_cast<const uint4 *>(shared)[i];
    }
    if (KIND == Load::Refilled) {
        // Others may still read the first box.
        if (threadIdx.x == 0) {
            tenp::mbarrier_arrive_expect(barrier, BYTES);
            tenp::load_box<tenp::Keep::First>(shared, &maps.rows, barrier, p.inner, p.row);
        }
        tenp::mbarrier_wait(barrier, 1);
    }
}

enum class Store { Right, NoFence, ReadersFence, Reused, NoWait };

template <Store KIND>
__device__ __forceinline__ void store(const BulkParams &p, const TenpTensorMaps &maps, uint8_t *shared) {
    for (int round = 0; round < 2; ++round) {
        for (int i = threadIdx.x; i < 32 * 64; i += 128) {
            const int row = i / 64;
            const int column = i % 64;
            reinterpret_cast<uint16_t *>(shared)[8 * tenp::swizzled<8>(row, column / 8) + column % 8] =
                static_cast<uint16_t>(100 * round + row + column);
        }
        if (KIND != Store::NoFence && KIND != Store::ReadersFence) {
            tenp::fence_proxy_async();
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            if (KIND == Store::ReadersFence) {
                tenp::fence_proxy_async();
            }
            tenp::store_box(&maps.rows, shared, p.inner, p.row);
            tenp::store_box_commit();
            if (KIND != Store::Reused && KIND != Store::NoWait) {
                tenp::store_box_wait_read<0>();
            }
        }
        if (KIND == Store::NoWait) {
            return;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        tenp::store_box_wait_read<0>();
    }
}

enum class Part { Right, OtherCount, WholeBlock, Missing };

// Two groups of 64 threads, each of which turns its own values around, twice.
template <Part KIND> __device__ __forceinline__ void turn(const BulkParams &p, uint16_t *shared) {
    const int group = threadIdx.x / 64;
    const int thread = threadIdx.x % 64;
    for (int round = 0; round < 2; ++round) {
        shared[threadIdx.x] = static_cast<uint16_t>(threadIdx.x + round);
        if (KIND == Part::WholeBlock && group == 1) {
            __syncthreads();
        } else if (KIND != Part::Missing) {
            tenp::part_barrier(1 + group, KIND == Part::OtherCount && thread >= 32 ? 96 : 64);
        }
        p.out[128 * round + threadIdx.x] = shared[64 * group + 63 - thread];
        tenp::part_barrier(1 + group, 64);
    }
}

} // namespace

#define TENP_LOAD(name, kind)                                                                       \
    TENP_KERNEL_MAPS(test_bulk_load_##name, BulkParams, 128, 1) {                                   \
        TENP_SHARED(uint8_t, shared);                                                               \
        load<Load::kind>(p, maps, shared);                                                          \
    }
#define TENP_STORE(name, kind)                                                                      \
    TENP_KERNEL_MAPS(test_bulk_store_##name, BulkParams, 128, 1) {                                  \
        TENP_SHARED(uint8_t, shared);                                                               \
        store<Store::kind>(p, maps, shared);                                                        \
    }
#define TENP_PART(name, kind)                                                                       \
    TENP_KERNEL_MAPS(test_part_##name, BulkParams, 128, 1) {                                        \
        TENP_SHARED(uint16_t, shared);                                                              \
        (void)maps;                                                                                 \
        turn<Part::kind>(p, shared);                                                                \
    }

TENP_LOAD(right, Right)
TENP_LOAD(no_wait, NoWait)
TENP_LOAD(other_phase, OtherPhase)
TENP_LOAD(few_bytes, FewBytes)
TENP_LOAD(many_bytes, ManyBytes)
TENP_LOAD(no_fence, NoFence)
TENP_LOAD(left, Left)
TENP_LOAD(shifted, Shifted)
TENP_LOAD(refilled, Refilled)
TENP_STORE(right, Right)
TENP_STORE(no_fence, NoFence)
TENP_STORE(readers_fence, ReadersFence)
TENP_STORE(reused, Reused)
TENP_STORE(no_wait, NoWait)
TENP_PART(right, Right)
TENP_PART(other_count, OtherCount)
TENP_PART(whole_block, WholeBlock)
TENP_PART(missing, Missing)
