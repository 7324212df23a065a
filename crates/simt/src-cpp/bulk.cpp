// Bulk tensor copies: boxes of a matrix that arrive later, and boxes of shared memory that are read later.
#include "engine.hpp"

#include <algorithm>
#include <cstring>

namespace simt {

namespace {

// The 16-byte chunks of a row are permuted by the row: bits 4..6 of the address, by bits 7..9. Its own inverse.
uint32_t swizzled(uint32_t at, uint32_t swizzle_bytes) { return swizzle_bytes == 128 ? at ^ (at >> 7 & 7) << 4 : at; }

} // namespace

// What cuTensorMapEncodeTiled and the instruction ask of a map and its place.
void Engine::check_map(const TensorMap &map, uint32_t at, bool groups, uint32_t place) {
    const char *wrong = map.magic != TensorMap::MAGIC                  ? "these bytes are no tensor map"
                        : map.base % 16 != 0                           ? "its base is no multiple of 16"
                        : groups != (map.group_pitch_bytes != 0)       ? "its rows come in groups, or the copy thinks so"
                        : map.group_pitch_bytes % 16 != 0              ? "its pitch of groups is no multiple of 16"
                        : map.pitch_bytes % 16 != 0                    ? "its pitch is no multiple of 16"
                        : map.inner == 0 || map.rows == 0              ? "it has an empty dimension"
                        : map.box_inner == 0 || map.box_rows == 0 || map.box_inner > 256 || map.box_rows > 256
                            ? "a side of its box is not 1 to 256"
                        : map.box_inner * 2 % 16 != 0                  ? "its box's rows are no multiples of 16 bytes"
                        : map.swizzle_bytes == 128 && map.box_inner != 64 ? "128-byte swizzle with rows of other lengths"
                        : map.swizzle_bytes == 128 && at % 1024 != 0   ? "a swizzled box not at a multiple of 1024"
                        : at % 128 != 0                                ? "a box not at a multiple of 128"
                                                                       : nullptr;
    if (wrong != nullptr) {
        fail(SIMT_UNDEFINED, running_->index, place, "tensor map: %s", wrong);
    }
}

void Engine::load_box(const TensorMap &map, uintptr_t to, uintptr_t barrier, int inner, int row, bool groups,
                      uint32_t place) {
    check_map(map, static_cast<uint32_t>(to - reinterpret_cast<uintptr_t>(shared)), groups, place);
    const uint32_t bytes = map.box_inner * map.box_rows * 2;
    const uint32_t at = shared_offset(to, bytes, "bulk copy", 128, place);
    const Mbarrier &counts = mbarrier(barrier, place);
    if (lanes_[counts.initialiser].proxy_fence <= counts.since) {
        fail(SIMT_UNDEFINED, running_->index, place,
             "a bulk copy counts at an mbarrier that was not fenced for the asynchronous proxy after it was made");
    }
    // A time of its own, so that whoever sees the barrier's phase end knows of this copy and of nothing later.
    const uint64_t time = ++time_;
    running_->clock = time;
    Observer by = observer(true, place);
    by.proxy = true;
    shared_used = std::max<uint64_t>(shared_used, at + bytes);
    if (const Conflict conflict = shared_shadow_.issue(at, bytes, by); conflict.trouble != Trouble::None) {
        conflicting(conflict, nullptr, "starts a bulk copy to", place);
    }
    running_->clock = ++time_;
    std::memset(shared + at, 0xff, bytes);
    loads_.push_back({map, shared + at, inner, row,
                      static_cast<uint32_t>(barrier - reinterpret_cast<uintptr_t>(shared)), running_->index, time, place});
}

// What is outside the matrix is zero, and counts at the barrier all the same.
void Engine::deliver_load(size_t index) {
    const BulkLoad load = loads_[index];
    loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(index));
    const TensorMap &map = load.map;
    Lane *asking = running_;
    running_ = &lanes_[load.lane];
    const uint32_t first = static_cast<uint32_t>(load.to - shared);
    const uint32_t row_bytes = map.box_inner * 2;
    for (uint32_t r = 0; r < map.box_rows; ++r) {
        const int64_t row = int64_t{load.row} + r;
        for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
            const uint32_t at = swizzled(first + r * row_bytes + chunk, map.swizzle_bytes);
            const int64_t inner = int64_t{load.inner} + chunk / 2;
            const int64_t inside = row < 0 || row >= static_cast<int64_t>(map.rows)
                                 ? 0
                                 : std::clamp<int64_t>(static_cast<int64_t>(map.inner) - inner, 0, 8);
            if (inner < 0) {
                fail(SIMT_UNDEFINED, load.lane, load.place, "a bulk copy from column %lld", static_cast<long long>(inner));
            }
            std::memset(shared + at, 0, 16);
            shared_shadow_.deliver_bulk(at, 16, load.lane, load.time, true);
            if (inside > 0) {
                const uintptr_t from = map.row(static_cast<uint64_t>(row)) + static_cast<uint64_t>(inner) * 2;
                const uint32_t bytes = static_cast<uint32_t>(inside) * 2;
                const bool valid = read_global(from, bytes, load.place);
                std::memcpy(shared + at, reinterpret_cast<const void *>(from), bytes);
                if (!valid) {
                    shared_shadow_.deliver_bulk(at, 16, load.lane, load.time, false);
                }
            }
        }
    }
    Mbarrier &barrier = mbarriers_.at(load.barrier);
    barrier.gathering.resize(num_lanes_, 0);
    barrier.gathering[load.lane] = std::max(barrier.gathering[load.lane], load.time + 1);
    barrier.bytes -= int64_t{row_bytes} * map.box_rows;
    running_ = asking;
    end_phase_if_due(barrier);
}

// Global memory as a bulk copy reads it: bytes that nothing has written travel too, and are no one's to use.
bool Engine::read_global(uintptr_t from, uint32_t bytes, uint32_t place) {
    const Region *region = regions().find(from, bytes);
    if (region == nullptr) {
        stray(from, bytes, Access::Read, place);
    }
    if (region->shadow == nullptr) {
        return true;
    }
    for (uint32_t i = 0; i < bytes; ++i) {
        if (!region->shadow->written(from - region->base + i)) {
            return false;
        }
    }
    access(from, bytes, Access::Read, place);
    return true;
}

void Engine::store_box(const TensorMap &map, uintptr_t from, int inner, int row, uint32_t place) {
    check_map(map, static_cast<uint32_t>(from - reinterpret_cast<uintptr_t>(shared)), false, place);
    const uint32_t row_bytes = map.box_inner * 2;
    const uint32_t at = shared_offset(from, row_bytes * map.box_rows, "bulk copy", 128, place);
    BulkStore store{{}, running_->store_group, false, place};
    for (uint32_t r = 0; r < map.box_rows; ++r) {
        for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
            const uint32_t source = swizzled(at + r * row_bytes + chunk, map.swizzle_bytes);
            const int64_t to_row = int64_t{row} + r, to_inner = int64_t{inner} + chunk / 2;
            if (to_row < 0 || to_inner < 0 || to_row >= static_cast<int64_t>(map.rows) ||
                to_inner >= static_cast<int64_t>(map.inner)) {
                continue;
            }
            read_operand(*running_, source, 16, true, place);
            shared_shadow_.begin_read(source, 16);
            store.pieces.push_back({shared + source, reinterpret_cast<char *>(map.row(static_cast<uint64_t>(to_row)) +
                                                                             static_cast<uint64_t>(to_inner) * 2)});
        }
    }
    running_->stores.push_back(std::move(store));
}

// The box has been read, and is at its place in global memory.
void Engine::wait_stores(uint32_t newest_pending) {
    Lane &lane = *running_;
    const uint64_t done = lane.store_group < newest_pending ? 0 : lane.store_group - newest_pending;
    for (BulkStore &store : lane.stores) {
        if (store.group >= done || store.read) {
            continue;
        }
        store.read = true;
        for (const BulkStore::Piece &piece : store.pieces) {
            const auto at = static_cast<size_t>(piece.shared - shared);
            shared_shadow_.end_read(at, 16);
            read_operand(lane, at, 16, true, store.place);
            access(reinterpret_cast<uintptr_t>(piece.global), 16, Access::Write, store.place);
            std::memcpy(piece.global, piece.shared, 16);
        }
    }
    std::erase_if(lane.stores, [](const BulkStore &store) { return store.read; });
}

// Shared memory read through the asynchronous proxy. A product may have rows in it that no one has written or asks for.
void Engine::read_operand(Lane &lane, size_t at, size_t bytes, bool all_written, uint32_t place) {
    Lane *mine = running_;
    running_ = &lane;
    Observer by = observer(true, place);
    by.proxy = true;
    const Conflict conflict = shared_shadow_.read(at, bytes, by, true, all_written);
    if (conflict.trouble != Trouble::None) {
        conflicting(conflict, nullptr, "reads", place);
    }
    running_ = mine;
}

bool Engine::deliver_something() {
    if (loads_.empty()) {
        return false;
    }
    deliver_load(request_.order == Order::Reversed ? loads_.size() - 1
                 : request_.order == Order::Random ? random(loads_.size())
                                                   : 0);
    return true;
}

// What a block leaves behind.
void Engine::end_asynchronous() {
    if (!loads_.empty()) {
        fail(SIMT_PENDING_COPY, loads_.front().lane, loads_.front().place,
             "the block ends while a bulk copy to its shared memory is under way: no one has waited for it");
    }
    for (unsigned i = 0; i < num_lanes_; ++i) {
        if (!lanes_[i].stores.empty()) {
            fail(SIMT_PENDING_COPY, i, lanes_[i].stores.front().place,
                 "the block ends while a bulk copy still reads its shared memory: no wait_group has come after it");
        }
    }
    for (const Warpgroup &group : warpgroups_) {
        if (!group.products.empty()) {
            fail(SIMT_PENDING_COPY, ~0u, 0, "the block ends while products of a warpgroup are under way");
        }
    }
}

void load_box(const void *map, void *shared, void *barrier, int inner, int row) {
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->load_box(*static_cast<const TensorMap *>(map), reinterpret_cast<uintptr_t>(shared),
                        reinterpret_cast<uintptr_t>(barrier), inner, row, false, place);
}

void load_groups(const void *map, void *shared, void *barrier, int inner, int group) {
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->load_box(*static_cast<const TensorMap *>(map), reinterpret_cast<uintptr_t>(shared),
                        reinterpret_cast<uintptr_t>(barrier), inner, 8 * group, true, place);
}

void store_box(const void *map, const void *shared, int inner, int row) {
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->store_box(*static_cast<const TensorMap *>(map), reinterpret_cast<uintptr_t>(shared), inner, row, place);
}

void store_commit() { ++current()->lane().store_group; }

void store_wait(uint32_t newest_pending) { current()->wait_stores(newest_pending); }

} // namespace simt
