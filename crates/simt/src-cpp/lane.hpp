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

enum class State : uint8_t { Ready, AtBarrier, AtMeeting, Exited };

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
};

} // namespace simt
