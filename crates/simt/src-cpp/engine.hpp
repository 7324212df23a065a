// Runs one launch: the blocks one after another, the lanes of a block as fibers of this OS thread.
#pragma once

#include "fault.hpp"
#include "lane.hpp"
#include "memory.hpp"
#include "watchdog.hpp"

#include <memory>
#include <vector>

namespace simt {

enum class Order : uint32_t { Forward, Reversed, Random };

struct Entry {
    const char *name;
    uint64_t params_bytes;
    unsigned max_threads;
    void (*run)(const void *);
};

struct Request {
    const Entry *entry;
    Index grid, block;
    uint32_t shared_bytes;
    Order order;
    uint64_t seed;
    uint64_t step_limit; // of one block
    const void *params;
};

enum class Access : uint32_t { Read, Write, ReadOnly, Collective, Atomic };

class Engine {
  public:
    static constexpr unsigned MAX_THREADS = 1024;
    static constexpr uint32_t MAX_SHARED = 232448;
    static constexpr size_t SHARED_GUARD = size_t{1} << 20;
    static constexpr size_t SHARED_MAPPING = 2 * SHARED_GUARD + (size_t{256} << 10);

    Engine();
    ~Engine();

    // False: `fault` says why.
    bool launch(const Request &request);
    SimtFault fault{};
    uint64_t steps = 0;
    uint64_t shared_used = 0; // highest byte of shared memory touched

    // Called on a lane's fiber.
    Lane &lane() { return *running_; }
    Lane *warp_lanes(uint32_t warp) { return &lanes_[warp * 32]; }
    void meet(const Meeting &meeting);
    void barrier(Site site, uint32_t place);
    void order_warp(uint32_t warp, uint32_t mask);
    // Checks an access of the running lane, and books it.
    void access(uintptr_t address, size_t bytes, Access kind, uint32_t place);
    // The same for another lane of the warp, by the lane that came last to a meeting.
    void access_for(Lane &lane, uintptr_t address, size_t bytes, Access kind, uint32_t place) {
        Lane *mine = running_;
        running_ = &lane;
        access(address, bytes, kind, place);
        running_ = mine;
    }
    void issue_copy(const Copy &copy);
    void deliver_copy(const Copy &copy, uint32_t place);
    [[noreturn]] [[gnu::format(printf, 5, 6)]] void fail(SimtKind kind, uint32_t lane, uint32_t place,
                                                         const char *format, ...);
    [[noreturn]] void out_of_steps();

    Index block_index{}, block_size{}, grid_size{};
    char *shared = nullptr;

  private:
    bool refuse(const Request &request);
    void run_block(uint64_t linear);
    void release(Lane &lane);
    Lane *next();
    void leave(State state);
    void lane_main();
    [[noreturn]] void abandon();
    [[noreturn]] void deadlock();
    std::string waiting() const;
    Observer observer(bool shared, uint32_t place) const;
    // The linear number of a block by the time of one of its accesses.
    uint64_t block_at(uint64_t time) const;
    Index block_from(uint64_t linear) const;
    [[noreturn]] void report(const Conflict &conflict, const char *where, const char *verb, uint32_t place);
    [[noreturn]] void conflicting(const Conflict &conflict, const Region *region, const char *verb, uint32_t place);
    [[noreturn]] void stray(uintptr_t address, size_t bytes, Access kind, uint32_t place);
    void check_source(const Copy &copy);
    uint64_t random(uint64_t below);

    Request request_{};
    Stacks stacks_;
    Watchdog watchdog_;
    std::unique_ptr<Lane[]> lanes_;
    Lane *running_ = nullptr;
    Fiber main_;
    unsigned num_lanes_ = 0, num_exited_ = 0, num_at_barrier_ = 0;
    // Lanes that can go on: a ring that never holds a lane twice.
    uint16_t ready_[MAX_THREADS];
    unsigned ready_head_ = 0, ready_count_ = 0;
    uint64_t random_ = 0;
    bool failed_ = false;

    std::vector<char> params_;
    char *shared_mapping_;
    Shadow shared_shadow_;
    uint64_t time_ = 0, launch_start_ = 0, block_start_ = 0, barrier_time_ = 0;
    uint64_t warp_sync_[32]{};
    uint32_t warp_waiting_[32]{}; // lanes in State::AtMeeting
    uint64_t step_start_ = 0;
    struct Started {
        uint64_t time, linear;
    };
    std::vector<Started> started_;
};

// The engine whose fiber this is, or null.
Engine *current();
const std::vector<Entry> &entries();

} // namespace simt
