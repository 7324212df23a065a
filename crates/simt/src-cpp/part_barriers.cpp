// Barriers that not all lanes of a block take part in, and what lanes know of one another through them.
#include "engine.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace simt {

// From here on the lanes' knowledge of each other is kept lane by lane.
void Engine::begin_clocks() {
    if (clocks_) {
        return;
    }
    clocks_ = true;
    for (unsigned i = 0; i < num_lanes_; ++i) {
        lanes_[i].seen.assign(num_lanes_, 0);
    }
}

// Adds what the lane has done and knows.
void Engine::publish(Lane &lane, Clocks &into) {
    lane.seen[lane.index] = ++time_;
    lane.clock = time_;
    const uint32_t warp = lane.index / 32;
    for (uint32_t i = 0; i < 32 && warp * 32 + i < num_lanes_; ++i) {
        uint64_t &seen = lane.seen[warp * 32 + i];
        seen = std::max({seen, lane.known[i], warp_sync_[warp]});
    }
    into.resize(num_lanes_, 0);
    for (unsigned i = 0; i < num_lanes_; ++i) {
        into[i] = std::max(into[i], lane.seen[i]);
    }
}

void Engine::acquire(Lane &lane, const Clocks &from) {
    ++lane.acquired;
    for (size_t i = 0; i < from.size(); ++i) {
        lane.seen[i] = std::max(lane.seen[i], from[i]);
    }
}

// __syncwarp hands on what its lanes know of other warps.
void Engine::join_clocks(uint32_t warp, uint32_t mask) {
    if (!clocks_) {
        return;
    }
    Clocks all;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        publish(warp_lanes(warp)[std::countr_zero(rest)], all);
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        acquire(warp_lanes(warp)[std::countr_zero(rest)], all);
    }
}

void Engine::fence_proxy() {
    running_->proxy_fence = ++time_;
    running_->clock = time_;
}

void Engine::part_barrier(uint32_t id, uint32_t expected, Site site, uint32_t place) {
    begin_clocks();
    if (id == 0 || id > 15 || expected == 0 || expected % 32 != 0 || expected > num_lanes_) {
        fail(SIMT_UNDEFINED, running_->index, place, "bar.sync %u of %u threads: ids are 1 to 15 (0 is __syncthreads), "
             "threads a multiple of 32 and at most the block's", id, expected);
    }
    PartBarrier &barrier = part_barriers_[id];
    if (!barrier.lanes.empty() && barrier.expected != expected) {
        fail(SIMT_BARRIER_DIVERGENCE, running_->index, place, "bar.sync %u of %u threads, of %u by others", id, expected,
             barrier.expected);
    }
    running_->meeting = {"bar.sync", site, id, 0, nullptr, nullptr, place};
    barrier.expected = expected;
    barrier.lanes.push_back(running_->index);
    if (barrier.lanes.size() < expected) {
        return leave(State::AtPartBarrier);
    }
    Clocks all;
    for (uint32_t lane : barrier.lanes) {
        publish(lanes_[lane], all);
    }
    for (uint32_t lane : barrier.lanes) {
        acquire(lanes_[lane], all);
        release(lanes_[lane]);
    }
    barrier.lanes.clear();
    leave(State::Ready);
}

uint32_t Engine::shared_offset(uintptr_t address, size_t bytes, const char *what, size_t alignment, uint32_t place) {
    const uintptr_t at = address - reinterpret_cast<uintptr_t>(shared);
    if (at >= request_.shared_bytes || request_.shared_bytes - at < bytes) {
        stray(address, bytes, Access::Write, place);
    }
    if (at % alignment != 0) {
        fail(SIMT_MISALIGNED, running_->index, place, "%s at byte %zu of shared memory, a multiple of %zu is needed", what,
             static_cast<size_t>(at), alignment);
    }
    return static_cast<uint32_t>(at);
}

void Engine::init_mbarrier(uintptr_t address, uint32_t count, uint32_t place) {
    begin_clocks();
    const uint32_t at = shared_offset(address, 8, "mbarrier", 8, place);
    if (count == 0 || count >= 1u << 20) {
        fail(SIMT_UNDEFINED, running_->index, place, "an mbarrier of %u arrivals", count);
    }
    access(address, 8, Access::Write, place);
    mbarriers_[at] = {count, count, 0, 0, {}, {}, running_->index, running_->clock};
}

Mbarrier &Engine::mbarrier(uintptr_t address, uint32_t place) {
    const uint32_t at = shared_offset(address, 8, "mbarrier", 8, place);
    const auto found = mbarriers_.find(at);
    if (found == mbarriers_.end()) {
        fail(SIMT_UNDEFINED, running_->index, place, "no mbarrier has been made at byte %u of shared memory", at);
    }
    // Its own operations are never in each other's way; they are behind what made it.
    access(address, 8, Access::Atomic, place);
    return found->second;
}

void Engine::end_phase_if_due(Mbarrier &barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) {
        return;
    }
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    barrier.released.swap(barrier.gathering);
    barrier.gathering.assign(num_lanes_, 0);
    for (unsigned i = 0; i < num_lanes_; ++i) {
        if (lanes_[i].state == State::AtPhase && lanes_[i].meeting.arguments == &barrier &&
            lanes_[i].meeting.detail != barrier.phase) {
            acquire(lanes_[i], barrier.released);
            release(lanes_[i]);
        }
    }
}

void Engine::arrive(uintptr_t address, uint32_t expected_bytes, uint32_t place) {
    Mbarrier &barrier = mbarrier(address, place);
    if (barrier.pending == 0) {
        fail(SIMT_UNDEFINED, running_->index, place, "more arrivals at an mbarrier than the %u it was made for",
             barrier.count);
    }
    publish(*running_, barrier.gathering);
    barrier.bytes += expected_bytes;
    --barrier.pending;
    end_phase_if_due(barrier);
}

// Waits until the phase of this parity is over.
void Engine::wait_phase(uintptr_t address, uint32_t parity, Site site, uint32_t place) {
    Mbarrier &barrier = mbarrier(address, place);
    if (request_.order == Order::Random && !loads_.empty() && random(2) == 0) {
        deliver_load(random(loads_.size()));
    }
    if (barrier.phase != parity) {
        acquire(*running_, barrier.released);
        return;
    }
    running_->meeting = {"mbarrier.try_wait", site, 0, parity, nullptr, &barrier, place};
    leave(State::AtPhase);
}

void part_barrier(uint32_t id, uint32_t threads, Site site) {
    current()->part_barrier(id, threads, site, place_of(__builtin_return_address(0)));
}

void mbarrier_init(void *barrier, uint32_t arrivals) {
    current()->init_mbarrier(reinterpret_cast<uintptr_t>(barrier), arrivals, place_of(__builtin_return_address(0)));
}

void mbarrier_arrive(void *barrier, uint32_t expected_bytes) {
    current()->arrive(reinterpret_cast<uintptr_t>(barrier), expected_bytes, place_of(__builtin_return_address(0)));
}

void mbarrier_wait(void *barrier, uint32_t parity, Site site) {
    current()->wait_phase(reinterpret_cast<uintptr_t>(barrier), parity, site, place_of(__builtin_return_address(0)));
}

void fence_proxy_async() { current()->fence_proxy(); }

} // namespace simt
