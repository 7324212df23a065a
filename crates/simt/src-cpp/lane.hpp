// One thread of the block.
#pragma once

#include "fiber.hpp"
#include "include/simt_runtime.hpp"

#include <cstdint>
#include <vector>

namespace simt {

class Engine;

// A cp.async on its way.
struct Copy {
    char *shared;
    const char *global;
    bool valid; // or zeros
    uint64_t group;
    uint32_t place;
};

// What a lane waits for: all lanes of `mask` at the same meeting. The last to come calls `finish` for all of them.
struct Meeting {
    const char *what;
    Site site;
    uint32_t mask;
    uint32_t detail; // must agree, such as a shuffle's width
    void (*finish)(Engine &, uint32_t warp, uint32_t mask);
    void *arguments;
    uint32_t place;
};

// A bulk copy from shared memory on its way.
struct BulkStore {
    struct Piece {
        const char *shared;
        char *global;
    };
    std::vector<Piece> pieces; // of 16 bytes
    uint64_t group;
    bool read = false;
    uint32_t place;
};

enum class State : uint8_t { Ready, AtBarrier, AtMeeting, AtPartBarrier, AtPhase, AtRegisters, Exited };

struct Lane {
    Fiber fiber;
    State state = State::Ready;
    uint32_t index = 0; // in the block
    Index thread{};
    uint64_t clock = 0;     // time of the last synchronisation
    uint64_t known[32]{};   // per lane of the warp: accesses of it before that time are ordered before this lane's next
    Meeting meeting{};      // in State::AtMeeting; `what`, `site` and `place` also in State::AtBarrier
    std::vector<Copy> copies;
    uint64_t group = 0; // number of commits
    // Per lane of the block: as `known`. Empty in a block without vector clocks.
    std::vector<uint64_t> seen;
    uint64_t acquired = 0;          // how often `seen` has grown from others
    uint64_t proxy_fence = 0;       // time of the last fence.proxy.async
    bool accumulators_fenced = false; // a wgmma.fence since the last wait for products
    uint64_t product_group = 0;       // number of wgmma commits
    std::vector<BulkStore> stores;
    uint64_t store_group = 0;
};

} // namespace simt
