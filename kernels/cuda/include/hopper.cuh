// Shared parts of the sm_90a products: 128 weight rows (M) by N rows of activations, 64 inner elements a stage, brought by
// bulk tensor copies of one warpgroup to two that multiply with wgmma (64 weight rows each).
//
// A stage holds the weights, then the activations, as boxes with rows of 128 bytes whose 16-byte chunks are permuted by
// the row (128-byte swizzle), which is what wgmma's descriptors name. `full` barriers count a stage's bytes, `empty`
// barriers the eight warps that have read it.
#pragma once

#include "hopper_ptx.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace tenp {

constexpr int WARPGROUP = 128, CONSUMERS = 256, CONSUMER_WARPS = CONSUMERS / 32;
// Of 65536 registers: one warpgroup that copies, two that hold the accumulators.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240, GATHER_REGISTERS = 56, GATHERED_REGISTERS = 224;

template <int N_, int STAGES_, int STAGED_BYTES_> struct WideShape {
    static constexpr int N = N_, STAGES = STAGES_, M = 128, K = 64;
    static constexpr int A_BYTES = 2 * M * K, STAGE_BYTES = A_BYTES + 2 * N * K;
    // What the second of the two warpgroups is away from the first: it has other weight rows and the same activations.
    static constexpr int HALF_A_BYTES = A_BYTES / 2, HALF_B_BYTES = 0;
    static constexpr int STAGED = STAGES * STAGE_BYTES;
    // Room of the consumers, where tiles are turned around on their way out.
    static constexpr int STAGED_BYTES = STAGED_BYTES_;
    static constexpr int BARRIERS = STAGED + STAGED_BYTES;
    static constexpr int OFFSETS = BARRIERS + 16 * STAGES + 16;
    static_assert(STAGE_BYTES % 1024 == 0 && STAGED_BYTES % 1024 == 0, "boxes lie at multiples of 1024");
};

// The matrix descriptor of a 128-byte swizzled operand: address, offset of blocks of 64 along M (unused here: M is 64),
// offset from 8 rows to the next 8. PTX ISA, "Matrix Descriptor Format".
__device__ __forceinline__ uint64_t descriptor(const void *shared) {
    return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | uint64_t{1} << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}

// What a descriptor grows by from 16 inner elements to the next: 32 bytes of a row, or 16 rows of 128 bytes.
template <bool TRANSPOSED> constexpr uint64_t INNER_STEP = TRANSPOSED ? 16 * 128 >> 4 : 32 >> 4;

// Place in the ring of stages.
template <int STAGES> struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <class S> struct Stages {
    uint8_t *shared;

    __device__ __forceinline__ uint8_t *weights(int stage) const { return shared + stage * S::STAGE_BYTES; }
    __device__ __forceinline__ uint8_t *rows(int stage) const { return weights(stage) + S::A_BYTES; }
    __device__ __forceinline__ uint8_t *staged() const { return shared + S::STAGED; }
    __device__ __forceinline__ uint64_t *full(int stage) const {
        return reinterpret_cast<uint64_t *>(shared + S::BARRIERS) + stage;
    }
    __device__ __forceinline__ uint64_t *empty(int stage) const { return full(S::STAGES + stage); }
    // Two more, for a kernel's own use.
    __device__ __forceinline__ uint64_t *extra(int which) const { return full(2 * S::STAGES + which); }
    __device__ __forceinline__ int32_t *tile_offsets() const { return reinterpret_cast<int32_t *>(shared + S::OFFSETS); }

    // By all threads, before anything else; a barrier of the block is due. `producers` arrive at `full`.
    __device__ __forceinline__ void begin_barriers(int producers) const {
        if (threadIdx.x == 0) {
            for (int s = 0; s < S::STAGES; ++s) {
                mbarrier_init(full(s), producers);
                mbarrier_init(empty(s), CONSUMER_WARPS);
            }
            mbarrier_init(extra(0), 1);
            mbarrier_init(extra(1), CONSUMER_WARPS);
            fence_mbarrier_init();
        }
    }

    // The same for a grouped product, whose schedule is read too.
    template <class P> __device__ __forceinline__ void begin(const P &p, int producers) const {
        begin_barriers(producers);
        load_tile_offsets(p.tile_offsets, p.num_experts, tile_offsets());
        __syncthreads();
    }
};

// Splits the block: a warpgroup copies (one thread of it, or all where rows are gathered), the others multiply.
template <bool GATHERS, class Produce, class Consume>
__device__ __forceinline__ void split_roles(Produce produce, Consume consume) {
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<GATHERS ? GATHER_REGISTERS : PRODUCER_REGISTERS>();
        if (GATHERS || threadIdx.x == 0) {
            produce();
        }
    } else {
        more_registers<GATHERS ? GATHERED_REGISTERS : CONSUMER_REGISTERS>();
        consume();
    }
}

// Barriers of both consuming warpgroups, and of one of them.
__device__ __forceinline__ void consumers_barrier() { part_barrier(1, CONSUMERS); }
__device__ __forceinline__ void half_barrier(int half) { part_barrier(2 + half, WARPGROUP); }

// Calls `of(tile)` for this block's share of a grouped product's tiles.
template <class S, class P, class Of>
__device__ __forceinline__ void every_tile(const P &p, const Stages<S> &stages, Of of) {
    const int num_tiles = stages.tile_offsets()[p.num_experts];
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        of(tile);
    }
}

// A consumer thread's place: which half of the weight rows, which warp of it.
struct ConsumerPlace {
    int half = static_cast<int>(threadIdx.x) / WARPGROUP - 1;
    int warp = static_cast<int>(threadIdx.x) % WARPGROUP / 32;
    int lane = static_cast<int>(threadIdx.x) % 32;
    // First weight row of the warp in the tile.
    int row = 64 * half + 16 * warp;
};

// One warp of the consumers is done with a stage.
__device__ __forceinline__ void release_stage(uint64_t *empty) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_arrive(empty);
    }
}

// Zeros cost less than a first product that would have to tell itself apart.
template <int COUNT> __device__ __forceinline__ void clear(float (&acc)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        acc[i] = 0.0f;
    }
}

// acc += the products of this warpgroup's 64 weight rows over `inner` elements, in steps of 16. One group of products is
// under way while the next stage is waited for; a stage is given back one step late.
template <class S, bool TRANSPOSED>
__device__ __forceinline__ void consume(const Stages<S> &stages, Ring<S::STAGES> &ring, int inner, float (&acc)[S::N / 2]) {
    const int half = static_cast<int>(threadIdx.x) / WARPGROUP - 1;
    int last = 0;
    for (int k0 = 0; k0 < inner; k0 += S::K) {
        mbarrier_wait(stages.full(ring.stage), ring.parity);
        const uint64_t a = descriptor(stages.weights(ring.stage) + half * S::HALF_A_BYTES);
        const uint64_t b = descriptor(stages.rows(ring.stage) + half * S::HALF_B_BYTES);
        hold_registers(acc);
        wgmma_fence();
        if (inner - k0 >= S::K) {
#pragma unroll
            for (int k = 0; k < S::K / 16; ++k) {
                wgmma<S::N, TRANSPOSED>(acc, a + k * INNER_STEP<TRANSPOSED>, b + k * INNER_STEP<false>);
            }
            wgmma_commit();
        } else {
#pragma unroll 1
            for (int k = 0; 16 * k < inner - k0; ++k) {
                wgmma<S::N, TRANSPOSED>(acc, a + k * INNER_STEP<TRANSPOSED>, b + k * INNER_STEP<false>);
            }
            wgmma_commit();
        }
        hold_registers(acc);
        if (k0 > 0) {
            wgmma_wait<1>();
            release_stage(stages.empty(last));
        }
        last = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>();
    hold_registers(acc);
    if (inner > 0) {
        release_stage(stages.empty(last));
    }
}

// ROWS rows gathered by the whole producer warpgroup with cp.async, LAG stages ahead of their arrival.
template <class S, int ROWS> struct Gather {
    static constexpr int LAG = S::STAGES > 3 ? 2 : 1, CHUNKS = S::K / 8, STEP = WARPGROUP / CHUNKS;
    static constexpr int COUNT = (ROWS + STEP - 1) / STEP;
    // Of the rows of eight threads, which copy a row together: each keeps one in eight. Negative for zeros.
    int32_t ids[(COUNT + CHUNKS - 1) / CHUNKS];
    int behind = 0; // stages begun and not announced
    Ring<S::STAGES> announced;

    // Announces the oldest stages once at most `pending` newer ones are under way.
    template <int PENDING> __device__ __forceinline__ void announce(const Stages<S> &stages) {
        if (behind > PENDING) {
            cp_async_wait<PENDING>();
            // The rows came by ordinary copies; wgmma reads them as bulk copies would be read.
            fence_proxy_async();
            mbarrier_arrive(stages.full(announced.stage));
            announced.advance();
            --behind;
        }
    }

    // The rows of all stages until the next choice: row r is what `row_id(r)` says, negative for zeros. Read once.
    template <class RowId> __device__ __forceinline__ void choose(RowId row_id) {
#pragma unroll
        for (int i = 0; i < (COUNT + CHUNKS - 1) / CHUNKS; ++i) {
            const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
            const int row = static_cast<int>(threadIdx.x) / CHUNKS + (i * CHUNKS + chunk) * STEP;
            ids[i] = row < ROWS ? row_id(row) : -1;
        }
    }

    // Elements k0 to k0 + K of the rows, to `to`; `first_of(id)` is the first element of the row with that id.
    template <class FirstOf>
    __device__ __forceinline__ void load(const Stages<S> &stages, uint8_t *to, int k0, int inner, const uint16_t *any,
                                         FirstOf first_of) {
        const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
        const bool inside = k0 + chunk * 8 < inner;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = static_cast<int>(threadIdx.x) / CHUNKS + i * STEP;
            const int32_t id = __shfl_sync(WHOLE_WARP, ids[i / CHUNKS], i % CHUNKS, CHUNKS);
            if (ROWS % STEP == 0 || row < ROWS) {
                const bool valid = inside && id >= 0;
                cp_async_16(to + 16 * swizzled<CHUNKS>(row, chunk), valid ? first_of(id) + k0 + chunk * 8 : any, valid);
            }
        }
        cp_async_commit();
        ++behind;
        announce<LAG>(stages);
    }

    __device__ __forceinline__ void finish(const Stages<S> &stages) {
        announce<1>(stages);
        announce<0>(stages);
    }
};

// Turns values around in the consumers' room, [N rows of activations][64 values of the weight side]: chunk `group` of the
// rows gets 8 values of the weight side, whose rows 8 j to 8 j + 7 are in `pairs[j]`, two in a register.
template <int N> __device__ __forceinline__ void stage_transposed(uint8_t *tile, int group, const uint32_t (&pairs)[N / 8]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (N == 8) {
        stmatrix_x1_trans(tile + 16 * swizzled<8>(lane % 8, group), {pairs[0]});
    } else if constexpr (N == 16) {
        stmatrix_x2_trans(tile + 16 * swizzled<8>(lane % 16, group), {pairs[0], pairs[1]});
    } else {
#pragma unroll
        for (int j = 0; j < N / 8; j += 4) {
            stmatrix_x4_trans(tile + 16 * swizzled<8>(8 * j + lane, group),
                              {pairs[j], pairs[j + 1], pairs[j + 2], pairs[j + 3]});
        }
    }
}

// Writes CHUNKS chunks of the turned rows out, from `first` on: row r < rows to `to` + r pitch, where chunk c begins at
// column 8 c, of `columns` (a multiple of 8) that are there.
template <int N, int CHUNKS>
__device__ __forceinline__ void write_staged(const uint8_t *tile, int first, uint16_t *to, int64_t pitch, int rows,
                                             int columns) {
    const int thread = static_cast<int>(threadIdx.x) % WARPGROUP;
    const int chunk = first + thread % CHUNKS;
    for (int row = thread / CHUNKS; row < N; row += WARPGROUP / CHUNKS) {
        if (row < rows && 8 * chunk < columns) {
            *reinterpret_cast<uint4 *>(to + row * pitch + 8 * chunk) =
                *reinterpret_cast<const uint4 *>(tile + 16 * swizzled<8>(row, chunk));
        }
    }
}

} // namespace tenp
