// What lanes of a warp do together, and atomics.
#include "engine.hpp"

#include <bit>
#include <cstring>

namespace simt {

namespace {

struct Shuffled {
    Shuffle kind;
    uint64_t value;
    uint32_t operand;
    uint32_t width;
    uint64_t result;
};

// The lane that `lane` reads from; its own where the one asked for is outside the segment. PTX ISA, shfl.sync.
uint32_t source_lane(const Shuffled &s, uint32_t lane) {
    const uint32_t first = lane & ~(s.width - 1);
    const uint32_t last = first + s.width - 1;
    const int64_t wanted = s.kind == Shuffle::Index ? first + (s.operand & (s.width - 1))
                           : s.kind == Shuffle::Up  ? int64_t{lane} - s.operand
                           : s.kind == Shuffle::Down ? int64_t{lane} + s.operand
                                                     : lane ^ (s.operand & 31);
    const bool inside = s.kind == Shuffle::Up ? wanted >= first : wanted <= last;
    return inside ? static_cast<uint32_t>(wanted) : lane;
}

void finish_shuffle(Engine &engine, uint32_t warp, uint32_t mask) {
    Lane *lanes = engine.warp_lanes(warp);
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t lane = std::countr_zero(rest);
        const Meeting &meeting = lanes[lane].meeting;
        auto &mine = *static_cast<Shuffled *>(meeting.arguments);
        const uint32_t from = source_lane(mine, lane);
        if ((mask >> from & 1) == 0) {
            engine.fail(SIMT_WARP_DIVERGENCE, warp * 32 + lane, meeting.place,
                        "%s: lane %u reads lane %u, which is not in the mask %08x", meeting.what, lane, from, mask);
        }
        mine.result = static_cast<const Shuffled *>(lanes[from].meeting.arguments)->value;
    }
}

struct Vote {
    bool predicate;
    uint32_t result;
};

void finish_ballot(Engine &engine, uint32_t warp, uint32_t mask) {
    Lane *lanes = engine.warp_lanes(warp);
    uint32_t votes = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t lane = std::countr_zero(rest);
        votes |= uint32_t{static_cast<const Vote *>(lanes[lane].meeting.arguments)->predicate} << lane;
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        static_cast<Vote *>(lanes[std::countr_zero(rest)].meeting.arguments)->result = votes;
    }
}

void finish_sync(Engine &engine, uint32_t warp, uint32_t mask) { engine.order_warp(warp, mask); }

} // namespace

Index thread_index() { return current()->lane().thread; }
Index block_index() { return current()->block_index; }
Index block_size() { return current()->block_size; }
Index grid_size() { return current()->grid_size; }
void *shared_window() { return current()->shared; }

void sync_threads(Site site) { current()->barrier(site, place_of(__builtin_return_address(0))); }

void sync_warp(uint32_t mask, Site site) {
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet({"__syncwarp", site, mask, 0, finish_sync, nullptr, place});
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t operand, uint32_t width, Site site) {
    static const char *const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
    Engine &engine = *current();
    const char *name = names[static_cast<uint32_t>(kind)];
    const uint32_t place = place_of(__builtin_return_address(0));
    if (!std::has_single_bit(width) || width > 32) {
        engine.fail(SIMT_UNDEFINED, engine.lane().index, place, "%s of width %u", name, width);
    }
    Shuffled arguments{kind, value, operand, width, 0};
    engine.meet({name, site, mask, static_cast<uint32_t>(kind) << 8 | width, finish_shuffle, &arguments, place});
    return arguments.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
    Vote arguments{predicate, 0};
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet({"a vote", site, mask, 0, finish_ballot, &arguments, place});
    return arguments.result;
}

uint32_t atomic(Atomic kind, void *address, uint32_t operand) {
    Engine &engine = *current();
    const uint32_t place = place_of(__builtin_return_address(0));
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at % 4 != 0) {
        engine.fail(SIMT_MISALIGNED, engine.lane().index, place, "atomic at address %#llx",
                    static_cast<unsigned long long>(at));
    }
    engine.access(at, 4, Access::Atomic, place);
    uint32_t old = 0;
    std::memcpy(&old, address, 4);
    const bool larger = kind == Atomic::MaxSigned ? static_cast<int32_t>(operand) > static_cast<int32_t>(old)
                                                  : operand > old;
    const uint32_t next = kind == Atomic::Add ? old + operand : larger ? operand : old;
    std::memcpy(address, &next, 4);
    return old;
}

} // namespace simt
