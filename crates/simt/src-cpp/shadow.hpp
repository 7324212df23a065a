// What is known of every byte of a memory: who wrote it last and who read it since, to find unordered accesses.
//
// Time is a counter that every synchronisation moves on; an access carries the time of its lane's last one. Blocks of a
// launch are never ordered with one another; lanes of a block are by __syncthreads, lanes of a warp also by __syncwarp.
// Shuffles, votes and matrix instructions order nothing. A block that uses barriers of a part of its lanes (mbarrier,
// bar.sync of fewer) is watched more closely, by what every lane knows of every other: a vector clock.
//
// Bulk copies and wgmma reach shared memory through the asynchronous proxy: what a lane wrote by ordinary stores is
// theirs to see, or to overwrite, only after that lane's fence.proxy.async.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace simt {

struct Lane;

// Whom an access comes from and what it is ordered after.
struct Observer {
    const Lane *lane;
    uint64_t floor;       // older accesses are of no interest: the start of the launch, or of the block
    uint64_t block_start;
    uint64_t barrier;     // time of the block's last __syncthreads
    uint64_t warp_sync;   // time of the warp's last full __syncwarp
    bool shared;          // shared memory: nothing is written before the block writes it
    uint32_t place;
    bool clocks = false;          // lanes have vector clocks
    bool proxy = false;           // through the asynchronous proxy
    const Lane *lanes = nullptr;  // of the block
};

enum class Trouble : uint32_t { None, Uninitialised, Pending, AfterWrite, AfterRead, AfterAsync, Proxy, BeingRead };

// What stands in the way of an access; the rest describes the other one.
struct Conflict {
    Trouble trouble = Trouble::None;
    size_t byte = 0;
    uint64_t time = 0;
    uint32_t lane = 0; // of the block; ~0: several
    uint32_t place = 0;
};

class Shadow {
  public:
    explicit Shadow(size_t bytes);
    ~Shadow();
    Shadow(const Shadow &) = delete;
    Shadow &operator=(const Shadow &) = delete;

    // Collective reads are those of a whole warp: not even the own write is ordered without a synchronisation.
    // Unless `all_written`, bytes that nothing has written may be read too.
    Conflict read(size_t at, size_t bytes, const Observer &by, bool collective, bool all_written = true);
    Conflict write(size_t at, size_t bytes, const Observer &by);
    Conflict atomic(size_t at, size_t bytes, const Observer &by);
    // The start and the end of an asynchronous write.
    Conflict issue(size_t at, size_t bytes, const Observer &by);
    void deliver(size_t at, size_t bytes, const Observer &by);
    // The same by a bulk copy, as of `time`; `valid` bytes had been written where they come from.
    void deliver_bulk(size_t at, size_t bytes, uint32_t lane, uint64_t time, bool valid);
    // The start and the end of an asynchronous read: nothing may be written between.
    void begin_read(size_t at, size_t bytes);
    void end_read(size_t at, size_t bytes);
    // A launch that failed has left reads without an end.
    void forget_reads();

    void set_written(size_t at, size_t bytes);
    bool written(size_t at) const { return writes_[at] != 0; }
    // Written since `time`.
    bool written_since(size_t at, size_t bytes, uint64_t time) const;

  private:
    Conflict change(size_t at, size_t bytes, const Observer &by, uint64_t flags);
    Conflict check_write(size_t at, const Observer &by, bool atomic) const;
    Conflict check_readers(size_t at, const Observer &by) const;
    // The set of readers with `by` among them, as a mask's stand-in.
    uint32_t add_reader(uint64_t cell, uint32_t mask, const Observer &by);

    // Lanes of a warp that read at a time and that no one is known to be ordered after.
    struct Reader {
        uint64_t time;
        uint32_t warp;
        uint32_t mask;
        bool operator==(const Reader &) const = default;
    };
    using Readers = std::vector<Reader>; // by warp
    struct Hash {
        size_t operator()(const Readers &readers) const;
        size_t operator()(const std::array<uint64_t, 4> &words) const;
    };

    size_t bytes_;
    char *base_;
    uint64_t *writes_; // time, lane, flags; 0: never
    uint64_t *reads_;  // time, warp, flags; 0: none since the last write
    uint32_t *masks_;  // lanes of that warp; of several warps in a block with clocks, a number of `readers_`
    uint32_t *write_places_;
    uint32_t *read_places_;
    uint8_t *being_read_;
    std::vector<Readers> readers_; // of the block that began at `readers_start_`
    std::unordered_map<Readers, uint32_t, Hash> numbers_;
    // What `add_reader` gave: by the cell and its mask, and the lane with its clock and what it knew.
    std::unordered_map<std::array<uint64_t, 4>, uint32_t, Hash> added_;
    Readers now_;
    uint64_t readers_start_ = 0;
};

} // namespace simt
