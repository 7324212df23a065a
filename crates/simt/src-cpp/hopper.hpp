// What sm_90 adds: barriers in shared memory, bulk tensor copies, products of warpgroups, and registers that move between
// them. Asynchronous effects happen as late as allowed: a bulk copy arrives when no lane can go on without it (sooner, by
// chance, under a random order), accumulators hold nothing until a wait has asked for them.
#pragma once

#include "include/simt_runtime.hpp"

#include <cstdint>
#include <map>
#include <vector>

namespace simt {

// Per lane of a block: its accesses before that time are known of.
using Clocks = std::vector<uint64_t>;

// What a launch on the CPU finds where a GPU finds a CUtensorMap; crates/simt/src/tensor_map.rs writes it.
struct TensorMap {
    static constexpr uint64_t MAGIC = 0x70616d2d746d6973;
    uint64_t magic;
    uint64_t base;
    uint64_t inner, rows; // elements of 2 bytes
    uint64_t pitch_bytes;
    uint32_t box_inner, box_rows;
    uint32_t swizzle_bytes; // 128, or 0
    uint32_t padding;
    uint64_t group_pitch_bytes; // from eight rows to the next eight; 0: `pitch_bytes` all the way
    uint64_t unused[8];

    uint64_t row(uint64_t number) const {
        return base + (group_pitch_bytes == 0 ? number * pitch_bytes
                                              : number / 8 * group_pitch_bytes + number % 8 * pitch_bytes);
    }
};
static_assert(sizeof(TensorMap) == 128);

// mbarrier objects, PTX ISA "Parallel Synchronization and Communication Instructions: mbarrier".
struct Mbarrier {
    uint32_t count, pending;
    int64_t bytes; // still to come in this phase
    uint32_t phase;
    Clocks gathering, released;
    uint32_t initialiser;
    uint64_t since;
};

// bar.sync of a part of the block.
struct PartBarrier {
    uint32_t expected = 0;
    std::vector<uint32_t> lanes;
};

struct BulkLoad {
    TensorMap map;
    char *to;
    int inner, row;
    uint32_t barrier; // offset
    uint32_t lane;
    uint64_t time;
    uint32_t place;
};

// One wgmma.mma_async as a lane asks for it.
struct WgmmaRequest {
    float *d;
    uint32_t columns;
    uint64_t a, b; // descriptors
    bool a_transposed;
    uint32_t place;
};

// Accumulators on their way.
struct Product {
    float *d[128];
    uint32_t columns;
    std::vector<float> values; // [64, columns]
    uint64_t group;            // of the last product that adds to them
    uint32_t waiting_warps;    // mask
};

// Operand bytes in use: offsets of 16 bytes.
struct OperandRead {
    uint64_t group;
    std::vector<uint32_t> of_warp[4]; // rows of A
    std::vector<uint32_t> of_all;     // B
    uint32_t waiting_warps;
};

struct Warpgroup {
    uint32_t registers = 0, wanted = 0;
    uint32_t waiting = 0; // lanes at a meeting of all 128
    std::vector<Product> products;
    std::vector<OperandRead> reads;
};

} // namespace simt
