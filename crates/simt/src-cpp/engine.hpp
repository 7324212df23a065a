// Runs one launch: the blocks one after another, the lanes of a block as fibers of this OS thread.
#pragma once

#include "fault.hpp"
#include "hopper.hpp"
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

    // Barriers of a part of the lanes (part_barriers.cpp).
    void part_barrier(uint32_t id, uint32_t lanes, Site site, uint32_t place);
    void init_mbarrier(uintptr_t at, uint32_t count, uint32_t place);
    void arrive(uintptr_t at, uint32_t expected_bytes, uint32_t place);
    void wait_phase(uintptr_t at, uint32_t parity, Site site, uint32_t place);
    void fence_proxy();

    // Bulk tensor copies (bulk.cpp).
    // `groups`: the copy takes rows in groups of eight.
    void load_box(const TensorMap &map, uintptr_t to, uintptr_t barrier, int inner, int row, bool groups, uint32_t place);
    void store_box(const TensorMap &map, uintptr_t from, int inner, int row, uint32_t place);
    void wait_stores(uint32_t newest_pending);

    // Products of warpgroups (wgmma.cpp).
    void meet_warpgroup(const Meeting &meeting);
    Warpgroup &warpgroup() { return warpgroups_[running_->index / 128]; }
    uint32_t shared_offset(uintptr_t address, size_t bytes, const char *what, size_t alignment, uint32_t place);
    void begin_product(Warpgroup &group);
    void finish_products(uint32_t warp, uint32_t newest_pending, uint32_t place);
    void set_registers(uint32_t group, uint32_t registers, bool more);

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
    void begin_clocks();
    void join_clocks(uint32_t warp, uint32_t mask);
    void publish(Lane &lane, Clocks &into);
    void acquire(Lane &lane, const Clocks &from);
    Mbarrier &mbarrier(uintptr_t at, uint32_t place);
    void end_phase_if_due(Mbarrier &barrier);
    void check_map(const TensorMap &map, uint32_t at, bool groups, uint32_t place);
    bool read_global(uintptr_t from, uint32_t bytes, uint32_t place);
    void deliver_load(size_t index);
    // Lets something asynchronous happen; false: nothing is under way.
    bool deliver_something();
    void end_asynchronous();
    void grant_registers();
    OperandRead begin_reads(const WgmmaRequest &request, std::vector<float> &left, std::vector<float> &right);
    Product &accumulators(Warpgroup &group, const WgmmaRequest &request);
    void read_operand(Lane &lane, size_t at, size_t bytes, bool all_written, uint32_t place);
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

    struct alignas(128) ParamsPart {
        char bytes[128];
    };
    std::vector<ParamsPart> params_;
    char *shared_mapping_;
    Shadow shared_shadow_;
    uint64_t time_ = 0, launch_start_ = 0, block_start_ = 0, barrier_time_ = 0;
    bool clocks_ = false;
    std::map<uint32_t, Mbarrier> mbarriers_; // by the offset in shared memory
    std::map<uint32_t, PartBarrier> part_barriers_;
    std::vector<BulkLoad> loads_;
    Warpgroup warpgroups_[8];
    uint32_t free_registers_ = 0;
    uint64_t warp_sync_[32]{};
    uint32_t warp_waiting_[32]{}; // lanes in State::AtMeeting
    uint64_t step_start_ = 0;
    struct Started {
        uint64_t time, linear;
    };
    std::vector<Started> started_;
};

bool same_site(const Site &a, const Site &b);
// The engine whose fiber this is, or null.
Engine *current();
const std::vector<Entry> &entries();

} // namespace simt
