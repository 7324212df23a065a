#include "engine.hpp"

#include "hooks.hpp"
#include "mapping.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace simt {

namespace {

std::vector<Entry> &table() {
    static std::vector<Entry> instance;
    return instance;
}

} // namespace

bool same_site(const Site &a, const Site &b) {
    return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

Registration::Registration(const char *name, uint64_t params_bytes, unsigned max_threads, void (*run)(const void *)) {
    table().push_back({name, params_bytes, max_threads, run});
}

const std::vector<Entry> &entries() { return table(); }

Engine::Engine()
    : lanes_(std::make_unique<Lane[]>(MAX_THREADS)), shared_mapping_(map_bytes(SHARED_MAPPING)),
      shared_shadow_(MAX_SHARED) {
    // Pages are 1024-byte aligned, and so is what lies a guard behind one.
    shared = shared_mapping_ + SHARED_GUARD;
    // Time 1 is that of what the host wrote.
    time_ = 2;
}

Engine::~Engine() { unmap_bytes(shared_mapping_, SHARED_MAPPING); }

bool Engine::launch(const Request &request) {
    fault = {};
    if (failed_) {
        shared_shadow_.forget_reads();
    }
    failed_ = false;
    steps = 0;
    shared_used = 0;
    request_ = request;
    block_index = {};
    block_size = request.block;
    grid_size = request.grid;
    if (refuse(request)) {
        return false;
    }
    params_.resize((request.entry->params_bytes + sizeof(ParamsPart) - 1) / sizeof(ParamsPart));
    std::memcpy(params_.data(), request.params, request.entry->params_bytes);
    num_lanes_ = request.block.x * request.block.y * request.block.z;
    random_ = request.seed * 2 + 1;
    started_.clear();
    launch_start_ = ++time_;
    const uint64_t blocks = uint64_t{request.grid.x} * request.grid.y * request.grid.z;
    std::vector<uint32_t> shuffled;
    if (request.order == Order::Random) {
        shuffled.resize(blocks);
        std::iota(shuffled.begin(), shuffled.end(), 0u);
        for (uint64_t i = blocks; i > 1; --i) {
            std::swap(shuffled[i - 1], shuffled[random(i)]);
        }
    }
    enter_engine(this);
    watchdog_.arm();
    for (uint64_t i = 0; i < blocks && !failed_; ++i) {
        run_block(request.order == Order::Forward ? i : request.order == Order::Reversed ? blocks - 1 - i : shuffled[i]);
    }
    watchdog_.disarm();
    enter_engine(nullptr);
    return !failed_;
}

bool Engine::refuse(const Request &r) {
    const uint64_t threads = uint64_t{r.block.x} * r.block.y * r.block.z;
    char *text = fault.detail;
    const size_t room = sizeof fault.detail;
    if (r.grid.x == 0 || r.grid.y == 0 || r.grid.z == 0 || threads == 0) {
        std::snprintf(text, room, "an empty grid or block");
    } else if (r.grid.x > 0x7fffffffu || r.grid.y > 65535 || r.grid.z > 65535) {
        std::snprintf(text, room, "grid (%u, %u, %u), at most (2147483647, 65535, 65535)", r.grid.x, r.grid.y, r.grid.z);
    } else if (threads > MAX_THREADS || r.block.x > 1024 || r.block.y > 1024 || r.block.z > 64) {
        std::snprintf(text, room, "block (%u, %u, %u), at most (1024, 1024, 64) and 1024 threads", r.block.x, r.block.y,
                      r.block.z);
    } else if (threads > r.entry->max_threads) {
        std::snprintf(text, room, "%u threads a block, launch bounds of %u", static_cast<unsigned>(threads),
                      r.entry->max_threads);
    } else if (r.shared_bytes > MAX_SHARED) {
        std::snprintf(text, room, "%u bytes of shared memory, at most %u", r.shared_bytes, MAX_SHARED);
    } else {
        return false;
    }
    fault.kind = SIMT_LAUNCH;
    fault.lane = ~0u;
    return true;
}

Index Engine::block_from(uint64_t linear) const {
    const uint64_t x = grid_size.x, y = grid_size.y;
    return {static_cast<unsigned>(linear % x), static_cast<unsigned>(linear / x % y),
            static_cast<unsigned>(linear / x / y)};
}

uint64_t Engine::block_at(uint64_t time) const {
    const auto after = std::upper_bound(started_.begin(), started_.end(), time,
                                        [](uint64_t t, const Started &block) { return t < block.time; });
    return std::prev(after)->linear;
}

void Engine::run_block(uint64_t linear) {
    block_index = block_from(linear);
    std::memset(shared, 0xff, request_.shared_bytes);
    block_start_ = barrier_time_ = ++time_;
    started_.push_back({block_start_, linear});
    std::fill(std::begin(warp_waiting_), std::end(warp_waiting_), 0u);
    num_exited_ = num_at_barrier_ = ready_head_ = ready_count_ = 0;
    clocks_ = false;
    mbarriers_.clear();
    part_barriers_.clear();
    loads_.clear();
    for (Warpgroup &group : warpgroups_) {
        group = {};
        // What __launch_bounds__ with one block per multiprocessor leaves each thread, of 65536.
        group.registers = std::min(65536 / num_lanes_ / 8 * 8, 255u);
    }
    free_registers_ = 0;
    for (unsigned i = 0; i < num_lanes_; ++i) {
        Lane &lane = lanes_[i];
        lane.state = State::Ready;
        lane.index = i;
        lane.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        lane.clock = block_start_;
        lane.meeting = {};
        lane.copies.clear();
        lane.group = 0;
        lane.seen.clear();
        lane.stores.clear();
        lane.acquired = lane.proxy_fence = lane.store_group = lane.product_group = 0;
        lane.accumulators_fenced = false;
        lane.fiber.start(stacks_.stack(i), Stacks::BYTES, [] { current()->lane_main(); });
        release(lane);
    }
    running_ = next();
    begin_steps(request_.step_limit);
    enter_lane(stacks_.stack(running_->index));
    switch_fiber(main_, running_->fiber);
    steps += request_.step_limit - steps_left();
}

void Engine::lane_main() {
    request_.entry->run(params_.data());
    if (++num_exited_ == num_lanes_) {
        end_asynchronous();
    }
    leave(State::Exited);
    std::abort(); // an exited lane is never chosen
}

uint64_t Engine::random(uint64_t below) {
    // SplitMix64, Steele, Lea and Flood 2014.
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % below;
}

void Engine::release(Lane &lane) {
    lane.state = State::Ready;
    ready_[(ready_head_ + ready_count_++) % MAX_THREADS] = static_cast<uint16_t>(lane.index);
}

// Forward: the one that has waited longest, so that lanes keep step. Reversed: the one that came last, so that one warp
// runs ahead as far as it can. Random: any.
Lane *Engine::next() {
    if (ready_count_ == 0) {
        return nullptr;
    }
    --ready_count_;
    if (request_.order == Order::Reversed) {
        return &lanes_[ready_[(ready_head_ + ready_count_) % MAX_THREADS]];
    }
    const unsigned head = ready_head_++ % MAX_THREADS;
    if (request_.order == Order::Random) {
        std::swap(ready_[head], ready_[(head + random(ready_count_ + 1)) % MAX_THREADS]);
    }
    return &lanes_[ready_[head]];
}

void Engine::leave(State state) {
    Lane *from = running_;
    from->state = state;
    Lane *to = next();
    while (to == nullptr && deliver_something()) {
        to = next();
    }
    if (to == from) {
        return;
    }
    if (to == nullptr) {
        if (num_exited_ == num_lanes_) {
            switch_fiber(from->fiber, main_);
        }
        deadlock();
    }
    running_ = to;
    enter_lane(stacks_.stack(to->index));
    switch_fiber(from->fiber, to->fiber);
}

void Engine::barrier(Site site, uint32_t place) {
    running_->meeting = {"__syncthreads", site, 0, 0, nullptr, nullptr, place};
    if (++num_at_barrier_ < num_lanes_) {
        return leave(State::AtBarrier);
    }
    running_->state = State::AtBarrier;
    for (unsigned i = 0; i < num_lanes_; ++i) {
        if (!same_site(lanes_[i].meeting.site, site)) {
            deadlock();
        }
    }
    num_at_barrier_ = 0;
    barrier_time_ = ++time_;
    for (unsigned i = 0; i < num_lanes_; ++i) {
        lanes_[i].clock = time_;
        release(lanes_[i]);
    }
    leave(State::Ready);
}

void Engine::meet(const Meeting &meeting) {
    const uint32_t warp = running_->index / 32;
    const uint32_t mine = running_->index % 32;
    if ((meeting.mask >> mine & 1) == 0) {
        fail(SIMT_WARP_DIVERGENCE, running_->index, meeting.place, "%s with mask %08x, which lane %u is not in",
             meeting.what, meeting.mask, mine);
    }
    running_->meeting = meeting;
    uint32_t &waiting = warp_waiting_[warp];
    waiting |= 1u << mine;
    if ((waiting & meeting.mask) != meeting.mask) {
        return leave(State::AtMeeting);
    }
    Lane *lanes = warp_lanes(warp);
    for (uint32_t rest = meeting.mask; rest != 0; rest &= rest - 1) {
        const Meeting &other = lanes[std::countr_zero(rest)].meeting;
        if (other.finish != meeting.finish || other.mask != meeting.mask || other.detail != meeting.detail ||
            !same_site(other.site, meeting.site)) {
            return leave(State::AtMeeting);
        }
    }
    meeting.finish(*this, warp, meeting.mask);
    waiting &= ~meeting.mask;
    for (uint32_t rest = meeting.mask; rest != 0; rest &= rest - 1) {
        release(lanes[std::countr_zero(rest)]);
    }
    leave(State::Ready);
}

void Engine::order_warp(uint32_t warp, uint32_t mask) {
    join_clocks(warp, mask);
    ++time_;
    Lane *lanes = warp_lanes(warp);
    if (mask == ~0u) {
        warp_sync_[warp] = time_;
        for (uint32_t i = 0; i < 32; ++i) {
            lanes[i].clock = time_;
        }
        return;
    }
    uint64_t known[32];
    for (uint32_t c = 0; c < 32; ++c) {
        known[c] = 0;
        for (uint32_t i = 0; i < 32; ++i) {
            known[c] = mask >> c & 1 ? time_ : std::max(known[c], mask >> i & 1 ? lanes[i].known[c] : 0);
        }
    }
    for (uint32_t i = 0; i < 32; ++i) {
        if (mask >> i & 1) {
            lanes[i].clock = time_;
            std::memcpy(lanes[i].known, known, sizeof known);
        }
    }
}

} // namespace simt
